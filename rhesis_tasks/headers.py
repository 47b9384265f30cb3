"""The one header in which context travels inside a Celery message.

    {"rhesis_tasks": {"v": 1, "organization_id": "...", "user_id": "...", "project_id": "...",
                      "extra": {...}, "vars": {...}, "retry_policy": "...", "first_at": 1764300000123}}

Namespaced, because a header named ``get``, ``id`` or ``group`` would clobber Celery's own; versioned, so that
an old worker can refuse what it does not understand.  Values are str, bool, int or None: AMQP refuses UUIDs
and large ints, JSON brokers silently change them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final

from .context import CurrentUser, TenantContext, agreed, as_tenant, current_tenant
from .errors import ContextError, HeaderError, InvalidTenantError, SignatureError
from .variables import MISSING, Activation, registered_vars

__all__ = [
    "HEADER",
    "MAX_BYTES",
    "REFUSED",
    "SENT_AT",
    "Envelope",
    "Progress",
    "RequestState",
    "capture",
    "carried_by",
    "context_headers",
    "decode",
    "encode",
    "find",
    "keep_state",
    "running",
    "state_of",
]

HEADER: Final = "rhesis_tasks"
SENT_AT: Final = "rhesis_tasks_sent_at"
"""The header with the time of publishing, in seconds since 1970: for metrics, and nothing else."""
VERSION: Final = 1
MAX_BYTES: Final = 8192
"""The largest context that may travel, in bytes of JSON."""

REFUSED: Final[Mapping[str, Any]] = {"refused": True}
"""Stands for the context header of a message that nobody has signed, where context is signed."""

_MAX_INT = 2**63
_OURS, _THEIRS = "the context header", "the tenant in the flat headers"
_FLAT_KEYS = ("organization_id", "user_id")


@dataclasses.dataclass(frozen=True, slots=True)
class Envelope:
    """What travels with one message: the tenant and the registered variables."""

    tenant: TenantContext | None = None
    variables: Mapping[str, str | bool | int | None] = dataclasses.field(default_factory=dict)
    retry_policy: str | None = None  #: the name of the one that this launch asks for
    first_at: int | None = None  #: when the first attempt began, for those after it: milliseconds since 1970

    def __bool__(self) -> bool:
        return self.tenant is not None or bool(self.variables)


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a task says it is."""

    done: int
    total: int | None
    message: str


@dataclasses.dataclass(slots=True, kw_only=True)
class RequestState:
    """What is known of a task's request while it is dealt with.  Kept on the request, never keyed by task id."""

    task: object
    activation: Activation | None
    envelope: Envelope  #: what the message carried; empty if it is refused
    tenant: TenantContext | None  #: whose the record is
    refusal: ContextError | None = None  #: why nothing may be done for the message
    is_running: bool = False  #: its body is
    awaits_body: bool = False  #: ... about to be called, and its result is waited for
    is_cancelled: bool = False  #: somebody has, before it was started
    is_superseded: bool = False  #: it has ended, but its record had an end already
    has_ended: bool = False  #: ... and nothing may have it run again
    began_at: float | None = None  #: when its body did, by time.monotonic()
    first_at: int | None = None  #: when the body of its first attempt did, in milliseconds since 1970
    reason: str | None = None  #: why a failed attempt is the last one
    has_retried: bool = False  #: its body has called self.retry()
    #: The synchronous sessions that its body has opened, and the thread of each; another one may add to them.
    sessions: weakref.WeakKeyDictionary[Any, int] = dataclasses.field(default_factory=weakref.WeakKeyDictionary)
    loops: set[Any] = dataclasses.field(default_factory=set)  #: the event loops in which it has opened others
    progress: Progress | None = None  #: as its body has reported it last
    reporter: Any = None  #: what has written it
    before: RequestState | None = None  #: of the request that runs around it, in eager mode


_STATE: Final = "rhesis_tasks_state"

running: ContextVar[RequestState | None] = ContextVar("rhesis_tasks.running", default=None)
"""The state of the request that runs here, between task_prerun and task_postrun: found faster than by the request."""


def state_of(request: object) -> RequestState | None:
    """The state of a task's request; None before it is known, whatever headers a message has."""
    state = vars(request).get(_STATE)
    return state if isinstance(state, RequestState) else None


def keep_state(request: object, state: RequestState) -> None:
    """Keep the state of a task's request."""
    vars(request)[_STATE] = state


def capture(tenant: TenantContext | None = None) -> Envelope:
    """The running context as it will travel; ``tenant`` replaces the active one.

    Raises:
        InvalidTenantError: a registered variable holds a value that cannot travel.
    """
    variables: dict[str, Any] = {}
    for name, registered in registered_vars().items():
        value = registered.var.get(MISSING)
        if type(value) is not str or registered.dump is not None:
            value = registered.dumped()
        if value is not MISSING:
            variables[name] = value
    return Envelope(tenant or current_tenant(), variables)


def context_headers(ctx_or_user: TenantContext | CurrentUser, /) -> dict[str, Any]:
    """The headers of a message for a tenant, where no code of ours launches it: in Celery beat's schedule.

    ::

        app.conf.beat_schedule = {
            "acme's digest": {
                "task": "shop.digest",
                "schedule": crontab(hour=6),
                "options": {"headers": context_headers(TenantContext("acme"))},
            },
        }

    Args:
        ctx_or_user: a TenantContext, or anything with ``id`` and ``organization_id``.

    Raises:
        InvalidTenantError: it is neither.
    """
    return {HEADER: encode(Envelope(as_tenant(ctx_or_user)))}


def encode(envelope: Envelope) -> dict[str, Any]:
    """The header's value.

    Raises:
        InvalidTenantError: it is larger than MAX_BYTES, or holds an int beyond 64 bits.
    """
    value: dict[str, Any] = {"v": VERSION}
    tenant, variables = envelope.tenant, envelope.variables
    if tenant is not None:
        value["organization_id"] = tenant.organization_id
        if tenant.user_id is not None:
            value["user_id"] = tenant.user_id
        if tenant.project_id is not None:
            value["project_id"] = tenant.project_id
        if tenant.extra:
            value["extra"] = dict(tenant.extra)
    if variables:
        value["vars"] = dict(variables)
    if envelope.retry_policy is not None:
        value["retry_policy"] = envelope.retry_policy
    if envelope.first_at is not None:
        value["first_at"] = envelope.first_at
    if not _is_short_text(tenant, variables):
        _check_portable(value)
    return value


def _is_short_text(tenant: TenantContext | None, variables: Mapping[str, Any]) -> bool:
    """Whether it is all text, and so little of it that nothing has to be measured: the usual case."""
    try:
        text = "".join((*variables, *variables.values()))
        if tenant is not None:
            if tenant.extra:
                return False
            text = "".join((text, tenant.organization_id, tenant.user_id or "", tenant.project_id or ""))
    except TypeError:
        return False
    return (len(text) + len(variables) + 10) * 12 < MAX_BYTES  # a character takes at most 12 bytes of JSON


def _check_portable(value: dict[str, Any]) -> None:
    for mapping in (value.get("extra", {}), value.get("vars", {})):
        for name, part in mapping.items():
            if isinstance(part, int) and not -_MAX_INT <= part < _MAX_INT:
                raise InvalidTenantError(f"{name!r} is beyond 64 bits; send it as a str", field=name, value=part)
    size = len(json.dumps(value))
    if size > MAX_BYTES:
        raise InvalidTenantError(
            f"the context to travel has {size} bytes; at most {MAX_BYTES} are allowed.  Send a key and look the "
            "rest up in the task",
            field="vars",
        )


def decode(value: object) -> Envelope:
    """What a header's value says.

    Raises:
        HeaderError: it is not one of ours, of a newer version, or holds a value that cannot be used.
        SignatureError: it stands for that of a message that is not signed.
    """
    if type(value) is not dict and not isinstance(value, Mapping):
        raise HeaderError(f"the context header is a {type(value).__name__}, not a mapping", header=value)
    version = value.get("v")
    if type(version) is not int or not 1 <= version <= VERSION:
        if value == REFUSED:
            raise SignatureError(
                "the message is not signed, or not by us, or not as it was then.  Configure publishers and workers "
                "with the same signing_keys"
            )
        if type(version) is not int or version < 1:
            raise HeaderError(f"the context header has no usable version: {version!r:.40}", header=value)
        raise HeaderError(
            f"the context header has version {version}, this worker understands up to {VERSION}.  Upgrade "
            "rhesis-tasks on the workers before the publishers",
            header=value,
        )
    variables = value.get("vars", {})
    if not isinstance(variables, dict) or not _are_plain(variables):
        raise HeaderError("the variables in the context header are not a mapping of plain values", header=value)
    try:
        tenant = None
        if value.get("organization_id") is not None:
            tenant = _tenant(
                value["organization_id"], value.get("user_id"), value.get("project_id"), value.get("extra")
            )
        elif value.get("user_id") is not None or value.get("project_id") is not None:
            raise HeaderError("the context header names a user or project without an organization", header=value)
    except InvalidTenantError as error:
        raise HeaderError(f"the context header cannot be used: {error}", header=value) from error
    policy, first_at = value.get("retry_policy"), value.get("first_at")
    return Envelope(
        tenant,
        {**variables},
        policy if type(policy) is str else None,
        first_at if type(first_at) is int and 0 < first_at < _MAX_INT else None,
    )


def _are_plain(variables: dict[Any, Any]) -> bool:
    for name, item in variables.items():
        if type(name) is not str or not (type(item) is str or item is None or isinstance(item, int)):
            return False
    return True


def _tenant(organization_id: Any, user_id: Any, project_id: Any, extra: Any) -> TenantContext:
    if extra is None and type(organization_id) is str and type(user_id) in _TEXT and type(project_id) in _TEXT:
        return _known_tenant(organization_id, user_id, project_id)
    return TenantContext(organization_id, user_id, project_id, extra)


_TEXT: Final = (str, type(None))
_known_tenant = functools.lru_cache(maxsize=1024)(TenantContext)  # frozen, and the same ones come again and again


def find(carrier: Mapping[str, Any] | None) -> object:
    """The context header inside a message's headers, still encoded; None if there is none.

    Flat ``organization_id`` / ``user_id`` headers, as applications sent them before they used this library,
    count as a header.

    Raises:
        TenantConflictError: there are both, and they name different tenants.
    """
    return _one_of((_OURS, carrier.get(HEADER)), (_THEIRS, _flat(carrier))) if carrier else None


def carried_by(request: object) -> object:
    """The context header of the message behind a task's request, still encoded; None if it had none.

    A message's headers become attributes of the request, and its ``headers``.  Eager requests have only those;
    and where another library nests a ``headers`` of its own in the message, only the attributes have ours.

    Raises:
        TenantConflictError: there are several, or flat headers too, and they name different tenants.
    """
    attributes = vars(request)
    nested = attributes.get("headers")
    if type(nested) is not dict and not isinstance(nested, Mapping):
        nested = {}
    own = attributes.get(HEADER)
    nested_own = nested.get(HEADER)
    is_alone = nested_own is own or nested_own is None
    if is_alone and own is not None and "organization_id" not in attributes and "organization_id" not in nested:
        return own
    # Once there is a state, the attributes organization_id and user_id are ours.
    flat = _flat(attributes) if state_of(request) is None else None
    return _one_of(
        (_OURS, own), (f"nested, {_OURS}", nested_own), (_THEIRS, flat), (f"nested, {_THEIRS}", _flat(nested))
    )


def _flat(carrier: Mapping[str, Any]) -> dict[str, Any] | None:
    """The header that flat headers amount to."""
    if carrier.get("organization_id") is None:
        return None
    return {"v": VERSION, **{key: carrier[key] for key in _FLAT_KEYS if carrier.get(key) is not None}}


def _one_of(*named: tuple[str, object]) -> object:
    """The first of several headers, each with what it is called, all of which have to agree."""
    found = [(source, header) for source, header in named if header is not None]
    if len(found) > 1:
        tenants = [(source, decode(header).tenant) for source, header in found]
        agreed([(source, tenant) for source, tenant in tenants if tenant is not None])
    return found[0][1] if found else None
