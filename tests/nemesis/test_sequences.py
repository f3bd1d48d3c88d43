"""Faults one after the other and at once, with traffic, as hypothesis draws them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.nemesis.clocks import hurried
from tests.nemesis.faults import FAULTS, Heal
from tests.nemesis.judge import Traffic, check_call
from tests.nemesis.world import World

DRAWS = 20

SHORT = [
    fault
    for fault in FAULTS
    if not any(word in fault.name for word in ("decode server", "calls of one client", "no room"))
]
"""Faults that may come together."""


class Sequence(RuleBasedStateMachine):
    """A world in which faults begin and end while clients call."""

    world: World

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.traffic = Traffic(self.world, self.draw)
        self.heals: dict[str, Heal] = {}
        self.codes: set[str] = set()

    @rule(fault=st.sampled_from(SHORT))
    @precondition(lambda self: len(self.heals) < 2)
    def a_fault_begins(self, fault: Any) -> None:
        # Faults of one kind hold each other's place: a proxy has one mode, the spoiler one way, and
        # a process that has ended cannot be stopped.
        kind = fault.inject.__qualname__
        if fault.name.startswith("prefill server") and "calls" not in fault.name:
            kind = "the process of a prefill server"
        if kind not in self.heals:
            self.heals[kind] = fault.inject(self.world, self.draw)
            self.codes |= fault.codes

    @rule()
    @precondition(lambda self: self.heals)
    def a_fault_ends(self) -> None:
        self.heals.pop(next(iter(self.heals)))()

    def teardown(self) -> None:
        if not hasattr(self, "traffic"):
            return
        try:
            for heal in self.heals.values():
                heal()
        finally:
            calls = self.traffic.end()
        # With two faults at once there may be no server left to read a prompt.
        codes = frozenset(self.codes | {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})
        for call, quiet in calls:
            check_call(call, quiet, codes)
        self.world.settle()


@pytest.mark.parametrize(
    "drawn_anew",
    [
        pytest.param(False, marks=[pytest.mark.e2e, pytest.mark.alone]),
        pytest.param(True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(600)
def test_any_sequence_of_faults_leaves_calls_typed_and_nothing_behind(
    drawn_anew: bool, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    world = World(tmp_path, str(tiny_directory("llama-long")), hurried(2))

    class InThisWorld(Sequence):
        pass

    InThisWorld.world = world
    try:
        run_state_machine_as_test(
            InThisWorld,
            settings=settings(
                max_examples=DRAWS,
                stateful_step_count=6,
                deadline=None,
                derandomize=not drawn_anew,
                print_blob=True,
                # To shrink a sequence would take long.
                phases=(Phase.explicit, Phase.reuse, Phase.generate),
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        world.close()
