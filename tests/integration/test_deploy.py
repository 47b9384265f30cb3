"""The templates in examples/deploy, run as far as they can be without containers: each step, command and script."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import yaml
from broker_rig import running_server

from rhesis_tasks.cli import commands
from rhesis_tasks.processes import Child, child, free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
STOP_SECONDS = 90
TOKEN = "a-token"
ORGANIZATION = "8d0f3c52-6b1e-4a57-9c40-2f1d7a5e9b01"


class Image(NamedTuple):
    """What the Dockerfile makes, in a folder."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "venv" / "bin"

    @property
    def app(self) -> Path:
        return self.folder / "app"

    def environment(self, **variables: str) -> dict[str, str]:
        """As the last stage's, and nothing of this process's."""
        return {"PATH": f"{self.bin}:{self.folder / 'bin'}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", **variables}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.app, env=self.environment(**variables), capture_output=True, text=True, timeout=120
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The steps of the Dockerfile: those of the build stage as they are, and what the last one copies."""
    folder = tmp_path_factory.mktemp("image")
    places = {f"/{name}": str(folder / name) for name in ("src", "venv", "build", "wheels")}
    places |= {"/app": str(folder / "app"), "/usr/local/bin/": f"{folder / 'bin'}/"}

    def placed(text: str) -> str:
        return re.sub(r"(?<![\w./-])/(?:src|venv|build|wheels|app)\b|/usr/local/bin/", lambda it: places[it[0]], text)

    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    stage = 0
    python = {"PATH": f"{folder / 'python'}:{os.environ['PATH']}"}
    (folder / "python").mkdir()
    (folder / "python" / "python").symlink_to(sys.executable)
    for line in text.splitlines():
        step, _, rest = line.partition(" ")
        if step == "FROM":
            stage += 1
        elif step == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            base = folder / "src" if target.startswith(".") or target[0] != "/" else Path("/")
            goal = base / placed(target).lstrip("/" if base == Path("/") else "")
            for source in sources:
                into = goal / Path(source).name if target.endswith("/") else goal
                into.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__", ".env"))
                else:
                    shutil.copy(ROOT / source, into)
        elif step == "RUN" and stage == 1:
            done = subprocess.run(
                ["/bin/sh", "-ec", placed(rest)],
                cwd=folder / "src",
                env={**os.environ, **python},
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"
    return Image(folder)


class Database(NamedTuple):
    owner: str
    app: str


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A server on which the script for PostgreSQL's image has made the logins."""
    with running_server() as server:
        environment = {
            **os.environ,
            "PGHOST": "127.0.0.1",
            "PGPORT": str(server.port),
            "POSTGRES_USER": "postgres",
            "OWNER_PASSWORD": "it's 'quoted'",
            "APP_PASSWORD": "$HOME",
        }
        done = subprocess.run(
            [DEPLOY / "postgres" / "10-roles.sh"], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        url = f"postgresql://{{}}@127.0.0.1:{server.port}/example"
        yield Database(url.format("example_owner"), url.format("example_app"))


@pytest.fixture(scope="module")
def migrated(image: Image, database: Database) -> Database:
    # Twice: it is run with each new version.
    for _ in range(2):
        done = image.run("migrate.sh", MIGRATION_DATABASE_URL=database.owner, APP_ROLE="example_app")
        assert done.returncode == 0, done.stderr
    return database


def stopped(process: Child, within: float) -> int:
    """What it ends with when it is asked to stop."""
    process.process.send_signal(signal.SIGTERM)
    try:
        return process.process.wait(within)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{process.name} did not stop within {within:g} seconds: {process.output[-2000:]}")


def answer(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:  # noqa: S310
        return json.load(response)


# --- the image -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_environment_of_the_image_has_what_the_commands_need_and_no_pip(image: Image) -> None:
    version = image.run("rhesis-tasks", "--version")
    tools = image.run("python", "-c", "import importlib.util as u; print(u.find_spec('pip'), u.find_spec('hatchling'))")

    assert version.returncode == 0, version.stderr
    assert tools.stdout.split() == ["None", "None"]
    assert all((image.bin / program).exists() for program in ("alembic", "celery", "uvicorn"))
    assert image.run("python", "-c", "import flower, psycopg, fastapi").returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_logins_are_those_of_the_example(migrated: Database) -> None:
    with psycopg.connect(migrated.app) as connection:
        [row] = connection.execute(
            "SELECT rolsuper, rolbypassrls, rolcreaterole, pg_has_role('example_owner', 'member') "
            "FROM pg_roles WHERE rolname = current_user"
        ).fetchall()
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE tableowner = current_user").fetchone()

    assert (row, tables) == ((False, False, False, False), (0,))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_api_and_worker_of_the_image_do_a_users_task_and_stop_in_time(image: Image, migrated: Database) -> None:
    port, health_port = free_port(), free_port()
    tokens = {TOKEN: {"user_id": "ana", "organization_id": ORGANIZATION}}
    [line] = re.findall(r"^CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    serve = [str(port) if word == "8000" else word for word in json.loads(line)]
    serve[serve.index("0.0.0.0")] = "127.0.0.1"  # noqa: S104 - what is in a container
    has_command = "worker" in commands.commands
    work = ["start-worker.sh"] if has_command else ["celery", "-A", "app.worker", "worker", "-c", "2", "-l", "INFO"]
    environment = image.environment(DATABASE_URL=migrated.app)
    health = {"HEALTH_PORT": str(health_port), "HEALTH_ADDRESS": "127.0.0.1", "CELERY_WORKER_CONCURRENCY": "2"}
    health["CELERY_WORKER_LOGLEVEL"] = "INFO"

    with (
        child(
            "api",
            [shutil.which(serve[0], path=environment["PATH"]) or "", *serve[1:]],
            env={**environment, "API_TOKENS": json.dumps(tokens)},
            cwd=image.app,
        ) as api,
        child(
            "worker",
            [shutil.which(work[0], path=environment["PATH"]) or "", *work[1:]],
            env={**environment, **health},
            cwd=image.app,
        ) as worker,
    ):
        url = f"http://127.0.0.1:{port}"
        wait_until("the API to answer", lambda: healthy(api, "api", port), 60)
        worker.wait_for(" ready.", 60)
        if has_command:
            wait_until("the worker to be ready", lambda: healthy(worker, "worker", health_port), 60)
        request = urllib.request.Request(  # noqa: S310
            f"{url}/examples/word-count",
            data=json.dumps({"text": "three small words"}).encode(),
            headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
            task = f"{url}/tasks/{json.load(response)['task_id']}"
        wait_until("the task", lambda: answer(task, Authorization=f"Bearer {TOKEN}")["state"] == "success", 60)

        assert stopped(worker, STOP_SECONDS) == 0, worker.output[-2000:]
        assert stopped(api, 30) in (0, -signal.SIGTERM)


def healthy(process: Child, service: str, port: int) -> bool:
    """What the health check of a service says, on another port."""
    assert process.running, process.output
    test = COMPOSE["services"][service]["healthcheck"]["test"]
    assert test[:2] == ["CMD", "python"]
    probe = re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", test[3])
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=30).returncode == 0


# --- the scripts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """An environment in which rhesis-tasks says its process and its arguments."""
    program = tmp_path / "rhesis-tasks"
    program.write_text('#!/bin/sh\necho "$$ $*"\n')
    program.chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin", "DATABASE_URL": "postgresql://nobody@nowhere/example"}


def test_a_worker_takes_the_scripts_place_so_that_signals_reach_it(stub: dict[str, str]) -> None:
    script = subprocess.Popen(
        [DEPLOY / "start-worker.sh", "--more", "a b"], env=stub, stdout=subprocess.PIPE, text=True
    )
    said, _ = script.communicate(timeout=30)

    assert said == f"{script.pid} worker -A app.worker --more a b\n"


@pytest.mark.parametrize(
    ("script", "missing"),
    [("start-worker.sh", "DATABASE_URL"), ("migrate.sh", "MIGRATION_DATABASE_URL"), ("migrate.sh", "APP_ROLE")],
)
def test_a_script_names_the_variable_that_it_misses(stub: dict[str, str], script: str, missing: str) -> None:
    given = {**stub, "MIGRATION_DATABASE_URL": "postgresql://nobody@nowhere/example", "APP_ROLE": "app", missing: ""}

    done = subprocess.run([DEPLOY / script], env=given, capture_output=True, text=True, timeout=30)

    assert done.returncode != 0
    assert missing in done.stderr and done.stdout == ""


# --- process 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", [name for name, it in COMPOSE["services"].items() if "image" in it])
def test_no_service_of_ours_is_process_1_of_its_container(service: str) -> None:
    ours = COMPOSE["services"][service]["image"] == "rhesis-tasks-example"

    assert COMPOSE["services"][service].get("init", False) is ours


@pytest.mark.parametrize("name", ["migrate", "example"])
def test_no_pod_makes_its_process_process_1(name: str) -> None:
    manifests = yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())
    pods = [it["spec"]["template"]["spec"] for it in manifests if "template" in it["spec"]]

    assert pods
    assert all(pod["shareProcessNamespace"] is True for pod in pods)


# --- systemd -------------------------------------------------------------------------------------------------------


UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, for an installation in a folder."""
    installed = tmp_path / "opt"
    for program in ("bin/start-worker.sh", "venv/bin/celery"):
        (installed / program).parent.mkdir(parents=True, exist_ok=True)
        (installed / program).symlink_to(
            DEPLOY / "start-worker.sh" if "bin/start" in program else Path(sys.executable).parent / "celery"
        )
    for path in UNITS:
        name = path.name.replace("@.", "@celery.")
        (tmp_path / name).write_text(path.read_text().replace("/opt/example", str(installed)))
    return tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "warning", "SYSTEMD_PAGER": "", "NO_COLOR": "1"}
    return subprocess.run(["systemd-analyze", *arguments], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("unit", ["example-worker@celery.service", "example-beat.service"])
def test_systemd_finds_nothing_wrong_with_a_unit(units: Path, unit: str) -> None:
    done = analyze("verify", "--man=no", "--recursive-errors=no", str(units / unit))

    complaints = [line for line in done.stderr.splitlines() if unit.partition("@")[0] in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.mark.parametrize("unit", ["example-worker@celery.service", "example-beat.service"])
def test_a_unit_is_little_exposed_as_systemd_counts(units: Path, unit: str) -> None:
    done = analyze("security", "--offline=true", "--threshold=25", str(units / unit))

    assert done.returncode == 0, done.stdout[-1500:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_beat_of_the_unit_starts_and_stops_in_time(image: Image, migrated: Database, tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "example-beat.service").read_text()
    [line] = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    command = shlex.split(
        line.replace("/opt/example/venv", str(image.folder / "venv")).replace("/var/lib/example-beat", str(tmp_path))
    )

    with child("beat", command, env=image.environment(DATABASE_URL=migrated.app), cwd=image.app) as beat:
        beat.wait_for("beat: Starting", 60)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                beat.process.wait(0.1)
            assert beat.running, beat.output
        assert stopped(beat, 15) == 0, beat.output
    assert list(tmp_path.glob("schedule*")), "its memory is where the unit lets it write"
