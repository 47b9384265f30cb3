"""What is shown of a task's data to whoever looks on: in events, to ``celery inspect``, in Flower.

Who looks on there works for no tenant, and sees the tasks of all.  So they see whose each task is, and neither its
arguments nor its result, unless the application says so; texts of failures as its log has them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from celery.utils.saferepr import saferepr
from kombu.utils.encoding import safe_repr

from .context import TenantContext
from .failures import redact_text

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["HIDDEN", "SHOWN", "shown_arguments", "shown_fields", "shows_arguments", "use_disclosure"]

HIDDEN: Final = "[hidden]"
"""Stands for arguments, and for a result."""

SHOWN: Final = ("argsrepr", "kwargsrepr")
"""The options of a launch, and headers of a message, that are shown in place of its arguments."""

_NAMES: Final = ("organization_id", "user_id", "project_id")

_showing: weakref.WeakSet[Celery] = weakref.WeakSet()


def use_disclosure(app: Celery, *, show_arguments: bool) -> None:
    """Let the arguments and results of the application's tasks be shown, or not."""
    if show_arguments:
        _showing.add(app)
    else:
        _showing.discard(app)


def shows_arguments(app: Celery) -> bool:
    """Whether they are."""
    return app in _showing


def shown_arguments(app: Celery, tenant: TenantContext | None, args: Any, kwargs: Any) -> tuple[str | None, str]:
    """The texts that travel with a message beside its arguments; None where Celery is to write its own.

    The second is that of a dict, in which Flower searches: ``kwargs:organization_id=acme``.
    """
    ids = {} if tenant is None else {name: value for name in _NAMES if (value := getattr(tenant, name)) is not None}
    if app not in _showing:
        return HIDDEN if args else "()", repr(ids)
    given = kwargs if isinstance(kwargs, Mapping) else {}
    # The tenant comes first, since a long text is cut off, and whatever an argument of the same name says.
    amqp: Any = app.amqp  # the stubs leave it out
    return None, saferepr({**ids, **given, **ids}, amqp.kwargsrepr_maxsize)


def shown_fields(app: Celery, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a task's event as they may be sent."""
    shown = dict(fields)
    if "result" in shown and app not in _showing:
        shown["result"] = HIDDEN
    for name in ("exception", "traceback"):
        if shown.get(name) is not None:
            text = shown[name]
            shown[name] = redact_text(app, text if isinstance(text, str) else safe_repr(text))
    return shown
