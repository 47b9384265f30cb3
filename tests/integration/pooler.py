"""PgBouncer, as Debian packages it, in front of a server of the tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from broker_rig import PostgresServer, as_other_user

from rhesis_tasks.processes import free_port, wait_until

__all__ = ["PgBouncer", "running_pgbouncer"]


class PgBouncer:
    """A PgBouncer of its own on a loopback port, in front of a server that trusts everybody."""

    def __init__(self, program: str, server: PostgresServer, mode: str, size: int, folder: Path) -> None:
        self.port = free_port()
        self.mode = mode
        self._command = [program, str(folder / "pgbouncer.ini")]
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": folder / "users",
            "auth_user": "postgres",  # who looks for the others
            "auth_query": "SELECT usename, passwd FROM pg_shadow WHERE usename = $1",
            "pool_mode": mode,
            "default_pool_size": size,
            "server_login_retry": 1,
            "logfile": self._log,
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        text = "\n".join(["[databases]", f"* = host=127.0.0.1 port={server.port}", "[pgbouncer]", *lines, ""])
        (folder / "pgbouncer.ini").write_text(text)
        (folder / "users").write_text('"postgres" ""\n')

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            **as_other_user(),
        )

        def answers() -> bool:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"pgbouncer does not start:\n{self._log.read_text()}")
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until("pgbouncer to answer", answers, 10)

    def stop(self) -> None:
        """Stop it at once: its clients lose their connections."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None


@contextmanager
def running_pgbouncer(server: PostgresServer, mode: str, size: int) -> Iterator[PgBouncer]:
    """A PgBouncer that runs until the end of the block.

    Args:
        server: what it is in front of.
        mode: transaction or session.
        size: how many server connections each user of a database gets.
    """
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if program is None:
        pytest.fail(
            "pgbouncer is not on the PATH and not in /usr/sbin.  On Debian: apt-get install pgbouncer", pytrace=False
        )
    folder = Path(tempfile.mkdtemp(prefix="rhesis-pgbouncer-", dir="/tmp"))
    try:
        user = as_other_user()
        if user:
            os.chown(folder, user["user"], user["group"])
        bouncer = PgBouncer(program, server, mode, size, folder)
        bouncer.start()
        try:
            yield bouncer
        finally:
            bouncer.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
