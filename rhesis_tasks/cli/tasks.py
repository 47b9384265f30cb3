"""``rhesis-tasks tasks ...``."""

from __future__ import annotations

import sys

import click

from .application import app_option, application

__all__ = ["tasks"]

_organization = click.option(
    "--organization", required=True, help="The tenant whose tasks they are; another one's are unknown."
)
_user = click.option("--user", help="Who is acting, for the records.")


@click.group()
def tasks() -> None:
    """What a tenant's tasks are doing."""


@tasks.command("show")
@click.argument("task_id")
@app_option
@_organization
@click.option("--follow", is_flag=True, help="Show its progress until it ends; exits with 1 unless it succeeds.")
def show(task_id: str, app: str, organization: str, follow: bool) -> None:
    """Print where a task is."""
    from ..context import TenantContext, tenant_scope
    from ..display import describe, follow_task
    from ..states import State
    from ..status import get_task

    with tenant_scope(TenantContext(organization)):
        celery = application(app)
        record = follow_task(celery, task_id) if follow else get_task(celery, task_id)
    if record is None:
        raise click.ClickException(f"organization {organization} has no task {task_id}")
    click.echo(describe(record))
    if follow and record.state is not State.SUCCESS:
        sys.exit(1)


@tasks.command("list")
@app_option
@_organization
@click.option("--state", "states", multiple=True, help="Only those in this state; repeatable.")
@click.option("--name", help="Only those of this task.")
@click.option("--root", "root_id", help="Only those of this run.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
def list_command(
    app: str, organization: str, states: tuple[str, ...], name: str | None, root_id: str | None, limit: int
) -> None:
    """Print tasks, the latest launch first."""
    from ..context import TenantContext, tenant_scope
    from ..display import line
    from ..states import State
    from ..status import list_tasks

    try:
        wanted = [State(state) for state in states] or None
    except ValueError as error:
        raise click.BadParameter(f"{error}; one of {', '.join(State)}", param_hint="--state") from None
    with tenant_scope(TenantContext(organization)):
        for record in list_tasks(application(app), states=wanted, name=name, root_id=root_id, limit=limit):
            click.echo(line(record))


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
