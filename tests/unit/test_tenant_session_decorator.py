"""@tenant_session: where it may stand, and how the session reaches the function.  What a session does is tested
on a real server."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Optional

import pytest
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, create_async_engine
from sqlalchemy.orm import Session, scoped_session

from rhesis_tasks import BaseTask, TenantContext, TenantSessions, configure, tenant_scope, tenant_session
from rhesis_tasks.binding import SettingNames
from rhesis_tasks.errors import (
    ConfigurationError,
    MissingTenantError,
    NotConfiguredError,
    PolicyViolationError,
    TaskArgumentsError,
    TaskDefinitionError,
    TenantSessionError,
)
from rhesis_tasks.launch import launch_with_context
from rhesis_tasks.loops import close_loops
from rhesis_tasks.sessions import AsyncTenantSession, TenantSession

if TYPE_CHECKING:
    from sqlalchemy.orm import Query as Unimported

ACME = TenantContext("acme", "alice")


class RecordedSessions(TenantSessions):
    """Sessions that open no connection, and note how each transaction ended."""

    def __init__(self, name: str = "db") -> None:
        super().__init__(f"postgresql://nowhere/{name}")
        self.ended: list[str] = []

    @contextmanager
    def begin(self, tenant: TenantContext | None = None) -> Iterator[Any]:
        with self(tenant) as session:
            try:
                yield session
            except BaseException:
                self.ended.append("rolled back")
                raise
            self.ended.append("committed")


@pytest.fixture
def sessions() -> RecordedSessions:
    return RecordedSessions()


@pytest.fixture
def closed_loops() -> Iterator[None]:
    """For tests that run ``async def`` tasks."""
    yield
    close_loops()


@pytest.fixture(autouse=True)
def tenant() -> Iterator[TenantContext]:
    """Every test here runs for a tenant, unless it says otherwise."""
    with tenant_scope(ACME):
        yield ACME


# --- where it may stand ----------------------------------------------------------------------------------------


def no_parameter(x: int) -> None: ...


def only_kwargs(x: int, **db: Any) -> None: ...


def only_args(*db: Any) -> None: ...


def generator(db: Session) -> Iterator[int]:
    yield 1


async def async_generator(db: Session) -> Any:
    yield 1


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (no_parameter, "has no parameter 'db' to take the session"),
        (only_kwargs, "has no parameter 'db' to take the session"),
        (only_args, "has no parameter 'db' to take the session"),
        (async_generator, "closed before the generator runs"),
        (generator, "the session would be closed before the generator runs"),
        ("rename", "wraps a function, not 'rename'"),
    ],
)
def test_a_function_that_cannot_take_a_session_is_refused_when_it_is_defined(function: Any, text: str) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        tenant_session(function)


def test_a_missing_parameter_is_shown_with_the_signature_and_the_remedy() -> None:
    with pytest.raises(
        TaskDefinitionError, match=r"no_parameter\(x: 'int'\) -> 'None' has no parameter 'session'.*param=\.\.\."
    ):
        tenant_session(param="session")(no_parameter)


def test_it_is_refused_above_app_task(app: Celery) -> None:
    with pytest.raises(TaskDefinitionError, match="goes below @app"):

        @tenant_session
        @app.task(base=BaseTask)
        def upside_down(db: Session) -> None: ...


def test_it_is_refused_above_a_task_that_was_made_already(app: Celery) -> None:
    @app.task(base=BaseTask, lazy=False)
    def made(db: Session) -> None: ...

    with pytest.raises(TaskDefinitionError, match="goes below @app"):
        tenant_session(app.tasks[made.name])


SYNCHRONOUS = [
    Session,
    "Session",
    "'Session'",
    TenantSession,
    scoped_session,
    scoped_session[Session],
    Session | None,
    Optional[Session],  # noqa: UP045
    Annotated[Session, "of the shop"],
    type("OwnSession", (Session,), {}),
    "unimported.Session",  # known to type checkers only
    "unimported.Session | None",
    "unimported.scoped_session[Session]",
]
ASYNCHRONOUS = [
    AsyncSession,
    "AsyncSession",
    AsyncTenantSession,
    async_scoped_session[AsyncSession],
    AsyncSession | None,
    type("OwnAsyncSession", (AsyncSession,), {}),
    "unimported.AsyncSession",
]
UNCLEAR = [Any, object, inspect.Parameter.empty, Session | AsyncSession, Session | Any, "Unimported", "1 +", None, 5]


def functions_with(annotation: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A plain function and a coroutine function whose ``db`` is annotated so."""

    def plain(db: Any, other: Unimported) -> None: ...

    async def coroutine(db: Any, other: Unimported) -> None: ...

    for function in (plain, coroutine):
        function.__annotations__["db"] = annotation
        if annotation is inspect.Parameter.empty:
            del function.__annotations__["db"]
    return plain, coroutine


@pytest.mark.parametrize("annotation", SYNCHRONOUS, ids=str)
def test_a_coroutine_function_that_expects_a_synchronous_session_is_refused(annotation: Any) -> None:
    plain, coroutine = functions_with(annotation)

    tenant_session(plain)
    with pytest.raises(
        TaskDefinitionError,
        match=r"coroutine is async def.* gives it an AsyncSession, and its 'db' is annotated .*[sS]ession.*"
        r"Annotate AsyncSession and await its methods, or make it a plain def",
    ):
        tenant_session(coroutine)


@pytest.mark.parametrize("annotation", ASYNCHRONOUS, ids=str)
def test_a_plain_function_that_expects_an_asynchronous_session_is_refused(annotation: Any) -> None:
    plain, coroutine = functions_with(annotation)

    tenant_session(coroutine)
    with pytest.raises(
        TaskDefinitionError,
        match=r"plain is a plain def.* gives it a Session, and its 'db' is annotated .*Session.*"
        r"Annotate Session, or make it async def",
    ):
        tenant_session(plain)


@pytest.mark.parametrize("annotation", UNCLEAR, ids=str)
def test_an_annotation_that_does_not_clearly_say_which_session_is_left_alone(annotation: Any) -> None:
    for function in functions_with(annotation):
        assert tenant_session(function).__name__ == function.__name__


def test_the_kind_of_session_is_checked_for_a_parameter_of_another_name() -> None:
    async def rename(db: AsyncSession, session: Session) -> None: ...

    tenant_session(rename)
    with pytest.raises(TaskDefinitionError, match="its 'session' is annotated Session"):
        tenant_session(param="session")(rename)


def test_a_decorator_in_between_may_make_one_kind_of_session_from_the_other() -> None:
    def synchronously(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def call(db: AsyncSession, *args: Any) -> Any:
            return await db.run_sync(function, *args)

        return call

    def rename(db: Session, name: str) -> None: ...

    assert inspect.iscoroutinefunction(tenant_session(synchronously(rename)))


# --- the signature that others see -----------------------------------------------------------------------------


def test_the_function_looks_as_if_it_had_no_such_parameter() -> None:
    @tenant_session
    def rename(db: Session, test_set_id: str, name: str = "new") -> int:
        """Give it another name."""
        return 1

    assert list(inspect.signature(rename).parameters) == ["test_set_id", "name"]
    assert set(rename.__annotations__) == {"test_set_id", "name", "return"}
    assert (rename.__name__, rename.__doc__) == ("rename", "Give it another name.")


# --- how the session gets in -----------------------------------------------------------------------------------


def first(db: Session, a: Any, b: Any = "b") -> tuple[Any, ...]:
    return db, a, b


def middle(a: Any, db: Session, b: Any = "b") -> tuple[Any, ...]:
    return db, a, b


def last(a: Any, b: Any = "b", db: Session | None = None) -> tuple[Any, ...]:
    return db, a, b


def keyword_only(a: Any, b: Any = "b", *, db: Session) -> tuple[Any, ...]:
    return db, a, b


def positional_only(a: Any, db: Session, /, b: Any = "b") -> tuple[Any, ...]:
    return db, a, b


def before_varargs(a: Any, db: Session, *rest: Any) -> tuple[Any, ...]:
    return db, a, *(rest or ("b",))


def after_varargs(a: Any, *rest: Any, db: Session) -> tuple[Any, ...]:
    return db, a, *(rest or ("b",))


EVERYWHERE = [first, middle, last, keyword_only, positional_only, before_varargs, after_varargs]


WAYS = [
    ((1,), {}, (1, "b")),
    ((1, 2), {}, (1, 2)),
    ((1,), {"b": 2}, (1, 2)),
    ((), {"a": 1}, (1, "b")),
    ((), {"b": 2, "a": 1}, (1, 2)),
]


def can_be_called(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether Python itself allows it: not every parameter has a name to callers."""
    signature = inspect.signature(function)
    rest = [parameter for name, parameter in signature.parameters.items() if name != "db"]
    try:
        signature.replace(parameters=rest).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "rest"),
    [(function, *way) for function in EVERYWHERE for way in WAYS if can_be_called(function, *way[:2])],
)
def test_the_session_arrives_wherever_the_parameter_stands_and_however_the_others_are_passed(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rest: tuple[Any, ...],
    sessions: RecordedSessions,
) -> None:
    session, *others = tenant_session(sessions=sessions)(function)(*args, **kwargs)

    assert isinstance(session, Session)
    assert tuple(others) == rest
    assert sessions.ended == ["committed"]


def test_the_session_belongs_to_the_active_tenant(sessions: RecordedSessions) -> None:
    @tenant_session(sessions=sessions)
    def owner(db: Any) -> TenantContext:
        return db.tenant  # type: ignore[no-any-return]

    assert owner() == ACME
    with tenant_scope(TenantContext("globex")):
        assert owner() == TenantContext("globex")


def test_the_parameter_may_have_another_name(sessions: RecordedSessions) -> None:
    @tenant_session(param="session", sessions=sessions)
    def rename(db: str, session: Session) -> tuple[Any, Any]:
        return db, session

    assert rename(db="my own")[0] == "my own"
    assert isinstance(rename("my own")[1], Session)


def test_a_method_gets_the_session_after_self(sessions: RecordedSessions) -> None:
    class Service:
        @tenant_session(sessions=sessions)
        def rename(self, db: Session, name: str) -> tuple[Any, ...]:
            return self, db, name

    service = Service()

    this, session, name = service.rename("new")

    assert this is service
    assert isinstance(session, Session)
    assert name == "new"


@pytest.mark.parametrize("function", EVERYWHERE)
def test_passing_the_session_oneself_is_a_type_error(function: Callable[..., Any], sessions: RecordedSessions) -> None:
    wrapped = tenant_session(sessions=sessions)(function)

    with pytest.raises(TypeError, match=r"gets 'db' from @tenant_session; do not pass it"):
        wrapped(1, db=object())

    assert sessions.ended == []


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"a": 1}), ((1,), {"c": 1})])
def test_wrong_arguments_are_type_errors_as_for_any_function(
    args: tuple[Any, ...], kwargs: dict[str, Any], sessions: RecordedSessions
) -> None:
    with pytest.raises(TypeError):
        tenant_session(sessions=sessions)(first)(*args, **kwargs)

    assert "committed" not in sessions.ended


def test_an_exception_of_the_body_reaches_the_caller_and_ends_the_transaction(sessions: RecordedSessions) -> None:
    @tenant_session(sessions=sessions)
    def fail(db: Session) -> None:
        raise ValueError("from the body")

    with pytest.raises(ValueError, match="from the body"):
        fail()

    assert sessions.ended == ["rolled back"]


def test_calls_may_nest_and_each_has_its_own_session(sessions: RecordedSessions) -> None:
    @tenant_session(sessions=sessions)
    def inner(db: Session) -> Session:
        return db

    @tenant_session(sessions=sessions)
    def outer(db: Session) -> bool:
        return db is inner()

    assert outer() is False
    assert sessions.ended == ["committed", "committed"]


# --- which sessions --------------------------------------------------------------------------------------------


@tenant_session
def database_name(db: Session) -> str | None:
    return db.get_bind().engine.url.database


@pytest.fixture
def app_with_sessions(make_app: Callable[..., Celery]) -> Callable[[str], Celery]:
    def make(name: str) -> Celery:
        app = make_app(configured=False)
        configure(app, sessions=RecordedSessions(name))
        return app

    return make


def test_outside_of_a_task_the_one_configured_database_is_used(app_with_sessions: Callable[[str], Celery]) -> None:
    app_with_sessions("only")

    assert database_name() == "only"


def test_without_a_configured_database_the_error_names_the_remedy(app: Celery) -> None:
    with pytest.raises(NotConfiguredError, match=r"Call rhesis_tasks.configure\(app, database_url\)"):
        database_name()


def test_outside_of_a_task_several_databases_are_ambiguous(app_with_sessions: Callable[[str], Celery]) -> None:
    app_with_sessions("one")
    app_with_sessions("other")

    with pytest.raises(NotConfiguredError, match=r"2 databases are configured.*@tenant_session\(sessions=\.\.\.\)"):
        database_name()


def test_in_a_task_the_database_of_its_application_is_used(app_with_sessions: Callable[[str], Celery]) -> None:
    for name in ("one", "other"):
        app = app_with_sessions(name)
        task = app.task(base=BaseTask, name="where")(database_name)

        assert task.apply().get() == name


def test_a_task_of_an_application_without_a_database_does_not_borrow_anothers(
    app: Celery, app_with_sessions: Callable[[str], Celery]
) -> None:
    app_with_sessions("of another application")
    task = app.task(base=BaseTask, name="where")(database_name)

    with pytest.raises(NotConfiguredError, match="application 'app' has no tenant sessions"):
        task.apply(throw=True)


def test_without_a_tenant_the_body_does_not_run(sessions: RecordedSessions) -> None:
    ran: list[bool] = []

    @tenant_session(sessions=sessions)
    def body(db: Session) -> None:
        ran.append(True)

    with pytest.raises(MissingTenantError):
        contextvars.Context().run(body)

    assert not ran


# --- on a task -------------------------------------------------------------------------------------------------


@pytest.fixture
def rename(app_with_sessions: Callable[[str], Celery]) -> Any:
    app = app_with_sessions("shop")

    @app.task(base=BaseTask, bind=True, name="rename")
    @tenant_session
    def rename(self: BaseTask, db: Session, test_set_id: str, name: str = "new") -> list[Any]:
        return [self.name, type(db).__name__, test_set_id, name]

    return rename


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [(("t",), {}, "new"), (("t", "n"), {}, "n"), (("t",), {"name": "n"}, "n"), ((), {"test_set_id": "t"}, "new")],
)
def test_a_decorated_task_is_called_without_the_session(
    rename: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, work_off: Any
) -> None:
    expected = ["rename", "TenantSession", "t", name]

    launched = rename.delay(*args, **kwargs)
    work_off(rename.app)

    assert launched.get() == expected
    assert rename.apply(args, kwargs).get() == expected
    assert rename(*args, **kwargs) == expected


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        (("t", "n", "too many"), {}),
        (("t",), {"db": 1}),
        (("t",), {"unknown": 1}),
        (("t",), {"test_set_id": 1}),
    ],
)
def test_celerys_check_of_arguments_ignores_the_session(rename: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    with pytest.raises(TypeError):
        rename.delay(*args, **kwargs)
    with pytest.raises(TaskArgumentsError, match=r"rename\(test_set_id: 'str', name: 'str' = 'new'\)"):
        launch_with_context(rename, *args, **kwargs)


# --- TenantSessions without a server ---------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite://", "mysql://app:s3cret@db/shop", "nonsense"])
def test_sessions_need_a_postgresql_url(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TenantSessions(url)

    assert "s3cret" not in str(caught.value)


def test_sessions_need_a_postgresql_engine() -> None:
    with pytest.raises(ConfigurationError, match="tenant sessions need PostgreSQL, not sqlite"):
        TenantSessions(create_engine("sqlite://"))


def test_engine_options_go_with_a_url_only() -> None:
    engine = create_engine("postgresql+psycopg://db/shop")

    with pytest.raises(ConfigurationError, match="engine options go with a URL"):
        TenantSessions(engine, pool_size=1)
    assert TenantSessions(engine).engine is engine


def test_sessions_are_shown_without_the_password() -> None:
    assert repr(TenantSessions("postgresql://app:s3cret@db/shop")) == (
        "TenantSessions('postgresql+psycopg://app:***@db/shop')"
    )


def test_a_session_class_of_the_applications_own_is_kept() -> None:
    class OwnSession(Session):
        """With methods of the application's own."""

    session = TenantSessions("postgresql://db/shop", session_class=OwnSession)()

    assert isinstance(session, OwnSession)
    assert session.tenant == ACME


def test_a_decorated_function_works_in_a_thread_of_an_event_loop(sessions: RecordedSessions) -> None:
    @tenant_session(sessions=sessions)
    def owner(db: Any) -> str:
        return db.tenant.organization_id  # type: ignore[no-any-return]

    async def main() -> str:
        return await asyncio.to_thread(owner)

    assert asyncio.run(main()) == "acme"


def test_an_asynchronous_session_in_a_plain_with_names_the_remedy(
    app_with_sessions: Callable[[str], Celery], closed_loops: None
) -> None:
    app = app_with_sessions("shop")

    @app.task(base=BaseTask, bind=True)
    async def rename(self: BaseTask) -> None:
        with self.get_db_session():
            raise AssertionError("it was opened")

    with pytest.raises(TenantSessionError, match=r"`async with self\.get_async_db_session\(\) as db:`"):
        rename.apply(throw=True)


def test_settings_that_the_database_takes_for_one_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="its own name"):
        SettingNames(organization="app.tenant", user="APP.tenant")
    with pytest.raises(ConfigurationError, match=r"named like 'app\.current_organization', not None"):
        SettingNames(organization=None)  # type: ignore[arg-type]


def test_what_is_no_login_of_the_system_is_refused() -> None:
    for wrong in (5, create_async_engine("postgresql+psycopg://app@localhost/shop")):
        with pytest.raises(ConfigurationError, match="system= takes a URL or an Engine"):
            TenantSessions("postgresql://app@localhost/shop", system=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="this source is an AsyncEngine already"):
        TenantSessions(
            create_async_engine("postgresql+psycopg://app@localhost/shop"),
            async_engine=create_async_engine("postgresql+psycopg://app@localhost/shop"),
        )


def test_a_partial_function_gets_the_session_too(sessions: RecordedSessions) -> None:
    def function(number: int, db: Session) -> tuple[int, Session]:
        return number, db

    with tenant_scope(TenantContext("acme")):
        number, db = tenant_session(sessions=sessions)(functools.partial(function, 1))()

    assert (number, db.tenant.organization_id) == (1, "acme")


def test_an_error_of_the_database_keeps_its_tenant_when_it_is_pickled() -> None:
    error = PolicyViolationError("no", tenant=TenantContext("acme"), statement="INSERT ...", orig=ValueError("driver"))
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301

    assert (str(copy), copy.tenant, copy.statement) == ("no", TenantContext("acme"), "INSERT ...")
