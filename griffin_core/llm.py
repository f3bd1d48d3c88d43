"""Offline batches: a model and its engine in this process, without a server."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Sequence
from typing import Literal, Unpack, overload

import torch

from griffin_core.engine.engine import Engine
from griffin_core.engine.task import ScoreTask
from griffin_core.errors import EngineFault, EngineStopped, InvalidRequest
from griffin_core.model.hub import Progress
from griffin_core.model.load import Model
from griffin_core.offline.checks import pairs as check_pairs
from griffin_core.offline.completion import Completion, Piece, Score
from griffin_core.offline.options import (
    Chats,
    GenerateOptions,
    Items,
    Prompts,
    ScoreOptions,
    TextOrIds,
)
from griffin_core.offline.results import SUBMITTED_AHEAD, run_generations, run_scores
from griffin_core.offline.start import make_engine
from griffin_core.offline.tasks import generate_tasks, score_tasks
from griffin_core.spec.choices import (
    DEFAULT_MODEL,
    CorrectionKind,
    PolicyName,
    Sharing,
    SpeculationMode,
)
from griffin_core.text.prompt import is_chat, list_prompts


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
        allow_pickle: whether weights may come from ``pytorch_model.bin``, which is a program.
        density, policy, correction, correction_rank, sharing: defaults for calls that set none. A
            policy or correction of None is what the model's calibration found best; without a
            calibration, "topk" and "bias". "private" always runs on the prompt's own experts.
            "auto", a server's default, runs dense where pruning gains no time, whatever the
            density; ``Completion.pruning`` says what ran.
        warmup_tokens: completions run dense until so many tokens of prompt and completion have run,
            which all choose the experts, unless a call sets another number.
        speculation: what drafts tokens for calls that do not say: "off", "lookup", "slim" or
            "auto"; see ``SpeculationParams``.
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
        allow_pickle: bool = False,
        density: float = 1.0,
        policy: PolicyName | None = None,
        correction: CorrectionKind | None = None,
        correction_rank: int | None = None,
        sharing: Sharing = "private",
        warmup_tokens: int = 0,
        speculation: SpeculationMode = "off",
        threads: int | None = None,
        batch_invariant: bool = False,
        max_sessions: int = 64,
        memory_fraction: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._engine = make_engine(
            model,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            density=density,
            policy=policy,
            correction=correction,
            correction_rank=correction_rank,
            sharing=sharing,
            warmup_tokens=warmup_tokens,
            speculation=speculation,
            threads=threads,
            batch_invariant=batch_invariant,
            max_sessions=max_sessions,
            memory_fraction=memory_fraction,
            progress=progress,
        )
        self.model = self._engine.model
        self._max_submitted = max_sessions + SUBMITTED_AHEAD
        self._closed = False
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

    def __exit__(self, *error: object) -> None:
        self.close()

    @overload
    def generate(
        self,
        prompts: Prompts,
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self, prompts: Prompts, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> Generator[tuple[int, Piece], None, None]: ...

    def generate(
        self, prompts: Prompts, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> list[Completion] | Generator[tuple[int, Piece], None, None]:
        """Completes one prompt or many. All are checked before any is run.

        Args:
            prompts: a text, a chat (messages as dicts with role and content, or as pairs of them)
                or token ids; or any number of these.
            stream: give pieces as they are made. Closing the iterator, or dropping it, cancels what
                still runs.
            density, policy, correction, correction_rank, sharing, warmup_tokens, speculation: None
                for those of the LLM.
            checks: whether dense passes check now and then which of the last tokens the dense model
                would have drawn too; ``Completion.pruning.agreement`` is the share.
            agreement_floor: instead of a density: it follows what checks measure; see
                ``DensityControl``.
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
        tasks = generate_tasks(self._engine, list_prompts(prompts), **options)
        pieces = run_generations(
            self._engine,
            tasks,
            max_submitted=self._max_submitted,
            whole=not stream,
            stop_reason=self._stop_reason,
        )
        if stream:
            return pieces
        done = {index: piece.completion for index, piece in pieces if piece.completion is not None}
        return [done[index] for index in range(len(tasks))]

    @overload
    def chat(
        self, messages: Chats, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> list[Completion]: ...

    @overload
    def chat(
        self, messages: Chats, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> Generator[tuple[int, Piece], None, None]: ...

    def chat(
        self, messages: Chats, *, stream: bool = False, **options: Unpack[GenerateOptions]
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
        self, context: TextOrIds, continuation: TextOrIds, **options: Unpack[ScoreOptions]
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
            density, policy, correction, correction_rank, sharing: None for those of the LLM. In
                mode "classification" experts are never shared, and a residual is a bias.
            seed: of the policies that draw.
            add_special_tokens: as in ``generate``, of the context.

        Raises:
            InvalidRequest, CapacityExhausted, NonFiniteLogits, EngineStopped: as ``generate``.
        """
        (score,) = self.score_many([(context, continuation)], **options)
        return score

    def score_many(
        self, pairs: Iterable[tuple[TextOrIds, TextOrIds]], **options: Unpack[ScoreOptions]
    ) -> list[Score]:
        """As ``score``, of many pairs of context and continuation. All are checked before any is
        run.

        Args:
            options: as of ``score_choices``.

        Returns:
            A score for each pair, in order.
        """
        self._check_open()
        items = [
            (one, [other]) for one, other in check_pairs("pairs", pairs, "context and continuation")
        ]
        tasks = score_tasks(self._engine, "pairs", items, lambda _: "continuation", **options)
        done = dict(self._scores(tasks, "pairs"))
        return [score for index in range(len(tasks)) for score in done[index]]

    @overload
    def score_choices(
        self, items: Items, *, stream: Literal[False] = False, **options: Unpack[ScoreOptions]
    ) -> list[list[Score]]: ...

    @overload
    def score_choices(
        self, items: Items, *, stream: Literal[True], **options: Unpack[ScoreOptions]
    ) -> Generator[tuple[int, list[Score]], None, None]: ...

    def score_choices(
        self, items: Items, *, stream: bool = False, **options: Unpack[ScoreOptions]
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
            mode, density, policy, correction, correction_rank, sharing, add_special_tokens: as of
                ``score``.
            seed: of the first item; each further one has the next number. Or one for each item.

        Returns:
            For each item, in order, a score for each of its continuations. With ``stream``, pairs
            of an item's index and its scores, as they come.
        """
        self._check_open()
        read = check_pairs("items", items, "context and continuations")
        tasks = score_tasks(self._engine, "items", read, "continuations[{}]".format, **options)
        scores = self._scores(tasks, "items")
        if stream:
            return scores
        done = dict(scores)
        return [done[index] for index in range(len(tasks))]

    def _scores(
        self, tasks: Sequence[ScoreTask], name: str
    ) -> Generator[tuple[int, list[Score]], None, None]:
        return run_scores(
            self._engine,
            tasks,
            name,
            max_submitted=self._max_submitted,
            stop_reason=self._stop_reason,
        )

    def _check_open(self) -> None:
        if self._closed or self._engine.ended.done():
            raise self._stop_reason()

    def _stop_reason(self) -> Exception:
        """Why the engine takes or continues no work."""
        if not self._closed and (fault := self._engine.ended.exception()):
            return EngineFault.of(fault, "the engine ended: ")
        return EngineStopped("the LLM is closed")
