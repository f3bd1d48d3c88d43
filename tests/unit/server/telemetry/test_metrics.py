"""What /metrics shows is what happened."""

from __future__ import annotations

import asyncio
import itertools
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from griffin_client import GriffinClientError, Started
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.model.load import Model
from griffin_server.telemetry.metrics import FINE, Metrics
from tests.servers import Running, eventually, free_port, running

STATED = [
    "griffin_time_to_first_token_seconds",
    "griffin_inter_token_latency_seconds",
    "griffin_e2e_request_seconds",
    "griffin_request_queue_seconds",
    "griffin_prefill_seconds",
    "griffin_expert_selection_seconds",
    "griffin_slim_build_seconds",
    "griffin_handoff_seconds",
    "griffin_handoff_bytes",
    "griffin_decode_step_seconds",
    "griffin_batch_size",
    "griffin_ff_density_ratio",
    "griffin_expert_norm_mass_ratio",
    "griffin_expert_jaccard_ratio",
    "griffin_sessions",
    "griffin_slim_view_bytes",
    "griffin_kv_cache_bytes",
    "griffin_prompt_tokens",
    "griffin_generated_tokens",
    "griffin_requests",
    "griffin_rejections",
    "griffin_aborts",
    "grpc_server_started",
    "grpc_server_handled",
    "grpc_server_msg_received",
    "grpc_server_msg_sent",
    "grpc_server_handling_seconds",
]
"""Names of families, without the _total of counters."""


class Scraped:
    """A server and what it shows."""

    def __init__(self, server: Running, port: int) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def sample(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name that have these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@pytest.fixture
def scraped(tiny: Callable[[str], Model]) -> Iterator[Scraped]:
    port = free_port()
    with running(tiny("llama"), metrics_port=port, max_queue=0, max_sessions=1) as server:
        yield Scraped(server, port)


def test_every_stated_family_is_there_from_the_start(scraped: Scraped) -> None:
    families = {f.name for f in text_string_to_metric_families(scraped.get("/metrics"))}
    assert set(STATED) <= families


def test_prefill_servers_show_the_same_families(tiny: Callable[[str], Model]) -> None:
    port = free_port()
    with running(tiny("llama"), role="prefill", metrics_port=port) as server:
        shown = Scraped(server, port).get("/metrics")
    assert set(STATED) <= {f.name for f in text_string_to_metric_families(shown)}


def test_a_completion_is_counted_once_in_everything_it_has(scraped: Scraped) -> None:
    client = scraped.server.client()
    for number in range(3):
        list(
            client.generate(
                token_ids=range(number, number + 20),
                density=0.5,
                max_tokens=6,
                ignore_eos=True,
            )
        )
    client.score([1, 2, 3], [4, 5], density=0.5)
    want = {
        "griffin_requests_total": 4,
        "griffin_prompt_tokens_total": 60 + 3,
        "griffin_generated_tokens_total": 18,
        "griffin_time_to_first_token_seconds_count": 3,
        "griffin_inter_token_latency_seconds_count": 15,
        "griffin_e2e_request_seconds_count": 3,
        "griffin_request_queue_seconds_count": 3,
        "griffin_slim_build_seconds_count": 3,
        "griffin_prefill_seconds_count": 4,
        "griffin_expert_selection_seconds_count": 4,
        "griffin_expert_jaccard_ratio_count": 3,
        "griffin_aborts_total": 0,
        "griffin_rejections_total": 0,
    }
    assert {name: scraped.sample(name) for name in want} == want
    assert scraped.sample("griffin_requests_total", finish_reason="MAX_TOKENS", code="OK") == 3
    assert scraped.sample("griffin_requests_total", finish_reason="SCORED") == 1
    assert scraped.sample("griffin_decode_step_seconds_count") == scraped.sample(
        "griffin_batch_size_sum"
    )
    for layer in "012":
        assert scraped.sample("griffin_ff_density_ratio_count", layer=layer) == 3
        assert scraped.sample("griffin_ff_density_ratio_sum", layer=layer) == pytest.approx(
            3 * (1 + 5 * 0.5) / 6  # the first token of six comes of the dense prompt
        )
        assert 1.5 < scraped.sample("griffin_expert_norm_mass_ratio_sum", layer=layer) < 3
    generate = {"grpc_method": "Generate", "grpc_type": "server_stream"}
    eventually(lambda: scraped.sample("grpc_server_handled_total", **generate, grpc_code="OK") == 3)
    assert scraped.sample("grpc_server_started_total", **generate) == 3
    assert scraped.sample("grpc_server_msg_sent_total", **generate) == 3 * (1 + 6 + 1)


def test_bad_input_a_cancel_and_a_deadline_are_told_apart(scraped: Scraped) -> None:
    client = scraped.server.client()
    endless = {"max_tokens": 200, "ignore_eos": True}
    with pytest.raises(GriffinClientError):
        list(client.generate(token_ids=[1, 2], top_p=7.0))
    for event in client.generate(token_ids=[1, 2], **endless):
        if isinstance(event, Started):
            break  # closes the call
    eventually(lambda: scraped.sample("griffin_aborts_total", origin="client") == 1)
    with pytest.raises(GriffinClientError):
        for _ in range(50):
            list(client.generate(token_ids=[1, 2], **endless, timeout=0.05))
    eventually(lambda: scraped.sample("griffin_aborts_total", origin="deadline") == 1)
    assert scraped.sample("griffin_rejections_total", reason="INVALID_REQUEST") == 1
    assert scraped.sample("griffin_rejections_total") == 1
    assert scraped.sample("griffin_requests_total", code="INVALID_ARGUMENT") == 1
    assert scraped.sample("griffin_requests_total", code="CANCELLED") == 1
    assert scraped.sample("griffin_requests_total", code="DEADLINE_EXCEEDED") == 1


def test_what_is_held_is_shown_while_it_is_held(scraped: Scraped) -> None:
    client = scraped.server.client()
    kept = list(client.generate(token_ids=range(30), density=0.5, keep_session=True))
    assert scraped.sample("griffin_sessions", state="idle") == 1
    assert scraped.sample("griffin_kv_cache_bytes") > 0
    client.close_session(kept[0].session_id)
    assert scraped.sample("griffin_sessions") == 0
    assert scraped.sample("griffin_kv_cache_bytes") == 0
    engine = scraped.server.app.engine
    assert scraped.sample("griffin_session_bytes_limit") == engine.session_bytes > 0


def test_a_handoff_is_counted_by_kind_and_way(tiny: Callable[[str], Model]) -> None:
    port, model = free_port(), tiny("llama")
    with (
        running(model, role="prefill") as prefill,
        running(model, role="decode", prefill_target=prefill.target, metrics_port=port) as decode,
    ):
        list(decode.client().generate(token_ids=range(40), density=0.5))
        shown = Scraped(decode, port)
        way = {"transport": "shared_memory"}
        kv = shown.sample("griffin_handoff_bytes_total", kind="kv", **way)
        assert kv == 3 * 2 * 2 * 16 * 40 * 4  # layers, K and V, heads, width, tokens, float32
        assert shown.sample("griffin_handoff_bytes_total", kind="experts", **way) == 3 * 44 * 4
        assert shown.sample("griffin_handoff_seconds_count") == 1
        assert shown.sample("griffin_prefill_seconds_count") == 0  # that is the other server's
        assert prefill.app.metrics.registry.get_sample_value("griffin_prefill_seconds_count") == 1


def test_health_follows_the_server(scraped: Scraped) -> None:
    assert scraped.get("/healthz") == "serving\n"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scraped.get("/")
    asyncio.run(scraped.server.app.listener.drain.drain(0.0))
    with pytest.raises(urllib.error.HTTPError, match="503"):
        scraped.get("/healthz")


def test_a_taken_port_is_named(scraped: Scraped, tiny: Callable[[str], Model]) -> None:
    port = int(scraped.url.rsplit(":", 1)[1])
    with (
        pytest.raises(Exception, match=f"metrics_port: cannot listen on 127.0.0.1:{port}"),
        running(tiny("llama"), metrics_port=port),
    ):
        pass


def test_a_gain_of_a_quarter_shows_between_buckets() -> None:
    assert all(later / earlier <= 1.15 for earlier, later in itertools.pairwise(FINE[:52]))
    assert FINE[0] == 1e-3 and FINE[51] == pytest.approx(1.0, rel=1e-3)


def test_overlap_is_taken_of_prompts_that_kept_as_many() -> None:
    def set_of(*experts: int) -> SlimSpec:
        return SlimSpec.of_layers(8, torch.tensor([experts], dtype=torch.int32))

    metrics = Metrics()
    for experts in ((0, 1), (0, 1, 2), (1, 2), tuple(range(8)), tuple(range(8)), (0, 1, 5)):
        metrics.chose(set_of(*experts))
    registry: CollectorRegistry = metrics.registry
    assert registry.get_sample_value("griffin_expert_jaccard_ratio_count") == 2
    total = registry.get_sample_value("griffin_expert_jaccard_ratio_sum")
    assert total == pytest.approx(1 / 3 + 2 / 4)


def test_labels_name_no_session_and_no_request(scraped: Scraped) -> None:
    client = scraped.server.client()

    def ask(request_id: str) -> str:
        stopping = {"max_tokens": 2, "ignore_eos": True}
        (started, *_) = client.generate(token_ids=range(5), request_id=request_id, **stopping)
        assert isinstance(started, Started)
        return started.session_id

    names = [ask("id-of-the-first")]
    first = scraped.get("/metrics").splitlines()
    names += [ask(f"id-{number}-of-many") for number in range(10)]
    shown = scraped.get("/metrics")
    assert len(shown.splitlines()) == len(first)
    assert not any(name in shown for name in (*names, "id-of-the-first", "of-many"))
