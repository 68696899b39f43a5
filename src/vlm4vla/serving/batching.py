"""Requests of all connections -> batches of one policy. Inference has its own thread: the event loop stays free.

While one batch is inferred the next one gathers; with nothing to do, a request is inferred at once. Clients that ask
again as soon as they are answered then share the policy in two halves, one waiting while the other is inferred; with
``max_wait_s`` an idle policy waits for a batch to fill, and they come together.
"""

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from vlm4vla.errors import UserError
from vlm4vla.types import ActionChunk, BatchPolicy, Observation

REMEMBERED = 10_000
"""Latest requests that the percentiles are of."""


@dataclass
class Request:
    observation: Observation
    answer: asyncio.Future[ActionChunk]
    arrived: float = field(default_factory=time.perf_counter)


class Batcher:
    """Batches requests dynamically; ``run`` must be running while ``predict`` is awaited.

    Args:
        max_batch: observations in one call of the policy at most.
        max_wait_s: how long an idle policy that has requests waits for a full batch.
    """

    def __init__(self, policy: BatchPolicy, max_batch: int = 16, max_wait_s: float = 0.0):
        self.policy, self.max_batch, self.max_wait_s = policy, max_batch, max_wait_s
        self._queue: asyncio.Queue[Request] = asyncio.Queue()
        self._latencies: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self.requests = self.batches = self.failures = self.abandoned = 0

    async def predict(self, observation: Observation) -> ActionChunk:
        """The chunk for one observation. Cancelling it takes the request out of the queue.

        Raises:
            UserError: the policy cannot act on this observation; others in its batch are not concerned.
        """
        request = Request(observation, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(request)
        return await request.answer

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "inference") as thread:
            while True:
                batch = await self._gather()
                if not batch:
                    continue
                started = time.perf_counter()
                answers = await loop.run_in_executor(thread, self._infer, [each.observation for each in batch])
                seconds = time.perf_counter() - started
                self.batches += 1
                for request, answer in zip(batch, answers, strict=True):
                    self.requests += 1
                    self._latencies.append((started - request.arrived, seconds))
                    if request.answer.done():  # its client has gone meanwhile
                        self.abandoned += 1
                    elif isinstance(answer, Exception):
                        self.failures += 1
                        request.answer.set_exception(answer)
                    else:
                        request.answer.set_result(answer)

    async def _gather(self) -> list[Request]:
        batch = [await self._queue.get()]
        deadline = time.perf_counter() + self.max_wait_s
        while len(batch) < self.max_batch:
            if self._queue.empty():
                left = deadline - time.perf_counter()
                if left <= 0:
                    break
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            else:
                batch.append(self._queue.get_nowait())
        alive = [request for request in batch if not request.answer.done()]
        self.abandoned += len(batch) - len(alive)
        return alive

    def _infer(self, observations: list[Observation]) -> list[ActionChunk | Exception]:
        """In the inference thread. Where a batch fails, each observation is tried alone: one must not harm others."""
        try:
            chunks = self.policy.predict(observations)
            if len(chunks) != len(observations):
                raise RuntimeError(f"the policy answered {len(observations)} observations with {len(chunks)} chunks")
            return [chunk if np.isfinite(chunk.actions).all() else _not_finite() for chunk in chunks]
        except Exception as error:
            if len(observations) == 1:
                return [error]
            return [answer for each in observations for answer in self._infer([each])]

    def statistics(self) -> dict:
        """Counts since the start, and percentiles in milliseconds over the latest requests."""
        counts = {name: getattr(self, name) for name in ("requests", "batches", "failures", "abandoned")}
        values: dict = {**counts, "waiting": self._queue.qsize(), "max_batch_size": self.max_batch}
        if self._latencies:
            queued, inferred = np.array(self._latencies).T * 1000
            for name, column in (("queue_ms", queued), ("infer_ms", inferred), ("total_ms", queued + inferred)):
                values[name] = {f"p{p}": round(float(np.percentile(column, p)), 3) for p in (50, 90, 99)}
        return values


def _not_finite() -> UserError:
    return UserError("a predicted action that is not finite", "finite actions", "look at the training's loss")
