"""What gives shared memory to prefill servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from griffin_server.transfer.descriptors import DescriptorSocket


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of the sockets."""
    return tmp_path / "handoff"


@pytest.fixture
def giver(directory: Path) -> Iterator[DescriptorSocket]:
    """It leaves no file."""
    made = DescriptorSocket(directory)
    yield made
    made.close()
    assert list(directory.iterdir()) == []
