"""With ``batch_invariant``, on a GPU too, a session makes the same to the bit whoever is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from griffin_core.errors import InvalidRequest
from griffin_core.model.load import Model, load_model
from tests.calibrations import calibrate
from tests.gpu.devices import needs_cuda
from tests.unit.core.engines import engine
from tests.unit.core.test_batching import made_alone, made_beside

pytestmark = [pytest.mark.gpu, needs_cuda, pytest.mark.timeout(300)]

if torch.cuda.is_available():
    from griffin_core.forward.graphs import GraphStep
    from griffin_core.sampling.sampler import Sampler
    from griffin_core.slim.indexed import IndexTable


def on_gpu(where: Path, dtype: torch.dtype) -> Model:
    model = load_model(str(where), dtype=dtype, device="cuda")
    calibrate(model.decoder)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_private_sessions_make_the_same_to_the_bit_beside_1_to_15_others(
    name: str, dtype: torch.dtype, tiny_directory: Callable[[str], Path]
) -> None:
    model = on_gpu(tiny_directory(name), dtype)
    alone = made_alone(model, batch_invariant=True)
    for others in (1, 5, 15):
        assert made_beside(model, others, batch_invariant=True) == alone, others


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "opt-norm-after"])
def test_a_row_makes_the_same_in_each_place(
    name: str, graphs: bool, tiny_directory: Callable[[str], Path]
) -> None:
    decoder = on_gpu(tiny_directory(name), torch.bfloat16).decoder
    for slots in (3, 12):
        vocabulary = decoder.spec.vocab_size
        sampler = Sampler(slots=slots, vocab_size=vocabulary, backend=decoder.backend)
        step = GraphStep(
            decoder=decoder,
            pool=decoder.new_pool(100),
            sampler=sampler,
            slims=IndexTable(decoder, sets=slots),
            max_sequences=slots,
            graphs=graphs,
            apart=True,
        )
        assert step.rows_stay_apart()


def test_it_is_refused_where_a_row_depends_on_its_place(
    tiny_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraphStep, "rows_stay_apart", lambda self: False)
    model = on_gpu(tiny_directory("llama"), torch.bfloat16)
    with (
        pytest.raises(InvalidRequest, match=r"batch_invariant: got true with .*bfloat16 on .*cuda"),
        engine(model, batch_invariant=True) as running,
    ):
        running.ready.result(100)
