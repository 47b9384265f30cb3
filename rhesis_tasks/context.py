"""Who the current piece of work is for.

A tenant is an organization together with the acting user.  It lives in a ContextVar, so every thread and
every asyncio task sees its own.  This module knows nothing of Celery or of databases.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, Protocol, TypeAlias

from .errors import InvalidTenantError, MissingTenantError, TenantConflictError

__all__ = [
    "CurrentUser",
    "TenantContext",
    "TenantId",
    "as_tenant",
    "current_tenant",
    "require_tenant",
    "resolve_tenant",
    "same_tenant",
    "tenant_scope",
    "tenant_var",
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


tenant_var: ContextVar[TenantContext | None] = ContextVar("rhesis_tasks.tenant", default=None)


# The scopes that are open here, and the tenant before each.  In the context, not on the scope: threads and asyncio
# tasks may enter one and the same scope at once.
open_scopes: ContextVar[tuple[tuple[object, TenantContext | None], ...]] = ContextVar(
    "rhesis_tasks.open_scopes", default=()
)


def current_tenant() -> TenantContext | None:
    """The tenant that the running code works for, or None."""
    return tenant_var.get()


def require_tenant() -> TenantContext:
    """The tenant that the running code works for.

    Raises:
        MissingTenantError: there is none.
    """
    tenant = tenant_var.get()
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
        open_scopes.set((*open_scopes.get(), (self, tenant_var.get())))
        tenant_var.set(self.tenant)
        return self.tenant

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        scopes = list(open_scopes.get())
        mine = [position for position, (scope, _) in enumerate(scopes) if scope is self]
        if not mine:
            return  # opened elsewhere: by a generator that is closed late, by another thread or after its task
        _, before = scopes.pop(mine[-1])
        if mine[-1] == len(scopes):
            tenant_var.set(before)
        else:  # others are open inside of it, and come back to what was before
            scopes[mine[-1]] = (scopes[mine[-1]][0], before)
        open_scopes.set(tuple(scopes))

    async def __aenter__(self) -> TenantContext:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, tb)


@contextmanager
def exactly(tenant: TenantContext | None) -> Iterator[None]:
    """This tenant, or none, for a block: for messages whose own header says for whom they are."""
    token = tenant_var.set(tenant)
    try:
        yield
    finally:
        tenant_var.reset(token)


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
    ambient = tenant_var.get()
    if ambient is not None:
        named.append(("the active tenant", ambient))
    return agreed(named)


def tenant_in(arguments: Mapping[str, Any] | None) -> TenantContext | None:
    """The tenant that ``organization_id=`` and ``user_id=`` name among a task's keyword arguments, if they do.

    Raises:
        InvalidTenantError: there are such arguments, and they are no ids.
    """
    if not arguments or arguments.get("organization_id") is None:
        return None
    return TenantContext(arguments["organization_id"], arguments.get("user_id"))


def agreed(named: Sequence[tuple[str, TenantContext]]) -> TenantContext | None:
    """The one tenant that several sources, each with what it is called, name.

    Where they agree, what one of them leaves out is taken from the next, in that order.

    Raises:
        TenantConflictError: two of them name different organizations, or different users.
    """
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
