"""On which PostgreSQL servers the tests of a module run."""

from __future__ import annotations

import pytest

__all__ = ["ON_BOTH_SERVERS"]

# As pytestmark: on the embedded server, and on the one that is installed (Debian's PostgreSQL 15).
ON_BOTH_SERVERS = pytest.mark.parametrize(
    "postgres_url", ["embedded", pytest.param("installed", marks=pytest.mark.newest_only)], indirect=True
)
