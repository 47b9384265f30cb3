"""Which headers are believed, and signed, where context is signed.

A worker believes what somebody with a key has signed: the header of a message, and those of all that comes with it to
be published later.  It signs what its own code launches, and never what came to it unsigned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .canvas import full_name, published
from .headers import OwnHeader, carried_by, find
from .signing import Signer, is_signed

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context, Task

__all__ = ["UNLOCK", "begin_to_work", "end_work", "require_genuine", "require_signed"]

UNLOCK: Final = "celery.chord_unlock"
"""The task of Celery's own that polls for a chord, and has the chord's body among its arguments."""

_worker_apps: list[Celery] = []  # whose workers run in this process, or in the one that it was forked from


def require_genuine(signer: Signer, app: Celery, headers: Mapping[str, Any] | None, name: str, task_id: str) -> None:
    """Check that what is about to be signed did not come unsigned, as part of a canvas or for a retry.

    Headers that are given in another process than a worker's are the application's own.

    Raises:
        SignatureError: the headers have a context that is not signed.
    """
    own = find(headers)
    if own is None or isinstance(own, OwnHeader) or signer.accepts(own, name, task_id):
        return
    if is_signed(own) or _worker_apps or app.current_worker_task is not None:
        signer.check(own, name, None)


def require_signed(signer: Signer, task: Task[Any, Any], request: Context) -> None:
    """Check the signatures of a message: its own, and those of what is published after it.

    Raises:
        SignatureError: one of them is missing or not ours.
    """
    name = full_name(task.name, request.kwargs)
    try:
        header = carried_by(request)
        later = [part for signature in _embedded(task, request) for part in published(signature)]
        carried = [(part, find((part.get("options") or {}).get("headers"))) for part in later]
    except Exception:  # whatever somebody has put there
        raise signer.refusal("comes with something that is not ours", name, request.id) from None
    signer.check(header, name, request.id if isinstance(request.id, str) else "")
    for part, own in carried:
        signer.check(own, full_name(part["task"], part.get("kwargs")), None)


def _embedded(task: Task[Any, Any], request: Context) -> list[Any]:
    """The signatures that a message brings along for Celery to publish."""
    found: list[Any] = [request.chord] if request.chord else []
    for several in (request.callbacks, request.errbacks, request.chain):
        found += several or []
    if task.name == UNLOCK:
        found.append((request.args or ())[1])
    return found


def begin_to_work(app: Celery) -> None:
    """A worker starts in this process: from now on what is published may have come in a message.

    Raises:
        SystemExit: it would run what is not signed.  (Celery swallows all other exceptions of receivers.)
    """
    app.finalize()
    strange = sorted(name for name, task in app.tasks.items() if not getattr(type(task), "checks_signatures", False))
    if strange:
        raise SystemExit(
            f"application {app.main!r} has signing_keys, but its tasks {', '.join(strange)} do not check signatures: "
            "let them inherit from rhesis_tasks.BaseTask first"
        )
    if app.conf.get("worker_deduplicate_successful_tasks"):
        raise SystemExit(
            f"application {app.main!r} has signing_keys and worker_deduplicate_successful_tasks: with the latter, "
            "Celery publishes what a message brings along before anybody can check it.  Switch it off"
        )
    _worker_apps.append(app)


def end_work(app: Celery) -> None:
    """The worker has ended."""
    if app in _worker_apps:
        _worker_apps.remove(app)
