"""The core's events to GenerateResponse."""

from __future__ import annotations

from dataclasses import asdict

from griffin.v1 import generation_pb2 as pb
from griffin_core.engine.events import Finished, PruningFigures, Started, TokensMade
from griffin_core.sampling.logprobs import Logprobs
from griffin_core.text.tokenizer import Tokenizer
from griffin_server.rpc.messages.enums import REASONS_TO_PB, correction_to_pb, policy_to_pb


def started_to_pb(event: Started, request_id: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(
            session_id=event.session_id,
            request_id=request_id,
            prompt_tokens=event.prompt_tokens,
            prefill_s=event.prefill_s,
            pruning=figures_to_pb(event.pruning),
        )
    )


def tokens_to_pb(event: TokensMade, tokenizer: Tokenizer) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        tokens=pb.Tokens(
            ids=event.ids,
            text=event.text,
            logprobs=[_logprobs_to_pb(item, tokenizer) for item in event.logprobs],
        )
    )


def _logprobs_to_pb(item: Logprobs, tokenizer: Tokenizer) -> pb.TokenLogprob:
    top = [
        pb.TopLogprob(id=token, logprob=logprob, text=tokenizer.decode_one(token))
        for token, logprob in item.top
    ]
    return pb.TokenLogprob(logprob=item.chosen, top=top)


def finished_to_pb(event: Finished) -> pb.GenerateResponse:
    timings = event.timings
    return pb.GenerateResponse(
        finished=pb.Finished(
            reason=REASONS_TO_PB[event.reason],
            stop=event.stop,
            usage=pb.Usage(
                prompt_tokens=event.prompt_tokens,
                generated_tokens=event.generated_tokens,
                context_tokens=event.context_tokens,
            ),
            timings=pb.Timings(
                queue_s=timings.queue_s,
                prefill_s=timings.prefill_s,
                selection_s=timings.selection_s,
                slim_build_s=timings.slim_build_s,
                first_token_s=timings.first_token_s,
                decode_s=timings.decode_s,
            ),
            pruning=figures_to_pb(event.pruning),
            session_kept=event.kept,
            speculation=pb.SpeculationFigures(**asdict(event.speculation)),
        )
    )


def figures_to_pb(figures: PruningFigures) -> pb.PruningFigures:
    return pb.PruningFigures(
        density=figures.density,
        policy=policy_to_pb(figures.policy),
        experts_per_layer=figures.experts_per_layer,
        expert_counts=figures.expert_counts,
        ff_width=figures.ff_width,
        mean_norm_mass=figures.mean_norm_mass,
        norm_mass=figures.norm_mass,
        slim_view_bytes=figures.slim_view_bytes,
        kv_cache_bytes=figures.kv_cache_bytes,
        mean_density=figures.mean_density,
        dense_tokens=figures.dense_tokens,
        checked_tokens=figures.checked_tokens,
        agreed_tokens=figures.agreed_tokens,
        agreement_floor=figures.agreement_floor,
        correction=correction_to_pb(figures.correction),
        correction_rank=figures.correction_rank,
        correction_bytes=figures.correction_bytes,
    )
