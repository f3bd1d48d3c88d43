"""Turns requests of lm-eval's tasks into items to score or complete, by the rules of its ``hf``
model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from griffin_core.sampling.stopping import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from griffin_evals.backend import GenerateItem, Tokens
from griffin_evals.errors import RequestRefused
from griffin_evals.settings import Settings
from griffin_evals.tokens import HfTokens

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Generation kwargs of a task that set the sampling."""

PLAIN = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling parameters for tasks that set none, so that results do not depend on a server's
defaults."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One continuation to score.

    Args:
        name: its name in errors.
        seed: for policies that draw at random; the same for all continuations of a context.
        special_tokens: whether a text gets the tokenizer's own; None for True.
    """

    name: str
    context: Tokens
    continuation: Tokens
    seed: int
    special_tokens: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads requests.

    Args:
        tokens: tokenizes texts; None to leave texts unchanged.
        max_length: the most tokens that are run at once.
        max_gen_toks: the most tokens of a completion for tasks that set no limit.
        add_bos_token: whether texts get the tokenizer's special tokens; None for its default.
    """

    settings: Settings
    tokens: HfTokens | None
    max_length: int
    max_gen_toks: int
    add_bos_token: bool | None

    def need_tokens(self, where: str, what: str) -> HfTokens:
        """Returns the tokenizer.

        Raises:
            RequestRefused: there is none.
        """
        if self.tokens is None:
            raise RequestRefused(
                f"{where}: {what} over a server needs its tokenizer; set tokenizer=NAME"
            )
        return self.tokens

    def pair(self, request: Instance) -> Pair:
        """Returns the pair of a ``loglikelihood`` request: (context, continuation)."""
        context, continuation = request.args
        name, seed = name_of(request), self.settings.seed_of(context)
        bare = context.rstrip()  # white space at its end belongs to the continuation's first token
        continuation = context[len(bare) :] + continuation
        if self.tokens is None:
            if not bare:
                self.need_tokens(name, "an empty context")
            return Pair(
                name=name,
                context=bare,
                continuation=continuation,
                seed=seed,
                special_tokens=self.add_bos_token,
            )
        if context:
            before = self.tokens.encode(bare)
            after = self.tokens.encode(bare + continuation)[len(before) :]
        else:
            before = [self.tokens.prefix_token_id]
            after = self.tokens.encode(continuation, add_special_tokens=False)
            if after[:1] == before:
                after = after[1:]
        return self.cut(name, before, after, seed)

    def windows(self, request: Instance) -> tuple[list[Pair], list[Pair]]:
        """Returns the windows of a ``loglikelihood_rolling`` request: (text,).

        Returns:
            The windows that are always scored dense, and those that the settings apply to.
        """
        name = name_of(request)
        tokens = self.need_tokens(name, "loglikelihood_rolling")
        dense = self.settings.density == 1
        context_len = 1 if dense else max(1, self.max_length // 2)
        first, *others = [
            *map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=tokens.encode(request.args[0]),
                    prefix_token=tokens.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=context_len,
                ),
            )
        ] or [([], [])]
        if dense:
            return [], self._windows(name, [first, *others])
        prefix, ids = first
        prompt = ids[:context_len]
        rest = (prefix + prompt, ids[context_len:])
        return self._windows(name, [(prefix, prompt)]), self._windows(name, [rest, *others])

    def prompt(self, request: Instance, repeat: int) -> tuple[GenerateItem, list[str]]:
        """Returns the prompt of a ``generate_until`` request: (context, generation kwargs).

        Args:
            repeat: how often the same request came before; it gives each repeat its own seed.

        Returns:
            The item to complete, and the strings before which its text ends.
        """
        context, given = request.args
        name = name_of(request)
        try:
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        except (TypeError, ValueError) as error:
            raise RequestRefused(f"{name}: generation_kwargs: {error}") from error
        eos = None if self.tokens is None else self.tokens.eos_text
        until = handle_stop_sequences(kwargs.pop("until"), eos=eos)
        if strange := [text for text in until if not isinstance(text, str)]:
            raise RequestRefused(f"{name}: until: got {strange[0]!r}; allowed: strings")
        max_tokens = kwargs.pop("max_gen_toks")
        kwargs.pop("do_sample")
        if unknown := sorted(kwargs.keys() - set(SAMPLING)):
            raise RequestRefused(
                f"{name}: generation_kwargs: got {', '.join(unknown)}; allowed: until, do_sample, "
                f"max_gen_toks, {', '.join(SAMPLING)}"
            )
        for field, value in kwargs.items():
            if not isinstance(value, int | float):
                raise RequestRefused(f"{name}: {field}: got {value!r}; allowed: a number")
        room = self.max_length - max_tokens
        if room < 1 or max_tokens < 1:
            raise RequestRefused(
                f"{name}: max_gen_toks: got {max_tokens}; allowed: 1 to {self.max_length - 1}, "
                "less than max_length"
            )
        prompt: Tokens = context
        if self.tokens is not None:
            prompt = tuple(self.tokens.encode_prompt(context)[-room:])
        if not prompt:
            raise RequestRefused(f"{name}: the prompt is empty; allowed: at least one token")
        stop = [text for text in until if 1 <= len(text) <= MAX_STOP_CHARACTERS]
        sampling = {**PLAIN, **kwargs}
        item = GenerateItem(
            name=name,
            prompt=prompt,
            max_tokens=max_tokens,
            stop=tuple(stop[:MAX_STOP_STRINGS]),  # the text is cut at the others afterwards
            sampling=sampling,
            seed=self.settings.seed_of(context, repeat if sampling["temperature"] else 0),
            special_tokens=self.add_bos_token if self.tokens is None else None,
        )
        return item, until

    def cut(
        self, name: str, context: Sequence[int], continuation: Sequence[int], seed: int
    ) -> Pair:
        """Cuts a pair that is too long from the left. The last token is not run, so a pair may have
            one token more than ``max_length``.

        Raises:
            RequestRefused: the context or the continuation has no tokens left.
        """
        if not context or not continuation:
            which = "continuation" if context else "context"
            raise RequestRefused(f"{name}: the {which} has no tokens of its own")
        if len(continuation) > self.max_length:
            raise RequestRefused(
                f"{name}: the continuation has {len(continuation)} tokens; allowed: at most "
                f"{self.max_length}, max_length"
            )
        room = self.max_length + 1 - len(continuation)
        return Pair(
            name=name, context=tuple(context[-room:]), continuation=tuple(continuation), seed=seed
        )

    def _windows(self, name: str, windows: Sequence[tuple[list[int], list[int]]]) -> list[Pair]:
        return [
            self.cut(name, context, ids, self.settings.seed_of(context))
            for context, ids in windows
            if ids
        ]


def name_of(request: Instance) -> str:
    """Returns the name of a request in errors."""
    return f"{request.task_name or 'request'}, document {request.doc_id}"
