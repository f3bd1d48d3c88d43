"""A handoff with values that are not finite, and with right checksums, is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from griffin_client import GriffinClient, Unavailable
from griffin_core.model.load import Model
from griffin_server.transfer.codec import HandoffWriter
from tests.servers import running

FOUR = {"max_tokens": 4, "ignore_eos": True}
PROMPT = tuple(range(20))


@pytest.fixture(scope="module", params=["messages", "shared_memory"])
def client(request: pytest.FixtureRequest, tiny: Callable[[str], Model]) -> Iterator[GriffinClient]:
    model = tiny("llama")
    with (
        running(model, role="prefill") as prefill,
        running(
            model, role="decode", prefill_target=prefill.target, handoff=request.param
        ) as decode,
        decode.client() as client,
    ):
        yield client


class Spoiled:
    """Puts a value into one place of each handoff, before its checksum is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: str, value: float) -> None:
        self.value = value
        self.done = 0
        self._whole = {name: getattr(HandoffWriter, name) for name in ("kv", "experts", "finished")}
        field = {"kv": "kv", "experts": "sums", "finished": "last_hidden"}[place]

        def spoiled(writer: HandoffWriter, event: Any, *rest: Any) -> Any:
            values = getattr(event, field).clone()
            if getattr(event, "layer", 1) == 1:  # one of three layers
                values.view(-1)[-1] = value
                self.done += 1
            return self._whole[place](writer, replace(event, **{field: values}), *rest)

        monkeypatch.setattr(HandoffWriter, place, spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["kv", "experts", "finished"])
def test_values_that_are_not_finite_are_refused(
    place: str, value: float, client: GriffinClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = client.complete(token_ids=PROMPT, density=0.5, **FOUR)
    with monkeypatch.context() as patched:
        spoiled = Spoiled(patched, place, value)
        with pytest.raises(Unavailable) as caught:
            client.complete(token_ids=PROMPT, density=0.5, **FOUR)
    assert spoiled.done and caught.value.reason == "HANDOFF_BROKEN"
    again = client.complete(token_ids=PROMPT, density=0.5, **FOUR)
    assert again.token_ids == quiet.token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_least_and_the_largest_value_show_each_of_them(
    dtype: torch.dtype, value: float
) -> None:
    """What the receiver relies on, wherever the value is."""
    for at in (0, 77, 199):
        values = torch.ones(2, 4, 50, dtype=dtype)[:, :, ::2]
        values[at % 2, at % 4, at % 25] = value
        low, high = torch.aminmax(values)
        assert not torch.isfinite(low) & torch.isfinite(high)
