"""A simulator in a process of its own that looks like one in this process."""

from typing import Any

import numpy as np

from vlm4vla.convention import Convention
from vlm4vla.sims.base import StepOutcome
from vlm4vla.sims.worker import Reply, Worker, WorkerFault
from vlm4vla.types import Observation


class Remote:
    """The protocol of ``sims/base.py`` over a worker, blocking. Its expert stays behind.

    Args:
        sim, kwargs, timeout_s, python: see ``Worker``.

    Raises:
        UserError, WorkerFault: as the worker does; what the simulator refuses with ``ValueError`` is one here too.
    """

    def __init__(self, sim: str, kwargs: dict | None = None, timeout_s: float = 120.0, python: str | None = None):
        self.worker = Worker(sim, kwargs or {}, timeout_s, python)
        try:
            made = self.worker.receive().made
        except BaseException:
            self.worker.kill()
            raise
        self.convention, self.versions = Convention.from_dict(made["convention"]), made["versions"]

    def reset(self, seed: int) -> None:
        self._ask("reset", seed=seed)

    def execute(self, actions: np.ndarray) -> StepOutcome:
        outcome = self._ask("execute", actions=actions).outcome
        assert outcome is not None
        return outcome

    def observe(self) -> Observation:
        observation = self._ask("observe").observation
        assert observation is not None
        return observation

    def expert(self) -> np.ndarray:
        raise NotImplementedError("a worker answers no questions about its expert")

    def close(self) -> None:
        self.worker.close()

    def _ask(self, do: str, **fields: Any) -> Reply:
        try:
            return self.worker.ask(do, **fields)
        except WorkerFault as fault:
            if fault.refused:
                raise ValueError(str(fault)) from fault
            raise
