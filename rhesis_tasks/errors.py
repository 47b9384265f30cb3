"""Every error this library raises on purpose.

One base class; the docstring of a class is its default message; the evidence is kept as attributes; the text
says how to mend it.  Errors that are also a standard kind (``ValueError``, ``TypeError``, ``ImportError``)
inherit from it, so that callers who know nothing of us catch them as usual.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.exc import DataError, DBAPIError, ProgrammingError

__all__ = [
    "AnswerTimeoutError",
    "ConfigurationError",
    "ContextError",
    "DatabaseFullError",
    "DatabaseUnavailableError",
    "DeadLetterError",
    "HeaderError",
    "IllegalTransitionError",
    "InvalidProgressError",
    "InvalidTenantError",
    "LeftoverError",
    "MissingExtraError",
    "MissingPrivilegeError",
    "MissingTenantError",
    "NotConfiguredError",
    "NotSupportedError",
    "PermissionDeniedError",
    "PolicyViolationError",
    "RhesisTasksError",
    "SchemaError",
    "SettingMissingError",
    "SettingValueError",
    "SignatureError",
    "TaskArgumentsError",
    "TaskCancelledError",
    "TaskDefinitionError",
    "TenantConflictError",
    "TenantDatabaseError",
    "TenantLaunchError",
    "TenantSessionError",
    "UnsafeConnectionError",
]


class RhesisTasksError(Exception):
    """An error of rhesis-tasks."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class ConfigurationError(RhesisTasksError):
    """The Celery application cannot be configured this way."""


class NotConfiguredError(ConfigurationError):
    """This Celery application is not configured.  Call rhesis_tasks.configure(app, ...) right after Celery(...)."""


class NotSupportedError(RhesisTasksError):
    """What was asked for is not available with this broker, result backend or version."""


class MissingExtraError(RhesisTasksError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, message: str | None = None, *, extra: str | None = None) -> None:
        self.extra = extra
        super().__init__(message)

    @classmethod
    def of(cls, module: str, extra: str) -> MissingExtraError:
        """The error for a module that an extra brings."""
        return cls(f"{module!r} is not installed.  It comes with: pip install 'rhesis-tasks[{extra}]'", extra=extra)


class ContextError(RhesisTasksError):
    """The context of a piece of work is missing or wrong."""


class InvalidTenantError(ContextError, ValueError):
    """A tenant, or a value that travels with it, cannot be used."""

    def __init__(self, message: str, *, field: str | None = None, value: object = None) -> None:
        self.field = field
        self.value = value
        super().__init__(message)


class MissingTenantError(ContextError):
    """No tenant is active.  Open one with tenant_scope(...), or pass current_user= or context= to the launch."""


class TenantConflictError(ContextError):
    """Two sources name different tenants for the same work."""

    def __init__(self, message: str, *, first: object = None, second: object = None) -> None:
        self.first = first
        self.second = second
        super().__init__(message)


class HeaderError(ContextError):
    """The context header of a message cannot be read.  The task's body was not run."""

    def __init__(self, message: str, *, header: object = None) -> None:
        self.header = header
        super().__init__(message)

    def __reduce__(self) -> tuple[type[HeaderError], tuple[str]]:
        # The offending header may hold anything; only its description goes to the result backend.
        return type(self), (str(self),)


class SignatureError(HeaderError):
    """The context header of a message is not signed, or not by us.  The task's body was not run."""


class TaskDefinitionError(RhesisTasksError, TypeError):
    """A task or a decorated function is defined in a way that cannot work."""


class TaskArgumentsError(RhesisTasksError, TypeError):
    """The arguments do not fit the task's signature."""


class TenantLaunchError(RhesisTasksError):
    """A schedule's task could not be launched for some tenants."""

    def __init__(self, message: str | None = None, *, failures: dict[str, str] | None = None) -> None:
        self.failures = failures or {}  #: what has gone wrong, by tenant
        super().__init__(message)


class IllegalTransitionError(RhesisTasksError):
    """A task cannot go there from the state that it is in."""

    def __init__(self, message: str, *, state: str | None = None, name: str | None = None) -> None:
        self.state = state
        self.name = name
        super().__init__(message)


class InvalidProgressError(RhesisTasksError, ValueError):
    """A task's progress is reported in numbers that are none."""


class TaskCancelledError(RhesisTasksError):
    """The coroutine of a task was cancelled from inside of the task."""


class LeftoverError(RhesisTasksError, RuntimeError):
    """Something that an earlier task has left behind was to be started."""


class MissingPrivilegeError(ConfigurationError):
    """The database login may not do what is needed."""


class SchemaError(ConfigurationError):
    """The library's tables in the database are missing, or of another version."""

    def __init__(self, message: str | None = None, *, found: int | None = None, needed: int | None = None) -> None:
        self.found = found
        self.needed = needed
        super().__init__(message)


class DeadLetterError(RhesisTasksError):
    """The task's message was delivered too often in vain, and was given up: it is a dead letter."""


class HookTimeoutError(RhesisTasksError, TimeoutError):
    """A hook did not end in its time; it is only logged."""


class DatabaseUnavailableError(RhesisTasksError, ConnectionError):
    """The database cannot be reached, or the connection to it was lost."""

    def __init__(self, message: str, *, url: str | None = None) -> None:
        self.url = url
        super().__init__(message)


class AnswerTimeoutError(DatabaseUnavailableError):
    """The database did not answer in time.  Whether it did what it was asked for, or still will, is not known."""


class DatabaseFullError(DatabaseUnavailableError):
    """The database can be reached, and has no room: for data on its disk, in its memory, or for connections."""


class TenantSessionError(RhesisTasksError):
    """A tenant session cannot be used this way."""


class UnsafeConnectionError(TenantSessionError):
    """The database connection cannot enforce the tenant, so nothing is run on it."""


class TenantDatabaseError(TenantSessionError, DBAPIError):
    """The database refused a statement of a tenant session, for a reason that has to do with the tenant.

    Also SQLAlchemy's kind of error, so that code that knows nothing of tenants goes on to catch it.

    Attributes:
        tenant: whose transaction it was.
        statement: the SQL.
        orig: the driver's error.
    """

    def __init__(
        self, message: str, *, tenant: object = None, statement: str | None = None, orig: BaseException | None = None
    ) -> None:
        DBAPIError.__init__(self, statement, None, orig or Exception(message), hide_parameters=True)
        self.args = (message,)
        self.tenant = tenant

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, {"tenant": self.tenant, "statement": self.statement}


class PolicyViolationError(TenantDatabaseError, ProgrammingError):
    """A row that is written does not belong to the transaction's tenant."""


class PermissionDeniedError(TenantDatabaseError, ProgrammingError):
    """The database login lacks a privilege."""


class SettingMissingError(TenantDatabaseError, ProgrammingError):
    """A policy or query reads a setting that nobody sends."""


class SettingValueError(TenantDatabaseError, DataError):
    """A policy or query cannot read the value of a setting: it is empty, or of another type than the column."""
