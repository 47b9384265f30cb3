"""The one call that makes an application tenant-aware, and its undoing."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, Task
from celery.backends.cache import CacheBackend
from celery.signals import celeryd_init
from pydantic import PostgresDsn, SecretStr
from sqlalchemy.engine import make_url

from rhesis_tasks import BaseTask, TenantContext, TenantSessions, configure, tenant_scope, unconfigure
from rhesis_tasks.app import DEFAULTS
from rhesis_tasks.errors import ConfigurationError, NotConfiguredError
from rhesis_tasks.guard import refuse_deduplication
from rhesis_tasks.headers import HEADER
from rhesis_tasks.postgres.patience import answer_timeout
from rhesis_tasks.postgres.results import PostgresBackend
from rhesis_tasks.sessions import sessions_of

ACME = TenantContext("acme", "alice")

DATABASE = "postgres://app:s3cret@db/shop"
AS_BROKER = "postgresql://app:s3cret@db/shop"
AS_BACKEND = "postgresql://app:s3cret@db/shop"


@pytest.fixture
def bare(make_app: Callable[..., Celery]) -> Celery:
    """An application without any settings of its own, not configured yet."""
    return make_app(configured=False, broker=None, backend=None)


def database_of(app: Celery) -> str:
    return sessions_of(app).engine.url.render_as_string(hide_password=False)


# --- where the settings come from ------------------------------------------------------------------------------


def test_a_database_is_broker_result_backend_and_tenant_sessions(bare: Celery) -> None:
    configure(bare, DATABASE)

    assert bare.conf.broker_url == AS_BROKER
    assert bare.conf.result_backend == AS_BACKEND
    assert database_of(bare) == "postgresql+psycopg://app:s3cret@db/shop"


@pytest.mark.parametrize("url", ["postgresql+asyncpg://app:s3cret@db/shop", "postgresql+psycopg2://app:s3cret@db/shop"])
def test_a_database_url_that_names_another_driver_does_as_well(bare: Celery, url: str) -> None:
    configure(bare, url)

    assert bare.conf.broker_url == AS_BROKER
    assert bare.conf.result_backend == AS_BACKEND


def test_an_url_may_be_one_of_sqlalchemys_and_keeps_its_password(bare: Celery) -> None:
    url = make_url("postgresql+psycopg://app:s3c%40ret@db/shop")

    configure(bare, url)
    configure(bare, url)

    assert bare.conf.broker_url == bare.conf.result_backend == "postgresql://app:s3c%40ret@db/shop"
    assert database_of(bare) == "postgresql+psycopg://app:s3c%40ret@db/shop"


def test_broker_and_results_may_have_urls_of_sqlalchemys(bare: Celery) -> None:
    configure(
        bare, broker_url=make_url(DATABASE.replace("postgres:", "postgresql:")), result_backend=make_url(AS_BACKEND)
    )

    assert (bare.conf.broker_url, bare.conf.result_backend) == (AS_BROKER, AS_BACKEND)


@pytest.mark.parametrize("name", ["database_url", "broker_url", "result_backend"])
@pytest.mark.parametrize("url", [SecretStr(DATABASE), PostgresDsn(DATABASE), DATABASE.encode(), 5, ["redis://"]])
def test_an_url_of_another_type_is_refused_with_what_to_pass_instead(bare: Celery, name: str, url: Any) -> None:
    kind = type(url).__name__

    with pytest.raises(
        ConfigurationError, match=rf"a str or a sqlalchemy.URL, not {kind}\.  Pass str\(url\)"
    ) as caught:
        configure(bare, **{name: url})

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("value", ["false", "true", "", 0, 1, None])
@pytest.mark.parametrize("flag", ["show_arguments", "launch_records"])
def test_a_flag_that_is_no_bool_is_refused(bare: Celery, flag: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^{flag}= is True or False, not {value!r}$"):
        configure(bare, DATABASE, **{flag: value})

    configure(bare, DATABASE)  # it is as it was


@pytest.mark.parametrize("first", ["shop", DATABASE, None])
def test_what_is_no_celery_application_is_refused(first: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"the first argument of configure\(\) is the Celery application"):
        configure(first)


def test_what_is_not_given_comes_from_the_environment(bare: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", DATABASE)
    monkeypatch.setenv("BROKER_URL", "memory://")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "cache+memory://")

    configure(bare)

    assert bare.conf.broker_url == "memory://"
    assert isinstance(bare.backend, CacheBackend)
    assert make_url(database_of(bare)).host == "db"


def test_the_database_of_the_environment_is_broker_and_result_backend(
    bare: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", DATABASE)

    configure(bare)

    assert (bare.conf.broker_url, bare.conf.result_backend) == (AS_BROKER, AS_BACKEND)


def test_an_url_of_the_environment_may_have_any_usual_form(bare: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_URL", DATABASE)
    monkeypatch.setenv("CELERY_RESULT_BACKEND", DATABASE)

    configure(bare)

    assert bare.conf.broker_url == AS_BROKER
    assert isinstance(bare.backend, PostgresBackend)


def test_an_argument_wins_over_the_environment(bare: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://environment/shop")
    monkeypatch.setenv("BROKER_URL", "redis://environment")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://environment")

    configure(bare, DATABASE, broker_url="memory://", result_backend="cache+memory://")

    assert bare.conf.broker_url == "memory://"
    assert isinstance(bare.backend, CacheBackend)
    assert make_url(database_of(bare)).host == "db"


def test_an_empty_variable_of_the_environment_counts_for_nothing(bare: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.setenv(name, "")

    configure(bare)

    assert not bare.conf.result_backend
    with pytest.raises(NotConfiguredError, match="has no tenant sessions"):
        sessions_of(bare)


def test_the_schema_is_a_setting_that_the_result_backend_finds(bare: Celery, make_app: Callable[..., Celery]) -> None:
    configure(bare, schema="tasks_of_shop")

    assert bare.conf.rhesis_tasks_schema == "tasks_of_shop"
    assert make_app().conf.rhesis_tasks_schema == "rhesis_tasks"


def test_sessions_of_the_applications_own_are_used(bare: Celery) -> None:
    own = TenantSessions("postgresql://elsewhere/shop")

    configure(bare, DATABASE, sessions=own)

    assert sessions_of(bare) is own


# --- who wins --------------------------------------------------------------------------------------------------


def test_an_application_gets_safe_defaults(bare: Celery) -> None:
    configure(bare, broker_url="memory://")

    assert bare.conf.task_acks_late is True
    assert bare.conf.task_track_started is True
    assert bare.conf.accept_content == ["json"]
    assert "%(organization_id)s" in bare.conf.worker_task_log_format


def test_settings_given_to_celery_win_over_ours(
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER_URL", "redis://environment")
    app = make_app(configured=False, broker="memory://mine", backend="cache+memory://", task_acks_late=False)

    configure(app, DATABASE)

    assert app.conf.broker_url == "memory://mine"
    assert app.conf.result_backend == "cache+memory://"
    assert app.conf.task_acks_late is False


def test_what_only_kombus_sql_transport_needs_is_left_out_for_a_broker_of_the_applications_own(
    make_app: Callable[..., Celery],
) -> None:
    app = make_app(configured=False, broker="amqp://rabbit//")

    configure(app, DATABASE)

    assert app.conf.worker_enable_remote_control is True
    assert app.conf.broker_transport_options == {}


@pytest.mark.parametrize("when", ["before", "after"])
def test_settings_of_app_conf_win_over_ours_whenever_they_are_made(bare: Celery, when: str) -> None:
    def set_own() -> None:
        bare.conf.broker_url = "memory://mine"
        bare.conf.update(result_backend="cache+memory://", task_acks_late=False)

    if when == "before":
        set_own()
    configure(bare, DATABASE)
    if when == "after":
        set_own()

    assert bare.conf.broker_url == "memory://mine"
    assert bare.conf.result_backend == "cache+memory://"
    assert bare.conf.task_acks_late is False
    assert bare.conf.task_track_started is True


@pytest.mark.parametrize("when", ["before", "after"])
def test_settings_of_a_configuration_object_win_over_ours_whenever_it_is_named(bare: Celery, when: str) -> None:
    class Settings:
        broker_url = "memory://mine"
        result_backend = "cache+memory://"
        task_acks_late = False

    if when == "before":
        bare.config_from_object(Settings)
    configure(bare, DATABASE)
    if when == "after":
        bare.config_from_object(Settings)

    assert bare.conf.broker_url == "memory://mine"
    assert bare.conf.result_backend == "cache+memory://"
    assert bare.conf.task_acks_late is False
    assert bare.conf.task_track_started is True


def test_what_is_given_to_configure_wins_over_what_was_given_to_celery(make_app: Callable[..., Celery]) -> None:
    app = make_app(configured=False, broker="memory://mine", task_acks_late=False)

    configure(app, broker_url="memory://given", task_acks_late=True)

    assert app.conf.broker_url == "memory://given"
    assert app.conf.task_acks_late is True


def test_overrides_are_celery_settings(bare: Celery) -> None:
    configure(bare, broker_url="memory://", task_acks_late=False, worker_prefetch_multiplier=1)

    assert bare.conf.task_acks_late is False
    assert bare.conf.worker_prefetch_multiplier == 1


# --- once ------------------------------------------------------------------------------------------------------


def test_configuring_again_with_the_same_arguments_changes_nothing(bare: Celery, published: Any) -> None:
    for _ in range(3):
        configure(bare, broker_url="memory://", task_default_priority=3)
    with tenant_scope(ACME):
        bare.send_task("elsewhere")

    (message,) = published(bare)
    assert message.organization == "acme"


def test_configuring_again_is_fine_after_tasks_were_made(app: Celery) -> None:
    app.finalize()

    configure(app)


@pytest.mark.parametrize(
    ("again", "named"),
    [
        ({"database_url": "postgresql://other/shop"}, "database_url"),
        ({"broker_url": "redis://other"}, "broker_url"),
        ({"result_backend": "rpc://"}, "result_backend"),
        ({"schema": "other"}, "schema"),
        ({"task_acks_late": False}, "overrides"),
        ({"sessions": TenantSessions("postgresql://other/shop")}, "sessions"),
        ({"broker_url": "redis://other", "schema": "other"}, "broker_url, schema"),
    ],
)
def test_a_second_call_that_contradicts_the_first_says_in_what(bare: Celery, again: dict[str, Any], named: str) -> None:
    configure(bare, DATABASE, broker_url="memory://")

    with pytest.raises(ConfigurationError, match=f"with other arguments: {named}\\.") as caught:
        configure(bare, **{"database_url": DATABASE, "broker_url": "memory://", **again})

    assert "s3cret" not in str(caught.value)
    assert bare.conf.broker_url == "memory://"


# --- too late, or wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [lambda app: app.finalize(), lambda app: app.tasks, lambda app: app.Task])
def test_an_application_in_use_cannot_be_configured_any_more(bare: Celery, use: Callable[[Celery], Any]) -> None:
    use(bare)

    with pytest.raises(ConfigurationError, match=r"is in use already.*right after Celery\(\.\.\.\)"):
        configure(bare)


def test_tasks_that_were_only_declared_do_not_count_as_use(bare: Celery) -> None:
    @bare.task(base=BaseTask)
    def early() -> None: ...

    configure(bare)

    assert isinstance(bare.tasks[early.name], BaseTask)


def test_a_task_class_of_the_applications_own_is_refused_with_the_remedy(make_app: Callable[..., Celery]) -> None:
    class Own(Task):
        abstract = True

    app = make_app(configured=False, task_cls=Own)

    with pytest.raises(ConfigurationError, match="name it as base= instead of task_cls="):
        configure(app)


@pytest.mark.parametrize(
    "arguments",
    [
        {"database_url": "mysql://app:s3cret@db/shop"},
        {"database_url": "app:s3cret@db/shop"},
        {"database_url": "postgresql://app:s3cret@db:port/shop"},
        {"broker_url": "postgresql://app:s3cret@db:port/shop"},
        {"result_backend": "postgresql://app:s3cret@db:port/shop"},
        {"schema": "Not A Name"},
    ],
)
def test_a_wrong_value_is_an_error_at_once_and_leaves_the_application_as_it_was(
    bare: Celery, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configure(bare, **arguments)
    assert "s3cret" not in str(caught.value)

    configure(bare, DATABASE)
    assert (bare.conf.broker_url, bare.conf.result_backend) == (AS_BROKER, AS_BACKEND)


def test_a_wrong_url_in_the_environment_is_an_error_at_once(bare: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "sqlite:///shop")

    with pytest.raises(ConfigurationError, match="a database URL looks like postgresql://"):
        configure(bare)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["short"], "at least 16 are needed"),
        ([b"long enough, really", b"short"], "at least 16 are needed"),
        (["long enough, really", 16], "takes str or bytes, not int"),
        ("one key that is long enough", "takes a list of keys"),
        ([], "signing_keys= is empty"),
        (iter([]), "signing_keys= is empty"),
    ],
)
def test_signing_keys_that_cannot_be_used_are_an_error_that_does_not_show_them(
    bare: Celery, keys: Any, text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text) as caught:
        configure(bare, broker_url="memory://", signing_keys=keys)

    assert "long enough, really" not in str(caught.value)


# --- which applications, and undoing ---------------------------------------------------------------------------


def test_another_application_of_the_process_is_untouched(
    app: Celery, make_app: Callable[..., Celery], published: Any, work_off: Any
) -> None:
    other = make_app(configured=False)

    @other.task(name="plain", bind=True)
    def plain(self: Task) -> list[str]:
        return sorted(name for name in vars(self.request) if "rhesis" in name or "organization" in name)

    with tenant_scope(ACME):
        plain.delay()
        other.send_task("elsewhere")
        result = plain.delay()

    assert [HEADER in message.headers for message in published(other)] == [False] * 3
    plain.apply_async(task_id=result.id)
    work_off(other)
    assert result.get() == []


def test_an_application_configured_later_is_independent_of_the_first(
    app: Celery, make_app: Callable[..., Celery], published: Any
) -> None:
    second = make_app()
    unconfigure(app)

    with tenant_scope(ACME):
        app.send_task("x")
        second.send_task("x")

    assert [message.envelope for message in published(app)] == [None]
    assert [message.organization for message in published(second)] == ["acme"]


def test_unconfiguring_brings_back_publishing_and_logging_as_they_were(bare: Celery, published: Any) -> None:
    factory, send_task = logging.getLogRecordFactory(), bare.send_task
    configure(bare, DATABASE, broker_url="memory://", result_backend="cache+memory://")
    assert logging.getLogRecordFactory() is not factory
    assert bare.send_task != send_task

    unconfigure(bare)

    assert logging.getLogRecordFactory() is factory
    assert bare.send_task == send_task
    with tenant_scope(ACME):
        bare.send_task("x")
    assert [message.envelope for message in published(bare)] == [None]
    with pytest.raises(NotConfiguredError):
        sessions_of(bare)


def test_logging_stays_as_long_as_one_application_is_configured(make_app: Callable[..., Celery]) -> None:
    factory = logging.getLogRecordFactory()
    one, other = make_app(), make_app()

    unconfigure(one)
    assert logging.getLogRecordFactory() is not factory
    unconfigure(other)
    assert logging.getLogRecordFactory() is factory


def test_unconfiguring_twice_or_what_was_never_configured_changes_nothing(bare: Celery) -> None:
    unconfigure(bare)
    configure(bare)
    unconfigure(bare)
    unconfigure(bare)


def test_an_unconfigured_application_can_be_configured_otherwise(bare: Celery) -> None:
    configure(bare, DATABASE)
    unconfigure(bare)

    configure(bare, "postgresql://other/shop")

    assert bare.conf.broker_url == "postgresql://other/shop"
    assert bare.conf.result_backend == "postgresql://other/shop"


def test_an_application_that_is_gone_is_not_kept_alive() -> None:
    app = Celery("gone", broker="memory://", set_as_current=False)
    configure(app)
    reference = weakref.ref(app)

    app.close()
    del app
    gc.collect()

    assert reference() is None


def test_a_setting_that_celery_does_not_have_is_refused(bare: Celery) -> None:
    with pytest.raises(ConfigurationError, match="no settings named task_alway_eager"):
        configure(bare, broker_url="memory://", task_alway_eager=True)


def test_a_launch_without_any_broker_names_the_ways_to_have_one(bare: Celery) -> None:
    configure(bare)

    with tenant_scope(ACME), pytest.raises(NotConfiguredError, match="Set DATABASE_URL"):
        bare.send_task("elsewhere")


@pytest.mark.parametrize("read", ["before", "after"])
def test_unconfiguring_brings_celerys_own_defaults_back(bare: Celery, read: str) -> None:
    celerys = {key: Celery("other", set_as_current=False).conf[key] for key in DEFAULTS}
    if read == "before":
        assert bare.conf.task_acks_late is False
    configure(bare, broker_url="memory://")
    assert {key: bare.conf[key] for key in DEFAULTS} == dict(DEFAULTS) != celerys

    unconfigure(bare)

    assert {key: bare.conf[key] for key in DEFAULTS} == celerys
    assert "rhesis_tasks_schema" not in bare.conf


def test_unconfigure_puts_back_a_send_task_of_the_applications_own(make_app: Any) -> None:
    app = make_app(configured=False)
    own = app.send_task
    app.send_task = own
    configure(app)
    assert app.send_task is not own

    unconfigure(app)
    assert app.send_task is own


def test_only_a_worker_waits_long_for_a_broker_that_is_away(bare: Celery) -> None:
    configure(bare, broker_url="memory://")
    before = bare.conf.task_publish_retry_policy
    assert answer_timeout({}, "broker_transport_options") == 10

    celeryd_init.send(sender="w@here", instance=SimpleNamespace(app=bare))  # as Celery does

    assert before["max_retries"] == 1
    assert bare.conf.task_publish_retry_policy["max_retries"] == 100
    assert answer_timeout({}, "broker_transport_options") == 90
    unconfigure(bare)
    assert bare.conf.task_publish_retry_policy["max_retries"] == 3  # Celery's own
    assert answer_timeout({}, "broker_transport_options") == 10


def test_how_long_an_answer_is_waited_for_is_a_number_of_seconds_or_none() -> None:
    assert answer_timeout({"answer_timeout": 3}, "broker_transport_options") == 3
    assert answer_timeout({"answer_timeout": None}, "broker_transport_options") is None
    for value in (-1, 0, "5", True, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match=rf"'answer_timeout'\] is a number of seconds, .* not {value!r}"):
            answer_timeout({"answer_timeout": value}, "broker_transport_options")


def test_a_worker_does_not_look_up_by_the_id_alone_what_is_delivered_again(bare: Celery) -> None:
    configure(bare, "postgresql://app@db/shop", worker_deduplicate_successful_tasks=True)

    with pytest.raises(SystemExit, match="worker_deduplicate_successful_tasks, which goes by a task's id alone"):
        refuse_deduplication(bare)

    bare.conf.worker_deduplicate_successful_tasks = False
    refuse_deduplication(bare)
