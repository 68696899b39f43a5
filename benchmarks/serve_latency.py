"""Serving: our server against openpi's way (one request at a time, inference in the event loop), same policy, one run.

    python benchmarks/serve_latency.py --clients 1 4 16
    python benchmarks/serve_latency.py --policy runs/mine/policy

Each client is a connection that asks again as soon as it is answered, with one 224 x 224 camera and a state; all
clients are one process of their own. Without ``--policy`` a stand-in takes ``--latency-ms`` for a batch and
``--item-ms`` more for each observation, without using the processor, as a GPU does. The floor is the policy alone,
called in a loop without any network, with batches as large as there are clients (ours) or of one (openpi's way).
``health`` is the slowest answer to ``GET /healthz`` meanwhile, ``cpu`` the server process's processor time a request,
which other work on the machine leaves as it is.
"""

import argparse
import asyncio
import json
import multiprocessing
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

from vlm4vla.convention import LIBERO
from vlm4vla.serving.codec import pack, unpack
from vlm4vla.serving.server import Server, Settings
from vlm4vla.serving.service import Service
from vlm4vla.serving.sources import Source, checkpoint
from vlm4vla.types import ActionChunk, Observation

CLIENT_SIZE = 224


class StandIn:
    """Sleeps as long as a GPU would compute."""

    convention = LIBERO

    def __init__(self, latency_s: float, item_s: float):
        self._latency_s, self._item_s = latency_s, item_s
        self._actions = np.zeros((10, 7), np.float32)

    def predict(self, observations: list[Observation]) -> list[ActionChunk]:
        time.sleep(self._latency_s + self._item_s * len(observations))
        return [ActionChunk(self._actions, self.convention) for _ in observations]


# ------------------------------------------------------------------------------------------------------------- servers


@contextmanager
def in_thread(main, *arguments) -> Iterator[int]:
    """Run ``main(started, *arguments)`` in an event loop of its own; yields the port that it puts into ``started``."""
    started: list = []
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(main(started, ready, *arguments)))
    thread.start()
    ready.wait()
    loop, stop, port = started
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop)
        thread.join()


async def ours(started: list, ready: threading.Event, service: Service, wait_s: float) -> None:
    server = Server(service, Settings(ports=(("openpi", 0),), max_wait_s=wait_s))

    def say() -> None:
        started.extend([asyncio.get_running_loop(), server.stop, server.ports["openpi"]])
        ready.set()

    await server.run(say)


async def openpis_way(started: list, ready: threading.Event, service: Service, _wait_s: float) -> None:
    """The structure of openpi's reference server: decode, infer, answer, all in the event loop."""
    stopped = asyncio.Event()

    async def handle(connection) -> None:
        await connection.send(pack({}))
        async for message in connection:
            values = unpack(message)
            image, state = values["observation/image"], values["observation/state"]
            observation = await service.observation(image, values["prompt"], state)
            (chunk,) = service.source.policy.predict([observation])
            await connection.send(pack({"actions": chunk.actions}))

    def health(connection, request):
        return connection.respond(200, "OK\n") if request.path == "/healthz" else None

    options = {"compression": None, "max_size": None, "ping_interval": None, "process_request": health}
    async with serve(handle, "127.0.0.1", 0, **options) as server:
        started.extend([asyncio.get_running_loop(), stopped.set, server.sockets[0].getsockname()[1]])
        ready.set()
        await stopped.wait()


# ------------------------------------------------------------------------------------------------------------- clients


def clients(port: int, number: int, seconds: float, results) -> None:
    """A process with ``number`` connections; puts every latency in seconds into ``results``."""
    image = np.random.default_rng(0).integers(0, 256, (CLIENT_SIZE, CLIENT_SIZE, 3), np.uint8)
    message = pack({"observation/image": image, "observation/state": np.zeros(8), "prompt": "put it in the basket"})

    async def one(end: float) -> list[float]:
        latencies = []
        async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, ping_interval=None) as connection:
            await connection.recv()
            while time.monotonic() < end:
                started = time.monotonic()
                await connection.send(message)
                await connection.recv()
                latencies.append(time.monotonic() - started)
        return latencies

    async def all_of_them() -> list[list[float]]:
        end = time.monotonic() + seconds
        return await asyncio.gather(*(one(end) for _ in range(number)))

    results.put([latency for each in asyncio.run(all_of_them()) for latency in each])


def measure(main, service: Service, wait_s: float, number: int, seconds: float) -> dict:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with in_thread(main, service, wait_s) as port:
        process = context.Process(target=clients, args=(port, number, seconds, results))
        process.start()
        slowest, end, used = 0.0, time.monotonic() + seconds, time.process_time()
        while time.monotonic() < end:
            time.sleep(0.2)
            started = time.monotonic()
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=60).read()
            slowest = max(slowest, time.monotonic() - started)
        latencies = np.array(results.get()) * 1000
        used = time.process_time() - used
        process.join()
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "requests_per_s": round(len(latencies) / seconds, 1),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "health_ms": round(slowest * 1000, 1),
        "cpu_ms": round(used / len(latencies) * 1000, 2),
    }


def floor(service: Service, batch: int, seconds: float) -> float:
    """Observations a second of the policy alone, in batches of ``batch``."""
    size = service.source.image_size
    observations = [Observation({"main": np.zeros((size, size, 3), np.uint8)}, "put it in the basket")] * batch
    service.source.policy.predict(observations)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        service.source.policy.predict(observations)
        count += batch
    return round(count / (time.monotonic() - started), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="a policy folder instead of the stand-in")
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--item-ms", type=float, default=2.0)
    parser.add_argument("--max-wait-ms", type=float, default=0.0, help="as of vlm4vla serve")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    if options.policy:
        source = checkpoint(options.policy, "cpu", threads=1)
    else:
        source = Source(StandIn(options.latency_ms / 1000, options.item_ms / 1000), "stand-in", 10, CLIENT_SIZE)
    service = Service(source, resize="bicubic", form="native")
    wait_s = options.max_wait_ms / 1000
    for number in options.clients:
        row = {
            "clients": number,
            "ours": measure(ours, service, wait_s, number, options.seconds),
            "ours_floor_per_s": floor(service, min(number, 16), options.seconds / 4),
            "openpis_way": measure(openpis_way, service, wait_s, number, options.seconds),
            "openpis_floor_per_s": floor(service, 1, options.seconds / 4),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
