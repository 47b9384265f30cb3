"""What a task is: ContextTask carries the context, BaseTask also insists on it.

``configure()`` makes :class:`ContextTask` the class of every task of an application, Celery's own included.
Applications subclass, or name as ``base=``, :class:`BaseTask`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from celery import Task
from celery._state import _task_stack  # type: ignore[attr-defined]  # left out of the stubs
from celery.exceptions import Ignore, Reject, Retry
from typing_extensions import override

from .context import TenantContext, current_tenant, exactly, require_tenant
from .errors import MissingTenantError, NotConfiguredError, SignatureError, TaskDefinitionError
from .headers import RequestState, state_of
from .logs import TaskLogger
from .otel import mark_current_span
from .propagation import (
    as_launched,
    begin,
    carried_header,
    is_installed,
    outgoing_envelope,
    outgoing_tenant,
    renew,
    running_state,
    with_context,
)
from .retry import DEFAULT, RetryLater, RetryPolicy
from .sessions import TenantSession, TransactionOptions, sessions_of

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context
    from celery.result import EagerResult

__all__ = ["BaseTask", "ContextTask"]


def _is_plain_call(request: Context) -> bool:
    """Whether a task is called as a function, from outside a worker or by its own body, and not by the worker."""
    state = state_of(request)
    return bool(request.called_directly or (state is not None and state.is_running))


class ContextTask(Task):  # type: ignore[type-arg]  # generic in the stubs only
    """A task that carries the context."""

    abstract = True
    Request = "rhesis_tasks.request:ContextRequest"

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
        state.is_running = True
        mark_current_span()
        try:
            return self.run(*args, **kwargs)
        finally:
            renew(state)

    def _call_directly(self, args: Any, kwargs: Any) -> Any:
        """As a plain function, with a request that names the active tenant."""
        tenant = current_tenant()
        _task_stack.push(self)
        self.push_request(
            args=args,
            kwargs=kwargs,
            organization_id=tenant.organization_id if tenant else None,
            user_id=tenant.user_id if tenant else None,
        )
        try:
            return self.run(*args, **kwargs)
        finally:
            self.pop_request()
            _task_stack.pop()

    @override
    def signature_from_request(self, request: Any = None, *args: Any, **options: Any) -> Any:
        """What a retry publishes: the context of the message, whatever scope or headers the body retries with."""
        request = self.request if request is None else request
        # Always, since request.headers lacks ours where another library's headers are nested in the message.
        options["headers"] = {**(options.get("headers") or request.headers or {}), **carried_header(request)}
        return super().signature_from_request(request, *args, **options)

    @override
    def replace(self, sig: Any) -> Any:
        """As Celery's; the replacement works for the same tenant, whatever scope the body is in."""
        with as_launched(self.request):
            return super().replace(sig)

    @override
    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:
        """As Celery's; what is added works for the same tenant, whatever scope the body is in."""
        with as_launched(self.request):
            return super().add_to_chord(sig, lazy)  # type: ignore[call-overload]

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
        headers = with_context(headers, outgoing_envelope(headers, self, kwargs))
        return super().apply(
            args, kwargs, link, link_error, task_id, retries, throw, logfile, loglevel, headers, **options
        )


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
        retry_policy: what is tried again, and when.  Not used on a task that uses Celery's ``autoretry_for``.
    """

    abstract = True

    tenant_required: ClassVar[bool] = True
    system: ClassVar[bool] = False
    tenant_in_arguments: ClassVar[bool] = True
    retry_policy: ClassVar[RetryPolicy] = DEFAULT

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

        Args:
            **transaction: how its transactions are begun: ``readonly``, ``isolation_level``, ``statement_timeout`` and
                ``lock_timeout`` (seconds).

        Raises:
            NotConfiguredError: the application was configured without a database.
            MissingTenantError: there is no tenant.
        """
        return sessions_of(self.app)(**transaction)

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
            countdown = self._countdown_after(error)
            if countdown is None:
                raise
            raise self.retry(exc=error, countdown=countdown, max_retries=self.retry_policy.max_retries) from error

    def _refuse_without(self, tenant: TenantContext | None) -> None:
        if tenant is None and self.tenant_required and not self.system:
            raise MissingTenantError(
                f"task {self.name} needs a tenant, and none came with its message or is active.  "
                "Its body was not run.  Launch it from a configured application, with a tenant active"
            )

    @override
    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """As Celery's; where it gives up, the retry policy is not asked again."""
        state = state_of(self.request)
        if state is not None:
            state.has_retried = True
        return super().retry(*args, **kwargs)

    def _countdown_after(self, error: Exception) -> float | None:
        """Seconds until the next attempt; None if there is none."""
        state = state_of(self.request)
        if getattr(self, "autoretry_for", ()) or (state is not None and state.has_retried):
            return None  # Celery's own rules, or the body's self.retry(), have decided already
        decision = self.retry_policy.decide(error, self.request.retries)
        return decision.countdown if isinstance(decision, RetryLater) else None

    @classmethod
    @override
    def on_bound(cls, app: Celery) -> None:
        """Refuse a definition that cannot work, when the task is made.

        Raises:
            TaskDefinitionError: the body is ``async def``, or the retry policy is no RetryPolicy.
        """
        super().on_bound(app)
        if inspect.iscoroutinefunction(inspect.unwrap(cls.run)):
            raise TaskDefinitionError(
                f"task {cls.name} is async def, which is not supported yet: Celery would never await it"
            )
        if not isinstance(cls.retry_policy, RetryPolicy):
            raise TaskDefinitionError(
                f"retry_policy of task {cls.name} must be a RetryPolicy, not {cls.retry_policy!r}"
            )
