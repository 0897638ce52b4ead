"""A reward in another process: a small HTTP server and its client. Tensors travel as safetensors, never as pickles.

POST /score: tensors `x` [B,*S] (and `t` [B]), metadata `cond`: a JSON object of lists, a row a sample. The answer is a
safetensors body with `reward` [B] or [B,R]. GET /about: what the reward is, as JSON. Faults are one line of text.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.errors import BadInput, LimbeckError, clean

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MEGABYTE = 2**20


def packed(x: Tensor, cond: Condition, t: Tensor | None) -> bytes:
    """A request's body."""
    tensors = {"x": x.detach().cpu().contiguous()} | ({} if t is None else {"t": t.detach().cpu().contiguous()})
    rows = {key: rows.tolist() if isinstance(rows, Tensor) else list(rows) for key, rows in cond.items()}
    return to_bytes(tensors, {"cond": json.dumps(rows)})


def unpacked(body: bytes) -> tuple[Tensor, Condition, Tensor | None]:
    """(x, cond, t) of a request's body; ValueError says what is wrong with it."""
    try:
        tensors = from_bytes(body)
        size = int.from_bytes(body[:8], "little")
        cond = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["cond"])
    except Exception as error:  # safetensors raises its own kind, json another
        raise ValueError(f"the body is no request: {clean(error, 100)}") from None
    x = tensors.get("x")
    if x is None or not x.ndim or not isinstance(cond, dict):
        raise ValueError("the body lacks x or cond")
    if any(not isinstance(rows, list) or len(rows) != len(x) for rows in cond.values()):
        raise ValueError(f"cond must hold lists of {len(x)} rows, one a sample")
    return x, cond, tensors.get("t")


class Handler(BaseHTTPRequestHandler):
    """One connection; the reward itself runs one request at a time."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte

    @property
    def owner(self) -> Server:
        """The server."""
        return cast(Server, self.server)

    def do_GET(self) -> None:
        """About the reward."""
        reward = self.owner.reward
        about = {"name": reward.name, "space": reward.space, "noise_aware": reward.noise_aware}
        self._say(200 if self.path == "/about" else 404, json.dumps(about).encode())

    def do_POST(self) -> None:
        """A batch to score."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > self.owner.limit:
            self.close_connection = True  # the body is not read
            return self._say(413, f"bodies of at most {self.owner.limit // MEGABYTE} MB are taken".encode())
        try:
            x, cond, t = unpacked(self.rfile.read(int(length)))
            with self.owner.lock, torch.no_grad():
                found = self.owner.reward(x, cond, t=t)
        except (ValueError, KeyError, LimbeckError, RuntimeError) as error:
            return self._say(400, clean(error, 300).encode())
        self._say(200, to_bytes({"reward": found.cpu().contiguous()}))

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a line a batch would hide what matters."""


class Server(ThreadingHTTPServer):
    """Serves one reward at (host, port); port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, reward: Reward, host: str = "127.0.0.1", port: int = 8765, limit: int = 256 * MEGABYTE) -> None:
        self.reward, self.limit, self.lock = reward, limit, threading.Lock()
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise BadInput(f"cannot listen on {clean(host)}:{port} ({error.strerror}); choose another --port") from None

    @property
    def address(self) -> str:
        """http://host:port."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}"


@dataclass(frozen=True)
class Client:
    """Asks a server; a server that is away is waited for, one that refuses ends the run with its own words."""

    address: str
    patience: float = 120.0  # seconds to wait for a server that is away
    timeout: float = 300.0  # seconds for one answer
    pause: Callable[[float], None] = time.sleep

    def score(self, x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        """[B] or [B,R], on x's device."""
        reward = from_bytes(self._ask("POST", "/score", packed(x, cond, t))).get("reward")
        if reward is None or len(reward) != len(x):
            raise LimbeckError(f"the reward server {self.address} answered without one reward a sample")
        return reward.to(x.device)

    def about(self) -> dict[str, Any]:
        """What the server's reward is."""
        found: dict[str, Any] = json.loads(self._ask("GET", "/about"))
        return found

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        began, wait = time.monotonic(), 0.1
        while True:
            try:
                return self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() - began > self.patience:
                    raise LimbeckError(
                        f"the reward server {self.address} does not answer ({clean(error, 80)}); start it with "
                        "`limbeck reward-server NAME`, then `limbeck resume` the run"
                    ) from None
            self.pause(wait)
            wait = min(2 * wait, 2.0)

    def _once(self, method: str, path: str, body: bytes | None) -> bytes:
        place = urlsplit(self.address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=self.timeout)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise LimbeckError(f"the reward server {self.address} refused: {clean(text.decode(errors='replace'), 300)}")
        return text


def remote(address: str, patience: float = 120.0) -> Reward:
    """The reward of a server; it has no gradient."""
    client = Client(address, patience)
    about = client.about()
    name, space = (clean(about.get(key, ""), 60) for key in ("name", "space"))
    return Reward(client.score, f"remote {name}", space or "any", noise_aware=bool(about.get("noise_aware")))


def is_here(address: str) -> bool:
    """Whether an address is this machine: only such a one may stand in a recipe."""
    return urlsplit(address).hostname in LOOPBACK
