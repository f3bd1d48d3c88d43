"""Servers that go away in the middle of a run, are busy, or come back as something else; and runs
that are interrupted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from griffin_client import GriffinClient, ResourceExhausted
from griffin_core.model.load import Model
from griffin_evals import remote
from griffin_evals.errors import OtherModel, RequestRefused, ServerGone
from griffin_evals.journal import Journal
from griffin_evals.lm import GriffinLM
from tests.servers import eventually, free_port, running
from tests.unit.evals.requests import assert_close, completing, scoring

COUNT = 60
PAIRS = scoring(*((f"The council met on day {n}", " to talk about bridges") for n in range(COUNT)))


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOOK_S", 0.02)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Lets the first 20 scores of servers through, and the others when it is opened."""
    made = Gate()
    ask = GriffinClient.score

    def score(client: GriffinClient, *arguments: Any, **options: Any) -> Any:
        made.pass_through()
        made.asked[str(arguments)] += 1
        return ask(client, *arguments, **options)

    monkeypatch.setattr(GriffinClient, "score", score)
    return made


class Gate:
    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._open = threading.Event()
        self._tickets = threading.Semaphore(20)

    def pass_through(self) -> None:
        if not self._tickets.acquire(blocking=False):
            assert self._open.wait(30)

    def open(self) -> None:
        self._open.set()


def run(lm: GriffinLM) -> list[tuple[float, bool]]:
    return lm.loglikelihood(PAIRS, disable_tqdm=True)


def test_a_server_that_dies_and_returns_is_waited_for_and_nothing_asked_twice(
    gate: Gate, tiny: Callable[[str], Model], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    target = f"127.0.0.1:{port}"
    with ThreadPoolExecutor(1) as pool, Journal(tmp_path / "run.jsonl") as journal:
        with running(tiny("llama"), port=port):
            lm = GriffinLM(target=target, concurrency=4, journal=journal, wait_s=30)
            answers = pool.submit(run, lm)
            eventually(lambda: len(journal) == 20)
        gate.open()
        said = ""

        def waits() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return f"waiting for {target} (" in said

        eventually(waits)
        with running(tiny("llama"), port=port):
            after = answers.result(30)
        lm.close()
    assert (said + capfd.readouterr().err).count("waiting for") == 1
    here = GriffinLM(pretrained=tiny("llama"), threads=1)
    assert_close(after, run(here))
    here.close()
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert len(lines) == COUNT == len(gate.asked)
    # Only what was under way when it died was asked again, until it was there.
    assert sum(times > 1 for times in gate.asked.values()) <= 4


def test_a_server_that_does_not_return_ends_the_run_with_its_name(
    gate: Gate, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool, Journal(tmp_path / "run.jsonl") as journal:
        with running(tiny("llama")) as server:
            lm = GriffinLM(target=server.target, concurrency=4, journal=journal, wait_s=0.3)
            answers = pool.submit(run, lm)
            eventually(lambda: len(journal) == 20)
        gate.open()
        with pytest.raises(ServerGone, match=rf"{server.target} cannot be reached; waited \d s"):
            answers.result(30)
        lm.close()
    with running(tiny("llama")) as server:  # elsewhere; the answers there are not asked again
        gate.asked.clear()
        lm = GriffinLM(target=server.target, journal=tmp_path / "run.jsonl")
        run(lm)
        assert lm.figures()["from_journal"] == 20
        assert len(gate.asked) == COUNT - 20
        lm.close()


def test_a_server_that_returns_with_another_model_ends_the_run_with_both_names(
    gate: Gate, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool, Journal(tmp_path / "run.jsonl") as journal:
        with running(tiny("llama"), port=port):
            target = f"127.0.0.1:{port}"
            lm = GriffinLM(target=target, concurrency=4, journal=journal, wait_s=30)
            answers = pool.submit(run, lm)
            eventually(lambda: len(journal) == 20)
        gate.open()
        with running(tiny("qwen2"), port=port):
            words = rf"{target} now holds qwen2 \(\w+\); this run began with llama \(\w+\)"
            with pytest.raises(OtherModel, match=words):
                answers.result(30)
            with pytest.raises(OtherModel, match=words):  # nor is anything asked later on
                run(lm)
        assert len(journal) == 20
        lm.close()


def test_nothing_there_at_first_is_waited_for_too_and_the_journal_is_free_afterwards(
    tmp_path: Path,
) -> None:
    target, path = f"127.0.0.1:{free_port()}", str(tmp_path / "run.jsonl")
    with pytest.raises(ServerGone, match=f"{target} cannot be reached; waited 0 s"):
        GriffinLM(target=target, wait_s=0.1, journal=path)
    Journal(path).close()


def test_a_busy_server_is_asked_again_when_it_says(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny("llama"), max_sessions=1, max_queue=1) as server:
        lm = GriffinLM(target=server.target, concurrency=16)
        refused: list[float | None] = []
        asked = GriffinClient.score

        def score(self: GriffinClient, *arguments: Any, **options: Any) -> Any:
            try:
                return asked(self, *arguments, **options)
            except ResourceExhausted as error:
                refused.append(error.retry_after_s)
                raise

        monkeypatch.setattr(GriffinClient, "score", score)
        assert len(run(lm)) == COUNT
        assert refused and None not in refused
        lm.close()


def test_a_refused_request_ends_the_run_with_its_name_and_keeps_the_answers_before(
    tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    bad = completing("fine", "a" * 300, "fine too", max_gen_toks=2)
    with running(tiny("llama")) as server, Journal(tmp_path / "run.jsonl") as journal:
        lm = GriffinLM(target=server.target, concurrency=1, journal=journal)
        with pytest.raises(RequestRefused, match=r"made up, document 1: .*300 tokens"):
            lm.generate_until(bad, disable_tqdm=True)
        assert len(journal) >= 1
        lm.close()


@pytest.mark.parametrize("way", ["process", "server"])
def test_an_interrupted_run_goes_on_where_it_was(
    way: str, tiny: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.jsonl"
    put, most = Journal.put, 25

    def interrupted(journal: Journal, key: str, value: Any) -> None:
        if len(journal) == most:
            raise KeyboardInterrupt
        put(journal, key, value)

    with running(tiny("llama")) as server:
        where: dict[str, Any] = {
            "process": {"pretrained": tiny("llama"), "threads": 1},
            "server": {"target": server.target, "concurrency": 2},
        }[way]
        whole = GriffinLM(**where)
        expected = run(whole)
        whole.close()
        with monkeypatch.context() as patched, Journal(path) as journal:
            patched.setattr(Journal, "put", interrupted)
            lm = GriffinLM(**where, journal=journal)
            with pytest.raises(KeyboardInterrupt):
                run(lm)
            lm.close()
        with Journal(path) as journal:
            lm = GriffinLM(**where, journal=journal)
            answers = run(lm)
            assert lm.figures()["from_journal"] == most
            assert lm.figures()["scored_tokens"] == whole.figures()["scored_tokens"]
            lm.close()
    assert_close(answers, expected)
    assert len(path.read_text().splitlines()) == COUNT


def test_a_journal_tells_settings_and_models_apart_but_not_dense_settings(
    tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    with Journal(tmp_path / "run.jsonl") as journal:
        for name in ("llama", "qwen2"):
            lm = GriffinLM(pretrained=tiny(name), threads=1, journal=journal)
            for number, settings in enumerate(
                (
                    {},
                    {"density": 0.5},
                    {"density": 0.5, "score_mode": "classification"},
                    {"density": 0.5, "policy": "random"},
                    {"density": 0.5, "policy": "random", "seed": 1},
                ),
                start=1 if name == "llama" else 6,
            ):
                run(lm.with_settings(**settings))  # type: ignore[arg-type]  # by name
                assert len(journal) == number * COUNT
            for same in ({"policy": "random"}, {"density": 0.5, "seed": 3}):
                other = lm.with_settings(**same)  # type: ignore[arg-type]  # by name
                run(other)
                assert other.figures()["from_journal"] == COUNT
            lm.close()
