"""Servers that speak other projects' protocols as theirs do, with a policy that shows what it was sent."""

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgpack
import numpy as np
from websockets.asyncio.server import serve

Infer = Callable[[dict], dict | str]


def encode(value):
    """openpi's way to write arrays, written anew: keys are bytes."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(type(value))


def decode(value):
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    return value


@contextmanager
def websocket(metadata: dict, infer: Infer) -> Iterator[str]:
    """openpi's reference server (StarVLA's is made of it): metadata first, inference in the event loop, a text
    frame and the end where it fails. Yields ``host:port``."""
    started: list = []
    ready = threading.Event()

    async def handle(connection):
        await connection.send(msgpack.packb(metadata, default=encode))
        async for message in connection:
            reply = infer(msgpack.unpackb(message, object_hook=decode))
            if isinstance(reply, str):
                await connection.send(reply)
                await connection.close(1011, "Internal server error.")
                return
            await connection.send(msgpack.packb(reply, default=encode))

    async def run():
        stop = asyncio.Event()
        async with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
            started.extend([server.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop])
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(20)
    port, loop, stop = started
    try:
        yield f"127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)


@contextmanager
def openvla(act: Callable[[dict], np.ndarray | str], encoded_twice: bool = False) -> Iterator[str]:
    """OpenVLA's ``POST /act`` with ``json_numpy`` patched in; ``act`` answering a text is its plain "error"."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])), object_hook=self.arrays)
            action = act(body)
            if not isinstance(action, str):
                data = base64.b64encode(action.tobytes()).decode()
                action = {"__numpy__": data, "dtype": action.dtype.str, "shape": action.shape}
                action = json.dumps(action) if encoded_twice else action
            text = json.dumps(action).encode()
            self.send_response(200 if self.path == "/act" else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text)

        @staticmethod
        def arrays(value):
            if "__numpy__" not in value:
                return value
            array = np.frombuffer(base64.b64decode(value["__numpy__"]), np.dtype(value["dtype"]))
            return array.reshape(value["shape"])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()
