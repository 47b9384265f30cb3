"""``rhesis-tasks tasks ...``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from .application import app_option, application
from .operating import filters, json_option, message_filter, operating, say

if TYPE_CHECKING:
    from celery import Celery

    from ..operations import MessageFilter
    from ..postgres.records import TaskRecord

__all__ = ["tasks"]

_organization = click.option(
    "--organization", required=True, help="The tenant whose tasks they are; another one's are unknown."
)
_any_organization = click.option("--organization", help="The tenant whose task it is; by default whoever's.")
_user = click.option("--user", help="Who is acting, for the records.")
_task_id = click.argument("task_id", required=False)
_unended = click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(["waiting", "delayed", "running"]),
    help="Only those; repeatable.",
)
_all = click.option("--all", "everything", is_flag=True, help="Mean all of them, of all tenants and queues.")


@click.group()
def tasks() -> None:
    """What tasks are doing, and stopping them; of one tenant, or for operators of all.

    Commands that change more than one task's state print what they would do, until you say --yes.
    """


@tasks.command("show")
@click.argument("task_id")
@app_option
@_any_organization
@click.option("--follow", is_flag=True, help="Show its progress until it ends; exits with 1 unless it succeeds.")
@json_option
def show(task_id: str, app: str, organization: str | None, follow: bool, as_json: bool) -> None:
    """Print where a task is: its record, its messages, and the run that it belongs to."""
    from ..context import TenantContext, tenant_scope
    from ..status import get_task

    celery = application(app)
    if follow:
        _follow(celery, task_id, organization)
        return
    if organization is not None:
        with tenant_scope(TenantContext(organization)):
            record = get_task(celery, task_id)
        if record is None:
            raise click.ClickException(f"organization {organization} has no task {task_id}")
        _show(celery, [record], task_id, organization, as_json)
        return
    from ..operations import find_records

    _show(celery, find_records(celery, task_id), task_id, None, as_json)


def _show(celery: Celery, records: list[TaskRecord], task_id: str, organization: str | None, as_json: bool) -> None:
    from ..context import TenantContext, tenant_scope
    from ..display import as_json as to_json
    from ..display import describe, message_lines, outline
    from ..errors import MissingPrivilegeError, NotSupportedError
    from ..operations import messages
    from ..status import task_tree

    try:
        found = messages(celery, message_filter(organization, task_id=task_id))
    except (MissingPrivilegeError, NotSupportedError):
        if organization is None:
            raise
        found = []  # a tenant's record can be shown without
    if not records and not found:
        raise click.ClickException(f"there is no task {task_id}, neither a record nor a message")
    if as_json:
        click.echo(to_json({"records": records, "messages": found}))
        return
    for record in records:
        click.echo(describe(record))
        if record.organization_id:
            with tenant_scope(TenantContext(record.organization_id)):
                node = task_tree(celery, task_id)
            if node is not None and node.children:
                click.echo("run:")
                for each in outline(node, 1):
                    click.echo(each)
    for message in found:
        click.echo("message:")
        for each in message_lines(message):
            click.echo(f"  {each}")


@tasks.command("follow")
@click.argument("task_id")
@app_option
@_any_organization
def follow_command(task_id: str, app: str, organization: str | None) -> None:
    """Show a task's progress until it ends; exits with 1 unless it succeeds."""
    _follow(application(app), task_id, organization)


def _follow(celery: Celery, task_id: str, organization: str | None) -> None:
    from ..context import TenantContext, tenant_scope
    from ..display import describe, follow_task
    from ..operations import find_records
    from ..states import State

    if organization is None:
        owners = [record.organization_id for record in find_records(celery, task_id) if record.organization_id]
        if not owners:
            raise click.ClickException(f"there is no record of a task {task_id} to follow")
        organization = owners[-1]
    with tenant_scope(TenantContext(organization)):
        record = follow_task(celery, task_id)
    if record is None:
        raise click.ClickException(f"organization {organization} has no task {task_id}")
    click.echo(describe(record))
    if record.state is not State.SUCCESS:
        sys.exit(1)


@tasks.command("list")
@app_option
@filters
@click.option("--state", "states", multiple=True, help="Only those in this state; repeatable.")
@click.option("--root", "root_id", help="Only those of this run, with --organization.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--after", type=click.IntRange(0, 2**63 - 1), help="Go on behind the message with this id.")
@json_option
def list_command(
    app: str, states: tuple[str, ...], root_id: str | None, limit: int, after: int | None, as_json: bool, **which: Any
) -> None:
    """Print tasks.

    What is in the queues, the oldest first: waiting, delayed, running, dead.  With --organization and nothing
    but --name, --root and the states of records, that tenant's records instead, the latest launch first.
    """
    from ..display import as_json as to_json
    from ..display import line, message_lines
    from ..operations import messages

    kind = _kind_of(states)
    others = [name for name, value in which.items() if value is not None and name not in ("organization", "task_name")]
    is_of_records = kind != "message" and which["organization"] and not others and after is None
    if kind == "record" and not is_of_records:
        raise click.UsageError(
            f"--state {' '.join(states)} is a record's: give --organization, and of other filters only --name"
        )
    if is_of_records:
        records = _records(application(app), which["organization"], which["task_name"], states, root_id, limit + 1)
        for record in records[:limit]:
            click.echo(to_json(record) if as_json else line(record))
        if len(records) > limit:
            click.echo(f"There are more than {limit:,}; --limit says how many to list.", err=True)
        return
    if root_id is not None:
        raise click.UsageError(
            "--root is for records: name --organization, and of other filters only --name and --state"
        )
    found = messages(application(app), message_filter(**which, states=states), limit=limit + 1, after=after)
    for message in found[:limit]:
        if as_json:
            click.echo(to_json(message))
        else:
            for each in message_lines(message):
                click.echo(each)
    if len(found) > limit:
        click.echo(
            f"There are more than {limit:,}.  Go on with --after {found[limit - 1].id}, or raise --limit.", err=True
        )


def _kind_of(states: tuple[str, ...]) -> str | None:
    """Whether states are those of records or of messages; None if they may be either's."""
    from ..operations import MessageState
    from ..states import State

    for state in states:
        if state not in {*State, *MessageState}:
            raise click.BadParameter(
                f"{state!r} is no state; one of {', '.join([*State])}, or of messages {', '.join(MessageState)}",
                param_hint="--state",
            )
    if all(state in {*State} for state in states):
        return None if all(state in {*MessageState} for state in states) else "record"
    if all(state in {*MessageState} for state in states):
        return "message"
    raise click.UsageError(
        "some of these states are those of records, others those of messages: list one kind at a time"
    )


def _records(
    celery: Celery, organization: str, name: str | None, states: tuple[str, ...], root_id: str | None, limit: int
) -> list[TaskRecord]:
    from ..context import TenantContext, tenant_scope
    from ..states import State
    from ..status import list_tasks

    with tenant_scope(TenantContext(organization)):
        wanted = [State(state) for state in states] or None
        return list_tasks(celery, states=wanted, name=name, root_id=root_id, limit=limit)


@tasks.command("count")
@app_option
@filters
@click.option("--state", "states", multiple=True, type=click.Choice(["waiting", "delayed", "running", "dead"]))
@click.option(
    "--by",
    default="queue",
    show_default=True,
    type=click.Choice(["queue", "organization", "user", "name"]),
    help="Count those of each.",
)
@json_option
def count_command(app: str, states: tuple[str, ...], by: str, as_json: bool, **which: Any) -> None:
    """Print how many messages there are, and how old the oldest is; the most first."""
    from ..display import as_json as to_json
    from ..display import count_table
    from ..operations import summary

    columns: dict[str, Any] = {"organization": "organization_id", "user": "user_id", "name": "task_name"}
    counts = summary(application(app), message_filter(**which, states=states), by=columns.get(by, by))
    if as_json:
        click.echo(to_json(counts))
        return
    for each in count_table(counts, by):
        click.echo(each)


@tasks.command("purge")
@app_option
@filters
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(["waiting", "delayed", "dead"]),
    help="Only those in this state; waiting and delayed by default; repeatable.",
)
@_all
@operating
def purge_command(
    app: str,
    states: tuple[str, ...],
    everything: bool,
    yes: bool,
    operator: str | None,
    as_json: bool,
    **which: Any,
) -> None:
    """Delete messages that wait or are delayed, or dead letters; what runs goes on."""
    from ..operations import login_name, purge

    meant = _meant(message_filter(**which, states=states), everything)
    done = purge(application(app), meant, operator=operator or login_name(), dry_run=not yes, everything=everything)
    say(done, as_json, "there is no such message to purge")


@tasks.command("replay")
@_task_id
@app_option
@filters
@_all
@operating
def replay_command(
    task_id: str | None, app: str, everything: bool, yes: bool, operator: str | None, as_json: bool, **which: Any
) -> None:
    """Put dead letters back into their queues: one task's, or those that the filters mean."""
    from ..operations import login_name, replay

    meant = _meant(message_filter(**which, task_id=task_id), everything)
    done = replay(application(app), meant, operator=operator or login_name(), dry_run=not yes)
    say(done, as_json, f"there is no dead letter of task {task_id}" if task_id else "there is no such dead letter")


@tasks.command("revoke")
@_task_id
@app_option
@filters
@_unended
@_all
@operating
def revoke_command(**arguments: Any) -> None:
    """Stop tasks: what has not begun never will, what runs is asked to stop."""
    from ..operations import revoke

    _stop(revoke, **arguments)


@tasks.command("terminate")
@_task_id
@app_option
@filters
@_unended
@_all
@operating
def terminate_command(**arguments: Any) -> None:
    """Stop tasks as revoke does; besides, workers end the process of what runs (prefork)."""
    from ..operations import terminate

    _stop(terminate, **arguments)


def _stop(
    stop: Any,
    task_id: str | None,
    app: str,
    states: tuple[str, ...],
    everything: bool,
    yes: bool,
    operator: str | None,
    as_json: bool,
    **which: Any,
) -> None:
    from ..operations import login_name

    meant = _meant(message_filter(**which, task_id=task_id, states=states), everything)
    done = stop(application(app), meant, operator=operator or login_name(), dry_run=not yes, everything=everything)
    say(
        done,
        as_json,
        f"there is no message of task {task_id}: it has ended, or is unknown" if task_id else "there is no such task",
    )


def _meant(which: MessageFilter, everything: bool) -> MessageFilter:
    """The filter, if it is one."""
    if which.is_empty and not everything:
        raise click.UsageError(
            "this would mean the messages of all tenants and queues.  Give --organization, --user, --name, --queue, "
            "--older-than or --published-before; or --all, if you mean all of them"
        )
    return which


@tasks.command("audit")
@app_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@json_option
def audit(app: str, limit: int, as_json: bool) -> None:
    """Print what operators did, the latest first."""
    from ..display import as_json as to_json
    from ..display import audit_line
    from ..operations import audit_records

    for record in audit_records(application(app), limit=limit):
        click.echo(to_json(record) if as_json else audit_line(record))


@tasks.command("tree")
@click.argument("task_id")
@app_option
@_organization
def tree(task_id: str, app: str, organization: str) -> None:
    """Print the run that a task belongs to, and where each of its tasks is."""
    from ..context import TenantContext, tenant_scope
    from ..display import outline
    from ..status import task_tree

    with tenant_scope(TenantContext(organization)):
        node = task_tree(application(app), task_id)
    if node is None:
        raise click.ClickException(f"organization {organization} has no task {task_id}")
    for each in outline(node):
        click.echo(each)


@tasks.command("cancel")
@click.argument("task_id")
@app_option
@_organization
@_user
@click.option("--terminate", is_flag=True, help="Have the worker end it, if it runs (prefork).")
def cancel(task_id: str, app: str, organization: str, user: str | None, terminate: bool) -> None:
    """Cancel a task that waits, or ask one that runs to stop."""
    from ..context import TenantContext, tenant_scope
    from ..status import cancel_task

    with tenant_scope(TenantContext(organization, user)):
        outcome = cancel_task(application(app), task_id, terminate=terminate)
    if outcome is None:
        raise click.ClickException(f"organization {organization} has no task {task_id}")
    click.echo(f"{task_id}: {outcome}")
