"""Signed context: proof that a message was published by somebody who has the key.

The whole message is signed as it leaves the process: its headers, with the context, the task's name and id among them,
and its body, with the arguments and all that is to be published after the task.  So a worker that believes a message
may believe everything in it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Final

from kombu.serialization import dumps

from .errors import ConfigurationError, TaskArgumentsError
from .headers import HEADER

if TYPE_CHECKING:
    from kombu import Producer
    from kombu.message import Message

__all__ = ["Signer", "SigningProducer"]

_SIGNATURE: Final = "sig"  # where the context header has it
_SIGNED: Final = "signed"  # the names of the other headers that are signed
_MIN_BYTES: Final = 16
_PROPERTIES: Final = ("content_type", "content_encoding", "correlation_id", "reply_to")


class Signer:
    """Signs headers with the first of its keys, and accepts the signatures of all of them.

    Args:
        keys: newest first.  To change keys, put the new one in front on all processes, then drop the old one when
            nothing that it signed is left in the queues.

    Raises:
        ConfigurationError: a key is neither str nor bytes, or shorter than 16 bytes.
    """

    def __init__(self, keys: Sequence[str | bytes]) -> None:
        if isinstance(keys, str | bytes | Mapping | Set) or not isinstance(keys, Iterable):
            raise ConfigurationError(f"signing_keys= takes a list of keys, newest first, not a {type(keys).__name__}")
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

    def sign(self, headers: Mapping[str, Any], body: bytes, **properties: Any) -> dict[str, Any]:
        """A message's headers with its signature.

        Args:
            headers: with the context.
            body: as it is sent, but for its compression.
            **properties: what else is signed: its type, encoding, correlation id and where to reply.

        Raises:
            TaskArgumentsError: a header has a value that some broker changes on the way.
        """
        try:
            # As it comes out of a broker: lists for tuples, names that are all text.
            sent: dict[str, Any] = json.loads(json.dumps(headers, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TaskArgumentsError(
                f"the headers of a signed message hold text, numbers, bool, None, lists and mappings: {error}"
            ) from None
        context = sent[HEADER] = {**sent[HEADER], _SIGNED: sorted(name for name in sent if name != HEADER)}
        context.pop(_SIGNATURE, None)  # one from before, which is no part of what is said
        context[_SIGNATURE] = _digest(self._keys[0], _said(sent, body, properties))
        return sent

    def signed_headers(self, message: Message) -> dict[str, Any] | None:
        """The headers of a message that somebody with one of the keys published, as it is; None if nobody did.

        Those that are signed: brokers, and libraries that trace messages, add others on the way.
        """
        received: Any = message.headers
        body: Any = message.body
        properties: Any = message.properties
        try:
            context = dict(received[HEADER])
            given = context.pop(_SIGNATURE).encode("utf-8", "replace")
            headers = {name: received[name] for name in context[_SIGNED]} | {HEADER: context}
            said = _said(
                headers,
                body.encode() if isinstance(body, str) else body,
                {
                    "content_type": message.content_type,
                    "content_encoding": message.content_encoding,
                    "correlation_id": properties.get("correlation_id"),
                    "reply_to": properties.get("reply_to"),
                },
            )
        except Exception:  # whatever somebody has put there: nobody signs such a thing
            return None
        # All keys are tried, whichever fits, so that the time does not tell which.
        fits = any([hmac.compare_digest(_digest(key, said).encode(), given) for key in self._keys])  # noqa: C419
        return headers if fits else None

    def accepts(self, message: Message) -> bool:
        """Whether somebody with one of the keys published this message, as it is."""
        return self.signed_headers(message) is not None


class SigningProducer:
    """A producer whose messages of tasks are signed."""

    def __init__(self, producer: Producer, signer: Signer) -> None:
        self._producer = producer
        self._signer = signer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> Any:
        """As kombu's.  What is no task, such as an event, is not signed."""
        if HEADER in (options.get("headers") or ()):
            if options.get("content_type") is None:
                written = dumps(body, serializer=options.get("serializer"))
                options["content_type"], options["content_encoding"], body = written
            body = body.encode() if isinstance(body, str) else body
            signed = {name: options.get(name) for name in _PROPERTIES}
            options["headers"] = self._signer.sign(options["headers"], body, **signed)
        return self._producer.publish(body, **options)


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


def _said(headers: Mapping[str, Any], body: bytes, properties: Mapping[str, Any]) -> bytes:
    said = ["rhesis_tasks", 1, headers, properties, hashlib.sha256(body).hexdigest()]
    return json.dumps(said, sort_keys=True).encode()


def _digest(key: bytes, said: bytes) -> str:
    return hmac.new(key, said, hashlib.sha256).hexdigest()
