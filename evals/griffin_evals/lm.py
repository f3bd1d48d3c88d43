"""Griffin as a model of lm-eval: ``lm_eval --model griffin``."""

from __future__ import annotations

import copy
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.models.utils import postprocess_generated_text

import griffin_evals.registration  # noqa: F401  # also for programs that do not run the .pth file
from griffin_core.engine.task import MAX_CONTINUATIONS
from griffin_core.model.load import Model
from griffin_core.spec.choices import CorrectionKind, PolicyName, ScoreMode, Sharing
from griffin_evals.answers import Answers
from griffin_evals.backend import Backend, Generated, GenerateItem, Scored, ScoreItem, Tokens
from griffin_evals.errors import InvalidSetting, RequestRefused
from griffin_evals.journal import Journal
from griffin_evals.local import LocalBackend
from griffin_evals.remote import RemoteBackend
from griffin_evals.requests import Pair, Reader
from griffin_evals.settings import Settings
from griffin_evals.tokens import HfTokens, tokenizer_of

log = logging.getLogger(__name__)

MOST_TOGETHER = 4096
"""The most tokens, or characters, of the continuations in one request, since the answer must fit a
message. The limit matters because windows of many texts may share a context of one token."""

TRUNCATES = "; with tokenizer=NAME it would be cut from the left, as lm-eval's hf does"


class GriffinLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model of lm-eval that runs on prompt-adaptive experts, on a server or in this process.

    ::

        lm_eval --model griffin --model_args target=localhost:50051,density=0.5 --tasks piqa
        lm_eval --model griffin --model_args pretrained=smollm2-135m-instruct --tasks piqa

    **Tokens.** In process, and over a server with ``tokenizer``, texts become token ids here, by
    the rules of lm-eval's ``hf``: white space at the end of a context belongs to the continuation,
    context and continuation are tokenized together and split after as many tokens as the context
    alone has, an empty context is the BOS (or EOS) token, and what is too long is cut from the
    left. Over a server without ``tokenizer``, texts go as they are and the server splits them. That
    is the same as long as the context's own tokens are the first of both texts together, as they
    are where a continuation begins with a space; elsewhere a token that holds characters of both
    counts as the continuation's, and a text that begins with a BOS token as it is gets another one
    unless ``add_bos_token`` is False. Without ``tokenizer`` an empty context, rolling
    log-likelihoods, chat templates and texts longer than the context length are refused.

    **Pruning.** The experts of a ``loglikelihood`` come from its context, those of a completion
    from its prompt (see ``score_mode``). ``loglikelihood_rolling`` at density 1 uses the windows of
    lm-eval's ``hf``. Below 1, each window has half of ``max_length`` as its context, which chooses
    the experts that its other tokens are scored on. The first half of ``max_length`` tokens of a
    document have no such context: they are the prompt, and scored dense. Choose ``max_length`` well
    below the length of the documents, and the same one for all densities that are compared.

    **Seeds.** What is drawn for a request depends on ``seed`` and the request, not on its order.

    Args:
        target: host:port of a server in role ``all`` or ``decode``; or
        pretrained: a model to run in this process, as ``griffin_core.LLM`` takes it.
        tokenizer: with ``target``, the model's tokenizer: a name as ``pretrained``. A short
            text checks that it is the server's.
        density, policy, correction, correction_rank, warmup_tokens, sharing, score_mode, seed: see
            ``Settings``.
        dtype, threads: in process, as ``griffin_core.LLM`` takes them.
        device: in process, as ``griffin_core.LLM`` takes it. lm-eval passes "cuda:0" by default, so
            without a GPU this means the CPU, as with ``hf``.
        max_length: most tokens of a context and its continuation without its last token; None for
            the model's context length. Over a server with ``tokenizer`` only.
        max_gen_toks: most tokens of a completion for tasks that set no limit.
        add_bos_token: whether texts get the tokenizer's special tokens; None for its default.
        chat_template_args: further variables of the chat template.
        concurrency: requests that run at once.
        wait_s: seconds for which a server that cannot be reached is waited for.
        journal: a file of answers; those in it are reused, and new ones are added.
        batch_size, max_batch_size: accepted from lm-eval and ignored, since the engine chooses
            what runs together.

    Raises:
        InvalidSetting: an argument is out of range or conflicts with another one.
        ServerGone: the server did not come within ``wait_s``.
        GriffinError: the model cannot be loaded; see ``griffin_core.errors``.
    """

    def __init__(
        self,
        target: str | None = None,
        pretrained: str | Model | None = None,
        *,
        tokenizer: str | None = None,
        density: float = 1.0,
        policy: PolicyName = "topk",
        correction: CorrectionKind = "none",
        correction_rank: int | None = None,
        warmup_tokens: int = 0,
        sharing: Sharing = "private",
        score_mode: ScoreMode = "generation",
        seed: int = 0,
        dtype: str | None = "float32",
        threads: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        concurrency: int = 32,
        wait_s: float = 300,
        journal: Journal | Path | str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.settings = Settings(
            density=density,
            policy=policy,
            correction=correction,
            correction_rank=correction_rank,
            warmup_tokens=warmup_tokens,
            sharing=sharing,
            score_mode=score_mode,
            seed=seed,
        )
        _check_arguments(
            target=target,
            pretrained=pretrained,
            tokenizer=tokenizer,
            dtype=dtype,
            threads=threads,
            device=device,
            add_bos_token=add_bos_token,
            chat_template_args=chat_template_args,
            max_length=max_length,
            max_gen_toks=max_gen_toks,
            concurrency=concurrency,
            wait_s=wait_s,
        )
        self._owned: list[Journal | Backend] = []
        self._journal = self._opened(journal)
        self._answers = Answers(self._journal)
        self._backend: Backend
        try:
            if target is not None:
                self.tokenizer = None if tokenizer is None else tokenizer_of(tokenizer)
                self._backend = RemoteBackend(target, concurrency=concurrency, wait_s=wait_s)
            else:
                assert pretrained is not None
                self._backend = local = LocalBackend(
                    pretrained,
                    dtype=None if isinstance(pretrained, Model) else dtype,
                    device=_device(device),
                    threads=threads,
                    max_sessions=concurrency,
                )
                self.tokenizer = local.model.tokenizer.fast
            self._owned.append(self._backend)
            tokens = None
            if self.tokenizer is not None:
                tokens = HfTokens(
                    self.tokenizer,
                    add_bos_token=add_bos_token,
                    chat_template_args=chat_template_args or {},
                )
            most = self._backend.facts.context_length
            if max_length is not None and max_length > most:
                raise InvalidSetting(
                    "max_length", max_length, f"at most {most}, the context length"
                )
            if isinstance(self._backend, RemoteBackend) and tokens is not None:
                _check_tokenizer(self._backend, tokens, cast(str, tokenizer))
        except BaseException:
            self.close()
            raise
        self._reader = Reader(
            settings=self.settings,
            tokens=tokens,
            max_length=max_length or most,
            max_gen_toks=max_gen_toks,
            add_bos_token=add_bos_token,
        )

    @property
    def reader(self) -> Reader:
        """The reader of lm-eval's requests, with the settings and the tokenizer of this model."""
        return self._reader

    def with_settings(
        self,
        *,
        density: float | None = None,
        policy: PolicyName | None = None,
        correction: CorrectionKind | None = None,
        correction_rank: int | None = None,
        warmup_tokens: int | None = None,
        score_mode: ScoreMode | None = None,
        seed: int | None = None,
        journal: Journal | Path | str | None = None,
    ) -> GriffinLM:
        """Returns the same model with other settings and separate figures; None keeps a setting of
        this one.

        It shares the loaded model or the connection, so closing one closes all.
        """
        given: dict[str, Any] = {
            "density": density,
            "policy": policy,
            "correction": correction,
            "correction_rank": correction_rank,
            "warmup_tokens": warmup_tokens,
            "score_mode": score_mode,
            "seed": seed,
        }
        changed = {name: value for name, value in given.items() if value is not None}
        other = copy.copy(self)
        other.settings = replace(self.settings, **changed)
        other._reader = replace(self._reader, settings=other.settings)
        if journal is not None:
            other._journal = self._opened(journal)
        other._answers = Answers(other._journal)
        other.cache_hook = CacheHook(None)
        return other

    def close(self) -> None:
        """Ends the model's thread or the connection, and closes journals that were given by their
        paths. It may be called again."""
        for owned in self._owned:
            owned.close()

    # -- the interface of lm-eval
    # -------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether it is the greedy continuation) for each (context,
        continuation).

        Raises:
            RequestRefused: a request cannot be answered; the message names task and document.
            ServerGone, OtherModel: see ``griffin_evals.errors``.
        """
        scores = self._score(
            [self._reader.pair(request) for request in requests],
            self.settings,
            self._answers,
            "loglikelihood",
            disable_tqdm,
            lambda place, score: self.cache_hook.add_partial(
                "loglikelihood", requests[place].args, (score.logprob, score.greedy)
            ),
        )
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each text, in windows: see the class.

        Raises:
            InvalidSetting: below density 1 in classification mode.
            RequestRefused, ServerGone, OtherModel: as ``loglikelihood``.
        """
        if self.settings.density < 1 and self.settings.score_mode == "classification":
            raise InvalidSetting(
                "score_mode", "classification", "generation, with loglikelihood_rolling"
            )
        read = [self._reader.windows(request) for request in requests]
        prompts = [(place, pair) for place, (pairs, _) in enumerate(read) for pair in pairs]
        windows = [(place, pair) for place, (_, pairs) in enumerate(read) for pair in pairs]
        short = sum(not pairs for _, pairs in read)
        if short and self.settings.density < 1:
            log.warning(
                "%d of %d documents have no more than %d tokens, half of max_length, and are "
                "scored dense: give a smaller max_length",
                short,
                len(requests),
                self.max_length // 2,
            )
        totals = [0.0] * len(requests)
        for parts, settings, answers in (
            (prompts, Settings(), Answers(self._journal)),
            (windows, self.settings, self._answers),
        ):
            if not (pairs := [pair for _, pair in parts]):
                continue
            scores = self._score(pairs, settings, answers, "loglikelihood_rolling", disable_tqdm)
            for (place, _), score in zip(parts, scores, strict=True):
                totals[place] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the completion of each (context, generation kwargs), up to a stop string of
        ``until``.

        Raises:
            RequestRefused, ServerGone, OtherModel: as ``loglikelihood``.
        """
        asked: Counter[str] = Counter()
        items, untils, keys = [], [], []
        for request in requests:
            item, until = self._reader.prompt(request, asked[repr(request.args)])
            asked[repr(request.args)] += 1
            items.append(item)
            untils.append(until)
            drawn = self.settings.draws or item.sampling["temperature"]
            described = {**asdict(item), "name": "", "seed": item.seed if drawn else 0}
            keys.append(self.settings.key_of(self._fingerprint, "generate", described))

        def ask(places: Sequence[int], answered: Callable[[int, Generated], None]) -> None:
            chosen = [items[place] for place in places]
            self._backend.generate(chosen, self.settings, lambda n, a: answered(places[n], a))

        def text(place: int, done: Generated) -> str:
            return self._completion(items[place], untils[place], done)

        done = self._answers.gather(
            keys,
            Generated,
            ask,
            words="Running generate_until requests",
            disable_tqdm=disable_tqdm,
            each=lambda place, made: self.cache_hook.add_partial(
                "generate_until", requests[place].args, text(place, made)
            ),
        )
        return [text(place, made) for place, made in enumerate(done)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a chat as the text of a prompt."""
        tokens = self._reader.need_tokens("apply_chat_template", "a chat template")
        return tokens.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the chat template itself, for lm-eval's results."""
        if chat_template:
            self._reader.need_tokens("apply_chat_template", "a chat template")
        return cast(str | None, super().chat_template(chat_template))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        tokens = self._reader.need_tokens("tok_encode", "token ids")
        return tokens.encode(string, add_special_tokens)

    @property
    def eot_token_id(self) -> int:
        tokens = self._reader.need_tokens("eot_token_id", "token ids")
        return cast(int, tokens.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self._reader.need_tokens("prefix_token_id", "token ids").prefix_token_id

    @property
    def max_length(self) -> int:
        return self._reader.max_length

    @property
    def max_gen_toks(self) -> int:
        return self._reader.max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """A name for tokenizer and chat template, for lm-eval's request caches."""
        facts = self._backend.facts
        return f"{facts.name}-{facts.fingerprint[:12]}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Returns the entries that lm-eval adds to ``config`` in its results."""
        return {"model_dtype": self._backend.facts.dtype, "griffin": self.figures()}

    def figures(self) -> dict[str, Any]:
        """Returns the figures of the run as JSON values.

        Returns:
            ``model``, ``fingerprint``, ``dtype``; ``settings``: see ``Settings``; ``max_length``;
            ``requests`` that were answered, and how many of them ``from_journal``;
            ``mean_norm_mass``: the experts' share of the activation norm, mean over different
            requests and layers, None before the first; ``scored_tokens``, ``generated_tokens`` and
            ``tokens``, their sum, of different requests; ``seconds`` of waiting for answers.
        """
        facts = self._backend.facts
        return {
            "model": facts.name,
            "fingerprint": facts.fingerprint,
            "dtype": facts.dtype,
            "settings": asdict(self.settings),
            "max_length": self.max_length,
            **self._answers.figures(),
        }

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [
            self._reader.cut(f"request {n}", before, after, self.settings.seed_of(before))
            for n, (_, before, after) in enumerate(requests)
        ]
        scores = self._score(pairs, self.settings, self._answers, "loglikelihood", True)
        return [(score.logprob, score.greedy) for score in scores]

    # -- asking ----------------------------------------------------------------------------------

    def _score(
        self,
        pairs: Sequence[Pair],
        settings: Settings,
        answers: Answers,
        kind: str,
        disable_tqdm: bool,
        each: Callable[[int, Scored], None] = lambda _place, _score: None,
    ) -> list[Scored]:
        """Scores pairs. Pairs with the same context are sent together, up to a size; the longest
        context first."""
        keys = [
            settings.key_of(
                self._fingerprint,
                "score",
                pair.context,
                pair.continuation,
                pair.special_tokens,
                pair.seed if settings.draws else 0,
            )
            for pair in pairs
        ]

        def ask(places: Sequence[int], answered: Callable[[int, Scored], None]) -> None:
            groups: defaultdict[tuple[Tokens, int], list[int]] = defaultdict(list)
            for place in places:
                groups[pairs[place].context, pairs[place].seed].append(place)
            grouped = [part for group in groups.values() for part in _parts(group, pairs)]
            grouped.sort(key=lambda group: -len(pairs[group[0]].context))

            def hand_over(index: int, scores: list[Scored]) -> None:
                for place, score in zip(grouped[index], scores, strict=True):
                    answered(place, score)

            items = [_item([pairs[place] for place in group]) for group in grouped]
            self._backend.score(items, settings, hand_over)

        try:
            return answers.gather(
                keys,
                Scored,
                ask,
                words=f"Running {kind} requests",
                disable_tqdm=disable_tqdm,
                each=each,
            )
        except RequestRefused as error:
            if self._reader.tokens is None and "context length" in str(error):
                raise RequestRefused(f"{error}{TRUNCATES}") from error
            raise

    def _completion(self, item: GenerateItem, until: list[str], done: Generated) -> str:
        if done.cut and self._reader.tokens is None:
            raise RequestRefused(
                f"{item.name}: the prompt leaves no room for {item.max_tokens} tokens in the "
                f"context length, {self.max_length}{TRUNCATES}"
            )
        return cast(str, postprocess_generated_text(done.text, until, None))

    def _opened(self, journal: Journal | Path | str | None) -> Journal | None:
        if journal is None or isinstance(journal, Journal):
            return journal
        if not isinstance(journal, str | Path):
            raise InvalidSetting("journal", journal, "a path, or a Journal")
        opened = Journal(journal)
        self._owned.append(opened)
        return opened

    @property
    def _fingerprint(self) -> str:
        return self._backend.facts.fingerprint


def _parts(places: Sequence[int], pairs: Sequence[Pair]) -> list[list[int]]:
    """Splits the indices of pairs of one context into requests."""
    parts: list[list[int]] = [[]]
    length = 0
    for place in places:
        length += len(pairs[place].continuation)
        if parts[-1] and (length > MOST_TOGETHER or len(parts[-1]) == MAX_CONTINUATIONS):
            parts.append([])
            length = len(pairs[place].continuation)
        parts[-1].append(place)
    return parts


def _item(pairs: Sequence[Pair]) -> ScoreItem:
    """Makes one item of pairs that share a context."""
    first = pairs[0]
    return ScoreItem(
        name=first.name,
        context=first.context,
        continuations=tuple(pair.continuation for pair in pairs),
        seed=first.seed,
        special_tokens=first.special_tokens,
    )


def _check_tokenizer(backend: RemoteBackend, tokens: HfTokens, name: str) -> None:
    """Checks that a tokenizer and the server's make the same tokens of a short text."""
    context, continuation = "A quick brown fox jumps", " over 27 lazy dogs, naïvely."
    whole = tokens.tokenizer.encode(context + continuation)
    ours = whole[len(tokens.tokenizer.encode(context)) :]
    theirs = backend.continuation_ids(context, continuation)
    if ours != theirs:
        raise InvalidSetting(
            "tokenizer",
            name,
            f"that of the server's model, {backend.facts.name}; of {continuation!r} it makes "
            f"{theirs}, this one {ours}",
        )


def _device(given: str | None) -> str:
    no_gpu = given is not None and given.startswith("cuda") and not torch.cuda.is_available()
    return "auto" if given is None or no_gpu else given


def _check_arguments(
    *,
    target: str | None,
    pretrained: str | Model | None,
    tokenizer: str | None,
    dtype: str | None,
    threads: int | None,
    device: str | None,
    add_bos_token: bool | None,
    chat_template_args: Mapping[str, Any] | None,
    max_length: int | None,
    max_gen_toks: int,
    concurrency: int,
    wait_s: float,
) -> None:
    """Raises InvalidSetting before anything is loaded."""
    if (target is None) == (pretrained is None):
        which = "neither" if target is None else "both"
        raise InvalidSetting("target, pretrained", which, "exactly one of them")
    kind: Any
    for name, given, kind, allowed in (
        ("target", target, str | None, "host:port, or another gRPC name"),
        ("pretrained", pretrained, str | Model | None, "a name, a path or a Model"),
        ("tokenizer", tokenizer, str | None, "a name or a path"),
        ("device", device, str | None, "a device's name, as torch has it"),
        ("add_bos_token", add_bos_token, bool | None, "True, False, or None"),
        ("chat_template_args", chat_template_args, Mapping | None, "a mapping"),
        ("threads", threads, int | None, ">= 1, or None"),
    ):
        if not isinstance(given, kind) or given == "":
            raise InvalidSetting(name, repr(given), allowed)
    if target is None and tokenizer is not None:
        raise InvalidSetting("tokenizer", tokenizer, "with target; pretrained has its own")
    if target is not None:
        if dtype not in ("float32", None):
            raise InvalidSetting("dtype", dtype, "with pretrained; a server has its own")
        if threads is not None:
            raise InvalidSetting("threads", threads, "with pretrained; a server has its own")
        if max_length is not None and tokenizer is None:
            raise InvalidSetting("max_length", max_length, "with pretrained or tokenizer")
    for name, value, least in (
        ("max_length", 2 if max_length is None else max_length, 2),
        ("max_gen_toks", max_gen_toks, 1),
        ("concurrency", concurrency, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise InvalidSetting(name, value, f"a whole number >= {least}")
    if not isinstance(wait_s, int | float) or not wait_s >= 0:
        raise InvalidSetting("wait_s", wait_s, "seconds, >= 0")
