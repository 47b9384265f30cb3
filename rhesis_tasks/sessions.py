"""SQLAlchemy sessions that belong to one tenant, and sessions that belong to none.

Each transaction of a :class:`TenantSession` begins by sending the tenant as transaction-local settings, which
row-level-security policies read (see :mod:`rhesis_tasks.rls`).  Transaction-local, so nothing is left on a
pooled connection, also behind PgBouncer in transaction mode.  What could make the settings vanish or be
ignored (autocommit, a superuser, a borrowed transaction) is refused before any statement of the caller runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypedDict, Unpack

from celery._state import get_current_task
from celery.signals import worker_init
from sqlalchemy import URL, Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker
from typing_extensions import override

from .binding import (
    PLAIN,
    IsolationLevel,
    SettingNames,
    Transaction,
    bind_nobody,
    bind_tenant,
    refuse_other_tenant,
    refuse_tenant,
    refuse_unsafe_pool,
    watch,
)
from .context import TenantContext, as_tenant, require_tenant
from .errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    NotConfiguredError,
    TenantDatabaseError,
    TenantSessionError,
    UnsafeConnectionError,
)
from .headers import RequestState, running
from .postgres.engines import (
    LoopEngines,
    OneLoopEngine,
    cut_busy,
    cut_lent,
    forget_pool_after_fork,
    new_engine,
)
from .settings import redacted

if TYPE_CHECKING:
    from datetime import timedelta

    from celery import Celery

__all__ = [
    "AsyncSystemSession",
    "AsyncTenantSession",
    "SystemSession",
    "TenantSession",
    "TenantSessions",
    "TransactionOptions",
    "ambient_sessions",
    "close_left_open",
    "require_sessions",
    "sessions_of",
    "use_sessions",
]

_ASKED: Final = "rhesis_tasks.asked"  # in the info of a session that has asked for a connection ...
_LENT: Final = "rhesis_tasks.lent"  # ... the connections that it has got
_BEGUN: Final = "rhesis_tasks.begun"  # ... and that their transactions have begun as they should
_log = logging.getLogger(__name__)
_system_log = logging.getLogger("rhesis_tasks.system")


class TransactionOptions(TypedDict, total=False):
    """The keyword arguments of :class:`~rhesis_tasks.binding.Transaction`: how a session's transactions are begun."""

    readonly: bool
    isolation_level: IsolationLevel | None
    statement_timeout: float | timedelta | None
    lock_timeout: float | timedelta | None


class _OptionsSession(Session):
    """A Session whose transactions are begun in a certain way, and never on somebody's connection."""

    def __init__(self, *args: Any, transaction: Transaction = PLAIN, **kwargs: Any) -> None:
        _refuse_connection(kwargs.get("bind", args[0] if args else None))
        self._transaction_options = transaction
        self._optioned: dict[Engine, Engine] = {}
        kwargs["close_resets_only"] = False  # a closed session that reopened would keep its tenant
        super().__init__(*args, **kwargs)
        _note(self)

    @override
    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """As Session's, asked before each statement; refused for somebody's Connection."""
        bind = super().get_bind(*args, **kwargs)
        _refuse_connection(bind)
        self.info[_ASKED] = True
        return self._with_options(bind)  # type: ignore[arg-type]

    @override
    def connection(
        self, bind_arguments: Mapping[str, Any] | None = None, execution_options: Mapping[str, Any] | None = None
    ) -> Connection:
        """As Session's, which would not ask for the bind where one is named."""
        bind = self.get_bind(**(bind_arguments or {}))
        return super().connection({"bind": bind}, execution_options)

    def _with_options(self, engine: Engine) -> Engine:
        """The engine with the session's options; the same one each time, since each has a connection of its own."""
        options = self._transaction_options.execution_options()
        if not options or engine in self._optioned.values():
            return engine
        if engine not in self._optioned:
            self._optioned[engine] = engine.execution_options(**options)
        return self._optioned[engine]


def _note(session: Session) -> None:
    """Know a session that a task's body has opened, in whatever thread; of an asynchronous one, the event loop."""
    state = running.get()
    if state is None:
        return
    if session.bind is None or not session.bind.dialect.is_async:
        state.sessions[session] = threading.get_ident()
    elif (loop := asyncio._get_running_loop()) is not None:
        state.loops.add(loop)


def close_left_open(state: RequestState) -> None:
    """Roll back and close what a task's body has left in the middle of a transaction, whatever it ended with.

    Called in the thread that has run the body.  Its own event loop has seen to its asynchronous sessions.
    """
    if not (state.sessions or state.loops):
        return
    for reference in state.sessions.keyrefs():  # a list: other threads may open more
        session = reference()
        if session is None or not session.in_transaction():
            continue
        _warn_left_open(state)
        try:
            if state.sessions[session] == threading.get_ident():
                session.close()
            else:
                _cut(session)
        except Exception:
            _log.exception("a session that was left open cannot be closed")
    for loop in tuple(state.loops):
        if loop.is_closed() and cut_lent(loop):  # such as that of asyncio.run()
            _warn_left_open(state)


def _warn_left_open(state: RequestState) -> None:
    _log.warning("task %s left a session open: its transaction is rolled back", getattr(state.task, "name", "-"))


def _cut(session: Session) -> None:
    """Cut the connections of a session that another thread may be using; what it does by it raises there."""
    for connection in tuple(session.info.get(_LENT, ())):
        cut_busy(connection)


class TenantSession(_OptionsSession):
    """A Session whose every transaction carries one tenant, fixed at construction.

    Made by :class:`TenantSessions`.

    Raises:
        MissingTenantError: at construction, if no tenant is given and none is active.
        TenantSessionError: it is given somebody's connection with an open transaction.
        UnsafeConnectionError: when a transaction begins, if the connection cannot enforce the tenant.
        TenantConflictError: before a statement, while another tenant is active.
        TenantDatabaseError: by a statement that the database refuses for a reason that has to do with the tenant.
    """

    def __init__(
        self,
        *args: Any,
        tenant: TenantContext | None = None,
        setting_names: SettingNames | None = None,
        **kwargs: Any,
    ) -> None:
        self._tenant = tenant if tenant is not None else require_tenant()
        self._setting_names = setting_names or SettingNames()
        super().__init__(*args, **kwargs)

    @property
    def tenant(self) -> TenantContext:
        """The tenant, the same for the session's whole life."""
        return self._tenant

    @override
    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """As Session's, asked before each statement; refused for somebody's Connection, or another tenant's code."""
        refuse_other_tenant(self._tenant)
        return super().get_bind(*args, **kwargs)

    @override
    def _with_options(self, engine: Engine) -> Engine:
        if engine not in self._optioned.values():  # those inherit it, and are made anew for each session
            refuse_unsafe_pool(engine)
            forget_pool_after_fork(engine)
            watch(engine)
        return super()._with_options(engine)

    @override
    def get(self, *args: Any, **kwargs: Any) -> Any:
        """As Session's; refused for another tenant's code, also where the object is loaded already."""
        refuse_other_tenant(self._tenant)
        return super().get(*args, **kwargs)

    @override
    def merge(self, *args: Any, **kwargs: Any) -> Any:
        """As Session's; refused for another tenant's code."""
        refuse_other_tenant(self._tenant)
        return super().merge(*args, **kwargs)

    @override
    def _identity_lookup(self, *args: Any, **kwargs: Any) -> Any:
        # By a relationship to one object, which is taken from memory if it is there.
        refuse_other_tenant(self._tenant)
        return super()._identity_lookup(*args, **kwargs)


def _refuse_connection(bind: object) -> None:
    if isinstance(bind, Connection | AsyncConnection):
        # The settings would stay on that transaction after this session's commit.
        raise TenantSessionError(
            "a tenant session opens its own transactions; it cannot join a Connection.  Give it an Engine"
        )


@event.listens_for(_OptionsSession, "after_transaction_end", propagate=True)
def _forget_connection(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(_ASKED, None)
        session.info.pop(_LENT, None)
        session.info.pop(_BEGUN, None)


@event.listens_for(TenantSession, "after_begin", propagate=True, insert=True)
def _bind(session: TenantSession, transaction: SessionTransaction, connection: Connection) -> None:
    if transaction.nested:
        return  # a savepoint lives in a transaction that has the settings already
    session.info.setdefault(_LENT, []).append(connection)
    bind_tenant(connection, session.tenant, session._setting_names, session._transaction_options)
    session.info[_BEGUN] = True


class AsyncTenantSession(AsyncSession):
    """An AsyncSession whose every transaction carries one tenant, as :class:`TenantSession`'s do."""

    sync_session_class = TenantSession

    @property
    def tenant(self) -> TenantContext:
        """The tenant, the same for the session's whole life."""
        return self.sync_session.tenant  # type: ignore[attr-defined,no-any-return]

    if not TYPE_CHECKING:  # type checkers refuse it by themselves, as long as there is no such method

        def __enter__(self):
            raise TenantSessionError(
                "this session is asynchronous, and `with` cannot open it.  In an async def task write "
                "`async with self.get_async_db_session() as db:`, elsewhere `async with`, and await its methods"
            )

        def __exit__(self, *_):
            """Python asks for it before it calls the other one."""


# --- of nobody ---------------------------------------------------------------------------------------------------


class SystemSession(_OptionsSession):
    """A Session for work across tenants, by a role that row-level security does not bind.

    Made by :meth:`TenantSessions.system_session`.

    Raises:
        UnsafeConnectionError: when a transaction begins, if row-level security binds the role: it would see nothing,
            and say nothing.
        TenantSessionError: before a statement, also of its connection, while a tenant is active.
    """

    def __init__(self, *args: Any, role: str | None = None, **kwargs: Any) -> None:
        self._role = role
        super().__init__(*args, **kwargs)

    @override
    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """As Session's, asked before each statement; refused for a tenant's code."""
        refuse_tenant()
        return super().get_bind(*args, **kwargs)

    @override
    def _with_options(self, engine: Engine) -> Engine:
        if engine not in self._optioned.values():
            watch(engine)
        return super()._with_options(engine)


class AsyncSystemSession(AsyncSession):
    """The same, asynchronous."""

    sync_session_class = SystemSession


_SEES_ALL: Final = text("SELECT rolsuper OR rolbypassrls, rolname FROM pg_roles WHERE rolname = current_user")


@event.listens_for(SystemSession, "after_begin", propagate=True, insert=True)
def _become_system(session: SystemSession, transaction: SessionTransaction, connection: Connection) -> None:
    if transaction.nested:
        return
    session.info.setdefault(_LENT, []).append(connection)
    settings = session._transaction_options.settings()
    if session._role is not None:
        settings["role"] = session._role
    try:
        for name, value in settings.items():
            connection.execute(text("SELECT set_config(:name, :value, true)"), {"name": name, "value": value})
        sees_all, role = connection.execute(_SEES_ALL).one()
        if not sees_all:
            raise UnsafeConnectionError(
                f"the role {role} of the system session is bound by row-level security, so that it would find no "
                "rows.  Give it BYPASSRLS"
            )
    except BaseException:
        connection.invalidate()
        raise
    bind_nobody(connection)
    session.info[_BEGUN] = True


# --- where they come from ----------------------------------------------------------------------------------------

Source: TypeAlias = str | URL | Engine | AsyncEngine | sessionmaker[Any] | async_sessionmaker[Any]
"""What a TenantSessions is made from."""


class TenantSessions:
    """Sessions of one database, each for the tenant it is opened for; for web processes and workers alike.

    Safe to create before a fork: a forked child starts with an empty pool.  Asynchronous sessions have an engine for
    each event loop, made when it is first needed.

    Args:
        source: a PostgreSQL URL in any usual form, or the application's own Engine, AsyncEngine, sessionmaker or
            async_sessionmaker.  From a URL both kinds of sessions are made; asynchronous ones by psycopg, or by asyncpg
            if the URL says ``postgresql+asyncpg``.
        async_engine: the application's own, besides a ``source`` for the synchronous sessions.  It serves one event
            loop.
        async_engine_options: those of ``engine_options`` that are others for ``create_async_engine``.
        session_class: the application's own Session class.
        async_session_class: its own AsyncSession class.
        setting_names: the settings that policies read.
        system: for :meth:`system_session`: the URL or Engine of another login.
        system_role: or a role that the login may change to (it has to be a member of it).
        engine_options: for ``create_engine`` and ``create_async_engine``, if a URL is given.

    Raises:
        ConfigurationError: it is nothing for PostgreSQL, or options do not go together.
        MissingExtraError: the driver is not installed.
    """

    def __init__(
        self,
        source: Source,
        *,
        async_engine: AsyncEngine | None = None,
        async_engine_options: Mapping[str, Any] | None = None,
        session_class: type[Session] = Session,
        async_session_class: type[AsyncSession] = AsyncSession,
        setting_names: SettingNames | None = None,
        system: str | URL | Engine | None = None,
        system_role: str | None = None,
        **engine_options: Any,
    ) -> None:
        self._options: dict[str, Any] = {}  # of each session
        self._async_options: dict[str, Any] = {}
        if isinstance(source, sessionmaker):
            source, session_class, self._options = _taken_apart(source)
        elif isinstance(source, async_sessionmaker):
            source, async_session_class, self._async_options = _taken_apart(source)
        self._url: str | URL | None = None
        self._engine_options = engine_options
        self._engine: Engine | None = None
        self._async_engines: LoopEngines | OneLoopEngine | None = None
        if isinstance(source, str | URL):
            self._url = source
            self._engine = new_engine(source, **engine_options)
            self._async_engine_options = {**engine_options, **(async_engine_options or {})}
            self._async_engines = LoopEngines(source, **self._async_engine_options)
        elif engine_options or async_engine_options:
            raise ConfigurationError("engine options go with a URL; an Engine has its own already")
        elif isinstance(source, AsyncEngine):
            if async_engine is not None:
                raise ConfigurationError("async_engine= goes with an Engine; this source is an AsyncEngine already")
            async_engine = source
        elif isinstance(source, Engine):
            self._engine = source
        else:
            raise ConfigurationError(
                "tenant sessions are made from a URL, an Engine, an AsyncEngine, a sessionmaker or an "
                f"async_sessionmaker, not {type(source).__name__}"
            )
        for engine in (self._engine, async_engine, system if isinstance(system, Engine) else None):
            if engine is not None and engine.dialect.name != "postgresql":
                raise ConfigurationError(f"tenant sessions need PostgreSQL, not {engine.dialect.name}")
        if system is not None and system_role is not None:
            raise ConfigurationError("system= is another login, system_role= a role of the same; give one of them")
        self._system_role = system_role
        self._system_engine = system if isinstance(system, Engine) else None
        self._system_loops: LoopEngines | None = None
        if isinstance(system, str | URL):
            self._system_engine = new_engine(system)
            self._system_loops = LoopEngines(system)
        elif system is not None and self._system_engine is None:
            raise ConfigurationError(f"system= takes a URL or an Engine, not {type(system).__name__}")
        for given in (self._engine, async_engine, self._system_engine):
            if given is not None:
                engine = given.sync_engine if isinstance(given, AsyncEngine) else given
                refuse_unsafe_pool(engine)
                forget_pool_after_fork(engine)
        if async_engine is not None:
            self._async_engines = OneLoopEngine(async_engine)
        self._setting_names = setting_names or SettingNames()
        self._session_class = _tenant_class(session_class)
        self._async_session_class = _async_tenant_class(async_session_class)

    def __repr__(self) -> str:
        engine = self._engine or getattr(self._async_engines, "engine", None)
        return f"TenantSessions({redacted(engine.url)!r})" if engine else "TenantSessions()"

    # --- synchronous -------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine of the synchronous sessions.

        Raises:
            ConfigurationError: they are made from an AsyncEngine.
        """
        if self._engine is None:
            raise ConfigurationError(
                "these sessions are asynchronous: they were made from an AsyncEngine.  Make them from a URL, or from "
                "an Engine and async_engine=..., to have both"
            )
        return self._engine

    def __call__(self, tenant: TenantContext | None = None, **transaction: Unpack[TransactionOptions]) -> TenantSession:
        """A new session, to be closed by the caller (``with sessions() as db:``), who also commits.

        Args:
            tenant: by default the active one.
            transaction: how its transactions are begun: ``readonly``, ``isolation_level``, ``statement_timeout`` and
                ``lock_timeout`` (seconds).

        Raises:
            MissingTenantError: there is none.
            ConfigurationError: there is no such isolation level, or a time-out is not positive.
        """
        return self._session_class(
            **{"bind": self.engine, **self._options},
            tenant=_tenant(tenant),
            setting_names=self._setting_names,
            transaction=Transaction(**transaction),
        )

    @contextmanager
    def begin(
        self, tenant: TenantContext | None = None, **transaction: Unpack[TransactionOptions]
    ) -> Iterator[TenantSession]:
        """A session that is committed at the end, rolled back on any exception, and always closed.

        The block may commit by itself in between, so that long work holds no transaction: the next statement begins
        another one, of the same tenant.
        """
        with self(tenant, **transaction) as session, _reaching(session, self.engine):
            yield session
            session.commit()

    @contextmanager
    def connection(
        self, tenant: TenantContext | None = None, **transaction: Unpack[TransactionOptions]
    ) -> Iterator[Connection]:
        """A Core connection in one transaction of the tenant's: committed at the end, rolled back on any exception."""
        tenant, options = _tenant(tenant), Transaction(**transaction)
        refuse_other_tenant(tenant)
        watch(self.engine)
        with ExitStack() as stack:
            with _connecting(self.engine):
                engine = self.engine.execution_options(**options.execution_options())
                connection = stack.enter_context(engine.begin())
            bind_tenant(connection, tenant, self._setting_names, options)
            yield connection

    # --- asynchronous ------------------------------------------------------------------------------------------

    def async_engine(self) -> AsyncEngine:
        """The engine of the running event loop's asynchronous sessions.

        Raises:
            ConfigurationError: they are made from an Engine, or the application's AsyncEngine serves another loop.
            RuntimeError: no event loop is running.
        """
        if self._async_engines is None:
            raise ConfigurationError(
                "these sessions are synchronous: they were made from an Engine.  Make them from a URL, or give them "
                "async_engine=... as well, to have both"
            )
        engine = self._async_engines.current()
        refuse_unsafe_pool(engine.sync_engine)
        return engine

    def async_session(
        self, tenant: TenantContext | None = None, **transaction: Unpack[TransactionOptions]
    ) -> AsyncTenantSession:
        """A new session, to be closed by the caller (``async with sessions.async_session() as db:``), who also commits.

        Raises:
            MissingTenantError: no tenant is given, and none is active.
            ConfigurationError: as :meth:`async_engine`, or as for a call.
        """
        tenant = _tenant(tenant)
        return self._async_session_class(
            **{"bind": self.async_engine(), **self._async_options},
            tenant=tenant,
            setting_names=self._setting_names,
            transaction=Transaction(**transaction),
        )

    @asynccontextmanager
    async def async_begin(
        self, tenant: TenantContext | None = None, **transaction: Unpack[TransactionOptions]
    ) -> AsyncIterator[AsyncTenantSession]:
        """As :meth:`begin`, asynchronous."""
        async with self.async_session(tenant, **transaction) as session:
            with _reaching(session.sync_session, self.async_engine().sync_engine):
                yield session
                await session.commit()

    @asynccontextmanager
    async def async_connection(
        self, tenant: TenantContext | None = None, **transaction: Unpack[TransactionOptions]
    ) -> AsyncIterator[AsyncConnection]:
        """As :meth:`connection`, asynchronous."""
        tenant, options = _tenant(tenant), Transaction(**transaction)
        refuse_other_tenant(tenant)
        engine = self.async_engine()
        watch(engine.sync_engine)
        async with AsyncExitStack() as stack:
            with _connecting(engine.sync_engine):
                beginning = engine.execution_options(**options.execution_options()).begin()
                connection = await stack.enter_async_context(beginning)
            await connection.run_sync(bind_tenant, tenant, self._setting_names, options)
            yield connection

    # --- of nobody ---------------------------------------------------------------------------------------------

    @contextmanager
    def system_session(self, *, reason: str, **transaction: Unpack[TransactionOptions]) -> Iterator[SystemSession]:
        """A session across all tenants, committed at the end, rolled back on any exception, and always closed.

        By another login or role, ``system=`` or ``system_role=``, that row-level security does not bind.  Each use is
        in the log ``rhesis_tasks.system``, with its reason.

        Args:
            reason: what it is for, for whoever reads the log.
            transaction: as for a call.

        Raises:
            NotConfiguredError: these sessions have neither ``system=`` nor ``system_role=``.
            TenantSessionError: there is no reason, or a tenant is active.
        """
        self._check_system(reason)
        engine = self._system_engine or self.engine
        options = Transaction(**transaction)
        with (
            SystemSession(bind=engine, role=self._system_role, transaction=options) as session,
            _reaching(session, engine),
        ):
            yield session
            session.commit()

    @asynccontextmanager
    async def async_system_session(
        self, *, reason: str, **transaction: Unpack[TransactionOptions]
    ) -> AsyncIterator[AsyncSystemSession]:
        """As :meth:`system_session`, asynchronous."""
        if self._system_engine is not None and self._system_loops is None:
            raise ConfigurationError("system= is an Engine; give it as a URL for asynchronous system sessions")
        self._check_system(reason)
        engine = self.async_engine() if self._system_loops is None else self._system_loops.current()
        options = Transaction(**transaction)
        async with AsyncSystemSession(engine, role=self._system_role, transaction=options) as session:
            with _reaching(session.sync_session, engine.sync_engine):
                yield session
                await session.commit()

    @property
    def has_system(self) -> bool:
        """Whether :meth:`system_session` has a login or role to use."""
        return self._system_engine is not None or self._system_role is not None

    def _check_system(self, reason: str) -> None:
        if not self.has_system:
            raise NotConfiguredError(
                "these sessions have no system login.  Make them with TenantSessions(..., system=URL), or with "
                "system_role="
            )
        if not isinstance(reason, str) or not reason.strip():
            raise TenantSessionError("system_session(reason=...) wants a reason, for whoever reads the log")
        refuse_tenant()
        _system_log.info("system session: %s", reason, extra={"reason": reason})

    # --- the pools ---------------------------------------------------------------------------------------------

    def fit(self, tasks: int) -> None:
        """Size the pool for so many tasks at once in this process, unless the application has sized it.

        A task may have a second session beside its first, and short bursts of more.  Connections that are lent stay.
        """
        if self._url is None or _SIZED & set(self._engine_options):
            return
        size = {"pool_size": tasks, "max_overflow": max(tasks, 10)}
        self.engine.dispose()
        self._engine = new_engine(self._url, **self._engine_options, **size)
        if not _SIZED & set(self._async_engine_options):
            self._async_engines = LoopEngines(self._url, **size, **self._async_engine_options)

    def dispose(self) -> None:
        """Close the pooled connections of synchronous sessions."""
        for engine in (self._engine, self._system_engine):
            if engine is not None:
                engine.dispose()

    async def async_dispose(self) -> None:
        """Close the pooled connections of the running event loop's asynchronous sessions."""
        for engines in (self._async_engines, self._system_loops):
            if engines is not None:
                await engines.dispose()


_SIZED: Final = frozenset({"pool_size", "max_overflow", "poolclass", "pool"})


def _taken_apart(maker: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The engine of a sessionmaker, the class of its sessions, and their options."""
    options = dict(maker.kw)
    engine = options.pop("bind", None)
    if engine is None:
        raise ConfigurationError("a sessionmaker for tenant sessions needs bind=, the Engine")
    inner = options.pop("sync_session_class", None)  # of an async_sessionmaker
    if inner is None:
        return engine, maker.class_, options
    return engine, type(maker.class_.__name__, (maker.class_,), {"sync_session_class": inner}), options


def _tenant(given: Any) -> TenantContext:
    """The tenant that is given, or the active one.

    Raises:
        MissingTenantError: none is active.
        InvalidTenantError: it is neither a tenant nor a user of one.
    """
    return require_tenant() if given is None else as_tenant(given)


def require_sessions(given: object) -> None:
    """Raise ConfigurationError for what looks like tenant sessions, and would send no tenant."""
    if given is not None and not isinstance(given, TenantSessions):
        raise ConfigurationError(
            f"sessions= takes TenantSessions, not {type(given).__name__}.  Make them from it: TenantSessions(...)"
        )


def _tenant_class(session_class: type[Session]) -> type[TenantSession]:
    """A Session class of the application's, made to carry the tenant."""
    if session_class is Session:
        return TenantSession
    if issubclass(session_class, TenantSession):
        return session_class
    return type(f"Tenant{session_class.__name__}", (TenantSession, session_class), {})


def _async_tenant_class(session_class: type[AsyncSession]) -> type[AsyncTenantSession]:
    """An AsyncSession class of the application's, made to carry the tenant, as does the Session inside of it."""
    if session_class is AsyncSession:
        return AsyncTenantSession
    if issubclass(session_class, AsyncTenantSession):
        return session_class
    inner = _tenant_class(session_class.sync_session_class)
    return type(f"Tenant{session_class.__name__}", (AsyncTenantSession, session_class), {"sync_session_class": inner})


@contextmanager
def _reaching(session: Session, engine: Engine) -> Iterator[None]:
    """Name the database whose connection a session has asked for and not got."""
    try:
        yield
    except (TenantDatabaseError, DatabaseUnavailableError):
        raise  # says already what is wrong
    except (DBAPIError, OSError) as error:
        if _BEGUN in session.info or _ASKED not in session.info:
            raise  # it was reached and something else is wrong, or it is another database's error
        raise _unavailable(engine, error) from error


@contextmanager
def _connecting(engine: Engine) -> Iterator[None]:
    """Name the database that a block cannot connect to."""
    try:
        yield
    except (DBAPIError, OSError) as error:
        raise _unavailable(engine, error) from error


def _unavailable(engine: Engine, error: DBAPIError | OSError) -> DatabaseUnavailableError:
    url = redacted(engine.url)
    reason = error.orig if isinstance(error, DBAPIError) else error
    return DatabaseUnavailableError(f"cannot connect to {url}: {reason}", url=url)


# --- which sessions the running code uses ------------------------------------------------------------------------

_by_app: weakref.WeakKeyDictionary[Celery, TenantSessions] = weakref.WeakKeyDictionary()


def use_sessions(app: Celery, sessions: TenantSessions | None) -> None:
    """Let tasks of ``app`` use these sessions; None takes them away."""
    if sessions is None:
        _by_app.pop(app, None)
        return
    _by_app[app] = sessions
    worker_init.connect(_fit_worker, weak=False, dispatch_uid="rhesis_tasks.sessions.fit")


def _fit_worker(sender: Any, **_: Any) -> None:
    """worker_init: a worker's pool says how many tasks run at once in a process."""
    sessions = _by_app.get(sender.app)
    if sessions is None:
        return
    one_each = getattr(sender.pool_cls, "__module__", str(sender.pool_cls)).rpartition(".")[2] in ("prefork", "solo")
    if one_each or isinstance(sender.concurrency, int):
        sessions.fit(1 if one_each else sender.concurrency)


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


def ambient_sessions() -> TenantSessions:
    """Those of the running task's application; outside of a task, those of the one database that is configured.

    Raises:
        NotConfiguredError: there are none, or several.
    """
    task: Any = get_current_task()
    if task is not None:
        return sessions_of(task.app)
    known = set(_by_app.values())
    if len(known) == 1:
        return known.pop()
    if not known:
        raise NotConfiguredError("no tenant sessions are configured.  Call rhesis_tasks.configure(app, database_url)")
    raise NotConfiguredError(
        f"{len(known)} databases are configured; outside of a task say which: @tenant_session(sessions=...), or let "
        "the applications share one by configure(app, sessions=...)"
    )
