"""A policy server in a thread of this process, and the least client of it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from websockets.sync.client import ClientConnection, connect

from fake_sim import FakePolicy
from vlm4vla.serving.codec import pack, unpack
from vlm4vla.serving.server import Server, Settings
from vlm4vla.serving.service import Service
from vlm4vla.serving.sources import Source
from vlm4vla.types import Observation

ANYWHERE = (("openpi", 0), ("vla-eval", 0), ("starvla", 0))


def picture(shade: int = 100, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), shade, np.uint8)


def service(policy=None, *, chunk=4, image_size=8, state_size=0, form="native", **handling) -> Service:
    source = Source(policy or FakePolicy(chunk=chunk), "fake", chunk, image_size, state_size)
    return Service(source, form=form, **handling)


def expected(shade: int = 100, chunk: int = 4) -> np.ndarray:
    """What the fake policy does about a picture."""
    return FakePolicy(chunk=chunk).predict([Observation({"main": picture(shade)}, "go")])[0].actions


class Running:
    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop, thread: threading.Thread):
        self.server, self.loop, self.thread = server, loop, thread

    def url(self, dialect: str) -> str:
        return f"ws://127.0.0.1:{self.server.ports[dialect]}"

    def connect(self, dialect: str, **options) -> ClientConnection:
        return connect(self.url(dialect), max_size=None, **options)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)


@contextmanager
def running(served: Service | None = None, ports=ANYWHERE, **settings) -> Iterator[Running]:
    """A server on free ports; what it raises is raised here."""
    started: list = []
    ready, errors = threading.Event(), []

    async def serve() -> None:
        server = Server(served or service(), Settings(ports=ports, **settings))
        started.extend([server, asyncio.get_running_loop()])
        await server.run(ready.set)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            errors.append(error)
        ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(20)
    if errors:
        raise errors[0]
    handle = Running(*started, thread)
    try:
        yield handle
    finally:
        if thread.is_alive():
            handle.stop()
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def ask(connection: ClientConnection, message, keys="bytes"):
    """Send a message, return the decoded reply (a text frame as it is)."""
    connection.send(message if isinstance(message, bytes) else pack(message, keys))
    reply = connection.recv(20)
    return reply if isinstance(reply, str) else unpack(reply)


def openpi(shade: int = 100, prompt: str = "go", **more) -> dict:
    return {"observation/image": picture(shade), "prompt": prompt, **more}


def frame(kind: str, payload: dict, seq: int = 0) -> bytes:
    return pack({"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}, "text")
