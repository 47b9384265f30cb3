"""Database and broker URLs: the forms people have, and the one form each library wants.

The only place that takes URLs apart.  Passwords never appear in what :func:`redacted` returns or in errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .errors import ConfigurationError, MissingExtraError

__all__ = [
    "DEFAULT_SCHEMA",
    "async_database_url",
    "broker_url",
    "database_url",
    "is_postgresql",
    "quote_identifier",
    "redacted",
    "rendered",
    "require_psycopg",
    "result_backend_url",
    "schema_name",
    "url_text",
]

DEFAULT_SCHEMA: Final = "rhesis_tasks"
"""The schema of the library's own tables."""

_SCHEMES: Final = frozenset({"postgres", "postgresql", "psycopg"})


def is_postgresql(url: str) -> bool:
    """Whether a URL, in any of the usual forms, names a PostgreSQL database."""
    return url.strip().partition("://")[0].partition("+")[0] in _SCHEMES


def url_text(url: object) -> str:
    """A URL as it was given to us, as a string with its password.

    Raises:
        ConfigurationError: it is neither a str nor SQLAlchemy's URL.
    """
    if isinstance(url, URL):
        return rendered(url)
    if not isinstance(url, str):
        raise ConfigurationError(
            f"a URL is a str or a sqlalchemy.URL, not {type(url).__name__}.  Pass str(url), or "
            "url.get_secret_value() of a secret"
        )
    return url


def database_url(url: str | URL) -> URL:
    """A PostgreSQL URL as SQLAlchemy and psycopg 3 want it.

    Understands ``postgres://``, ``postgresql://``, ``postgresql+psycopg://`` (or another driver's name, which is
    replaced), several hosts (``h1:5432,h2:5433``), unix sockets (``?host=/path``) and passwords with special
    characters, percent-encoded or not.

    Raises:
        ConfigurationError: it is not a PostgreSQL URL.
    """
    parsed = url if isinstance(url, URL) else _parsed(url_text(url).strip())
    if parsed.get_backend_name() not in _SCHEMES:
        raise ConfigurationError(
            f"a database URL looks like postgresql://user:password@host/database, not {redacted(parsed)}"
        )
    return parsed.set(drivername="postgresql+psycopg")


def async_database_url(url: str | URL) -> URL:
    """The same for asynchronous sessions: for asyncpg if the URL says ``postgresql+asyncpg``, else for psycopg.

    Raises:
        ConfigurationError: it is not a PostgreSQL URL.
        MissingExtraError: the driver is not installed.
    """
    plain = database_url(url)
    given = url if isinstance(url, URL) else _parsed(url.strip())
    if given.drivername.partition("+")[2] != "asyncpg":
        require_psycopg()
        return plain
    try:
        import asyncpg  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("asyncpg", "asyncpg") from error
    query = dict(plain.query)
    for libpqs, asyncpgs in (("sslmode", "ssl"), ("connect_timeout", "timeout")):
        if libpqs in query:
            query[asyncpgs] = query.pop(libpqs)
    return plain.set(drivername="postgresql+asyncpg", query=query)


def _parsed(url: str) -> URL:
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ConfigurationError(
            "a database URL looks like postgresql://user:password@host/database; the one given has no '://'"
        )
    # A password may hold '@', '/', '?' or '#' as they are: the credentials end at the last '@'.
    credentials, at, location = rest.rpartition("@")
    if at:
        user, colon, password = credentials.partition(":")
        credentials = quote(unquote(user), safe="") + (colon + quote(unquote(password), safe="") if colon else "")
    location, _, query = location.partition("?")
    hosts, _, database = location.partition("/")
    if "," in hosts:
        names, ports = zip(*(_host_and_port(host) for host in hosts.split(",")), strict=True)
        hosts = ""
        query = "&".join(filter(None, [query, f"host={','.join(names)}", f"port={','.join(ports)}"]))
    try:
        return make_url(f"{scheme}://{credentials}{at}{hosts}/{database}" + (f"?{query}" if query else ""))
    except (ArgumentError, ValueError):
        # Their texts may quote what is a password.
        raise ConfigurationError(
            f"the database URL (scheme {scheme!r}) cannot be read; it looks like "
            "postgresql://user:password@host:5432/database"
        ) from None


def _host_and_port(host: str) -> tuple[str, str]:
    match = re.fullmatch(r"(?P<name>\[[^]]+\]|[^:]*)(?::(?P<port>\d+))?", host)
    if match is None:
        raise ConfigurationError(f"{host!r} in the database URL is not a host or host:port")
    return match["name"].strip("[]"), match["port"] or "5432"


def redacted(url: str | URL) -> str:
    """The URL without its password, for logs and errors."""
    parsed = url if isinstance(url, URL) else _parsed(url)
    hidden = {name: "***" for name in parsed.query if "password" in name}  # libpq takes them there, too
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


def broker_url(url: str, schema: str = DEFAULT_SCHEMA) -> str:
    """A broker URL as kombu wants it, which names the schema; what is not PostgreSQL is returned as it is.

    Several URLs, one of which is used, are separated by ``;``.
    """
    several = re.split(r";(?=[a-z][a-z0-9+.]*://)", url.strip())  # and not one inside of a password
    if len(several) > 1:
        return ";".join(broker_url(each, schema) for each in several)
    if not is_postgresql(url):
        return url
    require_psycopg()
    # kombu takes a '+' in the scheme apart, so the driver stays out of it.
    parsed = database_url(url).set(drivername="postgresql")
    if schema != DEFAULT_SCHEMA and "schema" not in parsed.query:
        parsed = parsed.update_query_dict({"schema": schema})
    return rendered(parsed)


def result_backend_url(url: str) -> str:
    """A result backend URL as Celery wants it; what is not PostgreSQL is returned as it is."""
    if not is_postgresql(url):
        return url
    require_psycopg()
    # Celery takes a '+' in the scheme apart, so the driver stays out of it.
    return rendered(database_url(url).set(drivername="postgresql"))


def rendered(url: URL) -> str:
    """The URL as a string, with its password, that reads back as the same.

    (SQLAlchemy 2.0.22 leaves ``?``, ``#`` and ``%`` in a password as they are.)
    """
    scheme, separator, location = url._replace(username=None, password=None).render_as_string().partition("://")
    credentials = "" if url.username is None else quote(url.username, safe="")
    if url.password is not None:
        credentials += f":{quote(str(url.password), safe='')}"
    return scheme + separator + (f"{credentials}@" if credentials else "") + location


def require_psycopg() -> None:
    """Raises MissingExtraError if psycopg 3 is not installed."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("psycopg", "postgres") from error


def schema_name(name: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """The schema of the library's tables: the argument, else RHESIS_TASKS_SCHEMA, else ``rhesis_tasks``.

    Raises:
        ConfigurationError: it is not a lower-case SQL name.
    """
    name = name or environ.get("RHESIS_TASKS_SCHEMA") or DEFAULT_SCHEMA
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise ConfigurationError(f"schema {name!r} is not a lower-case SQL name of at most 63 characters")
    return name


def quote_identifier(name: Any) -> str:
    """A name as SQL wants it quoted; ``schema.table`` is not taken apart.

    Raises:
        ConfigurationError: it is not a non-empty string of at most 63 bytes.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or len(name.encode()) > 63:
        raise ConfigurationError(f"{name!r:.80} is not an SQL name of 1 to 63 bytes")
    return '"' + name.replace('"', '""') + '"'
