"""What the run of an ``async def`` task leaves in memory."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextvars import ContextVar

import pytest

from rhesis_tasks.loops import close_loops, loop_factory, run_coroutine

var: ContextVar[object] = ContextVar("var")


class Value:
    """Something that can be referred to weakly."""


@pytest.mark.parametrize("event_loop", ["asyncio", "uvloop"])
def test_what_a_run_has_set_in_its_context_is_gone_with_it(event_loop):
    if event_loop == "uvloop":
        pytest.importorskip("uvloop")
    values = []

    async def body() -> None:
        value = Value()
        values.append(weakref.ref(value))
        var.set(value)
        await asyncio.sleep(0)

    gc.collect()
    gc.disable()  # which would find it in the end
    try:
        run_coroutine(body(), name="body", grace=1, factory=loop_factory(event_loop))
        left = values[0]()
    finally:
        gc.enable()
        close_loops()

    assert left is None
