"""Walking a canvas: signatures, chains, groups and chords, in the dict form that all of them have.

Knows nothing of tenants.  What is stored as JSON and what is a Signature object are walked alike; nothing that
is passed in is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from celery.canvas import Signature

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["CALLING", "COMPOSITES", "Carry", "Part", "bound", "bound_options", "last_task", "parts"]

COMPOSITES: Final = frozenset({"chain", "group", "chord"})
CALLING: Final = frozenset({"celery.map", "celery.starmap", "celery.chunks"})
"""Tasks of Celery's own that call another one, in their own context."""


Carry: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
"""Makes of a part and its headers those that it shall have: the same object if they have all."""


class Part(NamedTuple):
    """A signature in a canvas."""

    signature: Mapping[str, Any]
    given: int | None
    """How many positional arguments come before its own, such as the result of the task before it; None if that
    is not known."""


def parts(signature: Mapping[str, Any], given: int | None = 0) -> Iterator[Part]:
    """A signature and all signatures in it, links and error callbacks included."""
    yield Part(signature, given)
    for part in _nested(signature, given):
        yield from parts(*part)


def _nested(signature: Mapping[str, Any], given: int | None) -> Iterator[Part]:
    kwargs = signature.get("kwargs") or {}
    match signature.get("subtask_type"):
        case "chain":
            for position, part in enumerate(kwargs["tasks"]):
                yield Part(part, 1 if position else given)
        case "group":
            for part in kwargs["tasks"]:
                yield Part(part, given)
        case "chord":
            header = kwargs["header"]
            for part in [header] if isinstance(header, Mapping) else header:
                yield Part(part, given)
            if kwargs["body"] is not None:
                yield Part(kwargs["body"], 1)
        case _ if signature["task"] in CALLING:
            yield Part(kwargs["task"], None)  # called inside Celery's own task
    options = signature.get("options") or {}
    for part in _listed(options.get("link")):
        yield Part(part, 1)
    for part in _listed(options.get("link_error")):
        yield Part(part, None)  # the failed task's id, or request, exception and traceback


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def last_task(signature: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The task whose id a launch of the whole returns; None if that is a group's, or there is no task."""
    last: Any = signature
    while last is not None and last.get("subtask_type") in COMPOSITES:
        kwargs = last["kwargs"]
        if last["subtask_type"] == "group":
            return None
        last = kwargs["body"] if last["subtask_type"] == "chord" else next(iter(reversed(kwargs["tasks"])), None)
    return last  # type: ignore[no-any-return]


def bound(signature: Mapping[str, Any], carry: Carry, app: Celery) -> Signature[Any]:
    """A copy of a signature, every part of which has the headers that ``carry`` makes of its own."""
    options = dict(signature.get("options") or {})
    options |= bound_options(options, carry, app)
    kwargs = dict(signature.get("kwargs") or {})
    match signature.get("subtask_type"):
        case "chain" | "group":
            kwargs["tasks"] = [bound(part, carry, app) for part in kwargs["tasks"]]
        case "chord":
            header, body = kwargs["header"], kwargs["body"]
            kwargs["header"] = (
                bound(header, carry, app)
                if isinstance(header, Mapping)
                else [bound(part, carry, app) for part in header]
            )
            kwargs["body"] = None if body is None else bound(body, carry, app)
        case _:
            # Only tasks, since Celery lets the headers of a whole replace those of its parts.
            options["headers"] = carry(signature, options.get("headers") or {})
    kind = type(signature) if isinstance(signature, Signature) else Signature
    return kind.from_dict({**signature, "kwargs": kwargs, "options": options}, app=app)


def bound_options(options: Mapping[str, Any], carry: Carry, app: Celery) -> dict[str, Any]:
    """The signatures among a launch's or a signature's options, copied and bound.

    ``chain`` is what Celery publishes after a task, ``chord`` the body of the chord that it is in.
    """
    found: dict[str, Any] = {
        key: [_carrying(part, carry, app) for part in _listed(options[key])]
        for key in ("link", "link_error", "chain")
        if options.get(key)
    }
    if options.get("chord"):
        found["chord"] = _carrying(options["chord"], carry, app)
    return found


def _carrying(signature: Mapping[str, Any], carry: Carry, app: Celery) -> Mapping[str, Any]:
    """The signature itself if nothing is to be added: each step of a chain publishes the rest of it again."""
    for part, _ in parts(signature):
        own = (part.get("options") or {}).get("headers") or {}
        if part.get("subtask_type") not in COMPOSITES and carry(part, own) is not own:
            return bound(signature, carry, app)
    return signature
