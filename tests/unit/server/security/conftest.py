"""Certificates for the tests of this directory."""

from __future__ import annotations

import pytest

from tests.certificates import Authority, Pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def own(authority: Authority) -> Pair:
    """The server's certificate, and its key."""
    return authority.issue("server", "localhost", "127.0.0.1")
