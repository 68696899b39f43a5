"""The few things that flow between the parts. Shapes: H horizon, A action dimensions."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vlm4vla.convention import Convention

Turns = tuple[tuple[str, str], ...]
"""A conversation: role (system, user, assistant) and text; user and assistant in turn."""


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one moment."""

    images: dict[str, np.ndarray]
    """uint8 (height, width, 3) RGB by camera name; the third-person camera is ``main``."""
    instruction: str
    state: np.ndarray | None = None
    """Optional proprioception, float32 (S,). Policies ignore it unless their spec names it."""
    episode: int = 0
    """Which episode of the protocol this is, and"""
    step: int = 0
    """how many of its actions were executed: for policies that replay or draw, no input of any model."""


@dataclass(frozen=True)
class ActionChunk:
    """Actions in native units: ``actions`` float32 (H, A)."""

    actions: np.ndarray
    convention: Convention


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode. ``success is None`` means an infrastructure fault, never a failure of the policy."""

    protocol: str
    episode: int
    seed: int
    success: bool | None
    steps: int
    credits: dict[str, Any] = field(default_factory=dict)
    """Partial credits by name. GrinningFace: ``execution`` (bool: cube placed on any card) and ``recognition``
    (True / False where the cube was moved to a card, None where it was not)."""
    instruction: str = ""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by part: ``sim``, ``render``, ``infer`` (its share of a batch), and ``wall``: from the start of its reset
    to the end of its last action (of its last picture, where it is filmed), waits for the policy included."""
    versions: dict[str, str] = field(default_factory=dict)
    fault: str | None = None
    """What went wrong with the infrastructure, where ``success is None``."""


class BatchPolicy(Protocol):
    """What is evaluated and served. Deterministic; the others in its batch change an observation's chunk by rounding
    only."""

    @property
    def convention(self) -> Convention: ...

    def predict(self, observations: list[Observation]) -> list[ActionChunk]: ...
