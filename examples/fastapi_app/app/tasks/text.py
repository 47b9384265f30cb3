"""Tasks on texts, which need no database."""

from __future__ import annotations

from app.rules import count_words
from app.worker import celery_app
from rhesis_tasks import BaseTask

__all__ = ["word_count"]


@celery_app.task(base=BaseTask, bind=True)
def word_count(self: BaseTask, text: str) -> int:
    """How many words a text has.  No session is asked for, so none is opened."""
    words = count_words(text)
    self.log.info("counted %d words", words)
    return words
