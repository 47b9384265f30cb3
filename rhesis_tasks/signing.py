"""Signed context: proof that a header was made by somebody who has the key.

What is signed is the context together with the task that it is for, so that neither can be exchanged for another:
with the task's name and id in the message that a task is run from, with the name alone in a later part of a canvas,
which has no id yet.  Arguments are not signed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .errors import ConfigurationError, SignatureError

__all__ = ["Signer", "is_signed"]

SIGNATURE: Final = "sig"
"""Where a header has its signature."""

_MIN_BYTES: Final = 16
_security = logging.getLogger("rhesis_tasks.security")


class Signer:
    """Signs headers with the first of its keys, and accepts the signatures of all of them.

    Args:
        keys: newest first.  To change keys, put the new one in front on all processes, then drop the old one when
            nothing that it signed is left in the queues.

    Raises:
        ConfigurationError: a key is neither str nor bytes, or shorter than 16 bytes.
    """

    def __init__(self, keys: Sequence[str | bytes]) -> None:
        if isinstance(keys, str | bytes):
            raise ConfigurationError("signing_keys= takes a list of keys, newest first, not a single one")
        self._keys = tuple(_key(key) for key in keys)

    def __repr__(self) -> str:
        return f"<Signer with {len(self._keys)} keys>"

    def sign(self, header: Mapping[str, Any], task: str, task_id: str | None) -> dict[str, Any]:
        """The header with its signature; without an id, as part of a canvas."""
        plain = {key: value for key, value in header.items() if key != SIGNATURE}
        return {**plain, SIGNATURE: _digest(self._keys[0], plain, task, task_id)}

    def accepts(self, header: object, task: str, task_id: str | None) -> bool:
        """Whether somebody with one of the keys signed this header for this task."""
        if not isinstance(header, Mapping) or not is_signed(header):
            return False
        plain = {key: value for key, value in header.items() if key != SIGNATURE}
        given = header[SIGNATURE].encode("utf-8", "replace")
        # All keys are tried, whichever fits, so that the time does not tell which.
        found = [hmac.compare_digest(_digest(key, plain, task, task_id).encode(), given) for key in self._keys]
        return any(found)

    def check(self, header: object, task: str, task_id: str | None) -> None:
        """Raise SignatureError, and say so in the log ``rhesis_tasks.security``, unless the header is genuine."""
        if not self.accepts(header, task, task_id):
            why = "has a signature that is not ours, or another task's" if is_signed(header) else "is not signed"
            raise _refused(why, task, task_id)


def is_signed(header: object) -> bool:
    """Whether a header has a signature, of whomever."""
    return isinstance(header, Mapping) and isinstance(header.get(SIGNATURE), str)


def _key(key: str | bytes) -> bytes:
    if not isinstance(key, str | bytes):
        raise ConfigurationError(f"signing_keys= takes str or bytes, not {type(key).__name__}")
    raw = key.encode() if isinstance(key, str) else key
    if len(raw) < _MIN_BYTES:
        raise ConfigurationError(
            f"a signing key has {len(raw)} bytes; at least {_MIN_BYTES} are needed.  Make one with: "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return raw


def _digest(key: bytes, plain: Mapping[str, Any], task: str, task_id: str | None) -> str:
    said = json.dumps(["rhesis_tasks", 1, task, task_id, plain], sort_keys=True, separators=(",", ":"), default=repr)
    return hmac.new(key, said.encode(), hashlib.sha256).hexdigest()


def _refused(why: str, task: str, task_id: str | None) -> SignatureError:
    _security.warning(
        "the context of task %.200r (%.200r) %s: it is refused",
        task,
        task_id or "a later part of a canvas",
        why,
        extra={"refused_task_name": task, "refused_task_id": task_id},
    )
    return SignatureError(
        f"the context header of task {task} {why}.  Configure publishers and workers with the same signing_keys"
    )
