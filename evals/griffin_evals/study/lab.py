"""The input of every part of the study: a model, texts as token ids, and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_core.text.tokenizer import Tokenizer
from griffin_evals.study.corpus import BadText, Corpus
from griffin_evals.study.sizes import DENSITY, Sizes

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text as token ids.

    Args:
        token_ids: with the tokenizer's own BOS, if it has one.
    """

    domain: str
    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A model and the texts that are measured on it.

    Args:
        model: the model in float32.
        texts: the same number from each domain, each of ``sizes.text_tokens`` tokens.
        domain_texts: ``texts``, and for a model of a large vocabulary those that other parts leave
            out: the domains part takes little time and needs several texts of each.
        long_texts: each of ``long_tokens`` + ``sizes.follow_tokens`` + 1 tokens.
        long_tokens: the tokens of the longest prefix, from ``sizes`` or limited by the model's
            context.
        timed: returns the model in the dtype that a server uses, for the timing.
        progress: is called with lines that report progress.
    """

    model: Model
    texts: Sequence[Text]
    domain_texts: Sequence[Text]
    long_texts: Sequence[Text]
    long_tokens: int
    sizes: Sizes
    timed: Callable[[], Model]
    progress: Progress = lambda _: None

    @property
    def selection(self) -> Selection:
        """The paper's selection: topk at half of the neurons."""
        return Selection(density=DENSITY)

    @property
    def experts(self) -> int:
        """K at that density."""
        return self.selection.count(self.model.decoder.spec.intermediate_size)

    def prompt(self, text: Text) -> tuple[int, ...]:
        """The tokens that choose the experts."""
        return text.token_ids[: self.sizes.prompt_tokens]

    def continuation(self, text: Text) -> tuple[int, ...]:
        """The tokens after them, without the last, which is only predicted."""
        return text.token_ids[self.sizes.prompt_tokens : -1]

    def each_text(self, part: str, texts: Sequence[Text] | None = None) -> Iterator[Text]:
        """The texts, all or those given; reports progress before each."""
        listed = self.texts if texts is None else texts
        for number, text in enumerate(listed, start=1):
            self.progress(f"{part}: text {number} of {len(listed)}")
            yield text


def leading_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token ids that the tokenizer puts before every text."""
    return tuple(tokenizer.encode(""))


def cut_texts(corpus: Corpus, tokenizer: Tokenizer, sizes: Sizes) -> list[Text]:
    """The first ``sizes.texts`` texts of each domain that are long enough, cut to equal length.

    Raises:
        BadText: a domain has too few long enough texts.
    """
    chosen: list[Text] = []
    for domain, texts in corpus.items():
        encoded = ((name, tokenizer.encode(text)) for name, text in texts.items())
        long = [
            Text(domain=domain, name=name, token_ids=tuple(ids[: sizes.text_tokens]))
            for name, ids in encoded
            if len(ids) >= sizes.text_tokens
        ]
        if len(long) < sizes.texts:
            raise BadText(
                f"{domain}: {len(long)} of its {len(texts)} texts have {sizes.text_tokens} tokens; "
                f"{sizes.texts} are needed (--texts)"
            )
        chosen += long[: sizes.texts]
    return chosen


def cut_long(texts: dict[str, str], tokenizer: Tokenizer, tokens: int, most: int) -> list[Text]:
    """The first ``most`` long texts that have ``tokens`` tokens, cut to them."""
    chosen: list[Text] = []
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        if len(ids) >= tokens and len(chosen) < most:
            chosen.append(Text(domain="long", name=name, token_ids=tuple(ids[:tokens])))
    return chosen
