"""ScoreRequest to the core's ScoreTask, and its result to ScoreResponse."""

from __future__ import annotations

import time

from griffin.v1 import generation_pb2 as pb
from griffin_core.engine.events import Scored
from griffin_core.engine.task import ScoreTask, check_continuations
from griffin_core.errors import InvalidRequest
from griffin_core.spec.model import ModelSpec
from griffin_core.text.prompt import continuations_ids, given_ids
from griffin_core.text.tokenizer import Tokenizer
from griffin_server.rpc.messages.enums import score_mode_from_pb
from griffin_server.rpc.messages.fields import exactly_one, seed_of
from griffin_server.rpc.messages.prompts import add_special_tokens
from griffin_server.rpc.messages.requests import pruning_params
from griffin_server.rpc.messages.responses import figures_to_pb


def score_task(
    request: pb.ScoreRequest,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    timeout_s: float | None = None,
) -> ScoreTask:
    """Tokenizes and checks a request.

    Args:
        timeout_s: seconds until the call's deadline; None without one.

    Raises:
        InvalidRequest: a field is out of range; the error names the field, value and range.
    """
    arrived = time.monotonic()
    context = exactly_one(
        "context",
        {
            "context": request.HasField("context"),
            "context_token_ids": bool(request.context_token_ids),
        },
    )
    given = exactly_one(
        "continuation",
        {
            "continuation": request.HasField("continuation"),
            "continuation_token_ids": bool(request.continuation_token_ids),
            "continuations": bool(request.continuations),
        },
    )
    pruning = pruning_params(request.pruning)
    mode = score_mode_from_pb("mode", request.mode) or "generation"
    special_tokens = add_special_tokens(request)
    if special_tokens is not None and context != "context":
        raise InvalidRequest("add_special_tokens", f"set with {context}", "with context")
    prompt, rests, names = _scored_ids(context, given, request, tokenizer, spec)
    task = ScoreTask(
        prompt=tuple(prompt),
        continuations=tuple(map(tuple, rests)),
        mode=mode,
        pruning=pruning,
        seed=seed_of(request),
        arrived=arrived,
        deadline=None if timeout_s is None else arrived + timeout_s,
    )
    task.check(spec, context, names)
    return task


def _scored_ids(
    context: str, given: str, request: pb.ScoreRequest, tokenizer: Tokenizer, spec: ModelSpec
) -> tuple[list[int], list[list[int]], list[str]]:
    """The token ids of a request's context and of its continuations, and the field of each
    continuation.

    Args:
        context, given: the fields that hold the context and the continuations.
    """
    names = [given]
    if given == "continuations":
        check_continuations(len(request.continuations))
        names = [f"continuations[{index}]" for index in range(len(request.continuations))]
        kinds = [
            exactly_one(
                name,
                {"text": one.HasField("text"), "token_ids": bool(one.token_ids)},
            )
            for name, one in zip(names, request.continuations, strict=True)
        ]
    else:
        kinds = ["token_ids" if given.endswith("_token_ids") else "text"]
    expected = "token_ids" if context.endswith("_token_ids") else "text"
    for name, kind in zip(names, kinds, strict=True):
        if kind != expected:
            shown = f"{name}.{kind}" if given == "continuations" else given
            raise InvalidRequest(
                name if given == "continuations" else "continuation",
                f"{context} with {shown}",
                "both as text or both as token ids",
            )
    most = spec.context_length
    if expected == "text":
        prompt, rests = continuations_ids(
            request.context,
            [one.text for one in request.continuations] or [request.continuation],
            tokenizer,
            names=names,
            special_tokens=add_special_tokens(request) is not False,
            most=most,
        )
        return prompt, rests, names
    if given == "continuations":
        names = [f"{name}.token_ids" for name in names]
    ids = [one.token_ids for one in request.continuations] or [request.continuation_token_ids]
    prompt = given_ids(context, request.context_token_ids, most=most)
    rests = [given_ids(name, one, most=most) for name, one in zip(names, ids, strict=True)]
    return prompt, rests, names


def scored_to_pb(
    task: ScoreTask, event: Scored, request_id: str, *, several: bool
) -> pb.ScoreResponse:
    """The response to a request.

    Args:
        several: the request set ``continuations``, so the response sets them, too.
    """
    scores = [
        pb.ContinuationScore(
            logprob=sum(scored.logprobs),
            greedy=all(scored.greedy),
            tokens=[
                pb.TokenScore(id=token, logprob=logprob, greedy=greedy)
                for token, logprob, greedy in zip(
                    continuation, scored.logprobs, scored.greedy, strict=True
                )
            ],
        )
        for continuation, scored in zip(task.continuations, event.continuations, strict=True)
    ]
    response = pb.ScoreResponse(
        context_tokens=len(task.prompt),
        pruning=figures_to_pb(event.pruning),
        request_id=request_id,
    )
    if several:
        response.continuations.extend(scores)
    else:
        (score,) = scores
        response.logprob, response.greedy = score.logprob, score.greedy
        response.tokens.extend(score.tokens)
    return response
