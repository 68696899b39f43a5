"""Policies that live in other processes: openpi's and StarVLA's servers, OpenVLA's REST service, and our own server.

A client looks like any policy to the episode loop: observations in, chunks in one of our conventions out. What the
other side wants to see and how it writes actions is a ``Baseline``, or what our own server says of itself.
"""

import base64
import contextlib
import json
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPException
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from websockets.exceptions import InvalidHandshake, WebSocketException
from websockets.sync.client import ClientConnection, connect

from vlm4vla.convention import Convention
from vlm4vla.errors import UserError
from vlm4vla.serving.baseline import Baseline
from vlm4vla.serving.codec import MalformedMessage, array, pack, unpack
from vlm4vla.serving.service import OWN_KEY
from vlm4vla.serving.wire import form
from vlm4vla.types import ActionChunk, Observation

TIMEOUT_S = 120.0
"""For one answer: a server's first inference may compile."""
OPEN_TIMEOUT_S = 10.0
MAX_REPLY = 1 << 26
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy of the environment, as the WebSockets: it would not know this machine's loopback."""
CONNECTIONS = 16
"""Requests under way at once; a server that batches makes use of them."""


class Remote(ABC):
    """A policy behind an address.

    Args:
        address: ``host:port``.
        baseline: how it sees and acts.
        convention: what our own server says that its chunks are; None: another project's server, whose convention is
            that of the baseline's form.
    """

    def __init__(
        self, address: str, baseline: Baseline, convention: Convention | None = None, token: str | None = None
    ):
        self.address, self.baseline, self._token = address, baseline, token
        known = form(baseline.form)
        self._own = {} if convention is None else {OWN_KEY: baseline.form}
        self._read: Callable[[np.ndarray], np.ndarray] = known.read if known else np.asarray
        written = known.convention if known else convention
        assert written is not None, "native actions come with their convention"
        self.convention = written

    @abstractmethod
    def predict(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """One chunk each. Raises ``UserError`` where the server is gone, refuses, or answers something else."""

    def close(self) -> None:  # noqa: B027 (not every client holds something)
        """Let the connections go."""

    def _chunk(self, actions: Any) -> ActionChunk:
        """What a server answered -> a chunk in ``convention``."""
        size = len(self.convention.names)
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "fiu":
            raise self._strange(f"actions that are a {type(actions).__name__}")
        if actions.ndim != 2 or actions.shape[1] != size or len(actions) < self.baseline.chunk:
            raise self._strange(f"actions of shape {actions.shape}, expected ({self.baseline.chunk} or more, {size})")
        if not np.isfinite(actions).all():
            raise self._strange("actions that are not finite")
        return ActionChunk(self._read(actions.astype(np.float32)), self.convention)

    def _strange(self, found: str) -> UserError:
        expected = f"{self.baseline.dialect}'s protocol and the baseline's numbers"
        return UserError(f"{self.address} answered {found}", expected, "look at the server and at --baseline")


class Sockets(Remote):
    """A WebSocket server: several connections, so that a server that batches can."""

    def __init__(
        self, address: str, baseline: Baseline, convention: Convention | None = None, token: str | None = None
    ):
        super().__init__(address, baseline, convention, token)
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(CONNECTIONS, "policy"))
        self._idle: SimpleQueue[ClientConnection] = SimpleQueue()

    def close(self) -> None:
        self._stack.close()

    def _ask(self, message: dict) -> dict:
        """Send one message, return the reply; once more on a fresh connection where an idle one has died."""
        data = pack(message)
        with contextlib.suppress(Empty, WebSocketException):  # servers drop idle connections
            return self._exchange(self._idle.get_nowait(), data)
        try:
            return self._exchange(opened(self._stack, self.address, self._token)[0], data)
        except WebSocketException as error:
            raise gone(self.address, error) from error

    def _exchange(self, connection: ClientConnection, data: bytes) -> dict:
        connection.send(data)
        try:
            reply = connection.recv(TIMEOUT_S)
        except TimeoutError as error:
            raise gone(self.address, error) from error
        if isinstance(reply, str):
            what = f"{self.address} refused the observation: {reply[-2000:]}"
            raise UserError(what, "an observation that its policy takes", "look at the server and at --baseline")
        self._idle.put(connection)
        try:
            values = unpack(reply)
        except MalformedMessage as error:
            raise self._strange(str(error)) from error
        if not isinstance(values, dict):
            raise self._strange(f"a {type(values).__name__}")
        return values


class OpenPi(Sockets):
    """openpi's server, and ours in that dialect: one observation a message."""

    def predict(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        replies = self._pool.map(lambda each: self._ask(self._message(each)), observations)
        return [self._chunk(reply.get("actions")) for reply in replies]

    def _message(self, observation: Observation) -> dict:
        look = self.baseline
        message: dict = dict(zip(look.cameras.values(), look.pictures(observation), strict=True))
        message |= {"prompt": look.instruction(observation), **self._own}
        if look.state is not None:
            message[look.state] = look.proprioception(observation)
        return message


class StarVLA(Sockets):
    """StarVLA's server: a batch a message."""

    def predict(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        message: dict = {"examples": [self._example(each) for each in observations], "do_sample": False}
        message |= self._own
        if self.baseline.unnorm_key is not None:
            message["unnorm_key"] = self.baseline.unnorm_key
        reply = self._ask(message)
        data = reply.get("data")
        if reply.get("ok") is not True or not isinstance(data, dict):
            raise self._strange(f"an error: {reply.get('error', reply.get('status'))!r:.2000}")
        actions = data.get("actions")
        if actions is None and "normalized_actions" in data:
            raise self._strange("normalised actions, as its servers of 2025 do; the statistics are on its side")
        if not isinstance(actions, np.ndarray) or actions.shape[:1] != (len(observations),):
            raise self._strange(f"no actions for {len(observations)} examples")
        return [self._chunk(chunk) for chunk in actions]

    def _example(self, observation: Observation) -> dict:
        look = self.baseline
        example: dict = {"image": look.pictures(observation), "lang": look.instruction(observation)}
        if look.state is not None:
            example[look.state] = look.proprioception(observation)[None]
        return example


class OpenVLA(Remote):
    """OpenVLA's ``POST /act``: JSON with arrays as ``json_numpy`` writes them, one action an answer, one at a time."""

    def predict(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [self._chunk(np.atleast_2d(self._act(observation))) for observation in observations]

    def _act(self, observation: Observation) -> np.ndarray:
        (image,) = self.baseline.pictures(observation)
        (key,) = self.baseline.cameras.values()
        picture = {
            "__numpy__": base64.b64encode(image.tobytes()).decode(),
            "dtype": image.dtype.str,
            "shape": image.shape,
        }
        message = {key: picture, "instruction": self.baseline.instruction(observation)}
        if self.baseline.unnorm_key is not None:
            message["unnorm_key"] = self.baseline.unnorm_key
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(f"http://{self.address}/act", json.dumps(message).encode(), headers)
        try:
            with DIRECT.open(request, timeout=TIMEOUT_S) as reply:
                text = reply.read(MAX_REPLY)
        except (OSError, HTTPException) as error:  # HTTPError and URLError are OSErrors
            raise gone(self.address, error) from error
        try:
            value = _decoded(text)
            return array(base64.b64decode(value["__numpy__"], validate=True), value["dtype"], value["shape"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._strange(f'{text[:200]!r}; a plain "error" means that its log says more') from error


def _decoded(text: bytes | str) -> Any:
    """JSON, or JSON in a JSON string: OpenVLA's service without ``json_numpy`` patched in."""
    value = json.loads(text)
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


DIALECTS: dict[str, type[Remote]] = {"openpi": OpenPi, "starvla": StarVLA, "openvla": OpenVLA}


def gone(address: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    return UserError(
        f"no answer from {address} ({reason})",
        "a policy server there",
        "start it, then run the same command again: finished episodes are kept",
    )


def opened(stack: ExitStack, address: str, token: str | None) -> tuple[ClientConnection, dict]:
    """A connection and what its server says first. Raises ``UserError`` where nobody answers, or not so."""
    headers = {"Authorization": f"Api-Key {token}"} if token else None
    try:
        connection = stack.enter_context(
            connect(
                f"ws://{address}",
                compression=None,
                max_size=MAX_REPLY,
                additional_headers=headers,
                open_timeout=OPEN_TIMEOUT_S,
                ping_interval=None,  # a server whose inference blocks it does not answer pings
                proxy=None,
            )
        )
        about = unpack(connection.recv(TIMEOUT_S))  # type: ignore[arg-type] (a text frame is refused as malformed)
        if not isinstance(about, dict):
            raise MalformedMessage(f"a {type(about).__name__}")
    except (OSError, InvalidHandshake, WebSocketException, TimeoutError) as error:
        raise gone(address, error) from error
    except MalformedMessage as error:
        raise UserError(f"{address} began with {error}", "a metadata dict", "check the port and the scheme") from error
    return connection, about


def metadata(address: str, token: str | None) -> dict:
    """What a WebSocket server says of itself. Raises ``UserError`` as ``opened``."""
    with ExitStack() as stack:
        return opened(stack, address, token)[1]
