"""GRIFFIN_* variables that others put there, empty ones, and ones with a slip of the pen."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from griffin_server.environment import is_service_link, notes
from griffin_server.settings import Settings, describe, load_settings

KUBERNETES = {
    "GRIFFIN_SERVICE_HOST": "10.96.14.3",
    "GRIFFIN_SERVICE_PORT": "50051",
    "GRIFFIN_SERVICE_PORT_GRPC": "50051",
    "GRIFFIN_PORT": "tcp://10.96.14.3:50051",
    "GRIFFIN_PORT_50051_TCP": "tcp://10.96.14.3:50051",
    "GRIFFIN_PORT_50051_TCP_PROTO": "tcp",
    "GRIFFIN_PORT_50051_TCP_PORT": "50051",
    "GRIFFIN_PORT_50051_TCP_ADDR": "10.96.14.3",
    # Of a Service griffin-metrics, whose name makes that of another setting.
    "GRIFFIN_METRICS_SERVICE_HOST": "fd00::3",
    "GRIFFIN_METRICS_PORT": "tcp://[fd00::3]:9464",
    "GRIFFIN_METRICS_PORT_9464_TCP": "tcp://[fd00::3]:9464",
}
"""What the kubelet puts into a pod beside Services griffin and griffin-metrics."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GRIFFIN_{name.upper()}", raising=False)


def test_a_kubernetes_service_of_our_name_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KUBERNETES.items():
        assert is_service_link(name, value)
        monkeypatch.setenv(name, value)
    settings = load_settings([])
    assert (settings.port, settings.metrics_port) == (50051, 0)
    (note,) = notes(KUBERNETES, Settings.model_fields)
    assert note.startswith("GRIFFIN_METRICS_PORT, GRIFFIN_PORT in the environment")
    assert "Kubernetes" in note


@pytest.mark.parametrize("value", ["udp://10.0.0.1:53", "sctp://10.0.0.1:5060", "TCP://x:1"])
def test_a_service_of_another_protocol_is_one_too(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_PORT", value)
    assert load_settings([]).port == 50051


@pytest.mark.parametrize("value", ["http://10.0.0.1:80", "tcp://", "50051x", "tcp"])
def test_any_other_value_of_a_port_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_PORT", value)
    with pytest.raises(ValidationError) as caught:
        load_settings([])
    assert f"port: got '{value}'" in describe(caught.value)


def test_a_setting_that_is_no_port_is_not_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_ROLE", "decode")
    monkeypatch.setenv("GRIFFIN_PREFILL_TARGET", "tcp://prefill:50052")
    with pytest.raises(ValidationError, match=r"allowed: host:port"):
        load_settings([])


def test_a_flag_wins_over_a_kubernetes_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_PORT", "tcp://10.96.14.3:50051")
    assert load_settings(["--port", "7"]).port == 7


@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_empty_variable_is_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"GRIFFIN_{name.upper()}", "")
    assert load_settings([]) == Settings()


def test_a_slip_of_the_pen_is_told() -> None:
    environment = {
        "GRIFFIN_DENSTY": "0.5",
        "GRIFFIN_COLOUR": "red",
        "GRIFFIN_CACHE_DIR": "/cache",
        "GRIFFIN_TARGET": "localhost:1",
        "GRIFFIN_DENSITY": "0.5",
        "PATH": "/bin",
    }
    colour, densty = notes(environment, Settings.model_fields)
    assert "GRIFFIN_DENSTY" in densty and "did you mean GRIFFIN_DENSITY?" in densty
    assert "GRIFFIN_COLOUR" in colour


def test_of_a_clean_environment_nothing_is_said() -> None:
    assert notes({"PATH": "/bin", "GRIFFIN_PORT": "7"}, Settings.model_fields) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "127.0.0.1:50051"], ["host: got '127.0.0.1:50051'", "without port"]),
        (["--host", "http://a"], ["host: got 'http://a'", "allowed"]),
        (["--host="], ["host: got ''", "allowed"]),
        (["--metrics-host", "unix:/a"], ["metrics_host: got 'unix:/a'", "no Unix socket"]),
        (["--role", "decode", "--prefill-target", "prefill"], ["prefill_target", "host:port"]),
    ],
)
def test_a_bad_address_is_refused_by_name(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        load_settings(arguments)
    for word in words:
        assert word in describe(caught.value)
