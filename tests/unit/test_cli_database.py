"""What commands say of a database that does not answer."""

from __future__ import annotations

import socket

import pytest

from rhesis_tasks.cli.database import engine
from rhesis_tasks.errors import DatabaseUnavailableError
from rhesis_tasks.postgres import engines


def test_a_server_that_accepts_and_says_nothing_keeps_no_command_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CONNECT_TIMEOUT", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me:secret@127.0.0.1:{silent.getsockname()[1]}/shop"

        with pytest.raises(DatabaseUnavailableError, match=r"cannot connect to .*timeout"), engine(url) as database:
            database.connect()
