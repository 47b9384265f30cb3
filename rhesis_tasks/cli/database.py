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

    from ..postgres.engines import new_engine
    from ..settings import redacted

    made = new_engine(url)
    try:
        yield made
    except OperationalError as error:
        raise DatabaseUnavailableError(f"cannot connect to {redacted(made.url)}: {error.orig}") from error
    except DBAPIError as error:
        refused = getattr(error.orig, "sqlstate", None) == "42501"
        reason = str(error.orig).partition("\n")[0]
        raise (MissingPrivilegeError if refused else ConfigurationError)(f"{redacted(made.url)}: {reason}") from error
    finally:
        made.dispose()
