"""Which context variables travel with every task besides the tenant, and setting all of them at once.

Only registered ones travel: an allow-list, never a copy of the whole context.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar, Token
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from contextvars_extras import ContextVarDescriptor, ContextVarsRegistry
from contextvars_extras.context_var_ext import DeletionMark, NoDefault

from .context import TenantContext, open_scopes, tenant_var
from .errors import HeaderError, InvalidTenantError

__all__ = [
    "LOG_FIELDS",
    "MISSING",
    "Activation",
    "RegisteredVar",
    "register_context_var",
    "registered_vars",
    "unregister_context_var",
]

Portable: TypeAlias = str | bool | int | None
"""What every broker carries unchanged."""


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


MISSING: Final = _Missing()
"""Stands for "not set", which is not the same as None."""


# contextvars-extras marks a deleted or reset variable by a sentinel inside the raw variable.
_MARKS: Final = (DeletionMark, NoDefault)


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
        return MISSING if isinstance(value, _MARKS) else value

    def dumped(self) -> Any:
        """The value as it travels, or MISSING.

        Raises:
            InvalidTenantError: it is not a str, bool, int or None, and dump= does not make it one, or fails.
        """
        value = self.value()
        if value is MISSING:
            return MISSING
        if self.dump is not None:
            try:
                value = self.dump(value)
            except Exception as error:
                raise InvalidTenantError(
                    f"dump= of context variable {self.name!r} refused {value!r:.80}: {error}",
                    field=self.name,
                    value=value,
                ) from error
        # Without the classes of their own that they may have, such as a StrEnum's.
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return int.__int__(value)
        if value is None or isinstance(value, bool):
            return value
        raise InvalidTenantError(
            f"context variable {self.name!r} holds a {type(value).__name__}; what travels is a str, bool, int or "
            "None.  Register it with dump= and load=",
            field=self.name,
            value=value,
        )

    def loaded(self, value: Any) -> Any:
        """The value back from how it travelled, where there is a load=.

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
_read_only: Final = MappingProxyType(_registered)


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
    if not isinstance(registered.log, bool):
        raise InvalidTenantError(f"log= is True or False, not {registered.log!r}", field="log")
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
    return _read_only


class Activation:
    """Everything that travels, set in the running context until :meth:`undo`, or for a ``with`` block.

    Kept with the request it belongs to, never keyed by task id: a retry reuses the id and may start before
    the first run has ended.

    Args:
        tenant: the tenant; None is none.
        variables: the registered variables by name.  Those that are missing are as if nobody had set them.
        are_loaded: whether the values are as the application has them, and not as they travel.

    Raises:
        HeaderError: a registered variable's ``load=`` refused its value; nothing is left set.
    """

    __slots__ = ("_scopes", "_set", "_unset")

    def __init__(self, tenant: TenantContext | None, variables: Mapping[str, Any], *, are_loaded: bool = False) -> None:
        self._scopes = open_scopes.get()
        if self._scopes:
            open_scopes.set(())
        self._set: list[tuple[ContextVar[Any], Any, Token[Any]]] = [(tenant_var, tenant, tenant_var.set(tenant))]
        # Variables that nobody has set stay so: to the body they look as they did to the launcher.
        self._unset: list[RegisteredVar] = []
        try:
            for name, registered in _registered.items():
                if name in variables:
                    value = variables[name]
                    if registered.load is not None and not are_loaded:
                        value = registered.loaded(value)
                elif registered.value() is not MISSING:
                    value = _absent_value(registered)
                else:
                    self._unset.append(registered)
                    continue
                var = registered.var
                self._set.append((var, value, var.set(value)))
        except BaseException:
            self.undo()
            raise

    def __enter__(self) -> None:
        pass  # it is set since it was made

    def __exit__(self, *_: object) -> None:
        self.undo()

    def renew(self) -> None:
        """Set everything as at the start, whatever the body has left.

        What Celery publishes after the body (chain, link, chord) belongs to the launcher's context, not to
        variables that the body set and forgot.
        """
        for var, value, _ in self._set:
            if var.get(MISSING) is not value:
                var.set(value)
        if self._unset:
            self._hide_unset()

    def _hide_unset(self) -> None:
        for registered in self._unset:
            if registered.value() is not MISSING:
                # Nobody can unset a ContextVar without the token.
                registered.var.set(_absent_value(registered))

    def undo(self) -> None:
        """Bring back what was set before, in reverse order; calling it again changes nothing."""
        if not self._set:
            return
        if self._unset:
            self._hide_unset()
            self._unset.clear()
        done, self._set = self._set, []
        for var, _, token in reversed(done):
            var.reset(token)
        if open_scopes.get() is not self._scopes:
            open_scopes.set(self._scopes)


def _absent_value(registered: RegisteredVar) -> Any:
    """What a variable is where the launcher had none but the worker's own context holds a value."""
    if registered.default is not MISSING:
        return registered.default
    try:
        return Context().run(registered.var.get)
    except LookupError:
        return None
