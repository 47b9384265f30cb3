"""Engines that survive a fork."""

from __future__ import annotations

import functools
import os
import weakref
from typing import Any, Final

from sqlalchemy import Engine, Pool, create_engine

from ..settings import database_url, require_psycopg

__all__ = ["forget_pool_after_fork", "new_engine", "shared_engine"]

CONNECT_TIMEOUT: Final = 5
"""Seconds within which a connection of the library's own must be made, unless the URL says otherwise."""


def new_engine(url: Any, **options: Any) -> Engine:
    """An engine for a PostgreSQL URL in any usual form, safe to inherit by a fork.

    Raises:
        MissingExtraError: psycopg is not installed.
        ConfigurationError: it is not a PostgreSQL URL.
    """
    require_psycopg()
    engine = create_engine(database_url(url), **{"pool_pre_ping": True, **options})
    forget_pool_after_fork(engine)
    return engine


@functools.cache
def shared_engine(url: str) -> Engine:
    """The library's own engine for a URL, one in the process: Celery makes a result backend for each thread."""
    # A server that accepts and then says nothing would keep a launch waiting for ever.
    timeout = {} if "connect_timeout" in database_url(url).query else {"connect_timeout": CONNECT_TIMEOUT}
    return new_engine(url, connect_args=timeout)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_inherited: list[Pool] = []  # kept, so that no driver closes or complains of a parent's connection it deletes


def forget_pool_after_fork(engine: Engine) -> None:
    """Let a forked child start with an empty pool: the sockets in it are its parent's."""
    _engines.add(engine)


def _forget_pools() -> None:
    for engine in list(_engines):
        _inherited.append(engine.pool)
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_pools)
