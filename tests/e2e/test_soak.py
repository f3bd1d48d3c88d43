"""Minutes of load on real processes: `make test-slow`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable

import psutil
import pytest

from griffin_client import AsyncGriffinClient, GriffinClient, Tokens
from griffin_core.model.load import Model
from tests.e2e.test_load import PROMPT, prefill_command, several
from tests.servers import Process, eventually, free_port, running
from tests.unit.core.engines import at_baseline

pytestmark = pytest.mark.slow

SOAK_S, FILL_S, SETTLE_S = 300.0, 240.0, 120.0
STREAMS = 64
DENSITIES = (1.0, 0.75, 0.5)


@pytest.mark.timeout(SOAK_S + FILL_S + SETTLE_S + 180)
async def test_64_streams_for_five_minutes_leave_memory_flat_and_nothing_behind() -> None:
    """On SmolLM2. Memory is the server's resident set, in the first minute and in the last, counted
    from two minutes after unused slim views have filled what they may: until then it grows by
    design, and what the allocator keeps between them still does (docs/LOG.md)."""
    port = free_port()
    memory = ("--session-memory-gib", "4")  # filled within minutes
    with Process("--max-sessions", str(STREAMS), "--metrics-port", str(port), *memory) as server:
        target = server.target()
        process = psutil.Process(server.pid)
        resident: list[tuple[float, int]] = []
        done: Counter[str] = Counter()
        clock = time.monotonic()
        full = asyncio.Event()

        def left() -> float:
            return SOAK_S - (time.monotonic() - clock) if full.is_set() else SOAK_S

        def views_held() -> float:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            sizes = dict(line.split() for line in text.splitlines() if line[:8] == "griffin_")
            held = float(sizes["griffin_slim_view_bytes"]) + float(sizes["griffin_kv_cache_bytes"])
            return held / float(sizes["griffin_session_bytes_limit"])

        async with AsyncGriffinClient(target, max_retries=0) as client:

            async def stream(number: int) -> None:
                draw = random.Random(number)
                while left() > 0:
                    tokens = draw.randint(16, 64)
                    made = 0
                    async for event in client.generate(
                        token_ids=[draw.randrange(1000, 40_000) for _ in range(256)],
                        density=draw.choice(DENSITIES),
                        sharing=draw.choice(("private", "shared", "auto")),
                        temperature=draw.choice((0.0, 0.8)),
                        seed=number,
                        **several(tokens),
                    ):
                        made += len(event.ids) if isinstance(event, Tokens) else 0
                    assert made == tokens
                    done["requests"] += 1
                    done["tokens"] += made

            async def watch() -> None:
                nonlocal clock
                for _ in range(int(FILL_S)):
                    if await asyncio.to_thread(views_held) >= 0.95:
                        break
                    await asyncio.sleep(1)
                await asyncio.sleep(SETTLE_S)
                clock = time.monotonic()
                full.set()
                while left() > 0:
                    resident.append((time.monotonic() - clock, process.memory_info().rss))
                    await asyncio.sleep(1)

            await asyncio.gather(watch(), *(stream(number) for number in range(STREAMS)))
            assert await client.list_sessions() == []
        first = statistics.median(rss for at, rss in resident if at < 60)
        last = statistics.median(rss for at, rss in resident if at >= SOAK_S - 60)
        print(
            f"{done['requests']} requests, {done['tokens']} tokens; resident {first / 1e6:.0f} MB "
            f"in the first minute, {last / 1e6:.0f} MB in the last"
        )
        assert last < 1.05 * first
        server.terminate()
        assert server.wait() == 0


@pytest.mark.timeout(300)
def test_prefill_servers_killed_every_20_seconds_fail_no_request_and_change_no_token(
    tiny: Callable[[str], Model], tiny_directory: Callable[[str], object]
) -> None:
    model = tiny("llama-long")
    command = prefill_command(str(tiny_directory("llama-long")))
    prompts = [PROMPT[: 500 + 250 * number] for number in range(8)]
    with running(model, density=0.5) as alone, alone.client() as client:
        expected = [client.complete(token_ids=p, **several(20)).token_ids for p in prompts]
    with (
        contextlib.ExitStack() as stack,
        Process(*command) as one,
        Process(*command) as other,
        running(
            model, role="decode", density=0.5, prefill_target=[one.target(), other.target()]
        ) as decode,
    ):
        servers = decode.app.prefill_router.clients
        processes, done, failures = [one, other], Counter(), []
        until = time.monotonic() + 130

        def stream(number: int) -> None:
            with GriffinClient(decode.target, max_retries=0) as client:
                while time.monotonic() < until:
                    try:
                        made = client.complete(token_ids=prompts[number], **several(20), timeout=60)
                        assert made.token_ids == expected[number]
                        done["requests"] += 1
                    except Exception as error:
                        failures.append(error)
                        return

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for kill in range(6):
            threads[0].join(20)
            busy = kill % 2
            processes[busy].kill()
            done["kills"] += 1
            port = servers[busy].target.rpartition(":")[2]
            processes[busy] = stack.enter_context(Process(*command, "--port", port))
            processes[busy].target()
        for thread in threads:
            thread.join(90)
        assert failures == []
        assert done["kills"] == 6 and done["requests"] > 50
        print(f"{done['requests']} requests, {done['kills']} kills")
        eventually(lambda: at_baseline(decode.app.engine))
