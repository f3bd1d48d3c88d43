"""The cache of converted models: directories that appear complete or not at all.

A conversion is written to a scratch directory next to its final path, and then renamed. The process
that writes it holds a lock on the scratch directory (flock), so that the next start can recognize
what a killed process has left.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from griffin_core.errors import CacheUnusable

_VARIABLE = "GRIFFIN_CACHE_DIR"
_MANIFEST = ".complete.json"


def cache_directory() -> Path | None:
    """``$GRIFFIN_CACHE_DIR``, else ``$XDG_CACHE_HOME/griffin``, else ``~/.cache/griffin``; None if
    there is no home directory either."""
    if path := os.environ.get(_VARIABLE):
        return Path(path)
    if path := os.environ.get("XDG_CACHE_HOME"):
        return Path(path) / "griffin"
    try:
        return Path.home() / ".cache" / "griffin"
    except RuntimeError:  # HOME is not set, and the user has no entry
        return None


def cached(
    name: str, make: Callable[[Path], None], progress: Callable[[str], None], what: str
) -> Path:
    """Returns the directory ``name`` of the cache, filled by ``make`` if it does not exist.

    If the default cache cannot be written, ``griffin-UID`` in the directory for temporary files is
    used instead.

    Args:
        name: must differ whenever the contents differ.
        make: writes into an empty directory; raises OSError or SafetensorError if it cannot.
        progress: called with what is made and where it is kept.
        what: a description for ``progress``, such as "converting x.gguf".

    Raises:
        CacheUnusable: the directory in ``GRIFFIN_CACHE_DIR`` cannot be written, or, if that is not
            set, none of the default places can.
    """
    places = []
    for place in _places():
        places.append(place / "models")
        _remove_abandoned(places[-1])
        if _is_whole(places[-1] / name):
            return places[-1] / name
    since = ""
    for models in places:
        progress(f"{what}, once; the copy is kept in {models}{since}")
        try:
            return _made(models / name, make)
        except (OSError, SafetensorError) as error:
            failed, reason = models, _reason(error)
            since = f", since {failed} cannot be written ({reason})"
    raise CacheUnusable(
        f"{_VARIABLE}: cannot write the cache {str(failed)!r} ({reason}); allowed: a directory "
        "that can be written, with room for a copy of the model"
    )


def _places() -> Iterator[Path]:
    """Yields places for the cache, the preferred one first; at least one."""
    place = cache_directory()
    if place is not None:
        yield place
        if os.environ.get(_VARIABLE):
            return
    temporary = Path(tempfile.gettempdir()) / f"griffin-{os.getuid()}"
    with suppress(OSError):
        temporary.mkdir(mode=0o700, exist_ok=True)
        # Another user may have created it first, to plant models there.
        if temporary.lstat().st_uid != os.getuid() or temporary.is_symlink():
            temporary = Path(tempfile.mkdtemp(prefix="griffin-"))
    yield temporary


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    models = target.parent
    models.mkdir(parents=True, exist_ok=True)
    with _scratch(target) as scratch:
        make(scratch)
        files = [path for path in scratch.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(scratch)): path.stat().st_size for path in files}
        (scratch / _MANIFEST).write_text(json.dumps(sizes))
        mode = models.stat().st_mode & 0o777
        with suppress(OSError):  # mkdtemp makes private directories, but a cache may be shared
            for path in (scratch / _MANIFEST, *files):
                path.chmod(mode & 0o666)
            scratch.chmod(mode)
        with _locked(models):
            if not _is_whole(target):  # otherwise another process has made the same contents
                shutil.rmtree(target, ignore_errors=True)
                scratch.rename(target)
    return target


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Creates an empty directory next to ``target``, and removes it when the context ends. If the
    process is killed, the next start removes it."""
    with _locked(target.parent):  # so that another start cannot remove it before it is locked
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        held = ExitStack()
        held.enter_context(_locked(scratch))
    with held:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(models: Path) -> None:
    """Removes scratch directories of processes that have ended."""
    with suppress(OSError), _locked(models):
        for scratch in models.glob(".*-*/"):
            with suppress(OSError), _locked(scratch, wait=False):
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a directory's lock; the system releases it when the process ends.

    Raises:
        OSError: the directory does not exist; or, with ``wait`` false, it cannot be locked.
    """
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process holds it, or this file system has no locks
            if not wait:
                raise
        yield
    finally:
        os.close(held)


def _is_whole(directory: Path) -> bool:
    """Returns whether the directory holds all files that were written, with their sizes."""
    try:
        sizes = json.loads((directory / _MANIFEST).read_text())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
