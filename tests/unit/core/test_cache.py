"""The cache of conversions: whole or not there, and no trouble where it cannot be written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from griffin_core.errors import BadModelFile, CacheUnusable
from griffin_core.model import hub as source
from griffin_core.model.conversion_cache import cache_directory, cached
from griffin_core.model.hub import resolve
from tests.gguf_files import contents_of, tiny_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own, with the cache at its default place, and temporary files beside it."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.delenv("GRIFFIN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path / "home"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return contents_of(tiny_model("llama")).write(tmp_path / "tiny.gguf")


def fill(target: Path) -> None:
    (target / "part").mkdir()
    (target / "part" / "a.txt").write_text("a")
    (target / "b.txt").write_text("bb")


def quiet(_: str) -> None:
    pass


def make(name: str = "x", fill: Callable[[Path], None] = fill) -> Path:
    return cached(name, fill, quiet, "making x")


def never(_: Path) -> None:
    raise AssertionError("made again")


def test_what_is_cached_is_made_once(home: Path) -> None:
    directory = make()
    assert directory == home / ".cache" / "griffin" / "models" / "x"
    assert make(fill=never) == directory
    assert [path.name for path in directory.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("damage", ["missing", "cut", "unlisted"])
def test_a_damaged_copy_is_made_anew(damage: str, home: Path) -> None:
    directory = make()
    match damage:
        case "missing":
            (directory / "part" / "a.txt").unlink()
        case "cut":
            (directory / "b.txt").write_text("b")
        case "unlisted":
            next(directory.glob(".*.json")).unlink()
    assert make() == directory
    assert (directory / "part" / "a.txt").read_text() == "a"
    assert (directory / "b.txt").read_text() == "bb"


def test_a_copy_has_the_permissions_of_the_cache(home: Path) -> None:
    models = home / ".cache" / "griffin" / "models"
    models.mkdir(parents=True)
    models.chmod(0o755)
    directory = make()
    assert directory.stat().st_mode & 0o777 == 0o755
    assert (directory / "b.txt").stat().st_mode & 0o777 == 0o644


def test_a_copy_in_a_cache_that_cannot_be_written_is_used(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make()

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert make(fill=never) == directory


@pytest.mark.parametrize("blocked", [".cache", ".cache/griffin", ".cache/griffin/models"])
def test_without_a_default_cache_the_copy_is_among_temporary_files(
    blocked: str, home: Path
) -> None:
    (home / blocked).parent.mkdir(parents=True, exist_ok=True)
    (home / blocked).write_text("in the way")
    told: list[str] = []
    directory = cached("x", fill, told.append, "making x")
    assert directory.is_relative_to(home.parent / "tmp")
    assert "cannot be written" in told[-1]
    assert str(home / ".cache" / "griffin") in told[-1]
    assert make(fill=never) == directory


def test_without_a_home_the_copy_is_among_temporary_files(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert cache_directory() is None
    assert make().is_relative_to(home.parent / "tmp")


def test_temporary_files_of_another_user_are_not_used(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".cache").write_text("in the way")
    theirs = home.parent / "theirs"
    theirs.mkdir()
    (home.parent / "tmp" / f"griffin-{os.getuid()}").symlink_to(theirs)
    make()
    assert not list(theirs.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "read-only", "full in safetensors"],
)
def test_a_cache_that_is_full_leaves_nothing_and_is_told(
    error: Exception, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(target: Path) -> None:
        fill(target)
        raise error

    with pytest.raises(CacheUnusable, match=r"GRIFFIN_CACHE_DIR.*griffin-\d+/models") as caught:
        make(fill=fails)
    assert str(error).rpartition("] ")[2] in str(caught.value)
    assert not [path for path in home.parent.rglob("*") if path.is_file()]

    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(home / "chosen"))
    with pytest.raises(CacheUnusable, match=r"GRIFFIN_CACHE_DIR.*home/chosen/models"):
        make(fill=fails)


@pytest.mark.parametrize("room", [100, 10_000, 100_000])
def test_a_conversion_that_finds_no_room_leaves_nothing(
    room: int, home: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(home / "cache"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # as a full disk, for files
    try:
        with pytest.raises(CacheUnusable, match="File too large"):
            resolve(str(gguf), torch.float32, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((home / "cache" / "models").iterdir()) == []
    assert Path(resolve(str(gguf), torch.float32, quiet), "model.safetensors").is_file()


@pytest.mark.parametrize("way", ["file", "file/below", "link"])
def test_a_chosen_cache_that_cannot_be_written_is_named(
    way: str, home: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("x")
    (home / "link").symlink_to(home / "link")
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(home / way))
    with pytest.raises(CacheUnusable, match=f"GRIFFIN_CACHE_DIR: .*{home / way}") as caught:
        resolve(str(gguf), torch.float32, quiet)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_refused_leaves_nothing(home: Path, gguf: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(BadModelFile):
        resolve(str(gguf), torch.float32, quiet)
    assert not [path for path in (home / ".cache").rglob("*") if path.is_file()]


def test_another_version_of_the_converter_makes_another_copy(
    home: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(str(gguf), torch.float32, quiet)
    assert resolve(str(gguf), torch.float32, quiet) == first
    monkeypatch.setattr(source, "CONVERTER_VERSION", source.CONVERTER_VERSION + 1)
    assert resolve(str(gguf), torch.float32, quiet) != first


def test_names_of_any_length_are_cached(home: Path, gguf: Path) -> None:
    long = gguf.rename(gguf.with_name("é" * 100 + ".gguf"))
    assert Path(resolve(str(long), torch.float32, quiet), "config.json").is_file()


_MAKER = """
import sys, time
from griffin_core.model.conversion_cache import cached

def fill(target):
    (target / "big").write_text("half")
    print("begun", flush=True)
    time.sleep(60)

cached(sys.argv[1], fill, lambda _: None, "making it")
"""


def begin(name: str) -> subprocess.Popen[str]:
    """A process that has begun to make ``name``."""
    process = subprocess.Popen(
        [sys.executable, "-c", _MAKER, name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_the_next_start_removes_what_killed_ones_have_left_and_nothing_else(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(home / "cache"))
    models = home / "cache" / "models"
    killed, living = begin("killed-one"), begin("living-one")
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list(models.glob(".killed-one-*"))) == 1
        make("another")
        assert not list(models.glob(".killed-one-*"))
        assert len(list(models.glob(".living-one-*/big"))) == 1
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate()
    make("another", fill=never)  # a start that makes nothing cleans up, too
    assert [path.name for path in models.iterdir()] == ["another"]


def test_of_two_that_make_the_same_both_get_it(home: Path) -> None:
    both = threading.Barrier(2)
    found: list[Path] = []

    def slow(target: Path) -> None:
        both.wait()
        fill(target)

    threads = [threading.Thread(target=lambda: found.append(make(fill=slow))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert sorted(path.name for path in found[0].iterdir() if path.name[0] != ".") == [
        "b.txt",
        "part",
    ]
    assert [path.name for path in found[0].parent.iterdir()] == ["x"]
