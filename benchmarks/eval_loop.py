"""Closed-loop evaluation: this project's loop against a plain sequential one, same simulator and policy, in one run.

    python benchmarks/eval_loop.py --protocol grinningface/place/val/dev+execute=8 --image-size 224 --workers 1 2
    python benchmarks/eval_loop.py --protocol libero_10/v1+execute=8 --image-size 256 --episodes 4
    python benchmarks/eval_loop.py --batching --workers 1 2 4 8 16 32 --step-ms 10 --latency-ms 60 --per-item-ms 2

The plain loop is what peers do: one environment in the policy's process, an image rendered after every step. Both
execute the protocol's number of actions of each chunk. The policy is a stand-in that computes for ``--latency-ms`` per
observation (with ``--elsewhere`` it sleeps for so long a batch, as a process does whose policy is on a GPU) and holds
the robot still, so that every episode runs to its horizon and both loops do the same steps.
Seconds include the start of the processes; CPU seconds are of all processes, and count where other programs take turns.
``times_the_floor`` is by the clock: the floor is what one worker's simulating, rendering and inferring take, divided
among the workers, or what of it needs a core divided among the cores, whichever is longer. On a quiet machine only:
on another, waiting counts as simulating.

``--batching`` sizes a host with many cores: simulators and policy only sleep, the policy ``--latency-ms`` a batch and
``--per-item-ms`` for each observation in it, a control step ``--step-ms`` and a picture ``--render-ms``.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vlm4vla.convention import LIBERO, Convention
from vlm4vla.sims import make
from vlm4vla.sims.base import StepOutcome
from vlm4vla.sims.environments import interpreter
from vlm4vla.sims.protocols import Protocol, protocol
from vlm4vla.types import ActionChunk, Observation

HERE = Path(__file__).resolve()


class Still:
    """Keeps a core busy for a given time per observation, as inference on a CPU does, and does not move."""

    def __init__(self, convention: Convention, latency_s: float, chunk: int):
        self.convention, self._latency_s = convention, latency_s
        self._actions = np.zeros((chunk, len(convention.names)), np.float32)

    def predict(self, observations: list[Observation]) -> list[ActionChunk]:
        end = time.perf_counter() + self._latency_s * len(observations)
        while time.perf_counter() < end:
            pass
        return [ActionChunk(self._actions, self.convention) for _ in observations]


class Asleep(Still):
    """Sleeps for its latency, as a process does that waits for a GPU."""

    def __init__(self, convention: Convention, latency_s: float, per_item_s: float, chunk: int):
        super().__init__(convention, latency_s, chunk)
        self._per_item_s, self.batches, self.times = per_item_s, [], []

    def predict(self, observations: list[Observation]) -> list[ActionChunk]:
        self.batches.append(len(observations))
        time.sleep(self._latency_s + self._per_item_s * len(observations))
        self.times.append(time.perf_counter())
        return [ActionChunk(self._actions, self.convention) for _ in observations]


class Sleeper:
    """A simulator that sleeps for as long as another one would compute."""

    convention = LIBERO

    def __init__(self, step_s: float, render_s: float, image_size: int, max_steps: int):
        self._step_s, self._render_s, self._max_steps = step_s, render_s, max_steps
        self._image = np.zeros((image_size, image_size, 3), np.uint8)

    def reset(self, seed: int) -> None:
        self._steps = 0

    def execute(self, actions: np.ndarray) -> StepOutcome:
        count = min(len(actions), self._max_steps - self._steps)
        time.sleep(self._step_s * count)
        self._steps += count
        return StepOutcome(count, self._steps >= self._max_steps, False)

    def observe(self) -> Observation:
        time.sleep(self._render_s)
        return Observation({"main": self._image}, "sleep")

    def expert(self) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None: ...


def stand_in(options: argparse.Namespace, convention: Convention, chunk: int) -> Still:
    latency_s = options.latency_ms / 1000
    return Asleep(convention, latency_s, 0.0, chunk) if options.elsewhere else Still(convention, latency_s, chunk)


def plain(named: Protocol, options: argparse.Namespace) -> list[tuple[bool, int]]:
    """``(success, steps)`` of each episode, one after the other."""
    sim = make(named.sim, **{**named.sim_args, "image_size": options.image_size, "max_steps": named.max_steps})
    policy = stand_in(options, sim.convention, named.execute)
    ends = []
    for episode in range(options.episodes):
        sim.reset(named.first_seed + episode)
        observation, steps, queue, done, success = sim.observe(), 0, [], False, False
        while not done:
            if not queue:
                queue = list(policy.predict([observation])[0].actions[: named.execute])
            outcome = sim.execute(queue.pop(0)[None])
            observation = sim.observe()
            steps, done, success = steps + outcome.steps, outcome.done, outcome.success
        ends.append((success, steps))
    sim.close()
    return ends


class Stopwatch:
    """Wall-clock and CPU seconds, children that have ended included."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._spent()

    @staticmethod
    def _spent() -> float:
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(use.ru_utime + use.ru_stime for use in uses)

    def read(self, episodes: int) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self._wall, self._spent() - self._cpu
        return {"seconds_per_episode": wall / episodes, "cpu_s_per_episode": cpu / episodes}


def ours(policy: Still, named: Protocol, episodes: int, image_size: int, workers: int) -> list:
    from vlm4vla.evaluation.rollout import evaluate
    from vlm4vla.studies.store import Store

    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "results.sqlite") as store:
        return evaluate(
            policy, named, episodes, store, "benchmark", image_size=image_size, workers=workers, progress=False
        )


def run_plain(sim: str) -> list[tuple[bool, int]]:
    """``plain`` in a process of its own: in the simulator's interpreter, where that is another one."""
    path = os.pathsep.join([str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [interpreter(sim), str(HERE), "--plain", *sys.argv[1:]],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    return [tuple(end) for end in json.loads(done.stdout.splitlines()[-1])]


def spread(values: list[float]) -> str:
    """Median, smallest and largest over the rounds."""
    return f"{np.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"


def compare(options: argparse.Namespace) -> dict:
    named, cores = protocol(options.protocol), len(os.sched_getaffinity(0))
    convention = LIBERO if named.sim == "libero" else make(named.sim, **named.sim_args).convention
    policy = stand_in(options, convention, named.execute)
    rounds: list[dict[str, dict[str, float]]] = []
    overheads, parts, reference = [], [], []
    for _ in range(options.rounds):
        watch, table = Stopwatch(), {}
        reference = run_plain(named.sim)
        table["plain"] = watch.read(options.episodes)
        for workers in options.workers:
            watch = Stopwatch()
            results = ours(policy, named, options.episodes, options.image_size, workers)
            table[f"{workers} workers"] = row = watch.read(options.episodes)
            assert [(r.success, r.steps) for r in results] == reference, "both loops must do the same"
            if workers == 1:
                spent = {part: sum(r.timings[part] for r in results) / options.episodes for part in results[0].timings}
                parts.append(spent)
                overheads.append(1 - (spent["sim"] + spent["render"] + spent["infer"]) / spent["wall"])
            if parts:
                work = sum(parts[-1][part] for part in ("sim", "render", "infer"))
                here = work - parts[-1]["infer"] * options.elsewhere
                floor = max(work / workers, here / cores)
                row["times_the_floor"] = row["seconds_per_episode"] / floor
            row["times_faster"] = table["plain"]["seconds_per_episode"] / row["seconds_per_episode"]
            row["times_less_cpu"] = table["plain"]["cpu_s_per_episode"] / row["cpu_s_per_episode"]
        rounds.append(table)
    return {
        "protocol": named.name,
        "image_size": options.image_size,
        "latency_ms": options.latency_ms,
        "elsewhere": options.elsewhere,
        "rounds": options.rounds,
        "episodes": options.episodes,
        "steps": sum(steps for _, steps in reference),
        "loops": {
            loop: {figure: spread([table[loop][figure] for table in rounds]) for figure in rounds[0][loop]}
            for loop in rounds[0]
        },
        "overhead_with_1_worker": spread(overheads) if overheads else "",
        "parts_with_1_worker_s": {part: spread([spent[part] for spent in parts]) for part in (parts or [{}])[0]},
        "load_average": os.getloadavg(),
    }


def batching(options: argparse.Namespace) -> dict:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    arguments = {"step_s": options.step_ms / 1000, "render_s": options.render_ms / 1000}
    rows = {}
    for workers in options.workers:
        named = Protocol("sleep/v1", "eval_loop:Sleeper", arguments, first_seed=0, max_steps=100, execute=8)
        policy = Asleep(LIBERO, options.latency_ms / 1000, options.per_item_ms / 1000, 8)
        episodes = max(options.episodes, 4 * workers)
        ours(policy, named, episodes, options.image_size, workers)
        busy = sum(options.latency_ms + options.per_item_ms * n for n in policy.batches) / 1000
        wall = policy.times[-1] - policy.times[0]  # processes start before it
        rows[workers] = {
            "episodes_per_minute": round(60 * episodes / wall, 1),
            "mean_batch": round(sum(policy.batches) / len(policy.batches), 2),
            "policy_busy": round(busy / wall, 3),
        }
    names = ("step_ms", "render_ms", "latency_ms", "per_item_ms", "image_size")
    return {name: getattr(options, name) for name in names} | {"workers": rows, "load_average": os.getloadavg()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="grinningface/place/val/dev")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1, help="in each, every loop runs once: they take turns")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--latency-ms", type=float, default=8.0)
    parser.add_argument("--elsewhere", action="store_true", help="the policy does not take a core of this machine")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batching", action="store_true")
    parser.add_argument("--per-item-ms", type=float, default=2.0)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--render-ms", type=float, default=5.0)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        named = protocol(options.protocol)
        print(json.dumps(plain(named, options)))
    else:
        print(json.dumps((batching if options.batching else compare)(options), indent=1))


if __name__ == "__main__":
    main()
