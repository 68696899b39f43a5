"""The simulator protocol. An adapter is one file, lists its non-obvious behaviours on top, and passes ``check_sim``."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vlm4vla.convention import Convention
from vlm4vla.types import Observation


@dataclass(frozen=True)
class StepOutcome:
    """What came of executing a chunk (nothing is rendered for it)."""

    steps: int
    """Actions executed; fewer than were given when the episode ended inside the chunk."""
    done: bool
    """The episode is over: decided, or out of steps."""
    success: bool
    credits: dict[str, Any] = field(default_factory=dict)


class Sim(Protocol):
    """One environment. No torch, no threads; one per process (``sims/worker.py``).

    It is built with ``image_size`` and ``max_steps``, and with ``cameras`` (names, ``main`` first) where a policy needs
    others than ``main``: one that has no such argument is refused then.
    """

    convention: Convention

    def reset(self, seed: int) -> None:
        """Start the episode that ``seed`` determines to the bit. Raises ``ValueError`` on a negative seed."""
        ...

    def execute(self, actions: np.ndarray) -> StepOutcome:
        """Execute float (n, A) actions in native units, one control step each, stopping where the episode ends.

        Raises ``ValueError`` on a wrong shape or non-finite numbers. Nothing is rendered.
        """
        ...

    def observe(self) -> Observation:
        """Render what a policy sees now (uint8 HWC, upright)."""
        ...

    def expert(self) -> np.ndarray:
        """The scripted expert's next action from here, float32 (A,); ``NotImplementedError`` where there is none."""
        ...

    def close(self) -> None: ...


def check_actions(actions: np.ndarray, convention: Convention) -> np.ndarray:
    """``actions`` as float64 (n, A). Raises ``ValueError`` on another shape or numbers that are not finite."""
    actions, width = np.asarray(actions, dtype=float), len(convention.names)
    if actions.ndim != 2 or actions.shape[1] != width or not len(actions):
        raise ValueError(f"actions of shape {actions.shape}, expected (n, {width}), n >= 1")
    if not np.isfinite(actions).all():
        raise ValueError("actions with non-finite numbers")
    return actions
