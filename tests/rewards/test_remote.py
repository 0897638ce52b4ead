"""Rewards over HTTP: same numbers, bounded bodies, clear refusals, and a server that goes away and comes back."""

import http.client
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.rewards.remote import Client, Server, is_here, packed, remote, unpacked
from limbeck.core.run.errors import BadInput, LimbeckError

X = torch.arange(6.0).view(3, 2)
COND: Condition = {"prompt": ["a", "bb", "ccc"], "label": torch.tensor([1, 2, 3])}


def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
    if cond["prompt"][0] == "fail":
        raise ValueError("this prompt fails")
    return x.sum(1) + torch.tensor([len(p) + n for p, n in zip(cond["prompt"], cond["label"], strict=True)])


def started(port: int = 0, **more: int) -> Server:
    server = Server(Reward(score, "sums", "pixels"), port=port, **more)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture
def server() -> Iterator[Server]:
    made = started()
    yield made
    made.shutdown()
    made.server_close()


def test_the_numbers_are_those_of_the_reward_itself(server: Server) -> None:
    far, near = remote(server.address), Reward(score, "sums", "pixels")
    assert torch.equal(far(X, COND), near(X, COND)) and far.space == "pixels" and far.name == "remote sums"
    assert not far.differentiable
    with pytest.raises(BadInput, match="use ddpo"):
        far.needed_differentiable("draft")


def test_a_reward_that_fails_says_so_at_once(server: Server) -> None:
    with pytest.raises(LimbeckError, match="refused: this prompt fails"):
        remote(server.address)(X, {**COND, "prompt": ["fail", "", ""]})


def test_bodies_are_bounded_and_checked() -> None:
    server = started(limit=64)
    place = urlsplit(server.address)

    def post(body: bytes, path: str = "/score") -> tuple[int, str]:
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    assert post(b"x" * 65)[0] == 413
    status, text = post(b"not a tensor")
    assert status == 400 and "no request" in text
    server.shutdown()
    server.server_close()


BARE, NO_X = save({"x": torch.ones(2)}), save({"y": torch.ones(2)}, {"cond": "{}"})


@pytest.mark.parametrize("body", [b"", b"\x00" * 64, BARE, NO_X])
def test_what_is_no_request_is_a_clear_fault(body: bytes) -> None:
    with pytest.raises(ValueError, match="body"):
        unpacked(body)


def test_rows_must_be_as_many_as_samples() -> None:
    x, cond, t = unpacked(packed(X, COND, torch.ones(3)))
    assert torch.equal(x, X) and cond == {"prompt": ["a", "bb", "ccc"], "label": [1, 2, 3]} and t is not None
    with pytest.raises(ValueError, match="lists of 3 rows"):
        unpacked(packed(X, {"prompt": ["a"]}, None))


def test_a_server_that_comes_back_is_waited_for(server: Server) -> None:
    client = Client(server.address, patience=20)
    expected = client.score(X, COND, t=None, gen=None)
    port = server.server_address[1]
    server.shutdown()
    server.server_close()
    back: list[Server] = []
    threading.Timer(0.7, lambda: back.append(started(port))).start()
    began = time.monotonic()
    assert torch.equal(client.score(X, COND, t=None, gen=None), expected)
    assert time.monotonic() - began > 0.5
    back[0].shutdown()
    back[0].server_close()


def test_a_server_that_stays_away_is_one_clear_line() -> None:
    server = started()
    server.shutdown()
    server.server_close()
    with pytest.raises(LimbeckError, match="does not answer .*limbeck reward-server"):
        Client(server.address, patience=0.2).about()


def test_a_taken_port_is_one_clear_line(server: Server) -> None:
    with pytest.raises(BadInput, match="choose another --port"):
        Server(Reward(score, "sums"), port=server.server_address[1])


def test_only_this_machine_is_here() -> None:
    assert is_here("http://127.0.0.1:80") and is_here("http://localhost:1") and is_here("http://[::1]:1")
    assert not is_here("http://127.0.0.1.example.org") and not is_here("http://10.0.0.1:80") and not is_here("x")
