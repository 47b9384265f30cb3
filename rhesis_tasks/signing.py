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
        self._keys = tuple(map(_key, keys))
        if not self._keys:
            raise ConfigurationError("signing_keys= is empty.  Leave it out where context shall not be signed")

    def __repr__(self) -> str:
        return f"<Signer with {len(self._keys)} keys>"

    def __reduce__(self) -> Any:
        raise TypeError("a Signer is not pickled: its keys would be")

    @property
    def fingerprint(self) -> str:
        """Tells two lists of keys apart, and tells nobody the keys."""
        return hashlib.sha256(b"\0".join(self._keys)).hexdigest()

    def sign(self, header: Mapping[str, Any], task: str, task_id: str | None) -> dict[str, Any]:
        """The header with its signature; without an id, as part of a canvas."""
        plain = {key: value for key, value in header.items() if key != SIGNATURE}
        return {**plain, SIGNATURE: _digest(self._keys[0], _said(plain, task, task_id))}

    def accepts(self, header: object, task: str, task_id: str | None) -> bool:
        """Whether somebody with one of the keys signed this header for this task."""
        if not isinstance(header, Mapping) or not is_signed(header):
            return False
        plain = {key: value for key, value in header.items() if key != SIGNATURE}
        given = header[SIGNATURE].encode("utf-8", "replace")
        try:
            said = _said(plain, task, task_id)
        except (RecursionError, TypeError, ValueError):
            return False  # nobody signs such a thing
        # All keys are tried, whichever fits, so that the time does not tell which.
        return any([hmac.compare_digest(_digest(key, said).encode(), given) for key in self._keys])  # noqa: C419

    def check(self, header: object, task: str, task_id: str | None) -> None:
        """Raise SignatureError, and say so in the log ``rhesis_tasks.security``, unless the header is genuine."""
        if not self.accepts(header, task, task_id):
            why = "has a signature that is not ours, or another task's" if is_signed(header) else "is not signed"
            raise self.refusal(why, task, task_id)

    def refusal(self, why: str, task: str, task_id: object) -> SignatureError:
        """The error to raise; it is in the log by then."""
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


def _said(plain: Mapping[str, Any], task: str, task_id: str | None) -> bytes:
    kind = "part" if task_id is None else "message"
    return json.dumps(["rhesis_tasks", 1, kind, task, task_id, plain], sort_keys=True, separators=(",", ":")).encode()


def _digest(key: bytes, said: bytes) -> str:
    return hmac.new(key, said, hashlib.sha256).hexdigest()
