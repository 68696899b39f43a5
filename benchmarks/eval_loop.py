"""Closed-loop evaluation: this project's loop against a plain sequential one, same simulator and policy, in one run.

    python benchmarks/eval_loop.py --episodes 20 --workers 2

The plain loop is what peers do: one environment in the policy's process, an image rendered after every step. Both
execute the protocol's number of actions of each chunk. Without ``--policy`` a stand-in computes for ``--latency-ms``
per observation and holds the robot still, so that every episode runs to its horizon and both loops do the same steps.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from vlm4vla.convention import Convention
from vlm4vla.evaluation.rollout import BatchPolicy, evaluate
from vlm4vla.sims import make
from vlm4vla.sims.protocols import Protocol, protocol
from vlm4vla.studies.store import Store
from vlm4vla.types import ActionChunk, EpisodeResult, Observation


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


def plain(policy: BatchPolicy, protocol: Protocol, episodes: int, image_size: int) -> list[tuple[bool, int]]:
    """``(success, steps)`` of each episode, one after the other."""
    sim = make(protocol.sim, **protocol.sim_args, image_size=image_size)
    ends = []
    for episode in range(episodes):
        sim.reset(protocol.first_seed + episode)
        observation, steps, queue, done, success = sim.observe(), 0, [], False, False
        while not done:
            if not queue:
                queue = list(policy.predict([observation])[0].actions[: protocol.execute])
            outcome = sim.execute(queue.pop(0)[None])
            observation = sim.observe()
            steps, done, success = steps + outcome.steps, outcome.done, outcome.success
        ends.append((success, steps))
    sim.close()
    return ends


def ours(policy: BatchPolicy, protocol: Protocol, episodes: int, image_size: int, workers: int) -> list[EpisodeResult]:
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "results.sqlite") as store:
        return evaluate(
            policy, protocol, episodes, store, "benchmark", image_size=image_size, workers=workers, progress=False
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="grinningface/place/val/dev")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--latency-ms", type=float, default=8.0)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--policy", type=Path, help="a policy folder instead of the stand-in")
    options = parser.parse_args()
    named = protocol(options.protocol)
    if options.policy:
        import torch

        from vlm4vla.policy import Policy

        torch.set_num_threads(1)
        policy = Policy.load(options.policy)
        image_size = policy.image_size
    else:
        sim = make(named.sim, **named.sim_args, image_size=options.image_size)
        policy = Still(sim.convention, options.latency_ms / 1000, named.execute)
        image_size = options.image_size
        sim.close()

    seconds = {}
    started = time.perf_counter()
    reference = plain(policy, named, options.episodes, image_size)
    seconds["plain"] = time.perf_counter() - started
    for workers in sorted({1, options.workers}):
        started = time.perf_counter()
        results = ours(policy, named, options.episodes, image_size, workers)
        seconds[f"workers_{workers}"] = time.perf_counter() - started
        assert [(r.success, r.steps) for r in results] == reference, "both loops must do the same"
        if workers == 1:
            spent = {part: sum(r.timings[part] for r in results) for part in results[0].timings}
            overhead = 1 - (spent["sim"] + spent["render"] + spent["infer"]) / spent["wall"]
    per_episode = {name: round(value / options.episodes, 4) for name, value in seconds.items()}
    summary = {
        "protocol": named.name,
        "episodes": options.episodes,
        "steps": sum(steps for _, steps in reference),
        "seconds_per_episode": per_episode,
        "ratio": {name: round(seconds["plain"] / value, 2) for name, value in seconds.items()},
        "overhead_with_1_worker": round(overhead, 4),
        "parts_with_1_worker_s": {part: round(value, 3) for part, value in spent.items()},
    }
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
