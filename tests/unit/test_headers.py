"""The codec of the one header: what goes in comes out, and garbage is refused in one way only."""

from __future__ import annotations

import copy
import json
import pickle
from contextvars import Context, ContextVar
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhesis_tasks import TenantContext, register_context_var, tenant_scope
from rhesis_tasks.errors import HeaderError, InvalidTenantError, TenantConflictError
from rhesis_tasks.headers import HEADER, MAX_BYTES, Envelope, capture, decode, encode, find
from rhesis_tasks.propagation import with_context

ACME = TenantContext("acme", "alice")

ids = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
ints = st.integers(-(2**63), 2**63 - 1)
names = st.text(min_size=1, max_size=10)
tenants = st.builds(
    TenantContext,
    st.one_of(ids, st.uuids(), ints),
    st.one_of(st.none(), ids, st.uuids(), ints),
    st.one_of(st.none(), ids),
    st.dictionaries(names, st.one_of(st.text(max_size=20), st.booleans(), ints), max_size=5),
)
variables = st.dictionaries(names, st.one_of(st.none(), st.text(max_size=20), st.booleans(), ints), max_size=5)

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=10,
)
header_like = st.fixed_dictionaries(
    {},
    optional={
        "v": st.one_of(st.just(1), json_values),
        "organization_id": st.one_of(ids, json_values),
        "user_id": st.one_of(ids, json_values),
        "project_id": st.one_of(ids, json_values),
        "extra": st.one_of(st.dictionaries(names, ids), json_values),
        "vars": st.one_of(st.dictionaries(names, ids), json_values),
    },
)


# --- there and back --------------------------------------------------------------------------------------------


@given(st.one_of(st.none(), tenants), variables)
def test_what_is_encoded_survives_json_and_is_decoded_again(
    tenant: TenantContext | None, variables: dict[str, Any]
) -> None:
    envelope = Envelope(tenant, variables)

    assert decode(json.loads(json.dumps(encode(envelope), allow_nan=False))) == envelope


def test_the_header_is_namespaced_versioned_and_leaves_out_what_is_not_known() -> None:
    assert HEADER == "rhesis_tasks"
    assert encode(Envelope()) == {"v": 1}
    assert encode(Envelope(ACME)) == {"v": 1, "organization_id": "acme", "user_id": "alice"}
    assert encode(Envelope(TenantContext("acme", None, "p", {"plan": "pro"}), {"locale": None})) == {
        "v": 1,
        "organization_id": "acme",
        "project_id": "p",
        "extra": {"plan": "pro"},
        "vars": {"locale": None},
    }


def test_an_envelope_is_empty_without_tenant_and_variables() -> None:
    assert not Envelope()
    assert Envelope(ACME)
    assert Envelope(None, {"locale": None})


def test_the_running_context_is_captured() -> None:
    locale: ContextVar[str] = ContextVar("locale")
    register_context_var(locale)

    def body() -> Envelope:
        locale.set("de")
        with tenant_scope(ACME):
            return capture()

    assert Context().run(body) == Envelope(ACME, {"locale": "de"})


def test_a_tenant_given_to_capture_replaces_the_active_one() -> None:
    other = TenantContext("globex")

    with tenant_scope(ACME):
        assert capture(other).tenant is other


# --- what may not travel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63)])
def test_the_largest_ints_that_amqp_carries_may_travel(value: int) -> None:
    envelope = Envelope(TenantContext("acme", extra={"n": value}), {"n": value})

    assert decode(encode(envelope)) == envelope


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("part", ["extra", "vars"])
def test_an_int_beyond_64_bits_is_refused(value: int, part: str) -> None:
    envelope = (
        Envelope(TenantContext("acme", extra={"big": value})) if part == "extra" else Envelope(ACME, {"big": value})
    )

    with pytest.raises(InvalidTenantError, match="'big' is beyond 64 bits; send it as a str") as caught:
        encode(envelope)

    assert (caught.value.field, caught.value.value) == ("big", value)


@pytest.mark.parametrize(
    "envelope",
    [
        pytest.param(Envelope(ACME, {"text": "x" * MAX_BYTES}), id="variables"),
        pytest.param(Envelope(None, {"text": "x" * MAX_BYTES}), id="variables without a tenant"),
        pytest.param(Envelope(TenantContext("acme", extra={"text": "x" * MAX_BYTES})), id="extra"),
        pytest.param(Envelope(ACME, {"text": "é" * (MAX_BYTES // 4)}), id="bytes, not characters, are counted"),
        pytest.param(Envelope(TenantContext("😀" * 255, "😀" * 255, "😀" * 255)), id="ids"),
    ],
)
def test_a_context_larger_than_the_limit_is_refused_with_the_remedy(envelope: Envelope) -> None:
    with pytest.raises(InvalidTenantError, match=rf"at most {MAX_BYTES} are allowed\.  Send a key"):
        encode(envelope)


def test_a_context_of_exactly_the_limit_may_travel() -> None:
    rest = len(json.dumps(encode(Envelope(ACME, {"text": ""}))))

    header = encode(Envelope(ACME, {"text": "x" * (MAX_BYTES - rest)}))

    assert len(json.dumps(header)) == MAX_BYTES
    with pytest.raises(InvalidTenantError):
        encode(Envelope(ACME, {"text": "x" * (MAX_BYTES - rest + 1)}))


# --- garbage ---------------------------------------------------------------------------------------------------


@given(st.one_of(json_values, header_like))
def test_garbage_is_refused_with_a_header_error_and_nothing_else(value: Any) -> None:
    try:
        envelope = decode(value)
    except HeaderError as error:
        assert error.header is value  # noqa: PT017 - either outcome is right
    else:
        assert isinstance(envelope, Envelope)


@pytest.mark.parametrize("value", [None, "acme", 7, ["acme"], b"{}", True])
def test_a_header_that_is_no_mapping_is_refused(value: Any) -> None:
    with pytest.raises(HeaderError, match=f"the context header is a {type(value).__name__}, not a mapping"):
        decode(value)


@pytest.mark.parametrize("version", [None, 0, -1, True, "1", 1.0, [1]])
def test_a_header_without_a_usable_version_is_refused(version: Any) -> None:
    with pytest.raises(HeaderError, match="no usable version"):
        decode({"v": version, "organization_id": "acme"})
    with pytest.raises(HeaderError, match="no usable version"):
        decode({"organization_id": "acme"})


def test_a_newer_version_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        HeaderError, match=r"version 2, this worker understands up to 1\.  Upgrade rhesis-tasks on the workers"
    ):
        decode({"v": 2, "organization_id": "acme"})


@pytest.mark.parametrize("field", ["user_id", "project_id"])
def test_a_user_or_project_without_an_organization_is_refused(field: str) -> None:
    with pytest.raises(HeaderError, match="without an organization"):
        decode({"v": 1, field: "alice"})


@pytest.mark.parametrize(
    "part",
    [
        {"organization_id": ""},
        {"organization_id": 1.5},
        {"organization_id": True},
        {"organization_id": ["acme"]},
        {"organization_id": 10**5000},
        {"organization_id": "\ud800"},
        {"user_id": " "},
        {"user_id": {}},
        {"project_id": "a\0b"},
        {"extra": ["plan"]},
        {"extra": {"plan": None}},
        {"vars": None},
        {"vars": ["locale"]},
        {"vars": {"locale": 1.5}},
        {"vars": {"locale": {}}},
        {"vars": {1: "de"}},
    ],
)
def test_one_bad_value_spoils_the_whole_header(part: dict[str, Any]) -> None:
    header = {"v": 1, "organization_id": "acme", **part}

    with pytest.raises(HeaderError) as caught:
        decode(header)

    assert caught.value.header is header


def test_an_error_about_a_header_is_stored_without_the_header() -> None:
    with pytest.raises(HeaderError) as caught:
        decode({"v": 0, "organization_id": object()})

    stored = pickle.loads(pickle.dumps(caught.value))  # noqa: S301

    assert str(stored) == str(caught.value)
    assert stored.header is None


# --- inside a message ------------------------------------------------------------------------------------------


def test_the_header_is_found_among_others() -> None:
    header = {"v": 1, "organization_id": "acme"}

    assert find({"id": 7, "x": 1, HEADER: header}) is header


@pytest.mark.parametrize("headers", [None, {}, {"x": 1}, {HEADER: None}, {"user_id": "alice"}])
def test_a_message_without_a_tenant_has_no_header(headers: Any) -> None:
    assert find(headers) is None


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({"organization_id": "acme"}, TenantContext("acme")),
        ({"organization_id": "acme", "user_id": "alice"}, ACME),
        ({"organization_id": 7, "user_id": 8, "project_id": 9}, TenantContext(7, 8)),
        ({"organization_id": "acme", "user_id": None}, TenantContext("acme")),
    ],
)
def test_flat_headers_of_applications_count_as_a_header(headers: dict[str, Any], tenant: TenantContext) -> None:
    assert decode(find(headers)) == Envelope(tenant)


def test_flat_headers_beside_ours_say_the_same_or_are_a_conflict() -> None:
    ours = {HEADER: encode(Envelope(ACME))}

    assert decode(find({"organization_id": "acme", "user_id": "alice", **ours})).tenant == ACME
    with pytest.raises(TenantConflictError, match=r"the context header names .*acme.* flat headers is .*globex"):
        find({"organization_id": "globex", "user_id": "gus", **ours})


# --- dicts of callers ------------------------------------------------------------------------------------------


def test_a_callers_headers_are_copied_not_changed() -> None:
    headers = {"x": 1}

    for tenant in (ACME, TenantContext("globex")):
        carried = with_context(headers, Envelope(tenant))
        assert carried == {"x": 1, HEADER: encode(Envelope(tenant))}

    assert headers == {"x": 1}


def test_the_header_shares_nothing_with_the_envelope_it_was_made_from() -> None:
    envelope = Envelope(TenantContext("acme", extra={"plan": "pro"}), {"locale": "de"})

    header = encode(envelope)
    header["extra"]["plan"] = header["vars"]["locale"] = "changed"

    assert envelope == Envelope(TenantContext("acme", extra={"plan": "pro"}), {"locale": "de"})


def test_an_envelope_shares_nothing_with_the_header_it_was_read_from() -> None:
    header = {"v": 1, "organization_id": "acme", "extra": {"plan": "pro"}, "vars": {"locale": "de"}}
    before = copy.deepcopy(header)

    envelope = decode(header)
    assert header == before
    header["extra"]["plan"] = header["vars"]["locale"] = "changed"  # type: ignore[index]

    assert envelope == Envelope(TenantContext("acme", extra={"plan": "pro"}), {"locale": "de"})
