"""The rules that an answer is judged by.  Pure functions: no database, no Celery."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["broken_rules", "count_words"]


def count_words(text: str) -> int:
    """How many words a text has: what white space separates."""
    return len(text.split())


def broken_rules(
    response: str,
    *,
    must_contain: Iterable[str] = (),
    must_not_contain: Iterable[str] = (),
    max_words: int | None = None,
) -> list[str]:
    """Why a response fails, in words; empty if it passes.  Upper and lower case are the same."""
    folded = response.casefold()
    reasons = [f"does not contain {phrase!r}" for phrase in must_contain if phrase.casefold() not in folded]
    reasons += [f"contains {phrase!r}" for phrase in must_not_contain if phrase.casefold() in folded]
    if max_words is not None and (words := count_words(response)) > max_words:
        reasons.append(f"has {words} words, {max_words} are allowed")
    return reasons
