"""Who the running code works for: validation, scopes, and the agreement of several sources."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import enum
import json
import pickle
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from types import SimpleNamespace
from typing import Any

import pytest

from rhesis_tasks import TenantContext, current_tenant, require_tenant, tenant_scope
from rhesis_tasks.context import as_tenant, resolve_tenant
from rhesis_tasks.errors import InvalidTenantError, MissingTenantError, TenantConflictError
from rhesis_tasks.variables import Activation

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")

FIELDS = ("organization_id", "user_id", "project_id")


class PlainStr(str, enum.Enum):  # noqa: UP042 - str() of such a member is "PlainStr.ACME", unlike a StrEnum's
    ACME = "acme"


class ModernStr(enum.StrEnum):
    ACME = "acme"


class PlainInt(int, enum.Enum):
    SEVEN = 7


class ModernInt(enum.IntEnum):
    SEVEN = 7


def user(organization_id: Any = "acme", id: Any = "alice") -> SimpleNamespace:
    return SimpleNamespace(organization_id=organization_id, id=id)


def with_field(field: str, value: Any) -> TenantContext:
    return TenantContext(**{"organization_id": "acme", field: value})


# --- TenantContext ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "value",
    [
        pytest.param("", id="empty"),
        pytest.param(" ", id="blank"),
        pytest.param("\t\n", id="white space"),
        pytest.param(" acme", id="leading space"),
        pytest.param("acme ", id="trailing space"),
        pytest.param("acme\n", id="trailing newline"),
        pytest.param("ac\nme", id="newline"),
        pytest.param("ac\0me", id="NUL"),
        pytest.param("ac\x1bme", id="control character"),
        pytest.param("ac\ud800me", id="lone surrogate"),
        pytest.param("x" * 256, id="too long"),
        pytest.param(10**300, id="too long int"),
        pytest.param(10**5000, id="int beyond what Python turns into text"),
        pytest.param(True, id="bool"),
        pytest.param(1.5, id="float"),
        pytest.param(float("nan"), id="nan"),
        pytest.param(b"acme", id="bytes"),
        pytest.param(["acme"], id="list"),
        pytest.param({"id": "acme"}, id="dict"),
        pytest.param(object(), id="object"),
    ],
)
def test_an_id_that_cannot_be_stored_is_refused_with_the_field_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidTenantError, match=field) as caught:
        with_field(field, value)

    assert caught.value.field == field
    assert caught.value.value is value


def test_an_organization_is_not_optional() -> None:
    with pytest.raises(InvalidTenantError, match=r"organization_id must be a str, UUID or int.* not NoneType"):
        TenantContext(None)  # type: ignore[arg-type]


def test_user_and_project_are_optional() -> None:
    tenant = TenantContext("acme", None, None)

    assert (tenant.user_id, tenant.project_id, tenant.extra) == (None, None, {})


def test_a_bad_id_is_a_value_error_for_callers_who_know_nothing_of_us() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        TenantContext("")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("acme", "acme"),
        ("Ärger & Söhne, Köln", "Ärger & Söhne, Köln"),
        ("x" * 255, "x" * 255),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (0, "0"),
        (7, "7"),
        (-1, "-1"),
        (2**70, "1180591620717411303424"),
        (PlainStr.ACME, "acme"),
        (ModernStr.ACME, "acme"),
        (ModernInt.SEVEN, "7"),
        (PlainInt.SEVEN, "7"),
    ],
)
def test_an_id_is_kept_as_a_plain_string(field: str, given: Any, kept: str) -> None:
    value = getattr(with_field(field, given), field)

    assert value == kept
    assert type(value) is str


def test_a_tenant_cannot_be_changed() -> None:
    tenant = TenantContext("acme")

    with pytest.raises(dataclasses.FrozenInstanceError):
        tenant.organization_id = "globex"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del tenant.user_id


def test_tenants_with_the_same_values_are_equal_and_hash_alike() -> None:
    one = TenantContext(7, uuid.UUID(int=1), "p", {"plan": "pro"})
    other = TenantContext("7", str(uuid.UUID(int=1)), "p", {"plan": "pro"})

    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1


@pytest.mark.parametrize(
    "other",
    [
        TenantContext("globex", "alice", "p", {"plan": "pro"}),
        TenantContext("acme", "bob", "p", {"plan": "pro"}),
        TenantContext("acme", None, "p", {"plan": "pro"}),
        TenantContext("acme", "alice", "q", {"plan": "pro"}),
        TenantContext("acme", "alice", "p", {"plan": "free"}),
        TenantContext("acme", "alice", "p"),
    ],
)
def test_tenants_that_differ_in_anything_are_not_equal(other: TenantContext) -> None:
    assert TenantContext("acme", "alice", "p", {"plan": "pro"}) != other


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_tenant_survives_pickling(protocol: int) -> None:
    tenant = TenantContext("acme", "alice", "p", {"plan": "pro", "seats": 3, "trial": True})

    assert pickle.loads(pickle.dumps(tenant, protocol)) == tenant  # noqa: S301


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_a_tenant_survives_copying(duplicate: Any) -> None:
    tenant = TenantContext("acme", "alice", "p", {"plan": "pro"})

    assert duplicate(tenant) == tenant


def test_replacing_a_field_checks_it_like_the_constructor() -> None:
    assert dataclasses.replace(ACME, project_id=7).project_id == "7"  # type: ignore[arg-type]
    with pytest.raises(InvalidTenantError):
        dataclasses.replace(ACME, project_id="")


def test_extra_is_a_copy_of_what_was_given() -> None:
    given = {"plan": "pro"}
    tenant = TenantContext("acme", extra=given)

    given["plan"] = "free"

    assert tenant.extra == {"plan": "pro"}


def test_extra_is_read_only() -> None:
    tenant = TenantContext("acme", extra={"plan": "pro"})

    with pytest.raises(TypeError):
        tenant.extra["plan"] = "free"  # type: ignore[index]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["plan"], "extra must be a mapping, not list"),
        ("plan", "extra must be a mapping, not str"),
        ({"": 1}, "keys of extra must be non-empty strings"),
        ({1: 1}, "keys of extra must be non-empty strings"),
        ({"plan": None}, "must be a str, bool or int, not NoneType"),
        ({"plan": 1.5}, "must be a str, bool or int, not float"),
        ({"plan": ["pro"]}, "must be a str, bool or int, not list"),
        ({"plan": b"pro"}, "must be a str, bool or int, not bytes"),
    ],
)
def test_extra_takes_plain_values_only(extra: Any, text: str) -> None:
    with pytest.raises(InvalidTenantError, match=text) as caught:
        TenantContext("acme", extra=extra)

    assert caught.value.field == "extra"


def test_a_tenant_reads_well_in_messages() -> None:
    assert str(ACME) == "organization acme (user alice)"
    assert str(TenantContext("acme")) == "organization acme (no user)"


# --- as_tenant -------------------------------------------------------------------------------------------------


def test_anything_with_id_and_organization_is_a_user() -> None:
    assert as_tenant(user(7, uuid.UUID(int=1))) == TenantContext("7", str(uuid.UUID(int=1)))


def test_a_tenant_is_its_own_tenant() -> None:
    assert as_tenant(ACME) is ACME


@pytest.mark.parametrize(
    ("source", "field", "text"),
    [
        (None, "id", "NoneType has no attribute 'id'"),
        ("acme", "id", "str has no attribute 'id'"),
        ({"id": 1, "organization_id": 2}, "id", "dict has no attribute 'id'"),
        (SimpleNamespace(organization_id="acme"), "id", "no attribute 'id'"),
        (SimpleNamespace(id="alice"), "organization_id", "no attribute 'organization_id'"),
        (user(organization_id=None), "organization_id", "user 'alice' belongs to no organization"),
        (user(organization_id=""), "organization_id", "must not be empty"),
        (user(id=1.5), "user_id", "user_id must be a str, UUID or int"),
    ],
)
def test_what_is_no_user_is_refused_with_the_reason(source: Any, field: str, text: str) -> None:
    with pytest.raises(InvalidTenantError, match=text) as caught:
        as_tenant(source)

    assert caught.value.field == field


# --- tenant_scope ----------------------------------------------------------------------------------------------


def test_nobody_is_the_tenant_outside_of_a_scope() -> None:
    assert current_tenant() is None
    with pytest.raises(MissingTenantError, match=r"Open one with tenant_scope\(...\)"):
        require_tenant()


def test_inside_a_scope_its_tenant_is_active() -> None:
    with tenant_scope(ACME) as entered:
        assert entered is ACME
        assert current_tenant() is ACME
        assert require_tenant() is ACME


def test_a_scope_takes_a_user() -> None:
    with tenant_scope(user()) as entered:
        assert entered == ACME


@pytest.mark.parametrize("source", [None, "acme", 7, user(organization_id=None)])
def test_a_scope_for_nobody_is_refused_before_it_is_entered(source: Any) -> None:
    with pytest.raises(InvalidTenantError):
        tenant_scope(source)


def test_scopes_nest() -> None:
    with tenant_scope(ACME):
        with tenant_scope(GLOBEX):
            with tenant_scope(ACME):
                assert current_tenant() is ACME
            assert current_tenant() is GLOBEX
        assert current_tenant() is ACME
    assert current_tenant() is None


def test_one_scope_can_be_entered_again_inside_itself() -> None:
    scope = tenant_scope(ACME)

    with scope, tenant_scope(GLOBEX):
        with scope:
            assert current_tenant() is ACME
        assert current_tenant() is GLOBEX
    assert current_tenant() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_previous_tenant_is_back_after_an_exception(error: type[BaseException]) -> None:
    with tenant_scope(ACME):
        with pytest.raises(error), tenant_scope(GLOBEX):
            raise error
        assert current_tenant() is ACME


def test_a_scope_works_with_async_with() -> None:
    async def fail_for_globex() -> None:
        async with tenant_scope(user("globex", "gus")):
            assert current_tenant() == GLOBEX
            raise ValueError("inside")

    async def main() -> None:
        async with tenant_scope(ACME) as entered:
            assert entered is ACME
            with pytest.raises(ValueError, match="inside"):
                await fail_for_globex()
            assert current_tenant() is ACME
        assert current_tenant() is None

    asyncio.run(main())


def test_a_thread_does_not_see_the_tenant_of_the_thread_that_started_it() -> None:
    with ThreadPoolExecutor(1) as pool, tenant_scope(ACME):
        assert pool.submit(current_tenant).result() is None


def test_threads_that_work_at_the_same_time_each_see_their_own_tenant() -> None:
    all_inside = threading.Barrier(2, timeout=10)

    def work(tenant: TenantContext) -> list[TenantContext | None]:
        with tenant_scope(tenant):
            all_inside.wait()
            inside = current_tenant()
            all_inside.wait()
        return [inside, current_tenant()]

    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(work, [ACME, GLOBEX]))

    assert seen == [[ACME, None], [GLOBEX, None]]


def test_asyncio_tasks_that_interleave_each_see_their_own_tenant() -> None:
    async def work(tenant: TenantContext, all_inside: asyncio.Barrier) -> list[TenantContext | None]:
        inherited = current_tenant()
        async with tenant_scope(tenant):
            await all_inside.wait()
            inside = current_tenant()
            await all_inside.wait()
        return [inherited, inside, current_tenant()]

    async def main() -> list[list[TenantContext | None]]:
        starter = TenantContext("starter")
        all_inside = asyncio.Barrier(2)
        async with asyncio.timeout(10), tenant_scope(starter):
            seen = await asyncio.gather(work(ACME, all_inside), work(GLOBEX, all_inside))
            assert current_tenant() is starter
        return [[tenant and tenant.organization_id for tenant in each] for each in seen]  # type: ignore[misc]

    assert asyncio.run(main()) == [["starter", "acme", "starter"], ["starter", "globex", "starter"]]


# --- resolve_tenant --------------------------------------------------------------------------------------------


def resolve(context: Any, current_user: Any, active: TenantContext | None) -> TenantContext | None:
    if active is None:
        return resolve_tenant(context=context, current_user=current_user)
    with tenant_scope(active):
        return resolve_tenant(context=context, current_user=current_user)


NO_USER = TenantContext("acme")
DETAILED = TenantContext("acme", "alice", "project", {"plan": "pro"})


@pytest.mark.parametrize(
    ("context", "current_user", "active", "expected"),
    [
        pytest.param(None, None, None, None, id="nobody anywhere"),
        pytest.param(ACME, None, None, ACME, id="the context alone"),
        pytest.param(None, user(), None, ACME, id="the user alone"),
        pytest.param(None, None, ACME, ACME, id="the active tenant alone"),
        pytest.param(ACME, user(), ACME, ACME, id="all agree"),
        pytest.param(None, user(), DETAILED, DETAILED, id="the active tenant knows more than the user"),
        pytest.param(NO_USER, None, DETAILED, DETAILED, id="the active tenant knows more than the context"),
        pytest.param(NO_USER, user(), None, ACME, id="the user adds who"),
        pytest.param(ACME, None, NO_USER, ACME, id="the context adds who to the active tenant"),
        pytest.param(None, user(), NO_USER, ACME, id="the user adds who to the active tenant"),
        pytest.param(DETAILED, None, ACME, DETAILED, id="the context adds a project to the active tenant"),
        pytest.param(DETAILED, user(), None, DETAILED, id="the context adds a project to the user"),
    ],
)
def test_sources_that_agree_name_one_tenant(
    context: Any, current_user: Any, active: TenantContext | None, expected: TenantContext | None
) -> None:
    assert resolve(context, current_user, active) == expected


@pytest.mark.parametrize(
    ("context", "current_user", "active"),
    [
        pytest.param(ACME, user("globex"), None, id="context and user: organizations"),
        pytest.param(ACME, user(id="bob"), None, id="context and user: users"),
        pytest.param(GLOBEX, None, ACME, id="context and active: organizations"),
        pytest.param(TenantContext("acme", "bob"), None, ACME, id="context and active: users"),
        pytest.param(None, user("globex", "gus"), ACME, id="user and active: organizations"),
        pytest.param(None, user(id="bob"), ACME, id="user and active: users"),
        pytest.param(NO_USER, user(id="bob"), ACME, id="user and active, with a context between"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(
    context: Any, current_user: Any, active: TenantContext | None
) -> None:
    with pytest.raises(TenantConflictError, match=r"open tenant_scope\(...\) for it") as caught:
        resolve(context, current_user, active)

    assert isinstance(caught.value.first, TenantContext)
    assert isinstance(caught.value.second, TenantContext)
    assert caught.value.first != caught.value.second


def test_a_conflict_names_both_sources_and_both_tenants() -> None:
    with pytest.raises(TenantConflictError) as caught:
        resolve(None, user("globex", "gus"), ACME)

    assert "current_user= names organization globex (user gus)" in str(caught.value)
    assert "the active tenant is organization acme (user alice)" in str(caught.value)


@pytest.mark.parametrize("context", ["acme", user(), {"organization_id": "acme"}])
def test_context_takes_a_tenant_context_and_nothing_else(context: Any) -> None:
    with pytest.raises(InvalidTenantError, match="context= takes a TenantContext"):
        resolve_tenant(context=context)


def test_a_tenant_can_be_taken_apart_and_written_as_json() -> None:
    tenant = TenantContext("acme", "alice", extra={"plan": "pro"})

    assert json.loads(json.dumps(dataclasses.asdict(tenant))) == {
        "organization_id": "acme",
        "user_id": "alice",
        "project_id": None,
        "extra": {"plan": "pro"},
    }


def test_one_scope_can_be_open_in_several_threads_at_once() -> None:
    scope = tenant_scope(TenantContext("acme"))
    inside = threading.Barrier(2, timeout=10)

    def work() -> list[TenantContext | None]:
        with scope:
            inside.wait()
            within = current_tenant()
        return [within, current_tenant()]

    with ThreadPoolExecutor(2) as threads:
        results = [future.result(timeout=10) for future in [threads.submit(work) for _ in range(2)]]

    assert results == [[TenantContext("acme"), None]] * 2


# --- scopes that are closed out of order -----------------------------------------------------------------------


def rows(tenant: TenantContext) -> Iterator[int]:
    """A generator that keeps a scope open while it is suspended."""
    with tenant_scope(tenant):
        yield 1


def suspended(tenant: TenantContext) -> Iterator[int]:
    generator = rows(tenant)
    next(generator)
    return generator


def close(generator: Any) -> None:
    generator.close()


def test_a_scope_in_a_generator_that_is_closed_late_changes_nobody_elses_tenant() -> None:
    def work() -> None:
        generator = suspended(GLOBEX)
        with tenant_scope(ACME):
            close(generator)
            assert current_tenant() == ACME
        assert current_tenant() is None, "and not what was active inside of the generator"

    Context().run(work)


def test_scopes_may_be_closed_in_any_order() -> None:
    def work() -> None:
        generators = [suspended(TenantContext(str(number))) for number in range(4)]
        for number in (1, 0, 3):
            close(generators[number])
        assert current_tenant() == TenantContext("2")
        close(generators[2])
        assert current_tenant() is None

    Context().run(work)


def test_a_generator_that_is_closed_in_another_thread_or_context_changes_nothing_there() -> None:
    def close_inside() -> TenantContext | None:
        with tenant_scope(ACME):
            close(generator)
            return current_tenant()

    generator = Context().run(suspended, GLOBEX)
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(close_inside).result(10) == ACME
        assert executor.submit(current_tenant).result(10) is None


def test_a_scope_of_a_task_that_has_ended_is_none_of_the_next() -> None:
    def work() -> None:
        first = Activation(ACME, {})
        generator = suspended(GLOBEX)
        first.undo()
        second = Activation(TenantContext("initech"), {})
        with tenant_scope(TenantContext("third")):
            close(generator)
            assert current_tenant() == TenantContext("third")
        assert current_tenant() == TenantContext("initech")
        second.undo()
        assert current_tenant() is None

    Context().run(work)
