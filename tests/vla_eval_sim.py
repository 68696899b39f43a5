"""Our simulators as a benchmark of vla-eval's harness."""

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import IMAGE_RGB, LANGUAGE, DimSpec

from vlm4vla.sims import make

ACTION = DimSpec("actions", 7, "raw")


class SimBenchmark(StepBenchmark):
    """Episode ``i`` has the seed ``first_seed + i``."""

    def __init__(self, sim: str, sim_args: dict, first_seed: int, max_steps: int):
        super().__init__()
        self._sim = make(sim, **sim_args)
        self._first_seed, self._max_steps = first_seed, max_steps

    def get_tasks(self):
        return [{"name": "all"}]

    def reset(self, task):
        self._sim.reset(self._first_seed + task["episode_idx"])
        return self._sim.observe()

    def step(self, action):
        outcome = self._sim.execute(np.asarray(action["actions"], np.float32)[None])
        return StepResult(self._sim.observe(), float(outcome.success), outcome.done, {})

    def make_obs(self, raw_obs, task):
        return {"images": {"agentview": raw_obs.images["main"]}, "task_description": raw_obs.instruction}

    def get_step_result(self, step_result):
        return {"success": bool(step_result.reward)}

    def get_metadata(self):
        return {"max_steps": self._max_steps}

    def get_action_spec(self):
        return {"actions": ACTION}

    def get_observation_spec(self):
        return {"agentview": IMAGE_RGB, "language": LANGUAGE}

    def cleanup(self):
        self._sim.close()
