"""What a task is: ContextTask carries the context, BaseTask also insists on it.

``configure()`` makes :class:`ContextTask` the class of every task of an application, Celery's own included.
Applications subclass, or name as ``base=``, :class:`BaseTask`.  The body of either may be ``async def``.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Unpack

from celery import Task
from celery._state import (  # type: ignore[attr-defined]  # left out of the stubs
    _task_stack,
    connect_on_app_finalize,
)
from celery.app.base import pydantic_wrapper  # type: ignore[attr-defined]  # left out of the stubs
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry
from typing_extensions import override

from . import hooks
from .batch import BatchOutcome, Items, ItemT, ResultT, run_batch
from .context import TenantContext, current_tenant, exactly, require_tenant
from .disclosure import SHOWN
from .errors import (
    MissingTenantError,
    NotConfiguredError,
    NotSupportedError,
    SignatureError,
    TaskDefinitionError,
)
from .headers import HEADER, Progress, RequestState, running, state_of
from .logs import TaskLogger
from .loops import LoopFactory, loop_factory, run_coroutine
from .otel import mark_current_span
from .outcomes import TaskOutcome, log_start
from .propagation import (
    as_launched,
    begin,
    carried_header,
    for_launch,
    is_installed,
    outgoing_envelope,
    outgoing_tenant,
    records,
    renew,
    running_state,
    with_context,
)
from .reporting import Reporter, checked_progress
from .retry import DEFAULT, NO_RETRY, GiveUp, RetryPolicy
from .retrying import check_policy, decide, objection, policy_of
from .sessions import AsyncTenantSession, TenantSession, TransactionOptions, close_left_open, sessions_of

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import EagerResult

__all__ = ["BaseTask", "ContextTask"]

_AWAITS_NOTHING: Final = ("celery.map", "celery.starmap")  # Celery's tasks that call others as functions


def _is_plain_call(request: Context) -> bool:
    """Whether a task is called as a function, from outside a worker or by its own body, and not by the worker."""
    state = state_of(request)
    return bool(request.called_directly or (state is not None and state.is_running))


def _is_anothers(request: Context) -> bool:
    """Whether the body that runs for a request is not that of the running code.

    The request is the thread's.  So it is also found by what an earlier task of the thread has left to be called back,
    and by what is called back for nobody.
    """
    state = state_of(request)
    return state is not None and state.is_running and state.activation is not None and running.get() is not state


class ContextTask(Task):  # type: ignore[type-arg]  # generic in the stubs only
    """A task that carries the context.

    Attributes:
        is_async: whether its body is ``async def``.
        cleanup_grace: seconds that the coroutines of such a body get to clean up when they are cancelled: all of them
            by the soft time limit, those that it has left behind at its end.
        hook_time_limit: seconds that each hook may take that is called at its end: see :mod:`rhesis_tasks.hooks`.
    """

    abstract = True
    Request = "rhesis_tasks.request:ContextRequest"

    is_async: ClassVar[bool] = False
    cleanup_grace: ClassVar[float] = 5.0
    hook_time_limit: ClassVar[float] = 10.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        caller = next(base for base in cls.__mro__ if "__call__" in vars(base))
        if not issubclass(caller, ContextTask):
            raise TaskDefinitionError(
                f"the __call__ of {caller.__name__} comes before that of rhesis-tasks in task class {cls.__name__}, "
                "which would refuse nothing.  Name the base from rhesis_tasks first"
            )

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body; called by a worker, the context is afterwards what it was before, whatever the body set."""
        state = running_state(self)
        if state is None:
            request = self.request
            if _is_plain_call(request):
                return self._call_directly(args, kwargs)
            state = begin(self, request)
        if isinstance(state.refusal, SignatureError):
            raise state.refusal
        return self._run_body(state, args, kwargs)

    def _run_body(self, state: RequestState, args: Any, kwargs: Any) -> Any:
        if state.is_cancelled:
            self._drop()
        before = running.get()
        if before is not state:  # somebody has changed it since task_prerun
            state.before = before
            running.set(state)
        state.is_running, state.awaits_body = True, self.is_async
        state.began_at = time.monotonic()
        state.first_at = state.envelope.first_at or int(time.time() * 1000)
        log_start(self, self.request)
        mark_current_span()
        try:
            return self.run(*args, **kwargs)
        finally:
            renew(state)
            close_left_open(state)

    def _drop(self) -> None:
        """What was cancelled before it was started does not run; the rest of its chain, and its chord, hear of it."""
        self.backend.mark_as_revoked(str(self.request.id), "cancelled", self.request)
        raise Ignore("it was cancelled before it was started")

    def _call_directly(self, args: Any, kwargs: Any) -> Any:
        """As a plain function, with a request that names the active tenant."""
        tenant = current_tenant()
        direct = _DirectRequest(
            self,
            args=args,
            kwargs=kwargs,
            organization_id=tenant.organization_id if tenant else None,
            user_id=tenant.user_id if tenant else None,
        )
        with direct:
            returned = self.run(*args, **kwargs)
            if not (self.is_async and inspect.isawaitable(returned)):
                return returned
        caller: Any = running.get()
        if caller is not None and caller.task.name in _AWAITS_NOTHING:
            with direct:
                return self._run_coroutine(returned)
        return _awaited(tenant, direct, returned)

    def _run_coroutine(self, coroutine: Any) -> Any:
        return run_coroutine(coroutine, name=self.name, grace=self.cleanup_grace, factory=self._loop_factory)

    @functools.cached_property
    def _loop_factory(self) -> LoopFactory:
        return loop_factory(self.app.conf.get("rhesis_tasks_event_loop") or "asyncio")

    @classmethod
    @override
    def on_bound(cls, app: Celery) -> None:
        """Let a body that is ``async def`` be run, when the task is made.

        Raises:
            TaskDefinitionError: the body is a generator, ``cleanup_grace`` or ``hook_time_limit`` is no time, or a hook
                is no function.
        """
        super().on_bound(app)
        # Also of a plain body, whose hooks may be async def.
        for name, least in (("cleanup_grace", 0.0), ("hook_time_limit", 1e-3)):
            value: Any = getattr(cls, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= threading.TIMEOUT_MAX:
                raise TaskDefinitionError(f"{name} of task {cls.name} must be seconds, not {value!r}")
        hooks.check(cls)
        body = inspect.unwrap(cls.run)
        if inspect.isasyncgenfunction(body):
            raise TaskDefinitionError(f"the body of task {cls.name} is an asynchronous generator; let it return a list")
        cls.is_async = inspect.iscoroutinefunction(body)
        if cls.is_async and not hasattr(cls.run, "awaits"):
            cls.run = _run_if_awaited(cls, app)  # type: ignore[method-assign]

    def _get_request(self) -> Context:
        """As Celery's, where the running code belongs to it; else an empty one, as in a thread of its own."""
        request: Context | None = self.request_stack.top
        if request is None:
            return super()._get_request()  # type: ignore[misc, no-any-return]  # left out of the stubs
        if state_of(request) is running.get() or not _is_anothers(request):  # the former is quick, and usual
            return request
        return Context(delivery_info={})

    request = property(_get_request)

    @override
    def signature_from_request(self, request: Any = None, *args: Any, **options: Any) -> Any:
        """What a retry publishes: the context of the message, whatever scope or headers the body retries with."""
        request = self.request if request is None else request
        # Always, since request.headers lacks ours where another library's headers are nested in the message.
        options["headers"] = {**(options.get("headers") or request.headers or {}), **carried_header(request)}
        shown = vars(request)
        others = (*args[:2], options.get("args"), options.get("kwargs"))
        if HEADER in shown and not any(each is not None for each in others):  # else they are of other arguments
            for name in SHOWN:
                options.setdefault(name, shown.get(name))
        return super().signature_from_request(request, *args, **options)

    @override
    def retry(self, *arguments: Any, **options: Any) -> Any:
        """As Celery's; what comes after the task is for the same tenant, whatever scope the body is in.

        Raises:
            NotSupportedError: the task has ended, or it is another one that runs.
        """
        self._refuse_when_ended("retry")
        with as_launched(self.request):
            return super().retry(*arguments, **options)

    @override
    def replace(self, sig: Any) -> Any:
        """As Celery's; the replacement works for the same tenant, whatever scope the body is in.

        Raises:
            NotSupportedError: the task has ended, or it is another one that runs.
        """
        self._refuse_when_ended("replace")
        with as_launched(self.request):
            return super().replace(sig)

    @override
    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:
        """As Celery's; what is added works for the same tenant, whatever scope the body is in.

        Raises:
            NotSupportedError: the task has ended, or it is another one that runs.
        """
        self._refuse_when_ended("add_to_chord")
        with as_launched(self.request):
            return super().add_to_chord(sig, lazy)  # type: ignore[call-overload]

    def _own_request(self, method: str) -> Context | None:
        """That for which a method is called, if there is one."""
        request: Context | None = self.request_stack.top
        if request is not None and _is_anothers(request):
            raise NotSupportedError(
                f"{method}() of task {self.name} is called by what is not part of the run that it would be for: an "
                "earlier task has left it, or it was called back without a context.  Call it in the task's own code, "
                "and give threads and callbacks of others a function by wrap()"
            )
        return request

    def _refuse_when_ended(self, method: str) -> None:
        request = self._own_request(method)
        state = None if request is None else state_of(request)
        if request is not None and state is not None and state.has_ended:
            raise NotSupportedError(
                f"{method}() of task {self.name}[{request.id}] is called when that has ended, by a hook or by "
                "what its body has left running.  Launch another task instead"
            )

    @override
    def apply(
        self,
        args: Any = None,
        kwargs: Any = None,
        link: Any = None,
        link_error: Any = None,
        task_id: str | None = None,
        retries: int | None = None,
        throw: bool | None = None,
        logfile: str | None = None,
        loglevel: str | None = None,
        headers: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> EagerResult[Any]:
        """Run the task here and now, with the context that a message would have carried.

        Publishing is what puts the header in, and nothing is published here.
        """
        envelope = for_launch(outgoing_envelope(headers, self, kwargs), {**options, "retries": retries})
        options.pop("retry_policy", None)
        headers = with_context(headers, envelope)
        return super().apply(
            args, kwargs, link, link_error, task_id, retries, throw, logfile, loglevel, headers, **options
        )


def _run_if_awaited(cls: type[ContextTask], app: Celery) -> Any:
    """A body that is ``async def`` as Celery calls it: what it returns is run if the task is to, and not a function.

    In place of the body, so that what Celery wraps around it (``autoretry_for``) sees how it ends.
    """
    run: Any = inspect.getattr_static(cls, "run")
    function = _dump_if_awaited(run.__func__ if isinstance(run, staticmethod) else run, app, cls.name)

    @functools.wraps(function)
    def run_or_return(*args: Any, **kwargs: Any) -> Any:
        state = running.get()
        returned = function(*args, **kwargs)
        if state is None or not state.awaits_body or not isinstance(state.task, cls):
            return returned
        if not inspect.isawaitable(returned):
            return returned  # from a decorator that runs the coroutine itself
        state.awaits_body = False
        task: Any = state.task
        return task._run_coroutine(returned)

    run_or_return.awaits = True  # type: ignore[attr-defined]
    return staticmethod(run_or_return) if isinstance(run, staticmethod) else run_or_return


def _dump_if_awaited(function: Callable[..., Any], app: Celery, name: str) -> Callable[..., Any]:
    """With ``pydantic=True``, the function whose result is dumped once it is there; else the function as it is.

    Celery's wrapper makes models of the arguments, but of the result it sees the coroutine only.  What that returns
    goes through a second wrapper of Celery's, around a function that returns what it is given.
    """
    if getattr(function, "__code__", function) not in pydantic_wrapper.__code__.co_consts:
        return function

    def result(value: Any) -> Any:
        return value

    within = inspect.getclosurevars(function).nonlocals  # Celery keeps body and options nowhere else
    body = within["task_fun"]
    returns = inspect.signature(body).return_annotation
    value = inspect.Parameter("value", inspect.Parameter.POSITIONAL_ONLY)
    result.__signature__ = inspect.Signature([value], return_annotation=returns)  # type: ignore[attr-defined]
    result.__annotations__ = {"return": returns}
    result.__wrapped__ = body  # type: ignore[attr-defined]  # where the annotation's names are looked up
    dumped = pydantic_wrapper(app, result, name, dump_kwargs=within["dump_kwargs"])

    async def dump(returned: Awaitable[Any]) -> Any:
        return dumped(await returned)

    @functools.wraps(function)
    def call_and_dump(*args: Any, **kwargs: Any) -> Any:
        returned = function(*args, **kwargs)
        return dump(returned) if inspect.isawaitable(returned) else returned

    return call_and_dump


class _DirectRequest:
    """The request of a task that is called as a function, there while its code runs in this thread."""

    def __init__(self, task: ContextTask, **request: Any) -> None:
        self._task = task
        self._request = request

    def __enter__(self) -> None:
        _task_stack.push(self._task)
        self._task.push_request(**self._request)

    def __exit__(self, *_: object) -> None:
        self._task.pop_request()
        _task_stack.pop()


class _Stepwise:
    """Awaits a coroutine with a request that is there while it runs, and not while it waits and others run."""

    def __init__(self, direct: _DirectRequest, coroutine: Awaitable[Any]) -> None:
        self._direct = direct
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = self._coroutine.__await__()
        step, value = steps.send, None
        while True:
            try:
                with self._direct:
                    awaited = step(value)
            except StopIteration as end:
                return end.value
            try:
                step, value = steps.send, (yield awaited)
            except GeneratorExit:
                with self._direct:
                    steps.close()
                raise
            except BaseException as error:
                step, value = steps.throw, error


async def _awaited(tenant: TenantContext | None, direct: _DirectRequest, coroutine: Awaitable[Any]) -> Any:
    with exactly(tenant):
        return await _Stepwise(direct, coroutine)


class BaseTask(ContextTask):
    """The base of an application's tasks: tenant, session, log, retries.

    ::

        @app.task(base=BaseTask, bind=True)
        def summarize(self, test_set_id: str) -> int:
            self.log.info("for %s", self.tenant)
            with self.get_db_session() as db:
                ...

    Attributes:
        tenant_required: whether the task is refused without a tenant, both where it is launched and in the
            worker, where its body does not run and a failure with the reason is stored.
        system: whether the task's work belongs to no tenant: it never has one, whoever launches it, and its records
            are no tenant's.  Where it acts for tenants, it opens a ``tenant_scope`` for each.
        tenant_in_arguments: whether ``organization_id=`` and ``user_id=`` among the keyword arguments name the
            tenant, as callers from before this library pass it.  Set it to False where they mean something else.
        retry_policy: what is tried again, and when; or a method that says it for the tenant, or None, that the task
            works for: ``def retry_policy(self, tenant)``, as an option of the decorator ``func(task, tenant)``.  Not
            together with Celery's ``autoretry_for``.
    """

    abstract = True

    tenant_required: ClassVar[bool] = True
    system: ClassVar[bool] = False
    tenant_in_arguments: ClassVar[bool] = True
    retry_policy: RetryPolicy | Callable[..., RetryPolicy] = DEFAULT  # no ClassVar, so that a method may replace it

    # --- hooks, to be replaced -----------------------------------------------------------------------------

    @hooks.does_nothing
    def on_tenant_success(self, outcome: TaskOutcome) -> object:
        """Called when a tenant's task has succeeded, after its result is stored; it may be ``async def``.

        The tenant is active, and ``self.get_db_session()`` is at hand.  It runs at most once, in the process that has
        run the task.  What it raises is logged, after ``hook_time_limit`` seconds it is not waited for, and neither
        changes anything about the task.
        """

    @hooks.does_nothing
    def on_tenant_failure(self, outcome: TaskOutcome) -> object:
        """The same when it has failed for good.

        A failure that a worker's main process decides (a time limit, a lost process) is told by a task of its own, at
        least once: :attr:`TaskOutcome.key` is then the same.
        """

    @hooks.does_nothing
    def on_tenant_retry(self, outcome: TaskOutcome) -> object:
        """The same when an attempt has failed and another one follows."""

    # --- for the body --------------------------------------------------------------------------------------

    @property
    def tenant(self) -> TenantContext:
        """The tenant that the task works for; inside a ``tenant_scope`` of its body, that of the scope.

        Raises:
            MissingTenantError: there is none (only possible where ``tenant_required`` is False).
        """
        return require_tenant()

    @property
    def log(self) -> TaskLogger:
        """The logger of the task's module, with the context on every record."""
        return TaskLogger(logging.getLogger(type(self).__module__), {})

    def get_db_session(self, **transaction: Unpack[TransactionOptions]) -> TenantSession:
        """A session of the tenant, for tasks that manage their transactions themselves.

        The caller commits, as often as it likes, and closes; ``with self.get_db_session() as db:`` closes.
        For one transaction around the whole task use :func:`~rhesis_tasks.tenant_session`.

        Where an event loop runs, in an ``async def`` body, it is an AsyncTenantSession as by
        :meth:`get_async_db_session`, which type checkers understand: ``async with self.get_db_session() as db:``.

        Args:
            **transaction: how its transactions are begun: ``readonly``, ``isolation_level``, ``statement_timeout`` and
                ``lock_timeout`` (seconds).

        Raises:
            NotConfiguredError: the application was configured without a database.
            MissingTenantError: there is no tenant.
        """
        if self.is_async and asyncio._get_running_loop() is not None:
            return self.get_async_db_session(**transaction)  # type: ignore[return-value]
        return sessions_of(self.app)(**transaction)

    def get_async_db_session(self, **transaction: Unpack[TransactionOptions]) -> AsyncTenantSession:
        """The same for ``async def`` bodies: ``async with self.get_async_db_session() as db:``.

        Raises:
            ConfigurationError: the sessions that the application was configured with are synchronous.
        """
        return sessions_of(self.app).async_session(**transaction)

    def report_progress(self, done: int, total: int | None = None, message: str = "") -> None:
        """Say how far the task is, for its status.

        Cheap enough to call for each item: it is written at most once a second, and with the task's end, and never
        makes an event loop wait.

        Args:
            done: how much is done, in whatever unit.
            total: how much there is to do, if it is known.
            message: what a user reads beside it.

        Raises:
            InvalidProgressError: ``done`` or ``total`` is no int of 0 or more, or the message no str.
            NotSupportedError: the result backend keeps no records, or it is another task that runs.
        """
        progress = checked_progress(done, total, message)
        reporter = self._reporter("report_progress", required=True)
        if reporter is not None:
            reporter.report(progress)

    def should_abort(self) -> bool:
        """Whether somebody has asked for the task to stop early; it decides itself where it can.

        The record is asked at most once a second; where an event loop runs, in the background (:meth:`aborted` waits
        for the answer).  It stays true in the task's retries.

        Raises:
            NotSupportedError: it is another task that runs.
        """
        reporter = self._reporter("should_abort")
        if reporter is None:
            return False
        reporter.look()
        return reporter.is_asked_to_abort

    async def aborted(self) -> bool:
        """The same for ``async def`` bodies: ``if await self.aborted(): ...``."""
        reporter = self._reporter("aborted")
        if reporter is None:
            return False
        await reporter.look_and_wait()
        return reporter.is_asked_to_abort

    def batch(
        self,
        function: Callable[[ItemT], Awaitable[ResultT]],
        items: Items[ItemT],
        *,
        limit: int,
        retry_policy: RetryPolicy = NO_RETRY,
        start: int = 0,
    ) -> AsyncGenerator[BatchOutcome[ItemT, ResultT], None]:
        """Await a function for each of many items, so many at once; see :func:`~rhesis_tasks.batch.run_batch`.

        It reports the task's progress, and begins no more items once the task is asked to abort::

            async for outcome in self.batch(evaluate, prompts, limit=100, retry_policy=HTTP):
                store(outcome.item, outcome.value())

        Args:
            function: called with one item; what it returns is awaited.
            items: an iterable, which may be asynchronous.
            limit: how many items run at once.
            retry_policy: by which a failed item is tried again.
            start: how many items an earlier attempt has done, for the progress.
        """
        checked_progress(start, None, "")
        reporter = self._reporter("batch")

        def on_progress(done: int, total: int | None) -> None:
            if reporter is not None:
                reporter.report(Progress(start + done, None if total is None else start + total, ""))

        return run_batch(
            function,
            items,
            limit=limit,
            retry_policy=retry_policy,
            should_stop=self.aborted,
            on_progress=on_progress,
        )

    def _reporter(self, method: str, *, required: bool = False) -> Reporter | None:
        """What writes to this run's record; None if it has none: run eagerly, or called as a function."""
        request: Any = self._own_request(method)
        state = None if request is None else state_of(request)
        if state is None:
            return None
        if state.reporter is None:
            if request.is_eager and not self.app.conf.task_store_eager_result:
                return None
            if not records(self.app):
                if required:
                    raise NotSupportedError(
                        f"the result backend {self.app.backend.as_uri()} keeps no records, so nobody could see the "
                        "progress.  Use result_backend='postgresql://...'"
                    )
                return None
            state.reporter = Reporter(self.app, request.id, state)
        found: Reporter = state.reporter
        return found

    # --- launching -----------------------------------------------------------------------------------------

    @override
    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, *more: Any, **options: Any
    ) -> Any:
        """As Celery's, but refused without a tenant, here at the caller's line.

        Raises:
            MissingTenantError: the task needs a tenant, and none is active or in the headers.
            NotConfiguredError: the task's application was not configured.
            TenantConflictError: the arguments name another tenant than the headers or the running code.
            TypeError: the arguments do not fit the task's signature.
        """
        self._refuse_unconfigured()
        if current_tenant() is None:
            # Once more when it is published, which does not happen in eager mode.
            self.check_launch(outgoing_tenant(options.get("headers"), self, kwargs))
        return super().apply_async(args, kwargs, task_id, *more, **options)

    def check_launch(self, tenant: TenantContext | None) -> None:
        """Raise what :meth:`apply_async` would raise for this tenant, or for nobody; asked before each publish."""
        if tenant is None and self.tenant_required and not self.system:
            raise MissingTenantError(
                f"task {self.name} needs a tenant, and none is active.  Launch it with "
                "launch_with_context(task, ..., current_user=user), or inside tenant_scope(...)"
            )

    def _refuse_unconfigured(self) -> None:
        if not is_installed(self.app):
            raise NotConfiguredError(
                f"task {self.name} belongs to application {self.app.main!r}, which is not configured.  Call "
                "rhesis_tasks.configure(app, ...) right after Celery(...)"
            )

    # --- running -------------------------------------------------------------------------------------------

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body: in a worker under the retry policy, elsewhere as the plain function it is."""
        state = running_state(self)
        if state is None:
            request = self.request
            if _is_plain_call(request):
                # Ids among the arguments may only contradict the active tenant here.
                with exactly(outgoing_tenant(None, self, kwargs if current_tenant() else None)):
                    self._refuse_without(current_tenant())
                    return super().__call__(*args, **kwargs)
            self._refuse_unconfigured()
            state = begin(self, request)
        if state.refusal is not None:
            raise state.refusal
        if state.tenant is None:
            self._refuse_without(None)
        try:
            return self._run_body(state, args, kwargs)
        except (Retry, Ignore, Reject):
            raise
        except Exception as error:
            if state.has_retried:
                raise  # the body's self.retry(), or Celery's own rules, have decided already
            if getattr(self, "autoretry_for", ()):
                state.reason = f"{type(error).__name__} is not listed in autoretry_for"
                raise
            decision = decide(policy_of(self, state), error, self.request.retries, state)
            if isinstance(decision, GiveUp):
                state.reason = decision.reason
                raise
            # The policy has counted; Celery is only to agree.
            limit = self.request.retries + 1
            raise self._try_again(state, exc=error, countdown=decision.countdown, max_retries=limit) from error

    def _refuse_without(self, tenant: TenantContext | None) -> None:
        if tenant is None and self.tenant_required and not self.system:
            raise MissingTenantError(
                f"task {self.name} needs a tenant, and none came with its message or is active.  "
                "Its body was not run.  Launch it from a configured application, with a tenant active"
            )

    @override
    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Exception | None = None,
        throw: bool = True,
        eta: Any = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Any:
        """As Celery's, within the bounds of the retry policy: its number of retries, and its age.

        The policy is not asked whether an exception is worth it: the body has decided.  Where the call or the task
        names a number of its own (``max_retries``), that one holds, not the policy's; where neither of them says how
        long to wait, the policy does.

        Raises:
            Retry: there will be another attempt.
            BaseException: ``exc``, or what is handled at the moment, or MaxRetriesExceededError, if there will not.
            NotSupportedError: the task has ended, or it is another one that runs.
        """
        self._refuse_when_ended("retry")
        request: Any = self.request
        state = state_of(request)
        if state is None:
            return super().retry(args, kwargs, exc, throw, eta, countdown, max_retries, **options)
        state.has_retried = True
        by_celery = bool(getattr(self, "autoretry_for", ()))
        policy = DEFAULT if by_celery else policy_of(self, state)
        if not by_celery:
            if max_retries is None and self.max_retries == Task.max_retries:
                max_retries = max(part.max_retries for part in (policy, *policy.rules))
            if eta is None and countdown is None and self.default_retry_delay == Task.default_retry_delay:
                countdown = policy.wait(request.retries)
        limit = self.max_retries if max_retries is None else max_retries
        state.reason = objection(policy, limit, request.retries, state, eta, countdown)
        if state.reason is not None:
            max_retries = 0
            if exc is None:  # Celery's own message would show the arguments
                raise self.MaxRetriesExceededError(f"Can't retry {self.name}[{request.id}]: {state.reason}")
        return self._try_again(state, args, kwargs, exc, throw, eta, countdown, max_retries, **options)

    def _try_again(self, state: RequestState, *arguments: Any, **options: Any) -> Any:
        """As Celery's :meth:`retry`; what the attempt has reported is written before another one can be."""
        if state.reporter is not None:
            state.reporter.write()
        return super().retry(*arguments, **options)

    @classmethod
    @override
    def on_bound(cls, app: Celery) -> None:
        """Refuse a definition that cannot work, when the task is made.

        Raises:
            TaskDefinitionError: the body is a generator, or the retry policy is no RetryPolicy and no method that
                could return one, or there is ``autoretry_for``, too, or an attribute that is a flag is no bool.
        """
        super().on_bound(app)
        for name in ("tenant_required", "system", "tenant_in_arguments"):
            flag: Any = getattr(cls, name)
            if not isinstance(flag, bool):  # "false" would count as True
                raise TaskDefinitionError(f"{name} of task {cls.name} must be True or False, not {flag!r}")
        check_policy(cls)


@connect_on_app_finalize
def _add_hooks_task(app: Celery) -> None:
    """The task by which a worker's main process has hooks run."""
    if not is_installed(app):
        return

    @app.task(
        name=hooks.RUN_HOOKS,
        base=BaseTask,
        bind=True,
        shared=False,
        lazy=False,
        ignore_result=True,
        retry_policy=NO_RETRY,
        retry_on_worker_lost=True,  # a few times, and not for ever: maybe a hook has ended the process
        max_retries=3,
        default_retry_delay=1,
    )
    def run_hooks(self: BaseTask, told: dict[str, Any]) -> None:
        """Run a task's hooks for an outcome that a worker's main process has decided."""
        hooks.run_published(self.app, told, self.tenant)
