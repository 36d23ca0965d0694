"""Shared fixtures. The network stays off: nothing here may fetch."""

import os
import socket
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption("--at-least", type=int, default=0, help="fail when fewer tests than this have passed")


def pytest_sessionfinish(session):
    """A suite that ran next to nothing must not look green."""
    passed = len(session.config.pluginmanager.get_plugin("terminalreporter").stats.get("passed", []))
    if passed < session.config.getoption("--at-least"):
        print(f"\nonly {passed} tests passed, {session.config.getoption('--at-least')} are wanted")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text, tokenizers and weights that lies beside a checkout, if it does."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder does not lie beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def network_off(monkeypatch):
    """Any connection but to this machine's own processes fails the test that asks for it."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "localhost",
            "::1",
        ):
            raise AssertionError(f"a test asked for the network: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
