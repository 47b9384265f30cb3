"""``examples/async_batch`` as its command runs it: killed in the middle, stopped early, undisturbed, broken off."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import psutil
import pytest

from rhesis_tasks.processes import Child, child, python, wait_until
from rhesis_tasks.retry import GiveUp, RetryLater

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMAND = python("-m", "async_batch.run")
PROMPTS = 60
FAILURES = {"acme": 5, "globex": 2}
"""How many of them the provider never answers, by its default seed."""
TIMEOUT = 100
NOW, FUTURE = "Wed, 01 May 2024 12:00:00 GMT", "Wed, 01 May 2024 12:00:30 GMT"


def scratch(folder: Path) -> dict[str, str]:
    """An environment in which temporary files go to a folder."""
    for each in (folder, *folder.parents[:3]):
        each.chmod(0o755)  # the embedded server runs as another user when the tests run as root
    environment = {"TMPDIR": str(folder), "COLUMNS": "80", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # What the shell happens to have set is not for the example.
    return environment | {"DATABASE_URL": "postgresql://127.0.0.1:1/none", "BROKER_URL": "amqp://127.0.0.1:1"}


def nothing_is_left(folder: Path) -> None:
    """No process whose temporary files go there, and no such file."""

    def ours() -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR", "").startswith(str(folder)):
                    yield process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    wait_until("all processes of the example to be gone", lambda: not list(ours()), 10)
    assert list(folder.rglob("*")) == []


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Child, Path]]]:
    """The command in each of its ways, all at once, since most of the time they wait."""
    with ExitStack() as stack:
        commands = {}
        for way in ("kill", "abort", "nothing"):
            folder = tmp_path_factory.mktemp(way)
            command = [*COMMAND, f"--{way}", "--prompts", str(PROMPTS)]
            running = stack.enter_context(child(f"--{way}", command, env=scratch(folder), cwd=EXAMPLES))
            commands[way] = running, folder
        yield commands


def output_of(started: dict[str, tuple[Child, Path]], way: str) -> str:
    """What a command has said, once it has ended well."""
    running, folder = started[way]
    try:
        code = running.process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{running.name} did not end within {TIMEOUT} seconds:\n{running.output}")
    output = running.finished_output()
    assert code == 0, output
    nothing_is_left(folder)
    return output


def table(output: str) -> dict[str, list[int]]:
    """By tenant: prompts, evaluated, failed."""
    rows = re.findall(r"^│ (\w+) +│ (\d+) +│ (\d+) +│ (\d+) +│", output, re.MULTILINE)
    return {tenant: [int(number) for number in numbers] for tenant, *numbers in rows}


def claims(output: str) -> list[str]:
    """What turned out to be true, if nothing turned out to be false."""
    assert not re.search(r"^NO ", output, re.MULTILINE), output
    return re.findall(r"^yes  (.*)$", output, re.MULTILINE)


COMPLETE = {tenant: [PROMPTS, PROMPTS - failed, failed] for tenant, failed in FAILURES.items()}
ALWAYS = [
    "each prompt of each tenant has a result, stored once",
    "each result is the provider's answer to this tenant, or why there was none",
    "no tenant sees a result or a task of another",
]


def test_undisturbed_it_evaluates_every_prompt_of_both_tenants(started: dict[str, tuple[Child, Path]]) -> None:
    output = output_of(started, "nothing")

    assert table(output) == COMPLETE
    assert claims(output) == [*ALWAYS, "no prompt was answered twice"]
    assert max(map(len, output.splitlines())) <= 80


def test_killed_in_the_middle_it_goes_on_with_what_has_no_result(started: dict[str, tuple[Child, Path]]) -> None:
    output = output_of(started, "kill")

    killed = re.search(r"kill -9 of the worker, with (\d+) results of acme and (\d+) results of globex", output)
    assert killed, output
    acme, globex = map(int, killed.groups())
    assert min(acme, globex) >= PROMPTS / 3
    assert max(acme, globex) < PROMPTS, "the worker was killed too late to show anything"
    assert table(output) == COMPLETE
    *always, again, twice = claims(output)
    assert always == ALWAYS
    assert again == f"the {acme + globex} prompts that had a result in the middle were not asked again"
    assert re.fullmatch(r"the \d+ prompts answered twice had no result when the worker was killed", twice)


def test_asked_to_stop_early_and_launched_again_it_goes_on_with_what_has_no_result(
    started: dict[str, tuple[Child, Path]],
) -> None:
    output = output_of(started, "abort")

    stopped = re.search(r"the task of acme ended with (\d+)\s+results", output)
    assert stopped, output
    assert PROMPTS / 3 <= int(stopped[1]) < PROMPTS
    assert table(output) == COMPLETE
    *always, said_so, again, once = claims(output)
    assert always == ALWAYS
    assert said_so == "the task that was asked to stop early did so, and said so"
    assert re.fullmatch(r"the \d+ prompts that had a result in the middle were not asked again", again)
    assert once == "no prompt was answered twice"


def test_broken_off_it_stops_everything(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    with child("the example", [*COMMAND, "--prompts", "500"], env=scratch(folder), cwd=EXAMPLES) as running:
        running.wait_for("Launching", TIMEOUT)
        time.sleep(1)  # the tasks are under way, or nearly so

        def ended() -> bool:
            running.process.send_signal(signal.SIGINT)  # as an impatient user does
            return not running.running

        wait_until("the example to end", ended, 30, interval=0.1)

        assert running.process.wait() == 130
        assert "Everything that was started is stopped." in running.finished_output()
        assert "Traceback" not in running.output
        nothing_is_left(folder)


def test_a_useless_number_of_prompts_is_refused() -> None:
    done = subprocess.run(
        [*COMMAND, "--prompts", "0"],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )

    assert done.returncode == 2
    assert "--prompts" in done.stderr
    assert "Creating" not in done.stdout


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"Retry-After": "7"}, RetryLater(7.05)),
        (503, {"Retry-After": FUTURE, "Date": NOW}, RetryLater(30.05)),
        (500, {}, RetryLater(0.05)),
        (401, {"Retry-After": "7"}, GiveUp("when() says no to HTTPStatusError")),
    ],
)
def test_a_prompt_is_asked_again_when_the_provider_wants_it(
    monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str], expected: RetryLater | GiveUp
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    client = importlib.import_module("async_batch.client")
    answer = httpx2.Response(status, headers=headers, request=httpx2.Request("POST", "http://provider/evaluate"))

    with pytest.raises(client.FAILURES) as failed:
        answer.raise_for_status()

    assert client.PATIENT.decide(failed.value, retries=0, rng=lambda: 0.5) == expected
