"""Layer: who does the tasks, and what a user is told when it cannot: a cluster that is silent, full or missing."""

import importlib.machinery
import socket
import sys
import types
from types import SimpleNamespace

import pytest

from llamita.data import engine
from llamita.data.build import Workers, build
from llamita.data.engine import OnRay, Stage, Stopped, executor, one
from tests.fakes import byte_tokenizer
from tests.test_build import NEAR, some_text


class RayError(Exception): ...


class OutOfMemoryError(RayError): ...


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(f"ray::perform()\n  File ...\n{cause!r}")
        self.cause = cause


@pytest.fixture
def ray(monkeypatch):
    """A module that does what Ray's does, in this process; `fails` is raised by the cluster, `dead` when it starts."""
    fake = types.ModuleType("ray")
    fake.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    fake.fails = fake.dead = None

    def init(**_):
        if fake.dead:
            raise fake.dead

    def get(calls):
        for function, arguments in calls:
            if fake.fails:
                raise fake.fails
            try:
                function(*arguments)
            except Exception as error:
                raise RayTaskError(error) from error

    fake.init, fake.get, fake.shutdown = init, get, lambda: None
    fake.remote = lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))
    errors = types.ModuleType("ray.exceptions")
    errors.RayError, errors.RayTaskError = RayError, RayTaskError
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    return fake


def silent_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_does_not_answer_is_told_at_once_and_nothing_is_written(tmp_path, ray, scheme):
    ray.dead = AssertionError("Ray would wait here for minutes")
    address, text = f"{scheme}127.0.0.1:{silent_port()}", some_text(tmp_path / "text")
    with pytest.raises(ValueError, match=f"^no Ray cluster answers at {address}: [^\n]*refused[^\n]*$"):
        build(NEAR, [text], byte_tokenizer(), tmp_path / "c", workers=Workers(ray=address))
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_how_long_an_answer_is_waited_for_is_bounded(monkeypatch, ray):
    asked = []

    def connect(place, seconds):
        asked.append((place, seconds))
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError, match="timed out"):
        engine.check_ray("ray://[::1]:6379")
    assert asked == [(("::1", 6379), engine.ANSWER_SECONDS)] and engine.ANSWER_SECONDS <= 30
    for name in ("", "auto", "local"):
        engine.check_ray(name)
    assert len(asked) == 1


def test_ray_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'llamita\[ray\]'"):
        engine.check_ray("")


def bad_input(job, number, tick):
    raise ValueError("the input is bad")


def test_what_goes_wrong_on_a_cluster_is_one_line(tmp_path, ray):
    job = SimpleNamespace(folder=tmp_path)
    with executor(1, "") as on:
        assert isinstance(on, OnRay)
        with pytest.raises(ValueError, match=r"^the input is bad$") as caught:
            on.run(Stage("read", one, bad_input), job, [0])
        assert not isinstance(caught.value, Stopped)
        ray.fails = OutOfMemoryError("\nTask was killed due to the node running low on memory.\nMemory on the node ...")
        told = (
            r"^Ray lost a worker in stage 'read' \(OutOfMemoryError: Task was killed [^\n]*memory\.\); the same [^\n]*$"
        )
        with pytest.raises(Stopped, match=told):
            on.run(Stage("read", one, bad_input), job, [0])
    ray.dead = ConnectionError("Could not find any running Ray instance.\nPlease specify")
    with pytest.raises(Stopped, match=r"^Ray does not start at this machine: Could not find any running Ray[^\n]*$"):
        OnRay()


@pytest.mark.parametrize("number", [0, -3])
def test_workers_are_at_least_one(number):
    with pytest.raises(ValueError, match=f"at least 1 worker, not {number}"):
        Workers(number)
