"""Figures as a table, for people."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["spread", "table"]


def table(rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """The figures; the first row is the heading."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    )


def spread(values: Sequence[float], form: str) -> str:
    """The least and the greatest."""
    return f"{min(values):{form}} - {max(values):{form}}"
