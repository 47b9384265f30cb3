"""Flower for an application: its command, and the process that runs it.

Flower shows every tenant's tasks, and revokes them; so it listens where only this machine gets at it, or asks for a
password.  What it shows of a task: :mod:`.disclosure`.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

from . import logs
from .errors import ConfigurationError, MissingExtraError

__all__ = ["DEFAULT_ADDRESS", "DEFAULT_PORT", "become_flower", "flower_command", "flower_process"]

DEFAULT_ADDRESS: Final = "127.0.0.1"
DEFAULT_PORT: Final = 5555

_PARENT: Final = "RHESIS_TASKS_FLOWER_PARENT"  # with whose end Flower ends, too
_LOOK_EVERY: Final = 1.0  # seconds
_GRACE: Final = 5.0  # seconds to stop in order


def flower_command(
    app_name: str,
    *,
    address: str = DEFAULT_ADDRESS,
    port: int = DEFAULT_PORT,
    basic_auth: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command that runs Flower, and its whole environment.

    Flower's own settings are read from the environment, as ``FLOWER_URL_PREFIX`` is.  No URL and no password is on the
    command line, which everybody on the machine can read.  Started from this process, it ends when this process does,
    however that happens.

    Args:
        app_name: the application, as for ``celery -A``.
        address: where it listens; loopback, or there must be a password.
        port: on which port.
        basic_auth: ``user:password``, several with commas between them; by default the environment's
            FLOWER_BASIC_AUTH.  Without, Flower's pages are open and its API is closed.

    Raises:
        ConfigurationError: the address is not loopback and there is no password, or something is not what it should be.
        MissingExtraError: Flower is not installed.
    """
    if importlib.util.find_spec("flower") is None:
        raise MissingExtraError.of("flower", "flower")
    if not 1 <= port <= 65535:
        raise ConfigurationError(f"Flower's port is a number from 1 to 65535, not {port}")
    basic_auth = basic_auth or os.environ.get("FLOWER_BASIC_AUTH") or None
    if basic_auth is not None:
        _check_basic_auth(basic_auth)
    elif not _is_loopback(address):
        raise ConfigurationError(
            f"Flower would listen on {address or 'all addresses'!r} and let anybody see and revoke the tasks of all "
            f"tenants.  Set FLOWER_BASIC_AUTH=user:password, or let it listen on {DEFAULT_ADDRESS}"
        )
    # In the environment, too, since Flower reads these before its command line: Kubernetes sets FLOWER_PORT to a URL
    # where a service is called flower.
    environ = {**os.environ, "FLOWER_ADDRESS": address, "FLOWER_PORT": str(port), _PARENT: str(os.getpid())}
    environ.pop("FLOWER_BASIC_AUTH", None)
    if basic_auth is not None:
        environ["FLOWER_BASIC_AUTH"] = basic_auth
    # And here, where they win over a flowerconfig.py.
    arguments = ["-A", app_name, "flower", f"--address={address}", f"--port={port}"]
    return [sys.executable, "-m", __name__, *arguments], environ


@contextmanager
def flower_process(
    app_name: str,
    *,
    address: str = DEFAULT_ADDRESS,
    port: int = DEFAULT_PORT,
    basic_auth: str | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Flower running beside this process, for a block; it prints where this process prints.

    If it cannot start, or ends, nothing else happens: ``poll()`` tells.

    Args, Raises: as :func:`flower_command`.
    """
    command, environ = flower_command(app_name, address=address, port=port, basic_auth=basic_auth)
    # In a group of its own: a Ctrl-C is for this process, which stops it.
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def become_flower(
    app_name: str,
    *,
    address: str = DEFAULT_ADDRESS,
    port: int = DEFAULT_PORT,
    basic_auth: str | None = None,
) -> NoReturn:
    """Run Flower in place of this program.

    Args, Raises: as :func:`flower_command`.
    """
    command, environ = flower_command(app_name, address=address, port=port, basic_auth=basic_auth)
    del environ[_PARENT]
    os.execve(command[0], command, environ)  # noqa: S606 - no shell is meant


def _check_basic_auth(value: str) -> None:
    """Raise ConfigurationError unless it is ``user:password``, or several; the error does not show it."""
    for position, each in enumerate(value.split(","), start=1):
        user, _, password = each.partition(":")
        if not user or not password or not each.isascii():  # Flower fails at others
            raise ConfigurationError(
                "FLOWER_BASIC_AUTH is user:password in ASCII, or several with commas between them; entry "
                f"{position} is not.  (A password cannot hold a comma.)"
            )


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


# --- in Flower's process -------------------------------------------------------------------------------------------


def _end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)  # it hangs


def _write_json() -> None:
    """Let Flower's log be JSON: it adds a handler of its own only where there is none."""
    handler = logging.StreamHandler()
    handler.setFormatter(logs.JsonFormatter())
    logging.getLogger().addHandler(handler)


def _main() -> None:
    if logs.is_json_wanted():
        _write_json()
    parent = os.environ.get(_PARENT, "")
    if parent.isdecimal():
        threading.Thread(target=_end_with, args=(int(parent),), name="end with the parent", daemon=True).start()
    runpy.run_module("flower", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
