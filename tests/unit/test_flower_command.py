"""The command that runs Flower: where it may listen, and what is not on its command line."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
from click.testing import CliRunner

from rhesis_tasks import flower
from rhesis_tasks.cli import commands
from rhesis_tasks.errors import ConfigurationError, MissingExtraError
from rhesis_tasks.flower import flower_command

pytest.importorskip("flower")

PASSWORD = "op:pa:ss word"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FLOWER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DATABASE_URL", "postgresql://shop:the-database-password@db/shop")


def test_flower_listens_on_the_loopback_address_unless_it_is_told_otherwise() -> None:
    command, environ = flower_command("shop:app")

    assert " ".join(command[1:]) == "-m rhesis_tasks.flower -A shop:app flower --address=127.0.0.1 --port=5555"
    assert (environ["FLOWER_ADDRESS"], environ["FLOWER_PORT"]) == ("127.0.0.1", "5555")
    assert "FLOWER_BASIC_AUTH" not in environ


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_no_password(address: str) -> None:
    assert f"--address={address}" in flower_command("shop", address=address)[0]


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "10.1.2.3", "flower.example.com"])  # noqa: S104
def test_another_address_is_refused_without_a_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"Set FLOWER_BASIC_AUTH=user:password"):
        flower_command("shop", address=address)

    assert flower_command("shop", address=address, basic_auth=PASSWORD)[1]["FLOWER_BASIC_AUTH"] == PASSWORD
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "ann:secret,bob:secret")
    assert flower_command("shop", address=address)[1]["FLOWER_BASIC_AUTH"] == "ann:secret,bob:secret"


@pytest.mark.parametrize("value", ["hunter2", ":hunter2", "op:", "op:a,hunter2", "op:hünter2", ","])
def test_what_is_no_user_and_password_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(ConfigurationError, match="FLOWER_BASIC_AUTH is user:password") as refused:
        flower_command("shop", basic_auth=value)

    assert "nter2" not in str(refused.value)


def test_no_password_and_no_url_is_on_the_command_line() -> None:
    command, environ = flower_command("shop", basic_auth=PASSWORD)

    assert "password" not in " ".join(command)
    assert "pa:ss" not in " ".join(command)
    assert environ["DATABASE_URL"] == os.environ["DATABASE_URL"]


def test_an_empty_password_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "")

    assert "FLOWER_BASIC_AUTH" not in flower_command("shop")[1]


def test_flowers_own_settings_are_passed_on_and_a_services_port_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWER_URL_PREFIX", "flower")
    monkeypatch.setenv("FLOWER_PORT", "tcp://10.0.0.7:5555")

    environ = flower_command("shop", port=5556)[1]

    assert environ["FLOWER_URL_PREFIX"] == "flower"
    assert environ["FLOWER_PORT"] == "5556"


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_there_is_not_is_refused(port: int) -> None:
    with pytest.raises(ConfigurationError, match="from 1 to 65535"):
        flower_command("shop", port=port)


def test_without_flower_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        return None if name == "flower" else real(name, *more)

    monkeypatch.setattr(flower.importlib.util, "find_spec", find_spec)  # type: ignore[attr-defined]

    with pytest.raises(MissingExtraError, match=r"rhesis-tasks\[flower\]"):
        flower_command("shop")


def test_the_command_refuses_an_open_address() -> None:
    result = CliRunner().invoke(commands, ["flower", "-A", "shop", "--address", "0.0.0.0"])  # noqa: S104

    assert isinstance(result.exception, ConfigurationError)
