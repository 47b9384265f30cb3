"""The README's quick start, run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import URL, Connection, create_engine
from sqlalchemy.pool import NullPool

from rhesis_tasks import configure
from rhesis_tasks.processes import child, python
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import StartWorker, TenantDatabase

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SHOP, PREPARE, API = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def shop(tenant_database: TenantDatabase, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The files of the quick start, and the environment that it asks for."""
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "prepare.py").write_text(PREPARE)
    admin_url = tenant_database.admin.url.set(database=database_url(tenant_database.owner_url).database)
    with new_admin(admin_url) as connection:
        connection.exec_driver_sql("DROP SCHEMA rhesis_tasks CASCADE")  # the quick start makes its own
    urls = {
        "ADMIN_DATABASE_URL": admin_url,
        "DATABASE_URL": admin_url.set(username="shop_app", password="secret"),
    }
    yield {name: url.set(drivername="postgresql").render_as_string(hide_password=False) for name, url in urls.items()}
    with new_admin(admin_url) as connection:
        connection.exec_driver_sql("DROP OWNED BY shop_app CASCADE")
        connection.exec_driver_sql("DROP ROLE shop_app")


@contextmanager
def new_admin(url: URL) -> Iterator[Connection]:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        yield connection


def test_the_quick_start_prints_what_the_readme_says(
    shop: dict[str, str], start_worker: StartWorker, tmp_path: Path
) -> None:
    with child("prepare.py", python("prepare.py"), env=shop, cwd=tmp_path) as prepare:
        assert prepare.process.wait(30) == 0, prepare.finished_output()
    start_worker("shop", env=shop)

    with child("shop.py", python("shop.py"), env=shop, cwd=tmp_path) as printed:
        assert printed.process.wait(60) == 0, printed.finished_output()

        assert printed.finished_output().splitlines()[-1] == "2"

    assert re.search(r"python shop\.py +# prints 2", README)


def test_the_quick_start_has_no_more_than_twenty_lines_of_code() -> None:
    assert len([line for line in SHOP.splitlines() if line.strip()]) <= 20


def test_the_route_of_the_readme_is_a_route() -> None:
    compile(API, "README.md", "exec")
    app = Celery("shop", set_as_current=False)
    configure(app, "postgresql://nobody@nowhere/shop")  # nothing is asked of it
    names: dict[str, object] = {"__name__": "readme", "app": app}
    exec(  # noqa: S102 - the README's own code
        "class User:\n    id = 'ann'\n    organization_id = 'acme'\n"
        "def get_current_user() -> User: return User()\n"
        "count_orders = None\n" + API,
        names,
    )

    assert set(names["api"].openapi()["paths"]) == {  # type: ignore[attr-defined]
        "/reports",
        "/tasks/",
        "/tasks/{task_id}",
        "/tasks/{task_id}/events",
        "/tasks/{task_id}/tree",
        "/tasks/{task_id}/cancel",
    }
