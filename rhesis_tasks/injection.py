"""``@tenant_session`` and ``with tenant_session()``: a session of the active tenant, for one function or block."""

from __future__ import annotations

import functools
import inspect
import threading
import types
import typing
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, Unpack, cast, overload

from celery.local import Proxy
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from .binding import Transaction
from .errors import TaskDefinitionError, TenantSessionError
from .sessions import (
    AsyncTenantSession,
    TenantSession,
    TenantSessions,
    TransactionOptions,
    ambient_sessions,
    require_sessions,
)

if TYPE_CHECKING:
    from celery import Task

__all__ = ["TenantSessionBlock", "tenant_session"]

P = ParamSpec("P")
R = TypeVar("R")
TaskT = TypeVar("TaskT", bound="Task[Any, Any]")

_CLASSES: Final = (
    (Session, (Session, scoped_session)),
    (AsyncSession, (AsyncSession, async_scoped_session)),
)
_NAMES: Final[dict[str, type]] = {
    **dict.fromkeys(("Session", "TenantSession", "scoped_session"), Session),
    **dict.fromkeys(("AsyncSession", "AsyncTenantSession", "async_scoped_session"), AsyncSession),
}


@overload
def tenant_session(
    function: Callable[Concatenate[TaskT, AsyncTenantSession, P], Awaitable[R]], /
) -> Callable[Concatenate[TaskT, P], Awaitable[R]]: ...
@overload
def tenant_session(
    function: Callable[Concatenate[AsyncTenantSession, P], Awaitable[R]], /
) -> Callable[P, Awaitable[R]]: ...
@overload
def tenant_session(
    function: Callable[Concatenate[TaskT, TenantSession, P], R], /
) -> Callable[Concatenate[TaskT, P], R]: ...
@overload
def tenant_session(function: Callable[Concatenate[TenantSession, P], R], /) -> Callable[P, R]: ...
@overload
def tenant_session(
    *, param: str = "db", sessions: TenantSessions | None = None, **transaction: Unpack[TransactionOptions]
) -> TenantSessionBlock: ...
def tenant_session(
    function: Callable[..., Any] | None = None,
    /,
    *,
    param: str = "db",
    sessions: TenantSessions | None = None,
    **transaction: Unpack[TransactionOptions],
) -> Any:
    """A session of the active tenant, for a function or a block, committed at its end.

    Rolled back if it raises, and closed either way.  As a decorator it fills in a parameter by its name and takes it
    out of the signature, so that callers, and Celery's check of arguments, never see it; in ``async def`` it is an
    AsyncSession.  On a task it goes below ``@app.task``::

        @app.task(base=BaseTask, bind=True)
        @tenant_session
        def rename(self, db: Session, test_set_id: str, name: str) -> None: ...

    As a block, in routes and tasks::

        with tenant_session() as db: ...
        async with tenant_session(readonly=True) as db: ...

    Either may commit by itself in between, so that no transaction is held meanwhile; the next statement begins another
    one, of the same tenant.

    Args:
        param: the parameter that takes the session.
        sessions: by default those of the task's application; outside of a task, those of the one database
            that is configured.
        transaction: ``readonly``, ``isolation_level``, ``statement_timeout`` and ``lock_timeout`` (seconds), see
            :class:`~rhesis_tasks.binding.Transaction`.

    Raises:
        TaskDefinitionError: when it is applied, if the function has no such parameter, is a generator, or a
            task already; or the parameter's annotation names the other kind of session than the function gets.
        ConfigurationError: there is no such isolation level, or a time-out is not positive.
        MissingTenantError: when it is called or entered, if no tenant is active.
    """
    block = TenantSessionBlock(param=param, sessions=sessions, **transaction)
    return block if function is None else block(function)


class TenantSessionBlock:
    """What ``tenant_session(...)`` returns: a decorator, or the ``with`` or ``async with`` statement of one block."""

    def __init__(
        self, *, param: str, sessions: TenantSessions | None, **transaction: Unpack[TransactionOptions]
    ) -> None:
        require_sessions(sessions)
        Transaction(**transaction)  # what is wrong with it is an error here
        self._param = param
        self._sessions = sessions
        self._transaction = transaction
        self._open: ExitStack | AsyncExitStack | None = None
        self._entered = threading.Lock()

    @property
    def _source(self) -> TenantSessions:
        return self._sessions or ambient_sessions()

    # --- as a block --------------------------------------------------------------------------------------------

    def __enter__(self) -> TenantSession:
        self._refuse_second_use()
        with ExitStack() as stack:
            session = stack.enter_context(self._source.begin(**self._transaction))
            self._open = stack.pop_all()
        return session

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        return cast("ExitStack", self._open).__exit__(exc_type, exc, tb)

    async def __aenter__(self) -> AsyncTenantSession:
        self._refuse_second_use()
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(self._source.async_begin(**self._transaction))
            self._open = stack.pop_all()
        return session

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        return await cast("AsyncExitStack", self._open).__aexit__(exc_type, exc, tb)

    def _refuse_second_use(self) -> None:
        if not self._entered.acquire(blocking=False):
            raise TenantSessionError("a tenant_session() is for one block; call it again for each")

    # --- as a decorator ----------------------------------------------------------------------------------------

    def __call__(self, function: Callable[..., R], /) -> Callable[..., R]:
        """The function without the parameter."""
        position, signature = _without(function, self._param)
        _refuse_other_kind(function, self._param)
        name = getattr(function, "__name__", repr(function))

        def arguments(session: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if position is not None and len(args) >= position:
                return (*args[:position], session, *args[position:]), kwargs
            return args, {**kwargs, self._param: session}

        def refuse_passed(kwargs: dict[str, Any]) -> None:
            if self._param in kwargs:
                raise TypeError(f"{name}() gets {self._param!r} from @tenant_session; do not pass it")

        if inspect.iscoroutinefunction(function):

            async def call_async(*args: Any, **kwargs: Any) -> Any:
                refuse_passed(kwargs)
                async with self._source.async_begin(**self._transaction) as session:
                    all_args, all_kwargs = arguments(session, args, kwargs)
                    return await function(*all_args, **all_kwargs)

            call: Any = call_async
        else:

            def call_sync(*args: Any, **kwargs: Any) -> Any:
                refuse_passed(kwargs)
                with self._source.begin(**self._transaction) as session:
                    all_args, all_kwargs = arguments(session, args, kwargs)
                    returned = function(*all_args, **all_kwargs)
                    if inspect.isawaitable(returned) or inspect.isgenerator(returned) or inspect.isasyncgen(returned):
                        if inspect.iscoroutine(returned):
                            returned.close()
                        raise TaskDefinitionError(
                            f"@tenant_session cannot wrap {name}: what it returned runs when the session is closed.  "
                            "Let it be an async def function"
                        )
                    return returned

            call = call_sync
        functools.update_wrapper(call, function)
        call.__signature__ = signature
        call.__annotations__ = {
            name: annotation
            for name, annotation in getattr(function, "__annotations__", {}).items()
            if name != self._param
        }
        return call  # type: ignore[no-any-return]


def _without(function: Any, param: str) -> tuple[int | None, inspect.Signature]:
    """Where the parameter stands (None if it is keyword-only), and the signature without it."""
    if isinstance(function, Proxy) or hasattr(function, "apply_async"):
        raise TaskDefinitionError("@tenant_session goes below @app.task: it wraps the function, not the task")
    name = getattr(function, "__qualname__", repr(function))
    if not callable(function):
        raise TaskDefinitionError(f"@tenant_session wraps a function, not {name}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TaskDefinitionError(
            f"@tenant_session cannot wrap {name}: the session would be closed before the generator runs.  Use "
            "with tenant_session() in its body"
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


def _refuse_other_kind(function: Any, param: str) -> None:
    """Raise TaskDefinitionError where the parameter is annotated with a session that the function does not get.

    An ``async def`` function that takes its session for a synchronous one awaits nothing: it would succeed, and have
    written nothing.
    """
    innermost = inspect.unwrap(function)
    is_async = inspect.iscoroutinefunction(function)
    if is_async is not inspect.iscoroutinefunction(innermost):
        return  # what is in between may make the one of the other
    annotation = inspect.signature(function).parameters[param].annotation
    named = _session_named(annotation, getattr(innermost, "__globals__", {}))
    if named is not (Session if is_async else AsyncSession):
        return
    name = getattr(function, "__qualname__", repr(function))
    shown = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    if is_async:
        raise TaskDefinitionError(
            f"{name} is async def, so that @tenant_session gives it an AsyncSession, and its {param!r} is annotated "
            f"{shown}.  Annotate AsyncSession and await its methods, or make it a plain def"
        )
    raise TaskDefinitionError(
        f"{name} is a plain def, so that @tenant_session gives it a Session, and its {param!r} is annotated {shown}.  "
        "Annotate Session, or make it async def and await the session's methods"
    )


def _session_named(annotation: Any, names: dict[str, Any]) -> type | None:
    """Session or AsyncSession, whichever an annotation says; None if it says neither, or both."""
    alone = types.SimpleNamespace(__annotations__={"session": annotation})  # others may not be resolvable
    try:
        resolved = typing.get_type_hints(alone, names)["session"]
    except Exception:  # imported under TYPE_CHECKING, say
        parts = (part.partition("[")[0].strip(" '\"").rpartition(".")[2] for part in str(annotation).split("|"))
        found = {_NAMES.get(part) for part in parts if part != "None"}
    else:
        is_union = typing.get_origin(resolved) in (typing.Union, types.UnionType)
        classes = typing.get_args(resolved) if is_union else (resolved,)
        found = {_session_class(each) for each in classes if each is not type(None)}
    return found.pop() if len(found) == 1 else None


def _session_class(annotated: Any) -> type | None:
    annotated = typing.get_origin(annotated) or annotated  # of scoped_session[Session]
    for session_class, classes in _CLASSES:
        if inspect.isclass(annotated) and issubclass(annotated, classes):
            return session_class
    return None
