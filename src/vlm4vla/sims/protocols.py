"""Named, versioned evaluation protocols: simulator, variant, seeds, horizon and success rule are one name.

Published numbers under another rule are another protocol. Seeds of ``v1`` are for reporting only; every recipe in
this repository was chosen on ``dev`` seeds. Demonstrations use a third range (``DEMO_SEED``).
"""

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from vlm4vla.errors import UserError, nearest

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


def _grinningface() -> list[Protocol]:
    """``grinningface/{level}[-{variant}]/{split}/{version}``.

    Splits: ``train`` (emojis of the demonstrations, new layouts), ``val`` (emojis never demonstrated), ``hard`` (emojis
    in look-alike groups, never demonstrated) and, as ``v1`` only, ``id`` (the episodes of a recording with seed 0).
    """
    rule = (
        "the cube rests (not grasped, robot joints below 0.2 rad/s) with its centre within 0.07 x sqrt 2 (0.099) m "
        "of the target card's centre, that card being the nearest; resting so on any card ends the episode"
    )
    variants = ("base", "cards5", "lookalike", "layout", "colours", "paraphrase")
    rows = []
    for level, max_steps in (("place", 30), ("pick_place", 50)):
        for variant in variants:
            for split in ("hard",) if variant == "lookalike" else ("train", "val", "hard"):
                for version, seed in (("v1", V1_SEED), ("dev", DEV_SEED)):
                    rows.append((level, variant, split, version, split, seed, max_steps))
        rows.append((level, "base", "id", "v1", "train", DEMO_SEED, max_steps))
    return [
        Protocol(
            name=f"grinningface/{level}{'' if variant == 'base' else '-' + variant}/{split}/{version}",
            sim="grinningface",
            sim_args={"level": level, "split": emojis, "variant": variant, "max_steps": max_steps},
            first_seed=seed,
            max_steps=max_steps,
            execute=4,
            success_rule=rule,
        )
        for level, variant, split, version, emojis, seed, max_steps in rows
    ]


@cache
def _protocols() -> dict[str, Protocol]:
    return {p.name: p for p in _grinningface()}


def protocol_names() -> list[str]:
    return list(_protocols())


def protocol(name: str) -> Protocol:
    """Raises ``UserError`` naming the nearest protocols where there is none of that name."""
    known = _protocols()
    if name not in known:
        raise UserError(
            f"no protocol {name!r}",
            "a name listed by: vlm4vla sims protocols",
            f"nearest: {nearest(name, list(known))}",
        )
    return known[name]
