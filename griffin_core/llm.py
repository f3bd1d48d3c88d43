"""Offline batches: a model and its engine in this process, without a server."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from numbers import Integral
from types import TracebackType
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, overload

import torch

from griffin_core.engine.cpu_share import CpuShare
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Event, Failed, Finished, Scored, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask, check_continuations
from griffin_core.errors import CapacityExhausted, EngineFault, EngineStopped, InvalidRequest
from griffin_core.experts.selection import Selection
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.hub import Progress
from griffin_core.model.load import DTYPES, Model, load_model
from griffin_core.offline.batch import run_tasks
from griffin_core.offline.completion import Completion, Piece, Score, completion_of, scores_of
from griffin_core.sampling.bad_words import bad_words_ids
from griffin_core.sampling.bans import Bans
from griffin_core.sampling.params import LARGEST_SEED, SamplingParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import DEFAULT_MODEL, SCORE_MODES, PolicyName, ScoreMode, Sharing
from griffin_core.text.prompt import (
    Message,
    Prompt,
    PromptKind,
    are_ids,
    continuations_ids,
    given_ids,
    is_chat,
    list_prompts,
    prompt_ids,
)

SUBMITTED_AHEAD = 8
"""Tasks that wait in the engine beside those that run, so that none of its places stays empty
while this process takes a result."""

T = TypeVar("T")

TextOrIds = str | Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """What ``LLM.generate`` and ``LLM.chat`` take beside prompts; see ``LLM.generate``."""

    density: float | None
    policy: PolicyName | None
    sharing: Sharing | None
    sampling: SamplingParams | Sequence[SamplingParams] | None
    stopping: StoppingParams | Sequence[StoppingParams] | None
    seed: int | Sequence[int] | None
    top_logprobs: int | None
    bad_words: Sequence[str]
    add_special_tokens: bool | None
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None


class ScoreOptions(TypedDict, total=False):
    """What ``LLM.score_many`` and ``LLM.score_choices`` take beside what they score; see
    ``LLM.score_choices``."""

    mode: ScoreMode
    density: float | None
    policy: PolicyName | None
    sharing: Sharing | None
    seed: int | Sequence[int]
    add_special_tokens: bool | None


class LLM:
    """A model in this process, for offline batches. May be used by several threads at once.

    ::

        from griffin_core import LLM

        with LLM("smollm2-135m-instruct", density=0.5) as llm:
            for completion in llm.generate(["Once upon a time", "It was"]):
                print(completion.text)

    It runs what a server runs: prompts together, all sessions of a step together, each on its
    experts. ``close`` it, or use it as a context manager, to end its thread; its memory is freed
    when nothing refers to it any more.

    The model runs on a thread of its own. Other work with torch in this process competes with it
    for CPUs, which slows both down.

    Args:
        model: as ``load_model`` takes it; or a model that is loaded.
        dtype: of weights, activations and KV: "float32", "bfloat16", "float16" or a torch.dtype;
            None for the fastest of the device.
        device: "cpu", "cuda", "cuda:N", or "auto" for the first GPU if there is one.
        density, policy, sharing: defaults for calls that set none. "private" always runs on the
            prompt's own experts. "auto", a server's default, runs dense where pruning gains no
            time, whatever the density; ``Completion.pruning`` says what ran.
        threads: of the model on a CPU; None for as many as other programs leave CPUs.
        batch_invariant: results do not depend, to the bit, on what else runs; see ``Engine``.
        max_sessions: prompts that run at once.
        memory_fraction: of the memory that is free once the model is loaded, for KV caches and
            experts of all sessions; None for 0.9 on a GPU and 0.5 on a CPU.
        progress: told about each slow part of loading.

    Raises:
        ModelNotFound, UnknownFamily, BadModelFile: see ``griffin_core.errors``.
        DeviceMemoryExhausted: the device has no room for the weights or for any session.
        InvalidRequest: an argument is out of range.
    """

    def __init__(
        self,
        model: str | Model = DEFAULT_MODEL,
        *,
        dtype: str | torch.dtype | None = None,
        device: str = "auto",
        density: float = 1.0,
        policy: PolicyName = "topk",
        sharing: Sharing = "private",
        threads: int | None = None,
        batch_invariant: bool = False,
        max_sessions: int = 64,
        memory_fraction: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        PruningParams(density=density, policy=policy, sharing=sharing)  # checks them
        _check("threads", threads, threads is None or threads >= 1, ">= 1, or None")
        _check("max_sessions", max_sessions, max_sessions >= 1, ">= 1")
        in_range = memory_fraction is None or 0 < memory_fraction <= 1
        _check("memory_fraction", memory_fraction, in_range, "(0, 1], or None")
        if isinstance(model, Model):
            _check("dtype", dtype, dtype is None, "None with a model that is loaded")
            _check("device", device, device == "auto", "auto with a model that is loaded")
        else:
            model = load_model(
                model,
                dtype=_dtype(dtype),
                device=device,
                progress=progress or (lambda _: None),
            )
        self.model = model
        self._most = max_sessions + SUBMITTED_AHEAD
        self._closed = False
        self._engine = Engine(
            model,
            limits=Limits(
                max_sessions=max_sessions,
                max_queue=2**31,  # each call submits a bounded number
                memory_fraction=memory_fraction,
                chunk_tokens=model.decoder.backend.default_chunk_tokens,
                prefill_share=1.0,  # nobody reads along: the sooner a step has all its rows
            ),
            selection=Selection(density=density, policy=policy),
            sharing=sharing,
            costs=None,
            batch_invariant=batch_invariant,
            threads=threads or CpuShare(),
        )
        self._engine.start()
        self._end = weakref.finalize(self, self._engine.stop)  # also when the interpreter exits
        try:
            self._engine.ready.result()
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The engine that runs the model, to see what it holds. Do not stop it: use ``close``."""
        return self._engine

    def close(self) -> None:
        """Ends what still runs with EngineStopped, and the engine's thread. May be repeated."""
        self._closed = True
        self._engine.stop()
        self._end.detach()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @overload
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Generator[tuple[int, Piece], None, None]: ...

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        stream: bool = False,
        density: float | None = None,
        policy: PolicyName | None = None,
        sharing: Sharing | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stopping: StoppingParams | Sequence[StoppingParams] | None = None,
        seed: int | Sequence[int] | None = None,
        top_logprobs: int | None = None,
        bad_words: Sequence[str] = (),
        add_special_tokens: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Completion] | Generator[tuple[int, Piece], None, None]:
        """Completes one prompt or many. All are checked before any is run.

        Args:
            prompts: a text, a chat (messages as dicts with role and content, or as pairs of them)
                or token ids; or any number of these.
            stream: give pieces as they are made. Closing the iterator, or dropping it, cancels what
                still runs.
            density, policy, sharing: None for those of the LLM.
            sampling, stopping: for all prompts, or one for each; None for greedy, and for at most
                256 tokens.
            seed: of the first prompt; each further one has the next number, so that equal prompts
                draw differently and the call can be repeated. Or one for each prompt. None for
                ``sampling``'s in the same way, or as they are if there is one for each prompt.
            top_logprobs: how many alternatives to report at each token, up to 20; None for no
                log-probabilities at all.
            bad_words: words that no completion holds.
            add_special_tokens: whether a text gets the tokenizer's own BOS and the like; None for
                True. With texts only.
            continue_final_message: go on with a chat's last message instead of answering it. With
                chats only.
            chat_template_kwargs: further variables of the chat template. With chats only.

        Returns:
            A completion for each prompt, in order. With ``stream``, pairs of a prompt's index and a
            piece of its completion, as they come.

        Raises:
            InvalidRequest: naming prompt or argument, what was given and what is allowed.
            CapacityExhausted: a prompt with its completion is larger than the session memory.
            NonFiniteLogits: the model does not suit a prompt. What else runs is cancelled; a stream
                has given by then what was made before.
            EngineStopped: the LLM is closed, or was while this ran.
        """
        self._check_open()
        batch = list_prompts(prompts)
        count = len(batch)
        pruning = PruningParams(density=density, policy=policy, sharing=sharing)
        sampling = SamplingParams() if sampling is None else sampling
        samplings = _each("sampling", sampling, count)
        stoppings = _each("stopping", StoppingParams() if stopping is None else stopping, count)
        if seed is None:
            if isinstance(sampling, SamplingParams):
                seed = sampling.seed
            else:
                seed = [each.seed for each in samplings]
        seeds = _seeds(seed, count)
        banned = bad_words_ids(bad_words, self.model.tokenizer)
        tasks = []
        for index, prompt in enumerate(batch):
            with _naming(f"prompts[{index}]"):
                kind, ids = prompt_ids(
                    prompt,
                    self.model.tokenizer,
                    add_special_tokens=add_special_tokens,
                    continue_final_message=continue_final_message,
                    chat_template_kwargs=chat_template_kwargs,
                    most=self.model.decoder.spec.context_length,
                )
                drawn = replace(
                    samplings[index],
                    seed=seeds[index],
                    bad_words_ids=samplings[index].bad_words_ids + banned,
                )
                task = GenerateTask(
                    prompt=tuple(ids),
                    sampling=drawn,
                    stopping=stoppings[index],
                    pruning=pruning,
                    top_logprobs=top_logprobs,
                )
                self._check_generate(task, kind)
            tasks.append(task)
        if stream:
            return self._pieces(tasks, whole=False)
        done: dict[int, Completion] = {}
        for index, piece in self._pieces(tasks, whole=True):
            if piece.completion is not None:
                done[index] = piece.completion
        return [done[index] for index in range(count)]

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Iterable[Sequence[Message]],
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Iterable[Sequence[Message]],
        *,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Generator[tuple[int, Piece], None, None]: ...

    def chat(
        self,
        messages: Sequence[Message] | Iterable[Sequence[Message]],
        *,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion] | Generator[tuple[int, Piece], None, None]:
        """As ``generate``, of one chat or many, and of nothing else."""
        chats = list_prompts(messages)
        for index, chat in enumerate(chats):
            if not is_chat(chat):
                raise InvalidRequest(f"messages[{index}]", chat, "a chat; generate takes others")
        if stream:
            return self.generate(chats, stream=True, **options)
        return self.generate(chats, **options)

    def score(
        self,
        context: TextOrIds,
        continuation: TextOrIds,
        *,
        mode: ScoreMode = "generation",
        density: float | None = None,
        policy: PolicyName | None = None,
        sharing: Sharing | None = None,
        seed: int = 0,
        add_special_tokens: bool | None = None,
    ) -> Score:
        """Log-probabilities of a continuation.

        Args:
            context, continuation: both text, or both token ids.
            mode: "generation": the context chooses the experts, and each token of the continuation
                runs on them, as if it were generated. "classification": every token that is run
                (context and continuation but for the last, which is only looked up) runs dense and
                chooses, but the last of them, which runs on the experts. Only the continuation's
                last log-probability is then of the pruned model: what the paper's tables of
                multiple choice simulate. Its context has at least two tokens.
            density, policy, sharing: None for those of the LLM. In mode "classification" experts
                are never shared.
            seed: of the policies that draw.
            add_special_tokens: as in ``generate``, of the context.

        Raises:
            InvalidRequest, CapacityExhausted, NonFiniteLogits, EngineStopped: as ``generate``.
        """
        (score,) = self.score_many(
            [(context, continuation)],
            mode=mode,
            density=density,
            policy=policy,
            sharing=sharing,
            seed=seed,
            add_special_tokens=add_special_tokens,
        )
        return score

    def score_many(
        self,
        pairs: Iterable[tuple[TextOrIds, TextOrIds]],
        **options: Unpack[ScoreOptions],
    ) -> list[Score]:
        """As ``score``, of many pairs of context and continuation. All are checked before any is
        run.

        Args:
            options: as of ``score_choices``.

        Returns:
            A score for each pair, in order.
        """
        tasks = self._score_tasks(
            "pairs",
            [
                (context, [continuation])
                for context, continuation in _pairs("pairs", pairs, "context and continuation")
            ],
            lambda _: "continuation",
            **options,
        )
        done = dict(self._scores(tasks, "pairs"))
        return [score for index in range(len(tasks)) for score in done[index]]

    @overload
    def score_choices(
        self,
        items: Iterable[tuple[TextOrIds, Sequence[TextOrIds]]],
        *,
        stream: Literal[False] = False,
        **options: Unpack[ScoreOptions],
    ) -> list[list[Score]]: ...

    @overload
    def score_choices(
        self,
        items: Iterable[tuple[TextOrIds, Sequence[TextOrIds]]],
        *,
        stream: Literal[True],
        **options: Unpack[ScoreOptions],
    ) -> Generator[tuple[int, list[Score]], None, None]: ...

    def score_choices(
        self,
        items: Iterable[tuple[TextOrIds, Sequence[TextOrIds]]],
        *,
        stream: bool = False,
        **options: Unpack[ScoreOptions],
    ) -> list[list[Score]] | Generator[tuple[int, list[Score]], None, None]:
        """As ``score``, of many contexts with several continuations each, such as the choices of a
        question. A context is read once, and each continuation scored by itself after it. All are
        checked before any is run.

        Args:
            items: pairs of a context and 1 to 256 continuations, all text or all token ids. A text
                that shares a token with the context, which the context is then without, is refused
                beside others that do not.
            stream: give results as they come. Closing the iterator, or dropping it, cancels what
                still runs.
            mode, density, policy, sharing, add_special_tokens: as of ``score``.
            seed: of the first item; each further one has the next number. Or one for each item.

        Returns:
            For each item, in order, a score for each of its continuations. With ``stream``, pairs
            of an item's index and its scores, as they come.
        """
        read = _pairs("items", items, "context and continuations")
        tasks = self._score_tasks("items", read, "continuations[{}]".format, **options)
        scores = self._scores(tasks, "items")
        if stream:
            return scores
        done = dict(scores)
        return [done[index] for index in range(len(tasks))]

    # -- from what is given to tasks -------------------------------------------------------------

    def _check_generate(self, task: GenerateTask, kind: PromptKind) -> None:
        spec = self.model.decoder.spec
        task.check(spec, kind)
        Bans(task.sampling, task.stopping, self.model.eos_ids, spec.vocabulary)  # checks them
        self._check_fits(len(task.prompt) + task.stopping.max_tokens)

    def _score_tasks(
        self,
        name: str,
        items: Sequence[tuple[TextOrIds, Sequence[TextOrIds]]],
        naming: Callable[[int], str],
        *,
        mode: ScoreMode = "generation",
        density: float | None = None,
        policy: PolicyName | None = None,
        sharing: Sharing | None = None,
        seed: int | Sequence[int] = 0,
        add_special_tokens: bool | None = None,
    ) -> list[ScoreTask]:
        """Checked tasks.

        Args:
            name: what the caller calls the items.
            naming: what it calls each continuation of one, by its index.
        """
        self._check_open()
        _check("mode", mode, mode in SCORE_MODES, ", ".join(SCORE_MODES))
        pruning = PruningParams(density=density, policy=policy, sharing=sharing)
        seeds = _seeds(seed, len(items))
        tasks = []
        for index, (context, continuations) in enumerate(items):
            with _naming(f"{name}[{index}]"):
                prompt, rests, names = self._scored_ids(
                    context, continuations, naming, add_special_tokens
                )
                task = ScoreTask(
                    prompt=tuple(prompt),
                    continuations=tuple(map(tuple, rests)),
                    mode=mode,
                    pruning=pruning,
                    seed=seeds[index],
                )
                task.check(self.model.decoder.spec, "context", names)
                self._check_fits(task.run_tokens)
            tasks.append(task)
        return tasks

    def _scored_ids(
        self,
        context: TextOrIds,
        continuations: Sequence[TextOrIds],
        naming: Callable[[int], str],
        add_special_tokens: bool | None,
    ) -> tuple[list[int], list[list[int]], list[str]]:
        """Token ids of a context and of its continuations, and the names of these."""
        most = self.model.decoder.spec.context_length
        listed = isinstance(continuations, Sequence) and not isinstance(continuations, str)
        if not listed or (continuations and are_ids(continuations)):
            raise InvalidRequest("continuations", continuations, "a list of texts or of token ids")
        check_continuations(len(continuations))
        names = [naming(index) for index in range(len(continuations))]
        for name, continuation in zip(names, continuations, strict=True):
            texts = isinstance(context, str) and isinstance(continuation, str)
            if not texts and not (are_ids(context) and are_ids(continuation)):
                raise InvalidRequest(
                    name,
                    f"{type(context).__name__} with {type(continuation).__name__}",
                    "both as text or both as token ids",
                )
        if isinstance(context, str):
            prompt, rests = continuations_ids(
                context,
                cast(Sequence[str], continuations),
                self.model.tokenizer,
                names=names,
                special_tokens=add_special_tokens is not False,
                most=most,
            )
            return prompt, rests, names
        if add_special_tokens is not None:
            raise InvalidRequest("add_special_tokens", "set with token ids", "with text")
        prompt = given_ids("context", [int(i) for i in context], most=most)
        given = cast(Sequence[Sequence[int]], continuations)
        rests = [
            given_ids(name, [int(i) for i in one], most=most)
            for name, one in zip(names, given, strict=True)
        ]
        return prompt, rests, names

    def _check_fits(self, tokens: int) -> None:
        """Refuses what never has room. The engine, which also counts experts, has the last word."""
        decoder = self.model.decoder
        needs = kv_bytes(decoder.spec, decoder.dtype, min(tokens, decoder.spec.context_length))
        if needs > (allowed := self._engine.session_bytes):
            raise CapacityExhausted(
                f"memory: the prompt and its completion need {needs} bytes of KV cache; sessions "
                f"have {allowed} in all. Ask for fewer tokens, or give a larger memory_fraction",
                retry_after_s=None,
            )

    # -- from events to results ------------------------------------------------------------------

    def _pieces(
        self, tasks: Sequence[GenerateTask], *, whole: bool
    ) -> Generator[tuple[int, Piece], None, None]:
        """Runs tasks; see ``run_tasks`` for ``whole``."""
        made: dict[int, list[TokensMade]] = {}
        with closing(self._events(tasks, "prompts", whole=whole)) as events:
            for index, event in events:
                match event:
                    case TokensMade():
                        made.setdefault(index, []).append(event)
                        piece = Piece(text=event.text, token_ids=event.ids, logprobs=event.logprobs)
                        yield index, piece
                    case Finished():
                        completion = completion_of(tasks[index], made.pop(index), event)
                        yield index, Piece(completion=completion)

    def _scores(
        self, tasks: Sequence[ScoreTask], name: str
    ) -> Generator[tuple[int, list[Score]], None, None]:
        """Runs tasks."""
        with closing(self._events(tasks, name, whole=True)) as events:
            for index, event in events:
                if isinstance(event, Scored):
                    yield index, scores_of(tasks[index], event)

    def _events(
        self, tasks: Sequence[GenerateTask | ScoreTask], name: str, *, whole: bool
    ) -> Generator[tuple[int, Event], None, None]:
        """Runs tasks; the error of one ends all."""
        running = run_tasks(self._engine, tasks, most=self._most, whole=whole)
        with closing(running) as events:
            for index, event in events:
                if isinstance(event, Failed):
                    if isinstance(event.error, EngineStopped):
                        raise self._stopped() from event.error
                    event.error.add_note(f"in {name}[{index}]")
                    raise event.error
                yield index, event

    def _check_open(self) -> None:
        if self._closed or self._engine.ended.done():
            raise self._stopped()

    def _stopped(self) -> Exception:
        """Why the engine takes or continues no work."""
        if not self._closed and (fault := self._engine.ended.exception()):
            return EngineFault(f"the engine ended: {type(fault).__name__}: {fault}")
        return EngineStopped("the LLM is closed")


def _check(name: str, given: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise InvalidRequest(name, given, allowed)


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    if given is None or given in DTYPES.values():
        return cast(torch.dtype | None, given)
    if given not in DTYPES:
        raise InvalidRequest("dtype", str(given), f"{', '.join(DTYPES)}, or None")
    return DTYPES[given]


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Has errors name the prompt that they are about."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{place}.{error.field}", error.given, error.allowed) from error
    except CapacityExhausted as error:
        raise CapacityExhausted(f"{place}: {error}", retry_after_s=None) from error


def _each(name: str, given: T | Sequence[T], count: int) -> list[T]:
    """One for each prompt."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise InvalidRequest(name, f"{len(given)} for {count} prompts", "one, or one for each")
    return list(given)


def _pairs(name: str, given: Iterable[Any], words: str) -> list[tuple[Any, Any]]:
    """What is to be scored, as pairs.

    Args:
        name: what the caller calls them.
        words: what is in a pair.
    """
    _check(name, given, isinstance(given, Iterable) and not isinstance(given, str), "a list")
    listed = list(given)
    for index, pair in enumerate(listed):
        holds = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        _check(f"{name}[{index}]", pair, holds, f"a pair: {words}")
    return listed


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """The seed of each prompt."""
    seeds = _each("seed", seed, count)
    for given in seeds:
        holds = isinstance(given, Integral) and 0 <= given <= LARGEST_SEED
        _check("seed", given, holds, "[0, 2^64), a whole number")
    if isinstance(seed, Sequence):
        return seeds
    return [(seed + index) % (LARGEST_SEED + 1) for index in range(count)]
