"""Named, versioned evaluation protocols: simulator, variant, seeds, horizon and success rule are one name.

Published numbers under another rule are another protocol. Seeds of ``v1`` are for reporting only; every recipe in
this repository was chosen on ``dev`` seeds. Demonstrations use a third range (``DEMO_SEED``).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

DEMO_SEED = 0
"""Demonstration ``i`` of a recording is episode seed ``DEMO_SEED + recording_seed * 1_000_000 + i`` (< 100 M)."""
V1_SEED = 100_000_000
DEV_SEED = 200_000_000


@dataclass(frozen=True)
class Protocol:
    name: str
    """``<sim>/<level>[-<variant>]/<split>/<version>``, e.g. ``grinningface/place-cards5/val/v1``."""
    sim: str
    """Key of ``sims.SIMS``."""
    sim_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the simulator, without ``image_size`` (the policy's) and without run-time choices."""
    first_seed: int = V1_SEED
    """Episode ``i`` has seed ``first_seed + i``: the same initial states for every policy, comparisons are paired."""
    max_steps: int = 50
    execute: int = 4
    """Actions executed of each predicted chunk."""
    success_rule: str = ""
    """In words, as measured by the simulator."""

    def to_dict(self) -> dict:
        return asdict(self)
