"""The brokers that are compared: Debian's servers, each in a temporary folder, on loopback, stopped afterwards.

Started as root, the servers run as the user ``nobody``.  No service of the system is used or touched.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from rhesis_tasks.processes import Child, child, free_port, python

__all__ = ["NAMES", "Broker", "MissingError", "install", "our_server", "started", "stoppable"]

NAMES: Final = {
    "ours": "rhesis-tasks",
    "ours-unflushed": "rhesis-tasks, not flushed",
    "sqla": "kombu sqla",
    "pgmq": "kombu pgmq",
    "pgmq-notify": "kombu pgmq, notify",
    "redis": "Redis",
    "redis-flushed": "Redis, flushed",
    "rabbitmq": "RabbitMQ",
    "procrastinate": "outside Celery: procrastinate",
    "pgqueuer": "outside Celery: pgqueuer",
    "bare": "psycopg alone, our statements",
}
"""The contenders, in the order of the table.  The last three are no brokers of Celery's: they tell what there is."""

_POSTGRES: Final = Path("/usr/lib/postgresql/15/bin")
_RABBITMQ: Final = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one in /usr/sbin insists on a user of its own
_REDIS: Final = {"redis": ("no", "no"), "redis-flushed": ("yes", "always")}  # appendonly and appendfsync
_OUTSIDE: Final = frozenset({"procrastinate", "pgqueuer"})
_ON_POSTGRES: Final = frozenset({"ours", "ours-unflushed", "sqla", "pgmq", "pgmq-notify", "bare"}) | _OUTSIDE
_MODULES: Final = {
    "pgmq": "pgmq",
    "pgmq-notify": "pgmq",
    "redis": "redis",
    "redis-flushed": "redis",
    **{name: name for name in _OUTSIDE},
}


class MissingError(Exception):
    """What a broker needs is not there, or does not start."""


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker that runs."""

    name: str  #: one of NAMES
    url: str
    version: str  #: the server's
    options: Mapping[str, Any] = field(default_factory=dict)  #: of the transport
    workload: str = "workload"  #: the module that has the tasks

    @property
    def is_celerys(self) -> bool:
        return self.workload == "workload"

    @property
    def has_tasks(self) -> bool:
        """Whether it runs tasks, rather than reading messages."""
        return self.name != "bare"


# --- what is installed -----------------------------------------------------------------------------------------


def _package(name: str) -> str | None:
    """The Debian package that a broker lacks."""
    if name in _ON_POSTGRES:
        return None if (_POSTGRES / "initdb").exists() else "postgresql-15"
    if name in _REDIS:
        return None if shutil.which("redis-server") else "redis-server"
    return None if _RABBITMQ.exists() else "rabbitmq-server"


def _lacks_module(name: str) -> bool:
    return name in _MODULES and importlib.util.find_spec(_MODULES[name]) is None


def install(names: Sequence[str]) -> None:
    """Install what the brokers lack: servers from Debian, clients from PyPI.  Needs root for Debian's.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    packages = sorted({package for name in names if (package := _package(name))})
    if packages:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "--quiet"], check=True, stdout=sys.stderr)
        command = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *packages]
        with _without_services():
            subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    if any(map(_lacks_module, names)):
        file = Path(__file__).with_name("requirements.txt")
        subprocess.run(python("-m", "pip", "install", "--quiet", "-r", str(file)), check=True, stdout=sys.stderr)
        importlib.invalidate_caches()


@contextmanager
def _without_services() -> Iterator[None]:
    """Let Debian's packages start no service, as their policy has it; what runs already goes on."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():  # somebody has decided that
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    try:
        policy.chmod(0o755)
        yield
    finally:
        policy.unlink()


def _require(name: str) -> None:
    if package := _package(name):
        raise MissingError(f"not installed: Debian's {package} (--install)")
    if _lacks_module(name):
        raise MissingError(f"not installed: PyPI's {_MODULES[name]} (--install)")


# --- starting --------------------------------------------------------------------------------------------------


def started(names: Sequence[str], stack: ExitStack, folder: Path) -> Iterator[Broker | tuple[str, str]]:
    """Start brokers; each comes running, or as its name and why it does not.

    Args:
        names: of NAMES.
        stack: stops them.
        folder: a folder for their data.
    """
    postgres: _Postgres | None = None
    for name in names:
        try:
            _require(name)
            if name in _ON_POSTGRES:
                postgres = postgres or stack.enter_context(_postgres(_own(folder / "postgres")))
                yield postgres.broker(name)
            elif name in _REDIS:
                yield stack.enter_context(_redis(name, _own(folder / name)))
            else:
                yield stack.enter_context(_rabbitmq(_own(folder / "rabbitmq")))
        except Exception as error:
            yield name, f"{error}"


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, so that nothing that was started stays."""

    def stop(signum: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def our_server() -> Iterator[tuple[Broker, Path]]:
    """PostgreSQL for ours alone, and a folder; nothing of them stays, however the measurement ends.

    Raises:
        SystemExit: it cannot be started.
    """
    with stoppable(), tempfile.TemporaryDirectory(prefix="rhesis-bench-") as name, ExitStack() as stack:
        broker = next(iter(started(["ours"], stack, Path(name))))
        if not isinstance(broker, Broker):
            sys.exit(f"PostgreSQL could not be started: {broker[1]}")
        yield broker, Path(name)


def _own(folder: Path) -> Path:
    """Make a folder that the servers' user owns."""
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        folder.parent.chmod(0o711)
        shutil.chown(folder, "nobody", "nogroup")
    return folder


def _unprivileged(*command: str | Path) -> list[str]:
    """The command, to be run by the servers' user."""
    drop = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    return [*drop, *map(str, command)]


def _output(*command: str | Path) -> str:
    """What a short command prints.

    Raises:
        MissingError: it failed; with the last line of its errors.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd="/")
    if done.returncode:
        raise MissingError(f"{command[0]} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class _Postgres:
    port: int
    password: str
    version: str

    def broker(self, name: str) -> Broker:
        """A broker in a database of its own."""
        import psycopg

        database = name.replace("-", "_")
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}".encode())
        if name == "sqla":
            return Broker(name, f"sqla+{self._url(database, 'postgresql+psycopg')}", self.version)
        if name in _OUTSIDE:
            return self._outside(name, self._url(database))
        if name in _MODULES:
            return self._with_pgmq(name, database)
        if name == "bare":
            return Broker(name, self._url(database), self.version, workload="workload_bare")
        if name == "ours-unflushed":
            return Broker(name, f"{self._url(database)}?options=-csynchronous_commit%3Doff", self.version)
        return Broker(name, self._url(database), self.version)

    def _with_pgmq(self, name: str, database: str) -> Broker:
        """A broker with the pgmq extension, which Debian does not package, run as plain SQL."""
        from pgmq import get_embedded_sql_version, install_pgmq_from_sql

        install_pgmq_from_sql(dsn=self._url(database))
        options: dict[str, Any] = {"init_extension": False}
        if name == "pgmq-notify":
            # By default it polls within the server meanwhile, and is notified four times a second at most.
            options |= {"use_notify": True, "wait_time_seconds": 0, "notify_throttle_interval_ms": 0}
        version = f"{self.version}, pgmq {get_embedded_sql_version()}"
        return Broker(name, self._url(database, "pgmq"), version, options)

    def _outside(self, name: str, url: str) -> Broker:
        """A task queue of its own kind, with its tables."""
        workload = f"workload_{name}"
        importlib.import_module(workload).install(url)
        return Broker(name, url, f"{self.version}, {name} {importlib.metadata.version(name)}", workload=workload)

    def _url(self, database: str, scheme: str = "postgresql") -> str:
        return f"{scheme}://bench:{self.password}@127.0.0.1:{self.port}/{database}"


@contextmanager
def _postgres(folder: Path) -> Iterator[_Postgres]:
    """A PostgreSQL server with Debian's default settings."""
    password, data = secrets.token_hex(16), folder / "data"
    secret = folder / "password"
    secret.write_text(password)
    initdb = _unprivileged(_POSTGRES / "initdb", "-D", data, "-U", "bench", f"--pwfile={secret}", "-E", "UTF8")
    secret.chmod(0o644)  # in a folder that only the servers' user enters
    _output(*initdb, "--auth=scram-sha-256")
    port = free_port()
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    with child("PostgreSQL", _unprivileged(_POSTGRES / "postgres", "-D", data, *options), cwd=folder) as server:
        server.wait_for("ready to accept connections")
        try:
            yield _Postgres(port, password, _output(_POSTGRES / "postgres", "--version").split()[2])
        finally:
            _interrupt(server)


def _interrupt(server: Child) -> None:
    """Ask for PostgreSQL's fast shutdown; the usual signal would wait for clients."""
    if server.running:
        server.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(30)


@contextmanager
def _redis(name: str, folder: Path) -> Iterator[Broker]:
    """A Redis server that saves nothing, as fast as it gets; or one that has on the disk what it has answered to."""
    appends, flushes = _REDIS[name]
    port, password = free_port(), secrets.token_hex(16)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password]
    command += ["--save", "", "--appendonly", appends, "--appendfsync", flushes]
    with child("Redis", _unprivileged(*command), cwd=folder) as server:
        server.wait_for("Ready to accept connections")
        version = _output("redis-server", "--version").split("v=")[1].split()[0]
        yield Broker(name, f"redis://:{password}@127.0.0.1:{port}/0", version)


@contextmanager
def _rabbitmq(folder: Path) -> Iterator[Broker]:
    """A RabbitMQ node with default settings, and the port mapper of its own that it needs."""
    port, distribution, mapper = free_port(), free_port(), free_port()
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\n")
    (folder / "environment").write_text("")
    (folder / "enabled_plugins").write_text("[].\n")
    environment = {
        "HOME": str(folder),  # for the cookie
        "ERL_EPMD_PORT": str(mapper),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"bench-{port}@localhost",
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
    }
    epmd = _unprivileged("epmd", "-address", "127.0.0.1", "-port", str(mapper))
    with (
        child("epmd", epmd, env=environment, cwd=folder),
        child("RabbitMQ", _unprivileged(_RABBITMQ), env=environment, cwd=folder) as server,
    ):
        server.wait_for("completed with", timeout=90)
        yield Broker("rabbitmq", f"amqp://guest:guest@127.0.0.1:{port}//", _output("dpkg-query", *_VERSION))


_VERSION: Final = ("--show", "--showformat=${source:Upstream-Version}", "rabbitmq-server")
