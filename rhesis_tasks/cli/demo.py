"""``rhesis-tasks demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import MissingExtraError

__all__ = ["demo"]


@click.command()
@click.option(
    "--input",
    "input_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON Lines file of test sets and tests of at least two organizations, instead of the example's.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the embedded server's data in this folder.",
)
@click.option("--keep", is_flag=True, help="Leave everything running until Ctrl-C, and print the URLs.")
def demo(input_file: Path | None, data_dir: Path | None, keep: bool) -> None:
    """Run the main job for real: two organizations, one worker, one PostgreSQL.

    Uses an embedded PostgreSQL, or DATABASE_URL if it is set; there it makes roles and schemas of random
    names, and drops them afterwards.  Exits with 0 only if everything it claims was true.
    """
    try:
        from rich.console import Console

        from ..demo import DemoOptions, run_demo
    except ImportError as error:
        if isinstance(error, MissingExtraError):
            raise
        raise MissingExtraError.of(error.name or "rich", "demo") from error
    if not run_demo(DemoOptions(input=input_file, data_dir=data_dir, keep=keep), Console()):
        sys.exit(1)
