"""Who the current piece of work is for, and which other context variables travel with it.

A tenant is an organization together with the acting user.  It lives in a ContextVar, so every thread and
every asyncio task sees its own.  This module knows nothing of Celery or of databases.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar, Token
from types import MappingProxyType, TracebackType
from typing import Any, Final, Protocol, TypeAlias

from contextvars_extras import ContextVarDescriptor, ContextVarsRegistry
from contextvars_extras.context_var_ext import DeletionMark, NoDefault

from .errors import HeaderError, InvalidTenantError, MissingTenantError, TenantConflictError

__all__ = [
    "Activation",
    "CurrentUser",
    "RegisteredVar",
    "TenantContext",
    "TenantId",
    "as_tenant",
    "current_tenant",
    "register_context_var",
    "registered_vars",
    "require_tenant",
    "resolve_tenant",
    "same_tenant",
    "tenant_scope",
    "unregister_context_var",
]

TenantId: TypeAlias = str | int | uuid.UUID
"""What an id may be given as; it is kept as a string."""

MAX_ID_LENGTH: Final = 255


class CurrentUser(Protocol):
    """Anything with the attributes ``id`` and ``organization_id``: an ORM row, a Pydantic model, a dataclass."""

    @property
    def id(self) -> Any: ...

    @property
    def organization_id(self) -> Any: ...


def _identifier(field: str, value: object) -> str:
    """The id as a string, or an InvalidTenantError that says what is wrong with it."""
    if isinstance(value, str):
        text = str.__str__(value)  # str() of a (str, Enum) member would be "Class.member"
    elif isinstance(value, uuid.UUID):
        return str(value)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**MAX_ID_LENGTH:
        text = int.__repr__(value)  # the same for (int, Enum)
    else:
        raise InvalidTenantError(
            f"{field} must be a str, UUID or int of at most {MAX_ID_LENGTH} digits, not {_described(value)}",
            field=field,
            value=value,
        )
    if not text.strip():
        raise InvalidTenantError(f"{field} must not be empty", field=field, value=value)
    if text != text.strip() or not text.isprintable():
        # isprintable() is false for control characters and for lone surrogates, which no database can store.
        raise InvalidTenantError(
            f"{field} must not contain control characters or surrounding white space: {text!r:.80}",
            field=field,
            value=value,
        )
    if len(text) > MAX_ID_LENGTH:
        raise InvalidTenantError(
            f"{field} has {len(text)} characters; at most {MAX_ID_LENGTH} are allowed",
            field=field,
            value=value,
        )
    return text


class _Frozen(dict[str, str | bool | int]):
    """A dict that stays as it is; unlike a mappingproxy it can be copied, and written as JSON."""

    def _refuse(self, *_: object, **__: object) -> Any:
        raise TypeError("the extra values of a tenant cannot be changed; make a new TenantContext")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _Frozen, (dict(self),)


def _described(value: object) -> str:
    try:
        return f"{type(value).__name__}: {value!r:.80}"
    except Exception:  # repr() of another's object may do anything; of a huge int it raises ValueError
        return type(value).__name__


@dataclasses.dataclass(frozen=True, slots=True)
class TenantContext:
    """The organization that work is done for, and who asked for it.

    Ids are kept as non-empty strings; UUIDs and ints are converted.  ``extra`` holds further values of the
    application (str, bool or int) that belong to the tenant.

    Raises:
        InvalidTenantError: (a ValueError) an id is empty, of another type or not storable.
    """

    organization_id: str
    user_id: str | None = None
    project_id: str | None = None
    extra: Mapping[str, str | bool | int] = dataclasses.field(default_factory=dict, hash=False)

    def __init__(
        self,
        organization_id: TenantId,
        user_id: TenantId | None = None,
        project_id: TenantId | None = None,
        extra: Mapping[str, str | bool | int] | None = None,
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "organization_id", _identifier("organization_id", organization_id))
        set_field(self, "user_id", None if user_id is None else _identifier("user_id", user_id))
        set_field(self, "project_id", None if project_id is None else _identifier("project_id", project_id))
        set_field(self, "extra", _Frozen(_checked_extra(extra)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.organization_id, self.user_id, self.project_id, dict(self.extra))

    def __str__(self) -> str:
        user = "no user" if self.user_id is None else f"user {self.user_id}"
        return f"organization {self.organization_id} ({user})"


def _checked_extra(extra: Mapping[str, str | bool | int] | None) -> dict[str, str | bool | int]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):  # a caller without a type checker
        raise InvalidTenantError(f"extra must be a mapping, not {type(extra).__name__}", field="extra", value=extra)
    for key, value in extra.items():
        if not isinstance(key, str) or not key:
            raise InvalidTenantError(f"keys of extra must be non-empty strings, not {key!r:.80}", field="extra")
        if not isinstance(value, str | bool | int):
            raise InvalidTenantError(
                f"extra[{key!r}] must be a str, bool or int, not {type(value).__name__}",
                field="extra",
                value=value,
            )
    return dict(extra)


def as_tenant(source: TenantContext | CurrentUser, /) -> TenantContext:
    """The tenant of a user: anything with ``id`` and ``organization_id``; a TenantContext is returned as it is.

    Raises:
        InvalidTenantError: there are no such attributes, or one of them is not a usable id.
    """
    if isinstance(source, TenantContext):
        return source
    try:
        user_id, organization_id = source.id, source.organization_id
    except AttributeError as error:
        raise InvalidTenantError(
            f"a tenant is a TenantContext or a user with .id and .organization_id; {type(source).__name__} "
            f"has no attribute {error.name!r}",
            field=error.name,
        ) from error
    if organization_id is None:
        raise InvalidTenantError(f"user {user_id!r:.80} belongs to no organization", field="organization_id")
    return TenantContext(organization_id, user_id)


_tenant: ContextVar[TenantContext | None] = ContextVar("rhesis_tasks.tenant", default=None)


# The tokens of the scopes that are open here.  In the context, not on the scope: threads and asyncio tasks may
# enter one and the same scope at once.
_open_scopes: ContextVar[tuple[Token[TenantContext | None], ...]] = ContextVar("rhesis_tasks.open_scopes", default=())


def current_tenant() -> TenantContext | None:
    """The tenant that the running code works for, or None."""
    return _tenant.get()


def require_tenant() -> TenantContext:
    """The tenant that the running code works for.

    Raises:
        MissingTenantError: there is none.
    """
    tenant = _tenant.get()
    if tenant is None:
        raise MissingTenantError
    return tenant


class tenant_scope:
    """Work for a tenant inside a ``with`` or ``async with`` block.

    The previous tenant is back after the block, however it ends.  Scopes nest: code that acts for several
    tenants opens one for each.

    Args:
        ctx_or_user: a :class:`TenantContext`, or anything with ``id`` and ``organization_id``.

    Raises:
        InvalidTenantError: at construction, if it is neither.
    """

    __slots__ = ("tenant",)

    def __init__(self, ctx_or_user: TenantContext | CurrentUser, /) -> None:
        self.tenant = as_tenant(ctx_or_user)

    def __enter__(self) -> TenantContext:
        _open_scopes.set((*_open_scopes.get(), _tenant.set(self.tenant)))
        return self.tenant

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        *outer, token = _open_scopes.get()
        _open_scopes.set(tuple(outer))
        _tenant.reset(token)

    async def __aenter__(self) -> TenantContext:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, tb)


@contextmanager
def exactly(tenant: TenantContext | None) -> Iterator[None]:
    """This tenant, or none, for a block: for messages whose own header says for whom they are."""
    token = _tenant.set(tenant)
    try:
        yield
    finally:
        _tenant.reset(token)


def same_tenant(one: TenantContext, other: TenantContext) -> bool:
    """Whether two contexts do not contradict each other: the same organization, and no two different users."""
    return one.organization_id == other.organization_id and (
        one.user_id == other.user_id or None in (one.user_id, other.user_id)
    )


def resolve_tenant(
    *, context: TenantContext | None = None, current_user: CurrentUser | None = None
) -> TenantContext | None:
    """The tenant named by the arguments and by the running code, which must not contradict each other.

    Where they agree, what one of them leaves out is taken from the next, in that order.

    Raises:
        TenantConflictError: two of them name different organizations, or different users.
    """
    named: list[tuple[str, TenantContext]] = []
    if context is not None:
        if not isinstance(context, TenantContext):
            raise InvalidTenantError(f"context= takes a TenantContext, not {type(context).__name__}", field="context")
        named.append(("context=", context))
    if current_user is not None:
        named.append(("current_user=", as_tenant(current_user)))
    ambient = _tenant.get()
    if ambient is not None:
        named.append(("the active tenant", ambient))
    if not named:
        return None
    source, tenant = named[0]
    for other_source, other in named[1:]:
        if not same_tenant(tenant, other):
            raise TenantConflictError(
                f"{source} names {tenant}, but {other_source} is {other}.  To act for another tenant on purpose, "
                "open tenant_scope(...) for it",
                first=tenant,
                second=other,
            )
        tenant = TenantContext(
            tenant.organization_id,
            tenant.user_id or other.user_id,
            tenant.project_id or other.project_id,
            {**other.extra, **tenant.extra},
        )
    return tenant


# --- other variables that travel -----------------------------------------------------------------------------

Portable: TypeAlias = str | bool | int | None
"""What every broker carries unchanged."""


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


MISSING: Final = _Missing()
"""Stands for "not set", which is not the same as None."""


@dataclasses.dataclass(frozen=True, slots=True)
class RegisteredVar:
    """A context variable that travels with every task."""

    name: str
    var: ContextVar[Any]
    dump: Callable[[Any], Portable] | None = None
    load: Callable[[Any], Any] | None = None
    default: Any = MISSING
    log: bool = False

    def value(self) -> Any:
        """The value in the running context, or MISSING."""
        value = self.var.get(MISSING)
        # contextvars-extras marks a deleted or reset variable by a sentinel inside the raw variable.
        return MISSING if isinstance(value, DeletionMark | NoDefault) else value

    def dumped(self) -> Portable | _Missing:
        """The value as it travels, or MISSING.

        Raises:
            InvalidTenantError: it is not a str, bool, int or None, and dump= does not make it one.
        """
        value: object = self.value()
        if isinstance(value, _Missing):
            return value
        if self.dump is not None:
            value = self.dump(value)
        if value is None or isinstance(value, str | bool | int):
            return value
        raise InvalidTenantError(
            f"context variable {self.name!r} holds a {type(value).__name__}; what travels is a str, bool, int or "
            "None.  Register it with dump= and load=",
            field=self.name,
            value=value,
        )

    def loaded(self, value: Any) -> Any:
        """The value back from how it travelled.

        Raises:
            HeaderError: load= refused it.
        """
        if self.load is None:
            return value
        try:
            return self.load(value)
        except Exception as error:
            raise HeaderError(f"load= of context variable {self.name!r} refused {value!r:.80}: {error}") from error


LOG_FIELDS: Final = ("organization_id", "user_id", "task_id", "task_name", "root_id")
"""The fields that our own log context has."""

RESERVED_LOG_FIELDS: Final = frozenset(
    {*vars(logging.LogRecord("", 0, "", 0, "", None, None)), "message", "asctime", *LOG_FIELDS}
)

_registered: dict[str, RegisteredVar] = {}


def register_context_var(
    var: ContextVar[Any] | type[ContextVarsRegistry],
    *,
    name: str | None = None,
    dump: Callable[[Any], Portable] | None = None,
    load: Callable[[Any], Any] | None = None,
    default: Any = MISSING,
    log: bool = False,
) -> None:
    """Let another context variable travel with every task.  Only registered ones do.

    Call it at import time, in code that web processes and workers share.

    Args:
        var: a ContextVar, or a ``contextvars_extras.ContextVarsRegistry`` class, all of whose variables are
            registered as ``ClassName.attribute``.
        name: the name in the message; by default the variable's own.  Not for a registry class.
        dump: turns the value into a str, bool, int or None, in the launching process.
        load: turns that back into the value, in the worker.
        default: the value in the worker when the launcher had none and the worker's own context has one.
            By default the variable's own default, or None.
        log: put the value on every log record made while the task runs.

    Raises:
        InvalidTenantError: it is no such thing, or another variable has the name already.
    """
    if isinstance(var, type) and issubclass(var, ContextVarsRegistry):
        if name is not None:
            raise InvalidTenantError("name= does not go with a registry class: each variable has its own", field="name")
        for registered_name, raw in _variables_of(var).items():
            _register(RegisteredVar(registered_name, raw, dump, load, default, log))
    elif isinstance(var, ContextVar):
        _register(RegisteredVar(name or var.name, var, dump, load, default, log))
    else:
        raise InvalidTenantError(
            f"register_context_var takes a ContextVar or a ContextVarsRegistry class, not {type(var).__name__}",
            field="var",
        )


def _variables_of(registry: type[ContextVarsRegistry]) -> dict[str, ContextVar[Any]]:
    """The raw variables behind a registry class, by the names that we register them under."""
    return {
        f"{registry.__name__}.{attribute}": descriptor.context_var
        for attribute, descriptor in vars(registry).items()
        if isinstance(descriptor, ContextVarDescriptor)
    }


def _register(registered: RegisteredVar) -> None:
    if not isinstance(registered.name, str) or not registered.name:
        raise InvalidTenantError(f"name= takes a non-empty str, not {registered.name!r}", field="name")
    if registered.log and registered.name in RESERVED_LOG_FIELDS:
        raise InvalidTenantError(
            f"log records have a field {registered.name!r} already; give this variable its own name=", field="name"
        )
    known = _registered.get(registered.name)
    if known is not None and known.var is not registered.var:
        raise InvalidTenantError(
            f"another context variable is registered as {registered.name!r}; give this one its own name=",
            field="name",
        )
    _registered[registered.name] = registered


def unregister_context_var(var: ContextVar[Any] | type[ContextVarsRegistry]) -> None:
    """Undo :func:`register_context_var`; unknown variables are ignored (for tests)."""
    if isinstance(var, ContextVar):
        gone = [name for name, registered in _registered.items() if registered.var is var]
    else:
        gone = list(_variables_of(var))
    for name in gone:
        _registered.pop(name, None)


def registered_vars() -> Mapping[str, RegisteredVar]:
    """The registered variables by name."""
    return MappingProxyType(_registered)


class Activation:
    """Everything that travels, set in the running context until :meth:`undo`.

    Kept with the request it belongs to, never keyed by task id: a retry reuses the id and may start before
    the first run has ended.

    Raises:
        HeaderError: a registered variable's ``load=`` refused its value; nothing is left set.
    """

    __slots__ = ("_tokens", "_unset", "_values")

    def __init__(self, tenant: TenantContext | None, variables: Mapping[str, Any]) -> None:
        self._tokens: list[Token[Any]] = [_tenant.set(tenant)]
        self._values: list[tuple[ContextVar[Any], Any]] = [(_tenant, tenant)]
        # Variables that nobody has set stay so: to the body they look as they did to the launcher.
        self._unset: list[RegisteredVar] = []
        try:
            for name, registered in _registered.items():
                if name in variables:
                    value = registered.loaded(variables[name])
                elif registered.value() is not MISSING:
                    value = _absent_value(registered)
                else:
                    self._unset.append(registered)
                    continue
                self._tokens.append(registered.var.set(value))
                self._values.append((registered.var, value))
        except BaseException:
            self.undo()
            raise

    def renew(self) -> None:
        """Set everything as at the start, whatever the body has left.

        What Celery publishes after the body (chain, link, chord) belongs to the launcher's context, not to
        variables that the body set and forgot.
        """
        for var, value in self._values:
            if var.get(MISSING) is not value:
                var.set(value)
        for registered in self._unset:
            if registered.value() is not MISSING:
                # Nobody can unset a ContextVar without the token.
                registered.var.set(_absent_value(registered))

    def undo(self) -> None:
        """Bring back what was set before, in reverse order; calling it again changes nothing."""
        self.renew()
        self._values.clear()
        self._unset.clear()
        while self._tokens:
            token = self._tokens.pop()
            token.var.reset(token)


def _absent_value(registered: RegisteredVar) -> Any:
    """What a variable is where the launcher had none but the worker's own context holds a value."""
    if registered.default is not MISSING:
        return registered.default
    try:
        return Context().run(registered.var.get)
    except LookupError:
        return None
