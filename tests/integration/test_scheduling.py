"""A task for each tenant: real beats, real workers, a real database."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery, chain
from celery.schedules import schedule
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Engine, column, select, table, text
from sqlalchemy.exc import ProgrammingError

from rhesis_tasks import BaseTask, TenantContext, TenantSessions
from rhesis_tasks.beat import TASK_NAME, each_tenant, latest_tick
from rhesis_tasks.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    NotConfiguredError,
    NotSupportedError,
    TaskArgumentsError,
    TenantLaunchError,
)
from rhesis_tasks.postgres.schedules import ScheduleTable
from rhesis_tasks.processes import Child, child, free_port, python, wait_until
from rhesis_tasks.retry import GiveUp
from rhesis_tasks.rls import enable_rls
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, running_worker

if TYPE_CHECKING:
    from conftest import MakeApp

HERE = Path(__file__).parent
DAY = 86_400
PATIENCE = 60.0


# --- with beats and workers ----------------------------------------------------------------------------------------


class Scene:
    """A database, and what the tasks of one schedule did there."""

    def __init__(self, database: TenantDatabase, folder: Path, schedule: str) -> None:
        self.database = database
        self.folder = folder
        self.env = {"DATABASE_URL": database.url, "SCHEDULE_FOLDER": str(folder), "SCHEDULE": schedule}

    @contextmanager
    def beat(self, name: str = "beat") -> Iterator[Child]:
        command = python("-m", "celery", "-A", "schedule_tasks", "beat", "--loglevel", "INFO", "--pidfile=")
        arguments = ("--schedule", str(self.folder / name), "--max-interval", "1")
        with child(name, [*command, *arguments], env=self.env, cwd=HERE) as beat:
            beat.wait_for("beat: Starting")
            yield beat

    @contextmanager
    def worker(self, **options: Any) -> Iterator[Child]:
        with running_worker("schedule_tasks", cwd=HERE, pool="threads", concurrency=4, env=self.env, **options) as it:
            yield it

    def runs(self, what: str) -> list[tuple[str, str | None, str]]:
        """Organization, user and task id of each time that a body has begun."""
        file = self.folder / "runs"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(run[1], run[2], run[3]) for run in map(json.loads, lines) if run[0] == what]

    def count(self, what: str, organization_id: str) -> int:
        return Counter(run[0] for run in self.runs(what))[organization_id]


def left_out(database: TenantDatabase) -> int:
    """How many messages of ticks found nothing left to launch."""
    with database.owner.connect() as connection:
        found = connection.scalar(
            text("SELECT count(*) FROM rhesis_tasks.task_record WHERE name = :name AND result LIKE :nothing"),
            {"name": TASK_NAME, "nothing": b'%"launched": 0%'},
        )
    return int(found or 0)


def test_each_tick_runs_once_for_each_tenant_though_two_beats_publish_it_and_one_is_killed(
    tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    scene = Scene(tenant_database, tmp_path, "two beats")
    tenant_database.execute(
        "CREATE TABLE organization (organization_id text PRIMARY KEY, user_id text)",
        "INSERT INTO organization VALUES ('acme', 'ann'), ('globex', NULL), ('initech', 'ina')",
        f'GRANT SELECT ON organization TO "{tenant_database.role}"',
    )

    with scene.worker() as worker, scene.beat("one") as one:
        with scene.beat("two") as two:
            wait_until("ticks that both have published", lambda: left_out(tenant_database) >= 2, PATIENCE)
            one.process.kill()
            before = scene.count("often", "initech")
            wait_until("ticks by the one that is left", lambda: scene.count("often", "initech") > before, PATIENCE)
            two.process.kill()
            two.process.wait()
        with scene.beat("two") as again:  # with what it knew
            before = scene.count("often", "initech")
            wait_until("ticks by one that is started anew", lambda: scene.count("often", "initech") > before, PATIENCE)
            worker.wait_for('relation "nowhere" does not exist', PATIENCE)
            worker.wait_for("(schedule 'broken' at ", PATIENCE)
            assert again.running

    runs = scene.runs("often")
    assert len({task_id for _, _, task_id in runs}) == len(runs)
    assert {(organization, user) for organization, user, _ in runs} == {
        ("acme", "ann"),
        ("globex", None),
        ("initech", "ina"),
    }
    with tenant_database.owner.connect() as connection:
        ticks, seconds = connection.execute(
            text(
                "SELECT count(*), extract(epoch FROM max(launched_at) - min(launched_at)) "
                "FROM rhesis_tasks.task_record WHERE organization_id = 'acme'"
            )
        ).one()
    assert ticks <= seconds + 2


def test_a_tenant_whose_last_run_has_not_ended_is_skipped_and_the_others_are_not(
    tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    scene = Scene(tenant_database, tmp_path, "slow")

    with scene.worker() as worker, scene.beat():
        wait_until("runs of another one", lambda: scene.count("slow", "globex") >= 3, PATIENCE)
        assert scene.count("slow", "acme") == 1
        worker.wait_for("organization acme (no user) is skipped")
        (tmp_path / "gate").touch()
        wait_until("its next run", lambda: scene.count("slow", "acme") >= 2, PATIENCE)


def test_a_worker_killed_between_launches_leaves_out_nobody_and_runs_nobody_twice(
    tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    scene = Scene(tenant_database, tmp_path, "dying")
    arguments = ["-m", "celery", "-A", "schedule_tasks", "call", TASK_NAME, "--kwargs", '{"schedule_name": "dying"}']

    with child("call", python(*arguments), env=scene.env, cwd=HERE) as call:
        assert call.process.wait(60) == 0, call.finished_output()
    with scene.worker() as first:
        first.process.wait(PATIENCE)
    with scene.worker():
        wait_until("all to run", lambda: len({run[0] for run in scene.runs("dying")}) == 150, PATIENCE)
        wait_until("the rest to be acknowledged", lambda: not waiting(tenant_database, None), PATIENCE)

    assert len((tmp_path / "launches").read_text().splitlines()) == 150, "each was launched once"
    with tenant_database.owner.connect() as connection:
        counted = connection.execute(
            text(
                "SELECT count(*), count(*) FILTER (WHERE root_id <> task_id), count(children) "
                "FROM rhesis_tasks.task_record"
            )
        ).one()
    assert tuple(counted) == (151, 0, 0), "each run is a tree of its own tenant's"
    # Bodies that ran in the worker that was killed may run again: that is the broker's at least once.
    assert len({task_id for _, _, task_id in scene.runs("dying")}) == 150


PAGE = (HERE.parents[1] / "docs" / "scheduling.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
LAUNCH = """
from shop import app
from rhesis_tasks.beat import TASK_NAME

for name in ("nightly reports", "hourly", "weekly"):
    print(app.tasks[TASK_NAME].apply_async(kwargs={"schedule_name": name}).get(timeout=60)["launched"])
"""


def test_the_code_of_the_page_runs(tenant_database: TenantDatabase, tmp_path: Path) -> None:
    tenant_database.execute(
        "CREATE TABLE organizations (organization_id text, active boolean)",
        "INSERT INTO organizations VALUES ('acme', true), ('globex', true), ('initech', false)",
        f'GRANT SELECT ON organizations TO "{tenant_database.role}"',
    )
    (tmp_path / "shop.py").write_text("\n".join(CODE).replace("spread=1800", "spread=0"))
    (tmp_path / "launch.py").write_text(LAUNCH)
    env = {"DATABASE_URL": tenant_database.url}

    with running_worker("shop", cwd=tmp_path, pool="threads", env=env, arguments=("-Q", "celery,reports")):
        with child("launch", python("launch.py"), env=env, cwd=tmp_path) as launch:
            status, output = launch.process.wait(90), launch.finished_output()
        wait_until("all to run", lambda: not waiting(tenant_database, None), PATIENCE)

    assert (status, output.split()) == (0, ["2", "2", "1"]), output
    with tenant_database.owner.connect() as connection:
        ended = connection.execute(
            text(
                "SELECT organization_id, user_id, convert_from(result, 'UTF8') FROM rhesis_tasks.task_record "
                "WHERE name = 'shop.nightly_report' AND state = 'success' ORDER BY 1, 3"
            )
        ).all()
    assert [tuple(row) for row in ended] == [
        ("acme", None, '"full for acme"'),
        ("acme", "the scheduler", '"long for acme"'),
        ("acme", None, '"short for acme"'),
        ("globex", None, '"full for globex"'),
        ("globex", None, '"short for globex"'),
    ]


# --- what a tick decides -------------------------------------------------------------------------------------------


def waiting(database: TenantDatabase, name: str | None = "digest") -> dict[str, dict[str, Any]]:
    """The messages of a task, or of all, by tenant."""
    with database.owner.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT tenant, task_id, envelope -> 'headers' ->> 'eta' AS eta, "
                "queue FROM rhesis_tasks.message "
                "WHERE task_name = :name OR (CAST(:name AS text) IS NULL AND task_id IS NOT NULL)"
            ),
            {"name": name},
        ).mappings()
        return {row["tenant"]: dict(row) for row in rows}


def add_digest(app: Celery) -> None:
    @app.task(base=BaseTask, name="digest", shared=False)
    def digest(what: str = "") -> str:
        return what


@pytest.fixture
def app(make_app: MakeApp, tenant_database: TenantDatabase) -> Celery:
    app = make_app(broker_url=tenant_database.url)
    app.main = "scheduling"
    add_digest(app)
    return app


TODAY = latest_tick(schedule(timedelta(seconds=DAY)), datetime.now(UTC))


def run(app: Celery, name: str = "daily", due: datetime = TODAY) -> dict[str, Any]:
    outcome: dict[str, Any] = app.tasks[TASK_NAME].run(name, due.isoformat())
    return {key: value for key, value in outcome.items() if value and key != "due_at"}


def end(database: TenantDatabase, organization_id: str) -> None:
    """As a worker would."""
    database.execute(
        f"UPDATE rhesis_tasks.task_record SET state = 'success', finished_at = now() "
        f"WHERE organization_id = '{organization_id}'",
        f"DELETE FROM rhesis_tasks.message WHERE tenant = '{organization_id}'",
    )


def daily(app: Celery, tenants: Any, **options: Any) -> None:
    each_tenant(app, "daily", "digest", schedule=DAY, tenants=tenants, **options)


def test_a_tick_is_run_once_and_an_older_one_not_at_all(app: Celery, tenant_database: TenantDatabase) -> None:
    daily(app, lambda: ["acme", "globex"])

    assert run(app) == {"launched": 2}
    end(tenant_database, "acme")
    end(tenant_database, "globex")

    assert run(app) == {}, "by the other beat"
    assert run(app, due=TODAY - timedelta(days=1)) == {}, "by a beat that comes late"
    assert waiting(tenant_database) == {}


def test_messages_of_one_tick_that_are_done_at_once_launch_for_each_tenant_once(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    names = [f"org-{number}" for number in range(150)]
    daily(app, lambda: names)
    assert TASK_NAME in app.tasks
    together = threading.Barrier(3)

    def one(_: int) -> int:
        together.wait(30)
        return int(run(app).get("launched", 0))

    with ThreadPoolExecutor(3) as threads:
        launched = list(threads.map(one, range(3)))

    with tenant_database.owner.connect() as connection:
        published = connection.scalar(text("SELECT count(*) FROM rhesis_tasks.message WHERE task_name = 'digest'"))
    assert (sum(launched), published) == (150, 150)


def test_a_new_tenant_is_launched_for_at_the_next_tick(app: Celery, tenant_database: TenantDatabase) -> None:
    tenants = ["acme"]
    daily(app, lambda: tenants)
    run(app, due=TODAY - timedelta(days=1))
    end(tenant_database, "acme")
    tenants.append("globex")

    assert run(app) == {"launched": 2}


def test_a_beat_whose_clock_was_ahead_does_not_keep_later_ticks_from_running(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    daily(app, lambda: ["acme"])
    run(app, due=TODAY + timedelta(days=300))
    end(tenant_database, "acme")

    assert run(app, due=TODAY + timedelta(days=300)) == {}
    assert run(app) == {"launched": 1}


def test_a_tick_that_was_skipped_is_not_run_later_on(app: Celery, tenant_database: TenantDatabase) -> None:
    daily(app, lambda: ["acme"])
    run(app, due=TODAY - timedelta(days=1))

    assert run(app) == {"skipped": 1}
    end(tenant_database, "acme")
    assert run(app) == {}
    assert run(app, due=TODAY + timedelta(days=1)) == {"launched": 1}


def test_a_run_whose_message_was_purged_does_not_keep_its_tenant_waiting(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    daily(app, lambda: ["acme"])
    run(app, due=TODAY - timedelta(days=1))
    tenant_database.execute("DELETE FROM rhesis_tasks.message")

    assert run(app) == {"launched": 1}


def test_with_a_broker_elsewhere_the_record_tells_whether_a_run_has_ended_until_it_counts_as_lost(
    make_app: MakeApp, tenant_database: TenantDatabase
) -> None:
    app = make_app()
    add_digest(app)
    daily(app, lambda: ["acme"], lost_after=3600)
    run(app, due=TODAY - timedelta(days=1))

    assert run(app) == {"skipped": 1}
    tenant_database.execute("UPDATE rhesis_tasks.schedule_run SET launched_at = launched_at - interval '2 hours'")
    assert run(app, due=TODAY + timedelta(days=1)) == {"launched": 1}


def test_one_who_cannot_be_launched_for_does_not_stop_the_others_and_is_tried_again(
    app: Celery, tenant_database: TenantDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    tenants: list[Any] = ["acme", "", None, ("a", "b", "c", "d"), "globex"]
    daily(app, lambda: tenants)

    with pytest.raises(TenantLaunchError, match="could not be launched for 3 of 5 tenants; the first: '': ") as caught:
        run(app)
    assert set(waiting(tenant_database)) == {"acme", "globex"}
    assert len(caught.value.failures) == 3
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 3

    tenants[1:4] = ["initech"]
    assert run(app) == {"launched": 1, "decided": 2}
    assert run(app) == {}


def test_what_would_be_the_same_for_all_is_raised_at_once_and_nothing_is_said_to_be_launched(
    make_app: MakeApp, app: Celery, tenant_database: TenantDatabase
) -> None:
    port = free_port()
    url = database_url(tenant_database.url).set(drivername="postgresql", host="127.0.0.1", port=port, query={})
    cut_off = make_app(broker_url=url.render_as_string(hide_password=False), broker_connection_max_retries=0)
    cut_off.main = app.main
    cut_off.conf.task_publish_retry = False
    add_digest(cut_off)
    for each in (app, cut_off):
        daily(each, lambda: ["acme", "globex"])

    with pytest.raises(BrokerError) as caught:
        run(cut_off)

    assert isinstance(caught.value.__cause__, DatabaseUnavailableError), "and no TenantLaunchError"
    assert run(app) == {"launched": 2}
    each_tenant(app, "wrong", "digest", schedule=DAY, tenants=lambda: ["acme"], kwargs={"no": "such"})
    with pytest.raises(TaskArgumentsError, match="no"):
        run(app, "wrong")


@pytest.mark.parametrize("tenants", ["acme", b"acme", None, TenantContext("acme")])
def test_a_function_that_returns_no_list_of_tenants_is_refused_and_launches_for_nobody(
    app: Celery, tenant_database: TenantDatabase, tenants: Any
) -> None:
    daily(app, lambda: tenants)

    with pytest.raises(ConfigurationError, match=r"the function of schedule 'daily' returned .* return a list"):
        run(app)

    assert waiting(tenant_database, None) == {}


def test_a_task_that_the_worker_does_not_know_is_told_at_once_with_the_schedules_name(app: Celery) -> None:
    each_tenant(app, "lost", "no.such.task", schedule=DAY, tenants=lambda: ["acme"])

    with pytest.raises(NotConfiguredError, match=r"schedule 'lost' runs 'no\.such\.task', and this worker knows no"):
        run(app, "lost")

    assert isinstance(app.tasks[TASK_NAME].retry_policy.decide(NotConfiguredError(), 0), GiveUp)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ProgrammingError, {"tenants": "SELECT id FROM nowhere"}),
        (TaskArgumentsError, {"tenants": lambda: ["acme"], "kwargs": {"no": "such"}}),
        (ZeroDivisionError, {"tenants": lambda: [1 // 0]}),
    ],
)
def test_whatever_ends_a_tick_is_told_with_the_schedules_name(
    app: Celery, caplog: pytest.LogCaptureFixture, kind: type[Exception], wrong: dict[str, Any]
) -> None:
    each_tenant(app, "wrong", "digest", schedule=DAY, **wrong)

    with pytest.raises(kind) as caught:
        run(app, "wrong")

    assert caught.value.__notes__ == [f"(schedule 'wrong' at {TODAY.isoformat()})"]
    assert f"schedule wrong at {TODAY.isoformat()} ends with {kind.__name__}" in caplog.messages


def test_what_was_launched_by_one_who_did_not_come_to_say_so_is_not_launched_again(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    daily(app, lambda: ["acme", "globex"])
    run(app)
    tenant_database.execute("DELETE FROM rhesis_tasks.schedule_run")

    assert run(app) == {"decided": 2}
    assert run(app) == {}


def test_runs_are_spread_over_time_and_a_tenants_place_is_the_same_at_each_tick(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    names = [f"org-{number}" for number in range(250)]
    daily(app, lambda: names, spread=7200, options={"queue": "reports"})
    tomorrow = TODAY + timedelta(days=1)

    assert run(app, due=tomorrow) == {"launched": 250}
    first = waiting(tenant_database)
    for name in names:
        end(tenant_database, name)
    run(app, due=tomorrow + timedelta(days=1))
    second = waiting(tenant_database)

    offsets = {name: datetime.fromisoformat(each["eta"]) - tomorrow for name, each in first.items()}
    assert all(timedelta(0) <= offset < timedelta(seconds=7200) for offset in offsets.values())
    quarters = Counter(offset // timedelta(seconds=1800) for offset in offsets.values())
    assert min(quarters[quarter] for quarter in range(4)) > 30
    assert {
        name: datetime.fromisoformat(each["eta"]) - tomorrow - timedelta(days=1) for name, each in second.items()
    } == offsets
    assert {each["queue"] for each in first.values()} == {"reports"}


def test_what_is_late_is_not_spread_any_more(app: Celery, tenant_database: TenantDatabase) -> None:
    daily(app, lambda: ["acme"], spread=3600)

    run(app, due=TODAY - timedelta(days=1))

    assert waiting(tenant_database)["acme"]["eta"] is None


def test_tenants_may_come_as_contexts_rows_or_ids_and_twice(app: Celery, tenant_database: TenantDatabase) -> None:
    daily(app, lambda: [TenantContext("acme", "ann"), ("globex", "gus", "p1"), 7, 7])

    assert run(app) == {"launched": 3}

    assert set(waiting(tenant_database)) == {"acme", "globex", "7"}


def test_a_chain_runs_until_its_last_task_has_ended(app: Celery, tenant_database: TenantDatabase) -> None:
    whole = chain(app.signature("digest", ("a",)), app.signature("digest"))
    each_tenant(app, "daily", whole, schedule=DAY, tenants=lambda: ["acme"])

    assert run(app, due=TODAY - timedelta(days=1)) == {"launched": 1}
    tenant_database.execute("DELETE FROM rhesis_tasks.message")  # its first task has ended

    assert run(app) == {"skipped": 1}
    end(tenant_database, "acme")
    assert run(app, due=TODAY + timedelta(days=1)) == {"launched": 1}


def test_a_chain_that_ends_in_a_task_known_by_its_name_is_refused_once_that_ignores_its_result(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    whole = chain(app.signature("digest", ("a",)), app.signature("quiet"))
    each_tenant(app, "daily", whole, schedule=DAY, tenants=lambda: ["acme"])

    @app.task(base=BaseTask, name="quiet", ignore_result=True, shared=False)
    def quiet() -> None: ...

    with pytest.raises(ConfigurationError, match="quiet, ignores its result"):
        app.tasks[TASK_NAME].apply_async(kwargs={"schedule_name": "daily"})
    with pytest.raises(ConfigurationError, match="quiet, ignores its result"):
        run(app)
    assert waiting(tenant_database, None) == {}


def test_a_single_task_that_ignores_its_result_runs_as_long_as_there_is_its_message(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    daily(app, lambda: ["acme"], options={"ignore_result": True})

    assert run(app, due=TODAY - timedelta(days=1)) == {"launched": 1}
    assert run(app) == {"skipped": 1}
    tenant_database.execute("DELETE FROM rhesis_tasks.message")  # it has ended
    assert run(app, due=TODAY + timedelta(days=1)) == {"launched": 1}


@pytest.mark.parametrize("name", ["context", "current_user", "session", "idempotency_key", "options"])
@pytest.mark.parametrize("kind", ["task", "chain"])
def test_a_tasks_argument_may_have_any_name(app: Celery, tenant_database: TenantDatabase, name: str, kind: str) -> None:
    @app.task(base=BaseTask, name="report", shared=False)
    def report(
        context: str = "", current_user: str = "", session: str = "", idempotency_key: str = "", options: str = ""
    ) -> None: ...

    task = report if kind == "task" else chain(report.s(), app.signature("digest"))
    each_tenant(app, "daily", task, schedule=DAY, tenants=lambda: ["acme"], kwargs={name: "weekly"})

    assert run(app) == {"launched": 1}
    with tenant_database.owner.connect() as connection:
        body = connection.scalar(text("SELECT convert_from(body, 'UTF8') FROM rhesis_tasks.message"))
    assert json.loads(body)[1] == {name: "weekly"}


ORGANIZATION = (
    "CREATE TABLE organization (organization_id text PRIMARY KEY)",
    "INSERT INTO organization VALUES ('acme'), ('globex')",
    'GRANT SELECT ON organization TO "{role}"',
)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT organization_id FROM organization",
        text("SELECT organization_id FROM organization"),
        select(column("organization_id")).select_from(table("organization")),
    ],
    ids=["SQL", "text", "select"],
)
def test_tenants_are_those_of_a_query(app: Celery, tenant_database: TenantDatabase, query: Any) -> None:
    tenant_database.execute(*(statement.format(role=tenant_database.role) for statement in ORGANIZATION))
    daily(app, query)

    assert run(app) == {"launched": 2}
    assert set(waiting(tenant_database)) == {"acme", "globex"}


def test_a_query_of_a_protected_table_finds_nobody_and_says_so_unless_there_is_a_system_login(
    app: Celery,
    make_app: MakeApp,
    tenant_database: TenantDatabase,
    superuser: Engine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tenant_database.execute(
        *(statement.format(role=tenant_database.role) for statement in ORGANIZATION),
        enable_rls("organization", role=tenant_database.role, column_type="text"),
    )
    daily(app, "SELECT organization_id FROM organization")

    assert run(app) == {}
    assert "If its table is under row-level security" in caplog.text

    system = superuser.url.render_as_string(hide_password=False)
    sessions = TenantSessions(tenant_database.url, system=system)
    seeing = make_app(broker_url=tenant_database.url, sessions=sessions)
    add_digest(seeing)
    daily(seeing, "SELECT organization_id FROM organization")
    try:
        assert run(seeing) == {"launched": 2}
    finally:
        assert sessions._system_engine is not None
        sessions._system_engine.dispose()


def test_two_applications_with_a_schedule_of_the_same_name_do_not_know_of_each_other(
    app: Celery, make_app: MakeApp, tenant_database: TenantDatabase
) -> None:
    other = make_app(broker_url=tenant_database.url)
    add_digest(other)
    for each in (app, other):
        daily(each, lambda: ["acme"])

    assert [run(app), run(other)] == [{"launched": 1}, {"launched": 1}]


def test_without_results_in_postgresql_it_is_refused_where_beat_publishes(make_app: MakeApp) -> None:
    app = make_app(None, result_backend="cache+memory://")
    daily(app, lambda: ["acme"])

    with pytest.raises(NotSupportedError, match="next to the results"):
        app.tasks[TASK_NAME].apply_async(kwargs={"schedule_name": "daily"})


def test_a_tenant_that_has_left_can_be_forgotten(app: Celery) -> None:
    daily(app, lambda: ["acme", "globex"])
    run(app)
    backend: Any = app.backend
    known = ScheduleTable(backend.records, has_messages=True, lost_after=DAY)

    assert [known.forget("acme"), known.forget("acme"), known.forget("globex")] == [1, 0, 1]
