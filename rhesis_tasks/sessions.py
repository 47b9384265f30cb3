"""SQLAlchemy sessions that belong to one tenant.

Each transaction of a :class:`TenantSession` begins by sending the tenant as transaction-local settings, which
row-level-security policies read (see :mod:`rhesis_tasks.rls`).  Transaction-local, so nothing is left on a
pooled connection, also behind PgBouncer in transaction mode.  What could make the settings vanish or be
ignored (autocommit, a superuser, a borrowed transaction) is refused before any statement of the caller runs.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, overload

from celery._state import get_current_task
from celery.local import Proxy
from sqlalchemy import URL, Connection, Engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, SessionTransaction
from typing_extensions import override

from .context import TenantContext, current_tenant, require_tenant, same_tenant
from .errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    NotConfiguredError,
    TaskDefinitionError,
    TenantConflictError,
    TenantSessionError,
    UnsafeConnectionError,
)
from .postgres.engines import forget_pool_after_fork, new_engine
from .rls import ORGANIZATION_SETTING
from .settings import redacted

if TYPE_CHECKING:
    from celery import Celery, Task

__all__ = [
    "BIND_TENANT",
    "TenantSession",
    "TenantSessions",
    "sessions_of",
    "tenant_session",
    "use_sessions",
]

USER_SETTING: Final = "app.current_user"
PROJECT_SETTING: Final = "app.current_project"

# One round trip: sends the tenant and asks what would make the database ignore it.
BIND_TENANT: Final = text(
    f"SELECT set_config('{ORGANIZATION_SETTING}', :organization_id, true), "
    f"set_config('{USER_SETTING}', :user_id, true), "
    f"set_config('{PROJECT_SETTING}', :project_id, true), "
    "current_setting('is_superuser'), current_user"
)
_BYPASSES: Final = text("SELECT rolbypassrls FROM pg_roles WHERE rolname = current_user")
_CHECKED: Final = "rhesis_tasks.bypassrls_checked"  # in the info of a physical connection
_ASKED: Final = "rhesis_tasks.asked"  # in the info of a session that has asked for a connection ...
_BEGUN: Final = "rhesis_tasks.begun"  # ... and that has got one with a transaction


def tenant_settings(tenant: TenantContext) -> dict[str, str]:
    """The parameters of BIND_TENANT.  A user or project that is not known is sent as the empty string, so
    that one set earlier on the same transaction cannot stay."""
    return {
        "organization_id": tenant.organization_id,
        "user_id": tenant.user_id or "",
        "project_id": tenant.project_id or "",
    }


class TenantSession(Session):
    """A Session whose every transaction carries one tenant, fixed at construction.

    Made by :class:`TenantSessions`.

    Raises:
        MissingTenantError: at construction, if no tenant is given and none is active.
        TenantSessionError: it is given somebody's connection with an open transaction.
        UnsafeConnectionError: when a transaction begins, if the connection cannot enforce the tenant.
        TenantConflictError: before a statement, while another tenant is active.
    """

    def __init__(self, *args: Any, tenant: TenantContext | None = None, **kwargs: Any) -> None:
        _refuse_connection(kwargs.get("bind", args[0] if args else None))
        self._tenant = tenant if tenant is not None else require_tenant()
        kwargs["close_resets_only"] = False  # a closed session that reopened would keep its tenant
        super().__init__(*args, **kwargs)

    @property
    def tenant(self) -> TenantContext:
        """The tenant, the same for the session's whole life."""
        return self._tenant

    @override
    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """As Session's, asked before each statement; refused for somebody's Connection, or another tenant's code."""
        _refuse_other_tenant(self._tenant)
        bind = super().get_bind(*args, **kwargs)
        _refuse_connection(bind)
        self.info[_ASKED] = True
        return bind


def _refuse_other_tenant(tenant: TenantContext) -> None:
    active = current_tenant()
    if active is not None and not same_tenant(active, tenant):
        raise TenantConflictError(
            f"this session belongs to {tenant}, but the running code works for {active}.  Open a session inside "
            "tenant_scope(...) for each tenant",
            first=tenant,
            second=active,
        )


def _refuse_connection(bind: object) -> None:
    if isinstance(bind, Connection):
        # The settings would stay on that transaction after this session's commit.
        raise TenantSessionError(
            "a tenant session opens its own transactions; it cannot join a Connection.  Give it an Engine"
        )


@event.listens_for(TenantSession, "after_begin", propagate=True, insert=True)
def _bind_tenant(session: TenantSession, transaction: SessionTransaction, connection: Connection) -> None:
    if transaction.nested:
        return  # a savepoint lives in a transaction that has the settings already
    try:
        _send_tenant(session.tenant, connection)
    except BaseException:
        # SQLAlchemy has registered the connection by now: if the caller swallowed the error, its next
        # statement would run without a tenant.  Invalidated, it raises PendingRollbackError instead.
        connection.invalidate()
        raise
    session.info[_BEGUN] = True


def _send_tenant(tenant: TenantContext, connection: Connection) -> None:
    # The driver is asked, since SQLAlchemy does not know of autocommit set in a connect listener.
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise UnsafeConnectionError(
            "the connection is in autocommit mode, in which the tenant would vanish after one statement.  Use an "
            "engine without isolation_level='AUTOCOMMIT' for tenant sessions"
        )
    sent = tenant_settings(tenant)
    row = connection.execute(BIND_TENANT, sent).one()
    if tuple(row[:3]) != (sent["organization_id"], sent["user_id"], sent["project_id"]):
        raise UnsafeConnectionError("the server did not keep the tenant's settings")
    if row[3] == "on":
        raise UnsafeConnectionError(
            "the login is a superuser, whom row-level security does not bind.  Connect as an application role "
            "that is neither superuser nor owner of the tables nor BYPASSRLS"
        )
    if connection.info.get(_CHECKED) != row[4]:  # once for each role that the connection acts as
        if connection.execute(_BYPASSES).scalar_one():
            raise UnsafeConnectionError(
                "the login has BYPASSRLS, so that row-level security does not bind it.  Connect as an application "
                "role without it"
            )
        connection.info[_CHECKED] = row[4]


class TenantSessions:
    """Sessions of one database, each for the tenant it is opened for; for web processes and workers alike.

    Safe to create before a fork: a forked child starts with an empty pool.

    Args:
        url_or_engine: a PostgreSQL URL in any usual form, or the application's own Engine.
        session_class: the application's own Session class.
        engine_options: for ``sqlalchemy.create_engine``, if a URL is given.

    Raises:
        ConfigurationError: it is neither a PostgreSQL URL nor an Engine for PostgreSQL.
        MissingExtraError: psycopg is not installed.
    """

    def __init__(
        self,
        url_or_engine: str | URL | Engine,
        *,
        session_class: type[Session] = Session,
        **engine_options: Any,
    ) -> None:
        if isinstance(url_or_engine, Engine):
            if engine_options:
                raise ConfigurationError("engine options go with a URL; an Engine has its own already")
            if url_or_engine.dialect.name != "postgresql":
                raise ConfigurationError(f"tenant sessions need PostgreSQL, not {url_or_engine.dialect.name}")
            self.engine = url_or_engine
            forget_pool_after_fork(self.engine)
        else:
            self.engine = new_engine(url_or_engine, **engine_options)
        self._session_class = _tenant_class(session_class)

    def __repr__(self) -> str:
        return f"TenantSessions({redacted(self.engine.url)!r})"

    def __call__(self, tenant: TenantContext | None = None) -> TenantSession:
        """A new session, to be closed by the caller (``with sessions() as db:``), who also commits.

        Args:
            tenant: by default the active one.

        Raises:
            MissingTenantError: there is none.
        """
        return self._session_class(bind=self.engine, tenant=tenant)

    @contextmanager
    def begin(self, tenant: TenantContext | None = None) -> Iterator[TenantSession]:
        """A session with one transaction: committed at the end, rolled back on any exception, always closed."""
        with self(tenant) as session:
            try:
                with session.begin():
                    yield session
            except OperationalError as error:
                if _BEGUN in session.info or _ASKED not in session.info:
                    raise  # it was reached and something else is wrong, or it is another database's error
                raise DatabaseUnavailableError(
                    f"cannot connect to {redacted(self.engine.url)}: {error.orig}", url=redacted(self.engine.url)
                ) from error

    def dispose(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()


def _tenant_class(session_class: type[Session]) -> type[TenantSession]:
    """A Session class of the application's, made to carry the tenant."""
    if session_class is Session:
        return TenantSession
    if issubclass(session_class, TenantSession):
        return session_class
    return type(f"Tenant{session_class.__name__}", (TenantSession, session_class), {})


# --- which sessions a decorated function uses ------------------------------------------------------------------

_by_app: weakref.WeakKeyDictionary[Celery, TenantSessions] = weakref.WeakKeyDictionary()


def use_sessions(app: Celery, sessions: TenantSessions | None) -> None:
    """Let tasks of ``app`` use these sessions; None takes them away."""
    if sessions is None:
        _by_app.pop(app, None)
    else:
        _by_app[app] = sessions


def sessions_of(app: Celery) -> TenantSessions:
    """The sessions that ``app`` was configured with.

    Raises:
        NotConfiguredError: it was configured without a PostgreSQL database.
    """
    try:
        return _by_app[app]
    except KeyError:
        raise NotConfiguredError(
            f"application {app.main!r} has no tenant sessions.  Call rhesis_tasks.configure(app, database_url) or "
            "configure(app, ..., sessions=TenantSessions(...))"
        ) from None


def _ambient_sessions() -> TenantSessions:
    task: Any = get_current_task()
    if task is not None:
        return sessions_of(task.app)
    known = set(_by_app.values())
    if len(known) == 1:
        return known.pop()
    if not known:
        raise NotConfiguredError("no tenant sessions are configured.  Call rhesis_tasks.configure(app, database_url)")
    raise NotConfiguredError(
        f"{len(known)} databases are configured; outside of a task say which: @tenant_session(sessions=...)"
    )


# --- the decorator ---------------------------------------------------------------------------------------------

P = ParamSpec("P")
R = TypeVar("R")
TaskT = TypeVar("TaskT", bound="Task[Any, Any]")


@overload
def tenant_session(
    function: Callable[Concatenate[TaskT, TenantSession, P], R], /
) -> Callable[Concatenate[TaskT, P], R]: ...
@overload
def tenant_session(function: Callable[Concatenate[TenantSession, P], R], /) -> Callable[P, R]: ...
@overload
def tenant_session(
    *, param: str = "db", sessions: TenantSessions | None = None
) -> Callable[[Callable[..., R]], Callable[..., R]]: ...
def tenant_session(
    function: Callable[..., Any] | None = None,
    /,
    *,
    param: str = "db",
    sessions: TenantSessions | None = None,
) -> Callable[..., Any]:
    """Give a function a session of the active tenant, in one transaction for the call.

    Committed when the function returns, rolled back when it raises, closed either way.  The parameter is
    filled in by name and taken out of the signature, so that callers, and Celery's check of arguments, never
    see it.  On a task it goes below ``@app.task``::

        @app.task(base=BaseTask, bind=True)
        @tenant_session
        def rename(self, db: Session, test_set_id: str, name: str) -> None: ...

    Args:
        param: the parameter that takes the session.
        sessions: by default those of the task's application; outside of a task, those of the one database
            that is configured.

    Raises:
        TaskDefinitionError: when it is applied, if the function has no such parameter, is ``async def`` or is
            a task already.
        MissingTenantError: when it is called, if no tenant is active.
    """
    if function is None:
        return functools.partial(_inject_session, param=param, sessions=sessions)
    return _inject_session(function, param=param, sessions=sessions)


def _inject_session(function: Callable[..., Any], *, param: str, sessions: TenantSessions | None) -> Callable[..., Any]:
    position, signature = _without(function, param)

    @functools.wraps(function)
    def call_with_session(*args: Any, **kwargs: Any) -> Any:
        if param in kwargs:
            raise TypeError(f"{function.__name__}() gets {param!r} from @tenant_session; do not pass it")
        with (sessions or _ambient_sessions()).begin() as session:
            if position is not None and len(args) >= position:
                return function(*args[:position], session, *args[position:], **kwargs)
            return function(*args, **kwargs, **{param: session})

    call_with_session.__signature__ = signature  # type: ignore[attr-defined]
    call_with_session.__annotations__ = {
        name: annotation for name, annotation in function.__annotations__.items() if name != param
    }
    return call_with_session


def _without(function: Callable[..., Any], param: str) -> tuple[int | None, inspect.Signature]:
    """Where the parameter stands (None if it is keyword-only), and the signature without it."""
    if isinstance(function, Proxy) or hasattr(function, "apply_async"):
        raise TaskDefinitionError("@tenant_session goes below @app.task: it wraps the function, not the task")
    name = getattr(function, "__qualname__", repr(function))
    if not callable(function):
        raise TaskDefinitionError(f"@tenant_session wraps a function, not {name}")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TaskDefinitionError(f"@tenant_session cannot wrap {name}: async functions are not supported yet")
    if inspect.isgeneratorfunction(function):
        raise TaskDefinitionError(
            f"@tenant_session cannot wrap {name}: the session would be closed before the generator runs"
        )
    signature = inspect.signature(function)
    found = signature.parameters.get(param)
    if found is None or found.kind in (found.VAR_POSITIONAL, found.VAR_KEYWORD):
        raise TaskDefinitionError(
            f"{name}{signature} has no parameter {param!r} to take the session.  Add one, or name it: "
            "@tenant_session(param=...)"
        )
    remaining = [parameter for parameter in signature.parameters.values() if parameter is not found]
    position = None if found.kind is found.KEYWORD_ONLY else list(signature.parameters).index(param)
    return position, signature.replace(parameters=remaining)
