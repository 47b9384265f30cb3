"""What faults happen to: a PostgreSQL server that can be stopped, a TCP proxy that cuts connections to it, and workers.

The embedded server would not do: it has a unix socket only, and no restart.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import broker_tasks
import psycopg
import pytest
from celery import Celery

from rhesis_tasks.processes import Child, free_port, wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, new_tenant_database, running_worker

__all__ = [
    "Held",
    "PostgresServer",
    "Rig",
    "TcpProxy",
    "as_other_user",
    "kill",
    "running_proxy",
    "running_rig",
    "running_server",
]


# --- the server ----------------------------------------------------------------------------------------------------


def as_other_user() -> dict[str, Any]:
    """What subprocess needs to start a server as a user who may: PostgreSQL and PgBouncer refuse to run as root."""
    if os.geteuid() != 0:
        return {}
    found = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = found.get("postgres") or found["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class PostgresServer:
    """A cluster of its own on a loopback port; everybody who connects is trusted.

    Args:
        programs: the folder of the server's programs.
        folder: where its data and its log are.
        settings: added to its configuration.
        primary: what it is a streaming standby of.
    """

    def __init__(
        self,
        programs: Path,
        folder: Path,
        settings: Mapping[str, object] | None = None,
        primary: PostgresServer | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._programs = programs
        self._log = folder / "log"
        self._data = folder / "data"
        if primary is None:
            self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync", "--locale=C", "--encoding=UTF8")
        else:
            self._run(
                "pg_basebackup", "--dbname", primary.url, "--write-recovery-conf", "--checkpoint=fast", "--no-sync"
            )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "shared_buffers": "32MB",
            "log_line_prefix": "%m [%p] %d ",
            # The machine survives these tests, so that what was written need not reach the disk.
            "fsync": "off",
            **(settings or {}),
        }
        with (self._data / "postgresql.auto.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self._pg_ctl("start", "--log", str(self._log))

    def stop(self, mode: str = "fast") -> None:
        """Stop it; with ``immediate`` as if it had crashed."""
        self._pg_ctl("stop", "--mode", mode)

    def restart(self, mode: str = "immediate") -> None:
        """Stop and start it; with ``immediate`` as if it had crashed."""
        self._pg_ctl("restart", "--mode", mode, "--log", str(self._log))

    def suspend(self) -> None:
        """Stop its processes where they are: it takes connections, whose packets are confirmed, and says nothing."""
        for process in self._processes():
            os.kill(process, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        for process in self._processes():
            os.kill(process, signal.SIGCONT)

    def _processes(self) -> Iterator[int]:
        """The first one, and then those that it has started."""
        first = int((self._data / "postmaster.pid").read_text().split()[0])
        yield first
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                if int(status.read_text().rpartition(")")[2].split()[1]) == first:
                    yield int(status.parent.name)

    def promote(self) -> None:
        """Let a standby take writes."""
        self._pg_ctl("promote")

    def program(self, name: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs, such as pg_dump; returns what it prints.

        Raises:
            CalledProcessError: it failed.
        """
        done = subprocess.run([str(self._programs / name), *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    @property
    def data(self) -> Path:
        """The folder of its data."""
        return self._data

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def running(self) -> bool:
        return (self._data / "postmaster.pid").exists()

    def _pg_ctl(self, *arguments: str) -> None:
        self._run("pg_ctl", *arguments, "--wait", "--timeout", "30")

    def _run(self, program: str, *arguments: str) -> None:
        # To a file, not a pipe, which the server would inherit and keep open.
        with tempfile.TemporaryFile("w+") as output:
            command = [str(self._programs / program), *arguments, "--pgdata", str(self._data)]
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd="/", **as_other_user()
            ).returncode
            if status != 0:
                output.seek(0)
                log = self._log.read_text()[-2000:] if self._log.exists() else ""
                raise RuntimeError(f"{program} failed:\n{output.read()}\n{log}")


@contextmanager
def running_server(
    *, settings: Mapping[str, object] | None = None, primary: PostgresServer | None = None
) -> Iterator[PostgresServer]:
    """A server that runs until the end of the block.

    Args:
        settings: added to its configuration.
        primary: what it is a streaming standby of.
    """
    programs = _programs()
    # Not in pytest's folder, where the server's user may not look.
    folder = Path(tempfile.mkdtemp(prefix="rhesis-pg-", dir="/tmp"))
    try:
        user = as_other_user()
        if user:
            os.chown(folder, user["user"], user["group"])
        server = PostgresServer(programs, folder, settings, primary)
        server.start()
        try:
            yield server
        finally:
            if server.running:
                server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    """The folder of PostgreSQL's server programs: that on the PATH, or else Debian's newest, which is not on it."""
    candidates = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")]
    candidates.sort(key=lambda folder: int(folder.parent.name), reverse=True)
    if found := shutil.which("pg_ctl"):
        candidates.insert(0, Path(found).resolve().parent)
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    pytest.fail(
        "PostgreSQL's server programs (initdb, pg_ctl, postgres) are in no /usr/lib/postgresql/*/bin and not on "
        "the PATH.  On Debian: apt-get install postgresql-15",
        pytrace=False,
    )


# --- the proxy -----------------------------------------------------------------------------------------------------


class TcpProxy:
    """Passes connections on to a port on this machine, until it is told not to."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._refusing = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._dropped: set[tuple[socket.socket, socket.socket]] = set()
        self._answer_bytes: int | None = None  # how much more the server may say
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name=f"proxy {self.port}", daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        """How many connections there are."""
        with self._lock:
            return len(self._pairs)

    def cut(self) -> int:
        """Reset all connections, on both sides; returns how many there were.  New ones are passed on."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                _reset(end)
        return len(pairs)

    def cut_after(self, answer_bytes: int) -> None:
        """Reset all connections once the server has said so much more: with 0, when it begins to answer."""
        with self._lock:
            self._answer_bytes = answer_bytes

    @property
    def has_cut(self) -> bool:
        """Whether what cut_after() asked for has happened."""
        with self._lock:
            return self._answer_bytes is None

    def hold(self) -> None:
        """Keep back all that is said, on both sides."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass it on again."""
        self._flowing.set()

    def drop(self) -> None:
        """Lose all that is said on today's connections, on both sides, as long as they last: they stay open."""
        with self._lock:
            self._dropped = set(self._pairs)

    def forget(self) -> None:
        """Reset the connections on which everything is lost, as a firewall does that forgot them."""
        with self._lock:
            pairs, self._dropped = self._dropped, set()
        for pair in pairs:
            for end in pair:
                _reset(end)

    def refuse(self) -> None:
        """Reset all connections, and take no new ones."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Take connections again."""
        self._refusing = False

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join(timeout=5)
        self._listener.close()
        self.refuse()
        self.flow()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                _reset(client)
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                _reset(client)
                client.close()
                continue
            server.settimeout(None)
            pair = (client, server)
            with self._lock:
                self._pairs.add(pair)
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._pass_on, args=(pair, source, sink), daemon=True).start()
            if self._refusing:  # since a moment ago
                self.cut()

    def _pass_on(self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._flowing.wait()
                if pair in self._dropped:
                    continue
                allowed = len(data) if source is pair[0] else self._allowed(len(data))
                sink.sendall(data[:allowed])
                if allowed < len(data):
                    self.cut()
                    break
        except OSError:
            pass
        finally:
            with self._lock:
                self._pairs.discard(pair)
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)
            source.close()

    def _allowed(self, size: int) -> int:
        """How much of what the server says may pass."""
        with self._lock:
            if self._answer_bytes is None:
                return size
            if size <= self._answer_bytes:
                self._answer_bytes -= size
                return size
            allowed, self._answer_bytes = self._answer_bytes, None
            return allowed


def _reset(end: socket.socket) -> None:
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)  # also wakes the thread that reads from it


@contextmanager
def running_proxy(target: int) -> Iterator[TcpProxy]:
    """A proxy for a port on this machine, until the end of the block."""
    proxy = TcpProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


# --- workers -------------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A message that is not acknowledged yet."""

    label: str
    holder: int | None  #: the consumer that claimed it
    deliveries: int


class Rig:
    """A new database as broker, the workers on it, and what they did."""

    def __init__(self, database: TenantDatabase, server: PostgresServer, folder: Path, stack: ExitStack) -> None:
        self.url = database.url
        self.runs = broker_tasks.Runs(folder / "runs")
        self.app = broker_tasks.application(self.url)
        self._folder = folder
        self._stack = stack
        self.database = database_url(self.url).database
        self._superuser = database_url(server.url).set(drivername="postgresql", database=self.database)
        stack.callback(self.app.close)

    def through(self, port: int) -> str:
        """The application's URL by way of another port."""
        url = database_url(self.url).set(drivername="postgresql", port=port)
        return url.render_as_string(hide_password=False)

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A superuser's connection."""
        return psycopg.connect(self._superuser.render_as_string(hide_password=False), autocommit=True)

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """What the superuser sees."""
        with self.connect() as connection:
            cursor = connection.execute(sql, parameters)
            return cursor.fetchall() if cursor.description else []

    # --- messages and what became of them ---

    def publish(
        self, *labels: str, task: str = "run", queue: str = "celery", gate: str = "", app: Celery | None = None
    ) -> None:
        """One message for each label; with a gate their bodies last until it is opened."""
        arguments = {"gate": str(self._folder / gate)} if gate else {}
        patience = {"max_retries": 100, "interval_start": 0.05, "interval_max": 0.2}
        for label in labels:
            (app or self.app).send_task(
                task, [label], arguments, task_id=label, queue=queue, retry=True, retry_policy=patience
            )

    def open_gate(self, gate: str = "gate") -> None:
        (self._folder / gate).touch()

    def messages(self) -> list[Held]:
        """The tasks in the queues, those that are being done included."""
        return [
            Held(*row)
            for row in self.query(
                "SELECT task_id, holder, deliveries FROM rhesis_tasks.message WHERE task_id IS NOT NULL ORDER BY id"
            )
        ]

    def holders(self, *labels: str) -> set[int | None]:
        """Who holds these messages, of those that are not acknowledged."""
        return {message.holder for message in self.messages() if message.label in labels}

    def wait_claimed(self, number: int) -> None:
        """Wait until so many messages are held by workers."""
        wait_until(
            f"{number} messages to be claimed",
            lambda: len([message for message in self.messages() if message.holder is not None]) >= number,
        )

    def wait_started(self, *labels: str, timeout: float = 30.0) -> None:
        wait_until(f"{labels} to be started", lambda: set(labels) <= set(self.runs.started), timeout)

    def wait_done(self, *labels: str, timeout: float = 30.0) -> None:
        """Wait until each of these was done at least once, and no message is left."""
        wait_until(f"all of {len(labels)} tasks to be done", lambda: set(labels) <= set(self.runs.done), timeout)
        wait_until("all messages to be acknowledged", lambda: not self.messages(), timeout)

    def done_more_than_once(self) -> set[str]:
        return {label for label, times in self.runs.done.items() if times > 1}

    # --- workers ---

    def worker(
        self,
        pool: str = "threads",
        *,
        concurrency: int = 2,
        prefetch: int = 4,
        url: str | None = None,
        queues: str = "celery",
        linger: bool = False,
        application: str = "broker_tasks",
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        **options: Any,
    ) -> Child:
        """Start a worker that holds up to ``concurrency * prefetch`` messages.

        Args:
            linger: let pool processes outlive the main process.
            application: as for ``celery -A``.
            environment: added to it.
            arguments: of ``celery worker``.
            options: those of the transport.
        """
        environment = {
            **(environment or {}),
            broker_tasks.URL: url or self.url,
            broker_tasks.OPTIONS: json.dumps(options),
            broker_tasks.RUNS: str(self.runs.path),
            broker_tasks.LINGER: str(int(linger)),
        }
        worker = self._stack.enter_context(
            running_worker(
                application,
                cwd=Path(__file__).parent,
                pool=pool,
                concurrency=concurrency,
                env=environment,
                arguments=("--queues", queues, "--prefetch-multiplier", str(prefetch), *arguments),
            )
        )
        self._stack.callback(kill, worker)  # before it is asked to stop, which takes seconds
        return worker

    def consumer_of(self, worker: Child) -> int | None:
        """The number under which the server knows a worker."""
        rows = self.query("SELECT id FROM rhesis_tasks.consumer WHERE name LIKE '%%:' || %s", worker.process.pid)
        return rows[0][0] if rows else None

    def holds_lock(self, consumer: int | None) -> bool:
        """Whether a session has this consumer's lock."""
        return bool(
            self.query(
                "SELECT true FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2"
                " AND objid::integer = %s AND database = (SELECT oid FROM pg_database WHERE datname = %s)",
                consumer,
                self.database,
            )
        )


def kill(worker: Child) -> None:
    """SIGKILL for all processes of a worker."""
    with suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)


@contextmanager
def running_rig(server: PostgresServer, folder: Path) -> Iterator[Rig]:
    """A rig on a database of its own; its workers are killed at the end of the block."""
    with new_tenant_database(server.url) as database:
        try:
            with ExitStack() as stack:
                yield Rig(database, server, folder, stack)
        finally:
            if not server.running:
                server.start()


# --- as fixtures: a server for each file, a new database for each test ---------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def rig(server: PostgresServer, tmp_path: Path) -> Iterator[Rig]:
    with running_rig(server, tmp_path) as rig:
        yield rig


@pytest.fixture
def proxy(server: PostgresServer, rig: Rig) -> Iterator[TcpProxy]:
    with running_proxy(server.port) as proxy:
        yield proxy
