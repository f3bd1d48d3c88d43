"""From prompts, as callers give them, to checked tasks of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from griffin_core.engine.engine import Engine
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask, check_continuations
from griffin_core.errors import CapacityExhausted, InvalidRequest
from griffin_core.kv.pool import kv_bytes
from griffin_core.offline.checks import check, naming, one_each, seeds_of
from griffin_core.offline.options import TextOrIds
from griffin_core.sampling.bad_words import bad_words_ids
from griffin_core.sampling.bans import Bans
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import SCORE_MODES, CorrectionKind, PolicyName, ScoreMode, Sharing
from griffin_core.text.prompt import (
    Prompt,
    are_ids,
    continuations_ids,
    given_ids,
    prompt_ids,
)


def generate_tasks(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    density: float | None = None,
    policy: PolicyName | None = None,
    correction: CorrectionKind | None = None,
    correction_rank: int | None = None,
    sharing: Sharing | None = None,
    warmup_tokens: int | None = None,
    checks: bool | None = None,
    agreement_floor: float | None = None,
    speculation: SpeculationParams | None = None,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    stopping: StoppingParams | Sequence[StoppingParams] | None = None,
    seed: int | Sequence[int] | None = None,
    top_logprobs: int | None = None,
    bad_words: Sequence[str] = (),
    add_special_tokens: bool | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[GenerateTask]:
    """The tasks of ``LLM.generate``, from its arguments. All are checked.

    Raises:
        InvalidRequest, CapacityExhausted: see ``LLM.generate``.
    """
    model, spec = engine.model, engine.model.decoder.spec
    pruning = _pruning(
        engine,
        density,
        policy,
        correction,
        correction_rank,
        sharing,
        warmup_tokens,
        checks,
        agreement_floor,
    )
    speculation = SpeculationParams() if speculation is None else speculation
    if engine.batch_invariant and speculation.over(engine.speculation).mode != "off":
        raise InvalidRequest("speculation", speculation.mode, "off with batch_invariant")
    sampling = SamplingParams() if sampling is None else sampling
    samplings = one_each("sampling", sampling, len(prompts))
    stopping = StoppingParams() if stopping is None else stopping
    stoppings = one_each("stopping", stopping, len(prompts))
    if seed is None and isinstance(sampling, SamplingParams):
        seed = sampling.seed
    elif seed is None:
        seed = [each.seed for each in samplings]
    seeds = seeds_of(seed, len(prompts))
    banned = bad_words_ids(bad_words, model.tokenizer)
    tasks = []
    for index, prompt in enumerate(prompts):
        with naming(f"prompts[{index}]"):
            kind, ids = prompt_ids(
                prompt,
                model.tokenizer,
                add_special_tokens=add_special_tokens,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
                most=spec.context_length,
            )
            task = GenerateTask(
                prompt=tuple(ids),
                sampling=replace(
                    samplings[index],
                    seed=seeds[index],
                    bad_words_ids=samplings[index].bad_words_ids + banned,
                ),
                stopping=stoppings[index],
                pruning=pruning,
                speculation=speculation,
                top_logprobs=top_logprobs,
            )
            task.check(spec, kind)
            Bans(task.sampling, task.stopping, model.eos_ids, spec.vocab_size)  # checks them
            _check_fits(engine, len(task.prompt) + task.stopping.max_tokens)
        tasks.append(task)
    return tasks


def score_tasks(
    engine: Engine,
    name: str,
    items: Sequence[tuple[TextOrIds, Sequence[TextOrIds]]],
    name_of: Callable[[int], str],
    *,
    mode: ScoreMode = "generation",
    density: float | None = None,
    policy: PolicyName | None = None,
    correction: CorrectionKind | None = None,
    correction_rank: int | None = None,
    sharing: Sharing | None = None,
    seed: int | Sequence[int] = 0,
    add_special_tokens: bool | None = None,
) -> list[ScoreTask]:
    """The tasks of ``LLM.score_choices`` and the like. All are checked.

    Args:
        name: what the caller calls the items.
        name_of: what the caller calls a continuation of an item, by its index.

    Raises:
        InvalidRequest, CapacityExhausted: see ``LLM.score``.
    """
    check("mode", mode, mode in SCORE_MODES, ", ".join(SCORE_MODES))
    pruning = _pruning(engine, density, policy, correction, correction_rank, sharing)
    seeds = seeds_of(seed, len(items))
    tasks = []
    for index, (context, continuations) in enumerate(items):
        with naming(f"{name}[{index}]"):
            prompt, rests, names = _scored_ids(
                engine, context, continuations, name_of, add_special_tokens
            )
            task = ScoreTask(
                prompt=tuple(prompt),
                continuations=tuple(map(tuple, rests)),
                mode=mode,
                pruning=pruning,
                seed=seeds[index],
            )
            task.check(engine.model.decoder.spec, "context", names)
            _check_fits(engine, task.run_tokens)
        tasks.append(task)
    return tasks


def _pruning(
    engine: Engine,
    density: float | None,
    policy: PolicyName | None,
    correction: CorrectionKind | None,
    correction_rank: int | None,
    sharing: Sharing | None,
    warmup_tokens: int | None = None,
    checks: bool | None = None,
    agreement_floor: float | None = None,
) -> PruningParams:
    """What all tasks of a call say about their experts, checked."""
    pruning = PruningParams(
        density=density,
        policy=policy,
        sharing=sharing,
        correction=correction,
        correction_rank=correction_rank,
        warmup_tokens=warmup_tokens,
        checks=checks,
        agreement_floor=agreement_floor,
    )
    pruning.selection(engine.selection, seed=0).check(engine.model.decoder.calibration)
    return pruning


def _scored_ids(
    engine: Engine,
    context: TextOrIds,
    continuations: Sequence[TextOrIds],
    name_of: Callable[[int], str],
    add_special_tokens: bool | None,
) -> tuple[list[int], list[list[int]], list[str]]:
    """Token ids of a context and of its continuations, and the names of the continuations."""
    most = engine.model.decoder.spec.context_length
    listed = isinstance(continuations, Sequence) and not isinstance(continuations, str)
    if not listed or (continuations and are_ids(continuations)):
        raise InvalidRequest("continuations", continuations, "a list of texts or of token ids")
    check_continuations(len(continuations))
    names = [name_of(index) for index in range(len(continuations))]
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
            engine.model.tokenizer,
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


def _check_fits(engine: Engine, tokens: int) -> None:
    """Refuses what can never fit. The engine, which also counts experts, checks again."""
    decoder = engine.model.decoder
    needs = kv_bytes(decoder.spec, decoder.dtype, min(tokens, decoder.spec.context_length))
    if needs > (allowed := engine.session_bytes):
        raise CapacityExhausted(
            f"memory: the prompt and its completion need {needs} bytes of KV cache; sessions "
            f"have {allowed} in all. Ask for fewer tokens, or give a larger memory_fraction",
            retry_after_s=None,
        )
