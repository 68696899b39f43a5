"""The policy server: every dialect on its port, one batched policy behind all of them.

    GET /health, /healthz       200 while the server lives, also during inference
    GET /stats                  requests, batches, waiting, percentiles of latency
    GET /config?max_batch_size=8&max_wait_time=0.01     read and set both

Loopback unless told otherwise, a token where one is set, connections from web pages refused, messages limited in size,
nothing unpickled. A slow or vanished client holds up nobody: its request leaves the queue with it.
"""

import asyncio
import contextlib
import errno
import hmac
import json
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from vlm4vla.errors import UserError, nearest
from vlm4vla.serving.batching import Batcher
from vlm4vla.serving.codec import MalformedMessage
from vlm4vla.serving.dialects import DIALECTS, Session
from vlm4vla.serving.service import Service
from vlm4vla.types import ActionChunk, Observation

log = logging.getLogger(__name__)
MEBIBYTE = 1 << 20
QUEUED_FRAMES = 2
"""Messages of one connection that wait in memory beside the one being answered."""
MAX_CONNECTIONS = 1024
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PING_S = 20.0
"""Seconds between pings, which keep idle connections alive. A missing pong ends nothing: clients that simulate do not
listen meanwhile."""
SILENT = logging.getLogger(f"{__name__}.handshakes")
SILENT.setLevel(logging.CRITICAL)  # a stranger's broken handshake is no news
GRACE_S = 10.0
"""How long requests under way may take after SIGTERM or Ctrl-C."""


def listening(given: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """``DIALECT=PORT`` (or ``DIALECT``, on its own port) each -> dialects and ports; all of them where none is given.

    Raises:
        UserError: no such dialect, or no port.
    """
    ports = []
    for text in given or tuple(DIALECTS):
        name, _, port = text.partition("=")
        if name not in DIALECTS or not ((port.isdecimal() and int(port) < 1 << 16) or text == name):
            known = " ".join(f"{name}={port}" for name, (_, port) in DIALECTS.items())
            raise UserError(
                f"--listen {text}", f"DIALECT=PORT, such as {known}", f"nearest: {nearest(name, [*DIALECTS])}"
            )
        ports.append((name, int(port) if port else DIALECTS[name][1]))
    return tuple(ports)


@dataclass(frozen=True)
class Settings:
    """How to serve, never what."""

    host: str = "127.0.0.1"
    ports: tuple[tuple[str, int], ...] = listening(())
    """Dialect and port; port 0 takes a free one."""
    token: str | None = None
    """What clients must show: ``Authorization: Api-Key TOKEN`` (openpi, StarVLA) or ``?token=TOKEN`` (vla-eval)."""
    max_batch: int = 16
    max_wait_s: float = 0.0
    max_message: int = 16 * MEBIBYTE
    """Bytes of one message; a client that sends more is disconnected (close code 1009)."""

    def __post_init__(self) -> None:
        """Raises: UserError: a blank token, such as an unset variable's: it would keep out nobody."""
        if self.token is not None and not self.token.strip():
            raise UserError("a blank token", "one that is hard to guess", "openssl rand -hex 16; or leave --token out")


def serve_forever(service: Service, settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; ``say`` gets a line for each address. Raises ``UserError``."""

    async def run() -> None:
        server = Server(service, settings)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)

        def ready() -> None:
            for name, port in server.ports.items():
                say(f"{name:<9} ws://{settings.host}:{port}")
            if settings.token is None and settings.host not in LOOPBACK:
                say("warning: everybody in these networks can use this server; --token limits it to those who know it")

        await server.run(ready)

    asyncio.run(run())


class Server:
    """Serves one policy until ``stop``."""

    def __init__(self, service: Service, settings: Settings):
        self._service, self._settings = service, settings
        self._batcher = Batcher(service.source.policy, settings.max_batch, settings.max_wait_s)
        self._listeners: list[Listener] = []
        self._busy: set[ServerConnection] = set()
        self._stopping = asyncio.Event()
        self.ports: dict[str, int] = {}
        """The bound port of each dialect, once ``run`` has said that it is ready."""

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Listen, call ``ready``, serve until ``stop``, then let requests under way finish (``GRACE_S`` at most)."""
        await asyncio.to_thread(self._service.begin)
        work = asyncio.create_task(self._batcher.run())
        work.add_done_callback(lambda _: self._stopping.set())  # a defect there must not leave a server that hangs
        try:
            for name, port in self._settings.ports:
                self._listeners.append(await self._listen(name, port))
                self.ports[name] = self._listeners[-1].sockets[0].getsockname()[1]
            ready()
            await self._stopping.wait()
        finally:
            await self._close()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work  # raises what ended it, if that was not us

    def stop(self) -> None:
        self._stopping.set()

    async def _listen(self, name: str, port: int) -> Listener:
        kind = DIALECTS[name][0]
        try:
            return await serve(
                lambda connection: self._converse(connection, kind),
                self._settings.host,
                port,
                process_request=self._door,
                origins=[None],  # browsers name theirs: no web page reaches a robot's policy on loopback
                compression=None,
                max_size=self._settings.max_message,
                max_queue=QUEUED_FRAMES,
                ping_interval=PING_S,
                ping_timeout=None,
                logger=SILENT,
            )
        except (OSError, UnicodeError) as error:  # the second for a name that can be no host's
            nowhere = isinstance(error, UnicodeError | socket.gaierror)
            if nowhere or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"--host {self._settings.host} ({error})",
                    "an address of this machine",
                    "leave it out for 127.0.0.1, or name 0.0.0.0 for all of this machine's",
                ) from error
            raise UserError(
                f"port {port} on {self._settings.host} cannot be had ({error.strerror})",
                f"a free port for {name}",
                f"end what listens there, or name another: --listen {name}={port + 10}",
            ) from error

    @property
    def _connections(self) -> list[ServerConnection]:
        return [connection for listener in self._listeners for connection in listener.connections]

    async def _close(self) -> None:
        """Accept nothing more, end idle connections, wait for busy ones, end those."""
        for listener in self._listeners:
            listener.close(close_connections=False)
        self._stopping.set()
        idle = [connection for connection in self._connections if connection not in self._busy]
        await asyncio.gather(*(connection.close(CloseCode.GOING_AWAY) for connection in idle))
        deadline = asyncio.get_running_loop().time() + GRACE_S
        while self._busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(connection.close(CloseCode.GOING_AWAY) for connection in self._connections))
        for listener in self._listeners:
            await listener.wait_closed()

    # --------------------------------------------------------------------------------------------------- HTTP's side

    def _door(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers HTTP requests; lets WebSocket handshakes pass that may."""
        url = urlsplit(request.path)
        options = {name: each[-1] for name, each in parse_qs(url.query).items()}
        if url.path in ("/health", "/healthz"):
            return _json(connection, HTTPStatus.OK, {"status": "ok"})
        if not self._admitted(request, options.pop("token", "")):
            return _json(connection, HTTPStatus.UNAUTHORIZED, {"error": "needed: Authorization: Api-Key TOKEN"})
        if url.path == "/stats":
            return _json(connection, HTTPStatus.OK, self._statistics())
        if url.path == "/config":
            if "Sec-Fetch-Site" in request.headers:
                return _json(connection, HTTPStatus.FORBIDDEN, {"error": "not from a web page"})
            return self._configure(connection, options)
        if self._stopping.is_set() or len(self._connections) >= MAX_CONNECTIONS:
            return _json(connection, HTTPStatus.SERVICE_UNAVAILABLE, {"error": "stopping, or too many connections"})
        return None

    def _statistics(self) -> dict:
        return {**self._batcher.statistics(), "connections": len(self._connections)}

    def _admitted(self, request: Request, token: str) -> bool:
        if self._settings.token is None:
            return True
        shown = request.headers.get("Authorization", "").partition(" ")[2] or token
        return hmac.compare_digest(shown.encode(), self._settings.token.encode())

    def _configure(self, connection: ServerConnection, values: dict[str, str]) -> Response:
        """vla-eval's sweep of batch sizes. Nothing is applied where one of the values is wrong."""
        try:
            unknown = values.keys() - {"max_batch_size", "max_wait_time"}
            batch = int(values.get("max_batch_size", self._batcher.max_batch))
            wait = float(values.get("max_wait_time", self._batcher.max_wait_s))
            if unknown or not 1 <= batch <= 1024 or not 0 <= wait <= 1:
                raise ValueError
        except ValueError:
            problem = "max_batch_size takes 1 to 1024, max_wait_time 0 to 1 (seconds); nothing else is known"
            return _json(connection, HTTPStatus.UNPROCESSABLE_ENTITY, {"errors": [problem]})
        self._batcher.max_batch, self._batcher.max_wait_s = batch, wait
        config = {"max_batch_size": batch, "max_wait_time": wait}
        return _json(connection, HTTPStatus.OK, {"applied": {name: config[name] for name in values}, "config": config})

    # ---------------------------------------------------------------------------------------------- WebSocket's side

    async def _converse(self, connection: ServerConnection, kind: type[Session]) -> None:
        async def act(observation: Observation) -> ActionChunk:
            return await self._batcher.predict(observation)

        session = kind(self._service, act)
        with contextlib.suppress(ConnectionClosed):
            if (greeting := session.greeting()) is not None:
                await connection.send(greeting)
            async for message in connection:
                self._busy.add(connection)
                try:
                    if not await self._reply(connection, session, message):
                        return
                finally:
                    self._busy.discard(connection)
                if self._stopping.is_set():
                    await connection.close(CloseCode.GOING_AWAY)

    async def _reply(self, connection: ServerConnection, session: Session, message: bytes | str) -> bool:
        """Answer one message; False where the connection has ended. What is asked for a client that goes is dropped."""
        answer = asyncio.ensure_future(_answer(session, message))
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return False
            reply, end = answer.result()
        finally:
            answer.cancel()
            gone.cancel()
        if reply is not None:
            await connection.send(reply)
        if end:
            await connection.close(CloseCode.INTERNAL_ERROR, "see the text frame before")
        return not end


async def _answer(session: Session, message: bytes | str) -> tuple[bytes | str | None, bool]:
    """The reply, and whether it is the last one."""
    try:
        if isinstance(message, str):
            raise MalformedMessage("a text frame; messages are binary")
        return await session.answer(message), False
    except MalformedMessage as error:
        return session.refusal(f"found: {error}\nexpected: a message of this port's dialect (docs/serving.md)")
    except UserError as error:
        return session.refusal(str(error))
    except Exception as error:  # a defect of ours or of the policy's: the log has it all, the client the kind
        log.exception("a request failed")
        return session.refusal(f"the server failed at this request ({type(error).__name__}); its log says why")


def _json(connection: ServerConnection, status: HTTPStatus, values: dict) -> Response:
    response = connection.respond(status, json.dumps(values) + "\n")
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = "application/json"
    return response
