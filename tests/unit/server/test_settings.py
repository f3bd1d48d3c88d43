"""Settings: flag over environment over file, and mistakes named."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from griffin_server.settings import Settings, describe, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GRIFFIN_{name.upper()}", raising=False)


def test_memory_comes_from_the_device_unless_it_is_set() -> None:
    settings = load_settings([])
    memory = (settings.memory_fraction, settings.session_memory_gib, settings.idle_memory_gib)
    assert memory == (None, None, None)
    settings = load_settings(["--session-memory-gib", "2.5", "--idle-memory-gib", "0"])
    assert (settings.session_memory_gib, settings.idle_memory_gib) == (2.5, 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "griffin.toml"
    path.write_text('density = 0.1\nrole = "prefill"\nmax_queue = 3\n')
    return path


def test_everything_has_a_default() -> None:
    settings = load_settings([])
    assert (settings.role, settings.port, settings.density) == ("all", 50051, 1.0)
    assert settings.sampling_defaults == "greedy"
    assert settings.sharing == "auto"


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_DENSITY", "0.2")
    monkeypatch.setenv("GRIFFIN_MAX_QUEUE", "2")
    settings = load_settings(["--config", str(file), "--density", "0.3"])
    assert (settings.density, settings.max_queue, settings.role) == (0.3, 2, "prefill")


def test_the_file_may_be_named_by_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CONFIG", str(file))
    assert load_settings([]).density == 0.1


@pytest.mark.parametrize("name", sorted(Settings.model_fields.keys() - {"config"}))
def test_every_setting_is_a_flag_and_an_environment_variable_and_a_line_of_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "griffin.toml"
    bad = "no such value"
    monkeypatch.delenv("GRIFFIN_CONFIG", raising=False)
    free_text = name in (
        "model",
        "calibration",
        "device",
        "handoff_dir",
        "jwt_keys",
        "jwt_issuer",
        "jwt_audience",
    )
    for given in ("flag", "environment", "file"):
        arguments, text = [], ""
        monkeypatch.delenv(f"GRIFFIN_{name.upper()}", raising=False)
        if given == "flag":
            arguments = [f"--{name.replace('_', '-')}={bad}"]
        elif given == "environment":
            monkeypatch.setenv(f"GRIFFIN_{name.upper()}", bad)
        else:
            text = f'{name} = "{bad}"\n'
        if name.startswith("jwt_") and free_text:  # they come together
            others = {"jwt_keys", "jwt_issuer", "jwt_audience"} - {name}
            text = text + "".join(f'{other} = "x"\n' for other in others)
        path.write_text(text + ('role = "decode"\n' if name == "prefill_target" else ""))
        arguments += ["--config", str(path)]
        if free_text:
            assert str(getattr(load_settings(arguments), name)) == bad
        else:
            with pytest.raises((ValidationError, SystemExit)) as caught:
                load_settings(arguments)
            if isinstance(caught.value, ValidationError):
                assert name in describe(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--density", "0"], ["density", "'0'", "greater than 0"]),
        (["--density", "1.5"], ["density", "1.5", "less than or equal to 1"]),
        (["--density", "nan"], ["density", "nan"]),
        (["--role", "both"], ["role", "both", "'all', 'prefill' or 'decode'"]),
        (["--port", "70000"], ["port", "70000", "65535"]),
        (["--max-sessions", "0"], ["max_sessions", "0"]),
        (["--role", "decode"], ["prefill_target", "None", "role decode needs one"]),
        (["--prefill-target", "a:1"], ["prefill_target", "'a:1'", "other roles take none"]),
        (["--policy", "best"], ["policy", "best", "topk"]),
        (["--memory-fraction", "0"], ["memory_fraction", "'0'", "greater than 0"]),
        (["--memory-fraction", "1.5"], ["memory_fraction", "1.5", "less than or equal to 1"]),
        (["--session-memory-gib", "0"], ["session_memory_gib", "'0'", "greater than 0"]),
        (["--idle-memory-gib", "-1"], ["idle_memory_gib", "-1", "greater than or equal to 0"]),
        (["--threads", "3000000000"], ["threads", "3000000000", "1024"]),
        (["--max-request-bytes", "99999999999"], ["max_request_bytes", "2147483647"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        load_settings(arguments)
    for word in words:
        assert word in describe(caught.value)


def test_an_unknown_key_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "griffin.toml"
    path.write_text("densty = 0.5\n")
    with pytest.raises(ValidationError, match="densty"):
        load_settings(["--config", str(path)])


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--densty", "0.5"])
    assert caught.value.code == 2
    assert "--densty" in capsys.readouterr().err


def test_a_missing_file_is_no_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_settings(["--config", str(tmp_path / "none.toml")])


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "griffin.toml"
    path.write_text("density = \n")
    with pytest.raises(ValueError, match="line 1"):
        load_settings(["--config", str(path)])


def test_the_old_name_of_a_setting_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings(["--own-prefill-tokens", "7"]).local_prefill_max_tokens == 7
    both = ["--own-prefill-tokens", "7", "--local-prefill-max-tokens", "8"]
    assert load_settings(both).local_prefill_max_tokens == 8
    path = tmp_path / "griffin.toml"
    path.write_text("own_prefill_tokens = 9")
    assert load_settings(["--config", str(path)]).local_prefill_max_tokens == 9
    monkeypatch.setenv("GRIFFIN_OWN_PREFILL_TOKENS", "10")
    assert load_settings([]).local_prefill_max_tokens == 10
