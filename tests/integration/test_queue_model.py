"""The queue beside a model of it: publishers, consumers that die, and acknowledgements that come too late.

``RHESIS_TASKS_TEST_EXAMPLES`` says how many stories are told; each has thirty steps.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.processes import wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

EXAMPLES = int(os.environ.get("RHESIS_TASKS_TEST_EXAMPLES", "15"))
STEPS = 30

QUEUES = ("red", "green", "blue", "passing")  # the last one is transient
ROUTES = {"warm": ["red"], "cold": ["blue", "green"], "any": ["blue", "passing", "red"]}  # of the direct exchange
LONG = 3600.0  # seconds: longer than any story


@dataclasses.dataclass(slots=True)
class Message:
    """A message that was published and is not done."""

    number: int
    """Its place among all that were published."""
    queue: str
    priority: int
    body: bytes
    id: int | None = None  # known once it was claimed
    deliveries: int = 0
    token: int | None = None
    holder: int | None = None

    @property
    def is_waiting(self) -> bool:
        return self.token is None

    @property
    def is_suspect(self) -> bool:
        return self.deliveries >= 2

    def wait_again(self, *, uncounted: bool) -> None:
        self.token = self.holder = None
        self.deliveries -= uncounted

    @property
    def row(self) -> tuple[object, ...]:
        table = "transient_message" if self.queue == "passing" else "message"
        return table, self.queue, self.priority, self.body, self.deliveries, self.token, self.holder


@dataclasses.dataclass(slots=True)
class Participant:
    """A consumer: its number, and the connection that holds its lock while it lives."""

    number: int
    lock: MessageQueue | None = None


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[TenantDatabase]:
    with new_tenant_database(postgres_url) as database:
        yield database


def connected(url: str) -> MessageQueue:
    return MessageQueue(Connection(database_url(url), name="test"), "rhesis_tasks")


some = st.lists(st.integers(0, 15), min_size=1, max_size=6)
someone = st.integers(0, 2)
queues = st.permutations(QUEUES)


class Story(RuleBasedStateMachine):
    """What happens to the queue, and what the model says should be true then."""

    database: ClassVar[TenantDatabase]
    queue: ClassVar[MessageQueue]
    owner: ClassVar[MessageQueue]

    def __init__(self) -> None:
        super().__init__()
        self.owner.connection.query(
            "TRUNCATE rhesis_tasks.message, rhesis_tasks.transient_message, rhesis_tasks.dead_letter, "
            "rhesis_tasks.consumer, rhesis_tasks.subscription, rhesis_tasks.waiter, rhesis_tasks.queue, "
            "rhesis_tasks.binding"
        )
        for name in QUEUES:
            self.queue.declare_queue(name, durable=name != "passing")
        self.queue.declare_exchange("weather", "direct", True, False)
        for key, bound in ROUTES.items():
            for name in bound:
                self.queue.bind(name, "weather", key)
        self.messages: list[Message] = []
        self.published = 0
        self.dead: list[bytes] = []  # what was given up
        self.claims: list[tuple[int, int]] = []  # all that were ever made, with their tokens
        self.consumers = [Participant(self.queue.new_consumer()) for _ in range(3)]
        self.known: set[int] = set()  # the consumers that the server knows of
        self.attached: set[int] = set()  # those of them that it knows for another reason than what they hold

    def teardown(self) -> None:
        for consumer in self.consumers:
            if consumer.lock is not None:
                consumer.lock.connection.close()

    # --- what the model says ---------------------------------------------------------------------------------

    def chosen(self, picks: Sequence[int]) -> list[tuple[int, int]]:
        """Some of the claims that were ever made, most of them of the last ones."""
        return list(dict.fromkeys(self.claims[-1 - pick % len(self.claims)] for pick in picks)) if self.claims else []

    def held(self, claim: tuple[int, int]) -> Message | None:
        return next((each for each in self.messages if (each.id, each.token) == claim), None)

    def done(self, acks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Let go of what is acknowledged; returns the acknowledgements that come too late."""
        late = []
        for claim in acks:
            message = self.held(claim)
            if message is None:
                late.append(claim)
            else:
                self.messages.remove(message)
        return late

    def next_in(self, names: Sequence[str], slots: int) -> list[Message]:
        """What is delivered next: queue by queue, urgent before old."""
        found: list[Message] = []
        for name in names:
            waiting = [each for each in self.messages if each.queue == name and each.is_waiting and not each.is_suspect]
            found += sorted(waiting, key=lambda each: (-each.priority, each.number))[: max(0, slots - len(found))]
        return found

    def suspects(self, name: str) -> list[Message]:
        """What was delivered twice in vain, the worst first."""
        waiting = [each for each in self.messages if each.queue == name and each.is_waiting and each.is_suspect]
        return sorted(waiting, key=lambda each: (-each.deliveries, -each.priority, each.number))

    def release_held(self, number: int, *, uncounted: bool, kept: Sequence[int] = ()) -> int:
        """Release what a consumer holds, but for the claims with the tokens in ``kept``."""
        held = [each for each in self.messages if each.holder == number and each.token not in kept]
        for message in held:
            message.wait_again(uncounted=uncounted)
        return len(held)

    @property
    def living(self) -> set[int]:
        return {each.number for each in self.consumers if each.lock is not None}

    # --- what happens ----------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(QUEUES), priority=st.integers(0, 9))
    def publish_to_a_queue(self, name: str, priority: int) -> None:
        assert self.publish("", name, [name], priority) == 1

    @rule(key=st.sampled_from([*ROUTES, "nowhere"]), priority=st.sampled_from([0, 5]))
    def publish_to_an_exchange(self, key: str, priority: int) -> None:
        bound = ROUTES.get(key, [])

        assert self.publish("weather", key, bound, priority) == len(bound)

    def publish(self, exchange: str, key: str, bound: Sequence[str], priority: int) -> int | None:
        self.published += 1
        body = b"%d" % self.published
        self.messages += [Message(self.published, name, priority, body) for name in bound]
        return self.queue.publish(exchange, key, "{}", body, priority=priority)

    @rule(who=someone, names=queues, slots=st.integers(1, 6))
    def claim(self, who: int, names: Sequence[str], slots: int) -> None:
        self.claim_and_more(who, names, slots)

    @rule(
        who=someone,
        names=queues,
        slots=st.integers(0, 6),
        take_slots=st.integers(0, 2),
        acks=some,
        has_none=st.booleans(),
    )
    def claim_and_more(
        self,
        who: int,
        names: Sequence[str],
        slots: int,
        take_slots: int = 0,
        acks: Sequence[int] = (),
        has_none: bool = False,
    ) -> None:
        """Acknowledge, take from the first of the queues, and claim from the second and third."""
        consumer = self.consumers[who]
        takes, names = (names[:1], names[1:3]) if take_slots else ([], names)
        late = self.done(self.chosen(acks))
        taken, claimed = self.next_in(takes, take_slots), self.next_in(names, slots)
        for name in takes:
            taken += sorted(self.suspects(name)[: take_slots - len(taken)], key=lambda each: each.number)
        alone = next((found for name in names for found in self.suspects(name)[:1]), None)
        if has_none and slots and alone is not None:
            claimed = [alone]
        for message in claimed:
            message.deliveries += 1

        found, found_late = self.queue.claim(
            consumer.number,
            names,
            slots,
            take_from=takes,
            take_slots=take_slots,
            acks=self.chosen(acks),
            has_none=has_none,
        )

        assert sorted((each.id, each.token) for each in found_late) == sorted(late)
        assert [(each.queue, each.body, each.deliveries) for each in found] == [
            *((each.queue, each.body, each.deliveries + 1) for each in taken),
            *((each.queue, each.body, each.deliveries) for each in claimed),
        ]
        assert [each.token is None for each in found] == [True] * len(taken) + [False] * len(claimed)
        for message in taken:
            self.messages.remove(message)
        tokens = {token for _, token in self.claims}
        for message, each in zip(claimed, found[len(taken) :], strict=True):
            assert message.id in (None, each.id), "a message keeps its id"
            assert each.token is not None and each.token not in tokens, "no two claims have one token"
            message.id, message.token, message.holder = each.id, each.token, consumer.number
            self.claims.append((each.id, each.token))
        if claimed:
            self.known.add(consumer.number)

    @precondition(lambda self: self.claims)
    @rule(acks=some)
    def ack(self, acks: Sequence[int]) -> None:
        sent = self.chosen(acks)
        late = self.done(sent)

        assert sorted((each.id, each.token) for each in self.queue.ack(sent)) == sorted(late)

    @precondition(lambda self: self.claims)
    @rule(picks=some, uncounted=st.booleans())
    def release(self, picks: Sequence[int], uncounted: bool) -> None:
        claims = self.chosen(picks)
        released = [message for claim in claims if (message := self.held(claim)) is not None]
        for message in released:
            message.wait_again(uncounted=uncounted)

        assert self.queue.release(claims, uncounted=uncounted) == len(released)

    @precondition(lambda self: self.claims)
    @rule(who=someone, picks=some)
    def release_what_a_consumer_does_not_know_of(self, who: int, picks: Sequence[int]) -> None:
        number = self.consumers[who].number
        kept = [token for _, token in self.chosen(picks)]
        self.release_held(number, uncounted=True, kept=kept)

        assert self.queue.agree(number, kept) == {each.token for each in self.messages if each.holder == number}

    @precondition(lambda self: self.claims)
    @rule(pick=st.integers(0, 15))
    def bury(self, pick: int) -> None:
        claim = self.chosen([pick])[0]
        message = self.held(claim)
        if message is not None:
            self.messages.remove(message)
            self.dead.append(message.body)

        assert self.queue.bury(*claim, "for a test") is (message is not None)

    @rule(name=st.sampled_from(QUEUES))
    def purge(self, name: str) -> None:
        gone = [each for each in self.messages if each.queue == name and each.is_waiting]
        self.messages = [each for each in self.messages if each not in gone]

        assert self.queue.purge(name) == len(gone)

    # --- consumers come and go -------------------------------------------------------------------------------

    @rule(who=someone)
    def attach(self, who: int) -> None:
        consumer = self.consumers[who]
        consumer.lock = consumer.lock or connected(self.database.url)
        self.known.add(consumer.number)
        self.attached.add(consumer.number)

        assert consumer.lock.attach(consumer.number, f"consumer {who}", ["red"]) is True

    @precondition(lambda self: self.living)
    @rule(who=someone)
    def die(self, who: int) -> None:
        living = [each for each in self.consumers if each.lock is not None]
        consumer = living[who % len(living)]
        assert consumer.lock is not None
        consumer.lock.connection.close()
        consumer.lock = None

        wait_until("the server to notice", lambda: consumer.number not in self.locked(), timeout=10, interval=0.001)

    @rule(who=someone, at_once=st.booleans())
    def keep(self, who: int, at_once: bool) -> None:
        consumer = self.consumers[who]
        was_known = consumer.number in self.known

        kept = (consumer.lock or self.queue).tend(consumer.number, 0.0 if at_once else LONG)

        assert kept.locked == (consumer.lock is not None)
        if not was_known or consumer.number in self.attached:
            assert kept.known == was_known
        self.known |= {each.holder for each in self.messages if each.holder is not None}
        if at_once:
            for dead in self.known - self.living - {consumer.number}:
                self.release_held(dead, uncounted=False)
                self.known.discard(dead)
                self.attached.discard(dead)

    @rule(who=someone)
    def detach(self, who: int) -> None:
        number = self.consumers[who].number
        self.release_held(number, uncounted=True)
        self.known.discard(number)
        self.attached.discard(number)

        self.queue.detach(number)

    # --- what is true all the time ---------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_and_nothing_is_there_twice(self) -> None:
        rows = self.owner.connection.query(
            "SELECT CASE tableoid WHEN 'rhesis_tasks.message'::regclass THEN 'message' ELSE 'transient_message' END, "
            "queue, priority, body, deliveries, claim_token, holder "
            "FROM rhesis_tasks.message"
        )
        assert sorted(rows, key=repr) == sorted((each.row for each in self.messages), key=repr)
        dead = self.owner.connection.query("SELECT body FROM rhesis_tasks.dead_letter")
        assert sorted(body for (body,) in dead) == sorted(self.dead)

    @invariant()
    def sizes_count_what_waits(self) -> None:
        waiting = {name: sum(each.queue == name and each.is_waiting for each in self.messages) for name in QUEUES}
        assert {name: self.queue.size(name) for name in QUEUES} == waiting

    @invariant()
    def the_living_hold_their_locks_and_the_known_are_in_the_table(self) -> None:
        assert self.locked() == self.living
        assert {id for (id,) in self.owner.connection.query("SELECT id FROM rhesis_tasks.consumer")} == self.known

    def locked(self) -> set[int]:
        rows = self.owner.connection.query(
            "SELECT objid::integer FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND classid::integer = rhesis_tasks.lock_class() AND database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return {number for (number,) in rows}


@pytest.mark.timeout(400)  # a story that fails is made short, for up to five minutes
def test_the_queue_does_what_its_model_does(database: TenantDatabase) -> None:
    class This(Story):
        pass

    This.database, This.queue, This.owner = database, connected(database.url), connected(database.owner_url)
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            This,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
            ),
        )
    finally:
        This.queue.connection.close()
        This.owner.connection.close()
