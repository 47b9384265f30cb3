"""The database that a command is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, DatabaseUnavailableError, MissingPrivilegeError

if TYPE_CHECKING:
    from sqlalchemy import Engine

__all__ = ["engine"]


@contextmanager
def engine(url: str) -> Iterator[Engine]:
    """An engine for one command; errors of its database are ours."""
    from sqlalchemy.exc import DBAPIError, OperationalError

    from ..postgres.engines import CONNECT_TIMEOUT, new_engine
    from ..settings import database_url, redacted

    # A server that accepts and then says nothing would keep the command for ever.
    is_bounded = "connect_timeout" in database_url(url).query
    made = new_engine(url, connect_args={} if is_bounded else {"connect_timeout": CONNECT_TIMEOUT})
    try:
        yield made
    except OperationalError as error:
        raise DatabaseUnavailableError(f"cannot connect to {redacted(made.url)}: {error.orig}") from error
    except DBAPIError as error:
        reason = f"{redacted(made.url)}: {str(error.orig).partition(chr(10))[0]}"
        if getattr(error.orig, "sqlstate", None) == "42501":
            raise MissingPrivilegeError(f"{reason}.  Give the URL of the tables' owner, as --database-url") from error
        raise ConfigurationError(reason) from error
    finally:
        made.dispose()
