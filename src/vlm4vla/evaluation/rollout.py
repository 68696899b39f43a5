"""The only episode loop: several simulator processes, one policy, one row per episode.

Each worker runs ``reset -> look -> (policy) -> execute -> look -> ... -> done``. The policy predicts for all workers
that wait at that moment in one batch; nothing is rendered between two looks. A worker whose episode ends goes on with
the next one by itself, for the policy may be busy with another's; the last ones go to whoever is free. Rows are stored
as episodes end, so an evaluation that was killed continues where it was. Which episodes exist, and their seeds, depend
on the protocol alone. The number of workers changes the time, and which observations share a batch: hidden states then
differ by some 4e-6 (fp32), so an episode that hangs on the last digits can end otherwise.

Shapes: H horizon, A action dimensions.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from typing import Protocol as Interface

import numpy as np
from tqdm import tqdm

from vlm4vla import __version__
from vlm4vla.convention import Convention, check_same
from vlm4vla.errors import UserError
from vlm4vla.evaluation.execution import blend, delay_opening
from vlm4vla.evaluation.filmstrip import write_strip
from vlm4vla.evaluation.interval import wilson
from vlm4vla.evaluation.video import video_path, write_video
from vlm4vla.locks import locked
from vlm4vla.sims.base import StepOutcome
from vlm4vla.sims.protocols import Protocol
from vlm4vla.sims.worker import Reply, Worker, WorkerFault, wait
from vlm4vla.spec import content_hash
from vlm4vla.types import ActionChunk, BatchPolicy, EpisodeResult, Observation

TRIES = 3
"""Starts of an episode whose worker fails before it becomes a fault, and of a worker before it is given up."""
Videos = Literal["failures", "all", "none"]


class ResultStore(Interface):
    """Where rows go and where finished ones are found (``studies.store.Store``)."""

    path: Path

    def declare(self, protocol: str, definition: dict) -> None: ...

    def add(self, run_id: str, result: EpisodeResult) -> None: ...

    def results(self, run_id: str, protocol: str) -> list[EpisodeResult]: ...


@dataclass
class Attempt:
    """An episode under way in a worker."""

    episode: int
    steps: int = 0
    outcome: StepOutcome | None = None
    observation: Observation | None = None
    """What the policy must act on now."""
    instruction: str = ""
    frames: list[np.ndarray] = field(default_factory=list)
    """For strips and videos, with the steps done before each."""
    frame_steps: list[int] = field(default_factory=list)
    chunks: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """For temporal ensembling: the step of each prediction, and its (H, A) actions."""
    asked_open: int = 0
    """For ``Protocol.open_after``: executed actions in a row that asked for an open gripper."""
    ahead: int | None = None
    """The episode with which the worker goes on by itself where the actions under way end this one."""
    timings: dict[str, float] = field(default_factory=lambda: {"sim": 0.0, "render": 0.0, "infer": 0.0})
    started: float | None = None
    """When its reset began; None while its worker is still starting."""
    asked: float = 0.0
    """When its worker began what it was last asked for; with the seconds of the reply, when it was done."""


def evaluate(
    policy: BatchPolicy,
    protocol: Protocol,
    episodes: int,
    store: ResultStore,
    run_id: str,
    *,
    image_size: int,
    cameras: Sequence[str] = ("main",),
    workers: int = 2,
    progress: bool = True,
    timeout_s: float = 120.0,
    strips: Path | None = None,
    num_strips: int = 0,
    sim_python: str | None = None,
    videos: Videos = "none",
    video_folder: Path | None = None,
) -> list[EpisodeResult]:
    """Evaluate ``policy`` on episodes 0 .. ``episodes`` - 1 of ``protocol``; finished ones are not repeated.

    Args:
        image_size: height and width in pixels of what the simulator renders.
        cameras: what the policy sees; a simulator is asked for others than ``main`` only where they are needed.
        timeout_s: a worker that gives no reply for so long is restarted.
        strips: folder for PNG film strips of the frames that the policy saw in the first ``num_strips`` episodes.
        sim_python: the interpreter of the workers (``sims/environments.py``).
        videos: which episodes are written to ``video_folder`` as MP4, the same frames with captions.

    Returns:
        All ``episodes`` results in their order, those of earlier starts included. ``success`` is None where the
        infrastructure failed ``TRIES`` times; these are tried again by the next call.

    Raises:
        UserError: the protocol has fewer episodes or another definition in this store, another process evaluates the
            same, conventions differ, the simulator does not start, or the policy's actions cannot be executed.
    """
    protocol.check_episodes(episodes)
    film = _Film(strips, num_strips, video_folder, videos)
    lock = store.path.with_name(f"{store.path.name}.locks") / content_hash([run_id, protocol.name])
    with locked(lock, f"evaluation of {run_id} under {protocol.name}"):
        store.declare(protocol.name, protocol.to_dict())
        evaluation = _Evaluation(policy, protocol, episodes, store, run_id, timeout_s, film)
        others = [camera for camera in cameras if camera != "main"]
        sight = {"image_size": image_size} | ({"cameras": ["main", *others]} if others else {})
        return evaluation.run(workers, sight, progress, sim_python)


@dataclass(frozen=True)
class _Film:
    """Which episodes are filmed, and into which folders."""

    strips: Path | None
    num_strips: int
    video_folder: Path | None
    videos: Videos

    def records(self, episode: int) -> bool:
        return self.wants_strip(episode) or (self.video_folder is not None and self.videos != "none")

    def wants_strip(self, episode: int) -> bool:
        return self.strips is not None and episode < self.num_strips

    def wants_video(self, success: bool) -> bool:
        return self.video_folder is not None and (self.videos == "all" or (self.videos == "failures" and not success))

    def tell_missing(self, finished: list[EpisodeResult]) -> None:
        """Say how many episodes of earlier starts are wanted as videos that are not there."""
        wanted = [r for r in finished if r.success is not None and self.wants_video(r.success)]
        folder = self.video_folder or Path()
        if number := sum(not video_path(folder, r.protocol, r.episode).is_file() for r in wanted):
            told = f"finished episodes without a video in {folder}: {number} (films are made while an episode runs"
            tqdm.write(f"{told}; with a new --store they are repeated)", file=sys.stderr)


class _Evaluation:
    def __init__(
        self,
        policy: BatchPolicy,
        protocol: Protocol,
        episodes: int,
        store: ResultStore,
        run_id: str,
        timeout_s: float,
        film: _Film,
    ):
        self.policy, self.protocol, self.episodes, self.store, self.run_id = policy, protocol, episodes, store, run_id
        self.timeout_s, self.film = timeout_s, film
        rows = [row for row in store.results(run_id, protocol.name) if row.episode < episodes]
        self.finished = {row.episode for row in rows if row.success is not None}
        film.tell_missing(rows)
        self.successes, self.faults = sum(bool(row.success) for row in rows), 0
        self.todo = deque(i for i in range(episodes) if i not in self.finished)
        self.tries: Counter[int] = Counter()
        self.stillborn: Counter[Worker] = Counter()
        self.versions: dict[str, str] = {}
        self.running: dict[Worker, Attempt] = {}
        self.dismissed: list[Worker] = []

    def run(self, num_workers: int, sight: dict, progress: bool, sim_python: str | None) -> list[EpisodeResult]:
        kwargs = {**self.protocol.sim_args, **sight, "max_steps": self.protocol.max_steps}
        name = f"{self.run_id} {self.protocol.name}"
        bar = tqdm(total=self.episodes, initial=len(self.finished), unit="episode", desc=name, disable=not progress)
        try:
            for _ in range(min(num_workers, len(self.todo))):
                worker = Worker(self.protocol.sim, kwargs, self.timeout_s, sim_python)
                self.running[worker] = Attempt(self.todo.popleft())
            while self.running:
                wait(list(self.running))
                for worker in list(self.running):
                    self._listen(worker, bar)
                self._act()
            while self.dismissed:
                self.dismissed.pop().close()
        finally:
            for worker in (*self.running, *self.dismissed):
                worker.kill()
            bar.close()
        return [row for row in self.store.results(self.run_id, self.protocol.name) if row.episode < self.episodes]

    def _listen(self, worker: Worker, bar: tqdm) -> None:
        """Take a worker's reply, if there is one, and bring its episode to the next look."""
        if (attempt := self.running.get(worker)) is None:
            return
        try:
            reply = worker.poll()
        except WorkerFault as fault:
            if attempt.started is None:
                self._start_again(worker, attempt, fault)
            else:
                self._retry(worker, attempt, str(fault), bar)
            return
        if reply is None:
            return
        if reply.made:
            self._check_made(reply)
            self.stillborn[worker] = 0
            self._begin(worker, attempt.episode)
            return
        for part, seconds in reply.seconds.items():
            attempt.timings[part] += seconds
        until = attempt.asked + sum(reply.seconds.values())
        if reply.outcome:
            attempt.outcome = reply.outcome
            attempt.steps += reply.outcome.steps
            if reply.outcome.steps < 1 or attempt.steps > self.protocol.max_steps:
                raise RuntimeError(f"{self.protocol.sim} counted {attempt.steps} steps; see sims/base.py")
        if reply.observation:
            if attempt.instruction != reply.observation.instruction:
                attempt.chunks.clear()  # predicted for another sentence (CALVIN's chains)
            attempt.instruction = reply.observation.instruction
            if self.film.records(attempt.episode):
                attempt.frames.append(reply.observation.images["main"])
                attempt.frame_steps.append(attempt.steps)
        if not (attempt.outcome and attempt.outcome.done):
            attempt.observation = reply.observation
        elif self._filmed(attempt, attempt.outcome) and reply.observation is None:
            self._send(worker, "observe")  # how it ended, for strips and videos only
        else:
            self._next(worker, attempt, until)  # it starts the next episode while this one is written down
            self._finish(attempt, attempt.outcome, until, bar)
            self._listen(worker, bar)  # the next one's first look may be there as well

    def _act(self) -> None:
        """Predict for all workers that wait, in one batch, and send them on."""
        waiting = [(w, a, a.observation) for w, a in self.running.items() if a.observation]
        if not waiting:
            return
        started = time.monotonic()
        chunks = self.policy.predict([replace(o, episode=a.episode, step=a.steps) for _, a, o in waiting])
        seconds = time.monotonic() - started
        for worker in self.running:
            worker.postpone(seconds)
        for (worker, attempt, _), chunk in zip(waiting, chunks, strict=True):
            attempt.timings["infer"] += seconds / len(waiting)
            attempt.observation = None
            attempt.ahead = self._ahead(attempt)
            then = None if attempt.ahead is None else self.protocol.first_seed + attempt.ahead
            self._send(worker, "execute", actions=self._executable(attempt, chunk), look=True, then=then)

    def _ahead(self, attempt: Attempt) -> int | None:
        """What follows this attempt, if that can be said before its end: its last frame is not filmed, and enough is
        left that no worker ends while another keeps an episode back."""
        if len(self.todo) < len(self.running) or self.film.records(attempt.episode):
            return None
        return self._following(attempt)

    def _following(self, attempt: Attempt) -> int | None:
        """The first episode with which no other worker may be going on by now; None where none is left."""
        taken = {other.ahead for other in self.running.values() if other is not attempt}
        return next((episode for episode in self.todo if episode not in taken), None)

    def _executable(self, attempt: Attempt, chunk: ActionChunk) -> np.ndarray:
        """The next ``protocol.execute`` actions (n, A), made of a chunk as the protocol says."""
        if len(chunk.actions) < self.protocol.execute:
            raise UserError(
                f"action chunks of {len(chunk.actions)}",
                f"at least {self.protocol.execute}, which {self.protocol.name} executes of each",
                "train with head.chunk as large, or evaluate under another protocol",
            )
        if not np.isfinite(chunk.actions).all():
            raise UserError("a predicted action that is not finite", "finite actions", "look at the training's loss")
        actions = chunk.actions[: self.protocol.execute]
        if self.protocol.ensemble is not None:
            attempt.chunks.append((attempt.steps, chunk.actions))
            actions = blend(attempt.chunks, attempt.steps, self.protocol.execute, self.protocol.ensemble)
        if self.protocol.open_after is not None:
            actions, attempt.asked_open = delay_opening(actions, attempt.asked_open, self.protocol.open_after)
        return actions

    def _check_made(self, reply: Reply) -> None:
        convention = Convention.from_dict(reply.made["convention"])
        check_same(self.policy.convention, "the policy", convention, self.protocol.sim)
        self.versions = {"vlm4vla": __version__, **reply.made["versions"]}

    def _begin(self, worker: Worker, episode: int) -> None:
        self.running[worker] = Attempt(episode, started=time.monotonic())
        self._send(worker, "reset", seed=self.protocol.first_seed + episode, look=True)

    def _send(self, worker: Worker, do: str, **fields: Any) -> None:
        self.running[worker].asked = time.monotonic()
        worker.send(do, **fields)

    def _next(self, worker: Worker, attempt: Attempt, ended: float) -> None:
        """After ``attempt``: the episode that the worker began when it ``ended``, or another, and at last one of a
        worker that is still starting; or let the worker end."""
        begun = attempt.ahead is not None
        episode = attempt.ahead if begun else self._following(attempt)
        if episode is None and (starting := next((w for w, a in self.running.items() if a.started is None), None)):
            episode = self.running.pop(starting).episode  # this worker can begin it now, and that one may never start
            starting.kill()
            self.todo.append(episode)
        if episode is None:
            del self.running[worker]
            worker.dismiss()
            self.dismissed.append(worker)
            return
        self.todo.remove(episode)
        if begun:
            self.running[worker] = Attempt(episode, started=ended, asked=ended)
            worker.expect()
        else:
            self._begin(worker, episode)

    def _start_again(self, worker: Worker, attempt: Attempt, fault: WorkerFault) -> None:
        """A worker failed before its simulator was made, which is no episode's fault: memory may be short for so many.
        Give it up after ``TRIES`` starts and leave its episode to the others. ``UserError`` where there is none, or
        where it says itself what is wrong and no worker was made yet."""
        self.stillborn[worker] += 1
        refused = fault.told and not self.versions
        if self.stillborn[worker] < TRIES and not refused:
            worker.restart()
            return
        if refused or len(self.running) == 1:
            raise UserError(
                f"the simulator {self.protocol.sim} does not start: {fault}",
                "a simulator that starts",
                "vlm4vla doctor; where memory is short, fewer --workers (what is finished is kept)",
            )
        del self.running[worker]
        worker.kill()
        self.todo.appendleft(attempt.episode)
        tqdm.write(f"a worker does not start and is given up ({len(self.running)} left): {fault}", file=sys.stderr)

    def _retry(self, worker: Worker, attempt: Attempt, fault: str, bar: tqdm) -> None:
        """Start the worker again with the same episode, or record the fault and go on."""
        self.tries[attempt.episode] += 1
        if self.tries[attempt.episode] < TRIES:
            self.running[worker] = Attempt(attempt.episode)
        else:
            self._store(self._result(attempt, None, fault), bar)
            if (episode := self._following(attempt)) is None:
                del self.running[worker]
                worker.kill()
                return
            self.todo.remove(episode)
            self.running[worker] = Attempt(episode)
        worker.restart()

    def _finish(self, attempt: Attempt, outcome: StepOutcome, ended: float, bar: tqdm) -> None:
        assert attempt.started is not None
        attempt.timings["wall"] = ended - attempt.started
        result = self._result(attempt, outcome)  # stored after its film: a kill between repeats both
        if self.film.strips and self.film.wants_strip(attempt.episode):
            write_strip(self.film.strips, attempt.frames, result)
        if self.film.video_folder and self.film.wants_video(outcome.success):
            hz = self.policy.convention.control_hz
            write_video(self.film.video_folder, attempt.frames, attempt.frame_steps, result, hz)
        self._store(result, bar)

    def _result(self, attempt: Attempt, outcome: StepOutcome | None, fault: str | None = None) -> EpisodeResult:
        return EpisodeResult(
            protocol=self.protocol.name,
            episode=attempt.episode,
            seed=self.protocol.first_seed + attempt.episode,
            success=outcome.success if outcome else None,
            steps=attempt.steps,
            credits=outcome.credits if outcome else {},
            instruction=attempt.instruction,
            timings=attempt.timings,
            versions=self.versions,
            fault=fault,
        )

    def _store(self, result: EpisodeResult, bar: tqdm) -> None:
        self.store.add(self.run_id, result)
        if result.success is None:
            self.faults += 1
        else:
            self.finished.add(result.episode)
            self.successes += result.success
        bar.update()
        if self.finished:
            low, high = wilson(self.successes, len(self.finished))
            text = f"success {self.successes / len(self.finished):.0%} [{low:.0%}, {high:.0%}]"
            bar.set_postfix_str(text + (f", {self.faults} faults" if self.faults else ""))

    def _filmed(self, attempt: Attempt, outcome: StepOutcome) -> bool:
        return self.film.wants_strip(attempt.episode) or self.film.wants_video(outcome.success)
