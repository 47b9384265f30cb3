"""A database transaction and its tenant: sent at its beginning, checked, and named in what the database refuses.

Usable with any SQLAlchemy connection; sessions are one floor up.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import weakref
from datetime import timedelta
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Connection, Engine, TextClause, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import NullPool, SingletonThreadPool, StaticPool, reset_none

from .context import TenantContext, current_tenant, same_tenant
from .errors import (
    ConfigurationError,
    PermissionDeniedError,
    PolicyViolationError,
    SettingMissingError,
    SettingValueError,
    TenantConflictError,
    TenantDatabaseError,
    TenantSessionError,
    UnsafeConnectionError,
)
from .postgres.engines import cancel_interrupted
from .rls import ORGANIZATION_SETTING, setting_literal

__all__ = [
    "IsolationLevel",
    "SettingNames",
    "Transaction",
    "bind_nobody",
    "bind_tenant",
    "refuse_other_tenant",
    "refuse_tenant",
    "refuse_unsafe_pool",
    "watch",
]

IsolationLevel: TypeAlias = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
_LEVELS: Final = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
_LONGEST: Final = 2**31 // 1000 - 1  # seconds; PostgreSQL counts milliseconds in 32 bits

_BYPASSES: Final = text("SELECT rolbypassrls FROM pg_roles WHERE rolname = current_user")
_CHECKED: Final = "rhesis_tasks.bypassrls_checked"  # in the info of a physical connection


@dataclasses.dataclass(frozen=True, slots=True)
class SettingNames:
    """The names of the settings in which a transaction carries its tenant, as policies read them.

    Raises:
        ConfigurationError: one is not like ``app.current_organization``, or two are the same.
    """

    organization: str = ORGANIZATION_SETTING
    user: str = "app.current_user"
    project: str = "app.current_project"

    def __post_init__(self) -> None:
        names = dataclasses.astuple(self)
        for name in names:
            setting_literal(name)
        if len({name.lower() for name in names}) < len(names):  # as the database compares them
            raise ConfigurationError(f"each setting needs its own name, not {', '.join(names)}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """How the transactions of a session are begun.

    Args:
        readonly: writes are refused by the database.
        isolation_level: READ COMMITTED, REPEATABLE READ or SERIALIZABLE; by default the database's.
        statement_timeout: seconds after which the database cancels a statement.
        lock_timeout: seconds after which it gives up to wait for a lock.

    Raises:
        ConfigurationError: the level is not one of these, a time-out is not positive, or ``readonly`` no bool.
    """

    readonly: bool = False
    isolation_level: IsolationLevel | None = None
    statement_timeout: float | timedelta | None = None
    lock_timeout: float | timedelta | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.readonly, bool):
            raise ConfigurationError(f"readonly is True or False, not {self.readonly!r}")
        if self.isolation_level is not None and self.isolation_level not in _LEVELS:
            raise ConfigurationError(f"isolation_level is one of {', '.join(_LEVELS)}, not {self.isolation_level!r}")
        for name in ("statement_timeout", "lock_timeout"):
            _milliseconds(name, getattr(self, name))

    def execution_options(self) -> dict[str, Any]:
        """What SQLAlchemy tells the driver, which costs no round trip."""
        options: dict[str, Any] = {}
        if self.isolation_level is not None:
            options["isolation_level"] = self.isolation_level
        if self.readonly:
            options["postgresql_readonly"] = True
        return options

    def settings(self) -> dict[str, str]:
        """What goes with the tenant, in the same statement."""
        timeouts = {name: _milliseconds(name, getattr(self, name)) for name in ("statement_timeout", "lock_timeout")}
        return {name: f"{value}ms" for name, value in timeouts.items() if value is not None}


def _milliseconds(name: str, value: Any) -> int | None:
    if value is None:
        return None
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.001 <= seconds <= _LONGEST:
        raise ConfigurationError(f"{name} takes seconds, at least 0.001, or a timedelta, not {value!r:.40}")
    return round(seconds * 1000)


PLAIN: Final = Transaction()


# --- at the beginning of a transaction ---------------------------------------------------------------------------


def bind_tenant(
    connection: Connection, tenant: TenantContext, names: SettingNames, transaction: Transaction = PLAIN
) -> None:
    """Give the transaction that has just begun its tenant; one round trip.

    Raises:
        UnsafeConnectionError: the connection cannot enforce it.  It is invalid by then: if the caller swallowed the
            error, the next statement would run without a tenant.
    """
    try:
        _send(connection, tenant, names, transaction.settings())
    except BaseException:
        connection.invalidate()
        raise
    _bound[connection] = _Bound(tenant, names)


def bind_nobody(connection: Connection) -> None:
    """Know the transaction that has just begun as a system session's."""
    _bound[connection] = _Bound(None, SettingNames())


def _send(connection: Connection, tenant: TenantContext, names: SettingNames, more: dict[str, str]) -> None:
    # The driver is asked, since SQLAlchemy does not know of autocommit set in a connect listener.
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise UnsafeConnectionError(
            "the connection is in autocommit mode, in which the tenant would vanish after one statement.  Use an "
            "engine without isolation_level='AUTOCOMMIT' for tenant sessions"
        )
    # A user or project that is not known is sent as the empty string, so that one set earlier on the same transaction
    # cannot stay.
    sent = {
        names.organization: tenant.organization_id,
        names.user: tenant.user_id or "",
        names.project: tenant.project_id or "",
        **more,
    }
    values = {f"value_{position}": value for position, value in enumerate(sent.values())}
    row = connection.execute(_statement(tuple(sent)), values).one()
    if tuple(row[:3]) != tuple(values.values())[:3]:
        raise UnsafeConnectionError("the server did not keep the tenant's settings")
    is_superuser, role = row[-2:]
    if is_superuser == "on":
        raise UnsafeConnectionError(
            "the login is a superuser, whom row-level security does not bind.  Connect as an application role "
            "that is neither superuser nor owner of the tables nor BYPASSRLS"
        )
    if connection.info.get(_CHECKED) != role:  # once for each role that the connection acts as
        if connection.execute(_BYPASSES).scalar_one():
            raise UnsafeConnectionError(
                "the login has BYPASSRLS, so that row-level security does not bind it.  Connect as an application "
                "role without it"
            )
        connection.info[_CHECKED] = role


@functools.cache
def _statement(names: tuple[str, ...]) -> TextClause:
    """Sends settings, and asks what would make the database ignore the tenant."""
    columns = [f"set_config('{name}', :value_{position}, true)" for position, name in enumerate(names)]
    return text(f"SELECT {', '.join(columns)}, current_setting('is_superuser'), current_user")


def refuse_other_tenant(tenant: TenantContext) -> None:
    """Raise TenantConflictError if the running code works for another tenant than a session's."""
    active = current_tenant()
    if active is not None and not same_tenant(active, tenant):
        raise TenantConflictError(
            f"this session belongs to {tenant}, but the running code works for {active}.  Open a session inside "
            "tenant_scope(...) for each tenant",
            first=tenant,
            second=active,
        )


def refuse_tenant() -> None:
    """Raise TenantSessionError if the running code works for a tenant, where a session is nobody's."""
    tenant = current_tenant()
    if tenant is not None:
        raise TenantSessionError(
            f"a system session is nobody's, but the running code works for {tenant}.  Read what is needed outside of "
            "tenant_scope(...), in a task with system=True, and open a tenant session inside of it"
        )


def refuse_unsafe_pool(engine: Engine) -> None:
    """Raise ConfigurationError if the engine's pool may lend a connection in the middle of somebody's transaction.

    To several sessions at once, or as a session came back that nobody has closed.
    """
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        raise ConfigurationError(
            f"{type(engine.pool).__name__} lends one connection to several sessions at once, so that one's tenant "
            "would become the other's.  Leave poolclass out, or use NullPool"
        )
    if engine.pool._reset_on_return is reset_none and not isinstance(engine.pool, NullPool):
        raise ConfigurationError(
            "with pool_reset_on_return=None an open transaction, and its tenant, would be lent to the next caller.  "
            "Leave pool_reset_on_return out"
        )


# --- what the database refuses -----------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Bound:
    """What a connection has been given."""

    tenant: TenantContext | None  #: None for a system session's
    names: SettingNames
    is_over: bool = False  #: the transaction has ended


_bound: weakref.WeakKeyDictionary[Connection, _Bound] = weakref.WeakKeyDictionary()
_watched: weakref.WeakSet[Engine] = weakref.WeakSet()


def watch(engine: Engine) -> None:
    """Look at each statement of this engine's tenant and system transactions, and at each error of the tenants'.

    A statement is refused for code that works for another tenant (in a system transaction: for any), and in a
    transaction that somebody has begun on the connection itself, which nobody has given the tenant.  An error says what
    it has to do with the tenant, and the remedy.
    """
    if engine in _watched:
        return
    _watched.add(engine)
    event.listen(engine, "before_cursor_execute", _refuse_statement)
    event.listen(engine, "handle_error", _explain, retval=True)
    cancel_interrupted(engine)
    for ending in ("commit", "rollback", "commit_twophase", "rollback_twophase"):
        event.listen(engine, ending, _end)


def _end(connection: Connection, *_: Any) -> None:
    bound = _bound.get(connection)
    if bound is not None:
        bound.is_over = True


def _refuse_statement(connection: Connection, *_: Any) -> None:
    bound = _bound.get(connection)
    if bound is None:
        return
    if bound.tenant is None:
        refuse_tenant()
    else:
        refuse_other_tenant(bound.tenant)
    if bound.is_over:
        carries = "is not the system's" if bound.tenant is None else "carries no tenant"
        raise TenantSessionError(
            f"this transaction was begun on the session's connection, and {carries}.  Commit and roll back by the "
            "session: db.commit(), not db.connection().commit()"
        )


def _explain(context: ExceptionContext) -> TenantDatabaseError | None:
    connection = context.connection
    bound = None if connection is None else _bound.get(connection)
    if (
        bound is None
        or bound.tenant is None
        or isinstance(getattr(context, "chained_exception", None), TenantDatabaseError)
    ):
        return None
    orig = context.original_exception
    found = _explanation(orig, bound.tenant, bound.names)
    if found is None:
        return None
    kind, remedy = found
    return kind(
        f"{_first_line(orig)}, in a transaction of {bound.tenant}.  {remedy}",
        tenant=bound.tenant,
        statement=context.statement,
        orig=orig,
    )


def _explanation(
    error: BaseException, tenant: TenantContext, names: SettingNames
) -> tuple[type[TenantDatabaseError], str] | None:
    """The kind of an error that has to do with the tenant, and what to do.

    Told apart by what is the same in all languages that a server speaks: the SQLSTATE, and where in the server it was
    raised.
    """
    message = _first_line(error)
    match getattr(error, "sqlstate", None):
        case "42501" if _raised_in(error) == "ExecWithCheckOptions":
            return PolicyViolationError, (
                "The row belongs to another organization, or to none.  Leave its organization out where the column has "
                "the tenant as its default (TenantMixin), or set it to that of the session: db.tenant.organization_id"
            )
        case "42501" if _raised_in(error) == "exec_stmt_raise":
            if not message.startswith("no tenant: "):
                return None  # by the application's own function
            return SettingMissingError, (
                f"Tenant sessions send {names.organization}, and the strict policy reads another setting.  Give "
                "enable_rls(setting=...) and TenantSessions(setting_names=...) the same name"
            )
        case "42501":
            return PermissionDeniedError, (
                "Grants say which tables, policies which rows: GRANT what is missing to the application's role, and "
                "USAGE on the schema"
            )
        case "42704" if _raised_in(error) in _READS_SETTING:
            return SettingMissingError, (
                f"Tenant sessions send {names.organization}, {names.user} and {names.project}.  Let the policy or "
                "query read one of these, as NULLIF(current_setting('...', true), ''), or name it in TenantSessions("
                "setting_names=...)"
            )
        case "22P02" if _last_quoted(message) == "":
            return SettingValueError, (
                "A setting is empty (there is no user or project, or nobody has sent it on this connection), or a "
                "parameter of the statement is.  Let the policy or query read NULLIF(current_setting('...', true), '')"
            )
        case "22P02" if _last_quoted(message) in {tenant.organization_id, tenant.user_id, tenant.project_id} - {None}:
            return SettingValueError, (
                "The tenant's id has another type than the column that the policy or query compares it with.  Use ids "
                "of that type, or another column_type= in enable_rls"
            )
    return None


_READS_SETTING: Final = frozenset({"GetConfigOptionByName", "find_option", "show_config_by_name"})


def _raised_in(error: BaseException) -> str | None:
    """The function of the server's that raised an error."""
    diagnosis = getattr(error, "diag", None)  # psycopg's
    if diagnosis is not None:
        return getattr(diagnosis, "source_function", None)
    return getattr(error.__cause__, "server_source_function", None)  # asyncpg's, which SQLAlchemy has wrapped


_QUOTES: Final = "\"'«»‹›„“”‚‘’「」『』"  # noqa: RUF001


def _last_quoted(message: str) -> str | None:
    """What a message ends with in quotation marks, those of whatever language."""
    found = re.search(rf"[{_QUOTES}]\s*([^{_QUOTES}]*?)\s*[{_QUOTES}]\W*$", message)
    return None if found is None else found[1]


def _first_line(error: BaseException) -> str:
    text = str(error)
    if error.__cause__ is not None and getattr(error, "diag", None) is None:
        text = str(error.__cause__)  # without the name of asyncpg's class
    return text.partition("\n")[0]
