"""Named, versioned evaluation protocols: simulator, variant, seeds, horizon and success rule are one name.

Published numbers under another rule are another protocol. GrinningFace: seeds of ``v1`` are for reporting only; every
recipe in this repository was chosen on ``dev`` seeds; demonstrations use a third range (``DEMO_SEED``).

A name may carry options, which make it another protocol with results of its own: ``libero_10/v1+execute=8`` executes
8 actions of each chunk, ``+ensemble=0.01`` averages all chunks that predict a step (``evaluation/rollout.py``).
"""

from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from vlm4vla.errors import UserError, nearest
from vlm4vla.sims import bridge, calvin, libero

DEMO_SEED = 0
"""Demonstration ``i`` of a recording is episode seed ``DEMO_SEED + recording_seed * 1_000_000 + i`` (< 100 M)."""
V1_SEED = 100_000_000
DEV_SEED = 200_000_000
EPISODES = 100
"""What an evaluation runs where nobody says how many."""


@dataclass(frozen=True)
class Protocol:
    name: str
    """``<sim or suite>[/<level>[-<variant>]/<split>]/<version>[+<option>=<value>...]``, e.g.
    ``grinningface/place-cards5/val/v1``."""
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
    num_episodes: int | None = None
    """How many there are; None: any number."""
    image: str | None = None
    """What the simulator does to a picture before the policy's own processor, in words."""
    ensemble: float | None = None
    """Temporal ensembling (arXiv 2304.13705): an executed action is the mean of all predictions for its step, weighted
    by exp(-ensemble x age rank), the oldest first. None: the newest chunk alone."""
    open_after: int | None = None
    """The gripper opens from the so many-th executed action in a row that asks for it. None: when it is asked."""

    def to_dict(self) -> dict:
        """Fields that are None are left out: a field that is added later changes no identity."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def episodes(self, asked: int | None) -> int:
        """How many to run: those asked for; without that ``EPISODES``, or all where there are fewer.

        Raises ``UserError`` where more are asked for than there are.
        """
        if asked is None:
            return min(EPISODES, self.num_episodes or EPISODES)
        self.check_episodes(asked)
        return asked

    def check_episodes(self, episodes: int) -> None:
        """Raises ``UserError`` where there are not so many."""
        if self.num_episodes is not None and episodes > self.num_episodes:
            raise UserError(
                f"{episodes} episodes of {self.name}",
                f"at most {self.num_episodes}",
                f"ask for {self.num_episodes} (eval: --episodes {self.num_episodes})",
            )


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


def _libero() -> list[Protocol]:
    """``{suite}/v1``: layouts made from the episode's seed; ``{suite}/published/v1``: in the published order of resets.

    OpenVLA-OFT, openpi and VLM4VLA agree on all but the number of executed actions (8, 5 and 4) and on openpi's padding
    of the picture.
    """
    rule = "LIBERO's goal predicates hold after any step, which ends the episode; 10 settling steps before do not count"
    return [
        Protocol(
            name=f"{suite}{'/published' if layouts == 'published' else ''}/v1",
            sim="libero",
            sim_args={"suite": suite, "layouts": layouts},
            first_seed=0,
            max_steps=max_steps,
            execute=4,
            success_rule=rule,
            num_episodes=libero.TASKS[suite] * libero.NUM_STATES,
            image=f"agentview at {libero.RENDER_SIZE} px, rotated by 180 degrees, bicubic to the policy's size",
        )
        for suite, max_steps in libero.SUITES.items()
        for layouts in ("seeded", "published")
    ]


def _calvin() -> list[Protocol]:
    """``calvin_abc_d/v1``, and ``calvin_abc_d/tiny/v1`` with the software renderer, for tests without OpenGL."""
    return [
        Protocol(
            name=f"calvin_abc_d{'' if renderer == 'egl' else '/' + renderer}/v1",
            sim="calvin",
            sim_args={"renderer": renderer},
            first_seed=0,
            max_steps=calvin.CHAIN * calvin.STEPS,
            execute=10,
            success_rule=f"all {calvin.CHAIN} instructions of a chain, {calvin.STEPS} steps for each, judged after "
            "every step; credits: how many were fulfilled in a row (length)",
            num_episodes=calvin.NUM_CHAINS,
            image="static camera at 200 px, bicubic to the policy's size",
        )
        for renderer in ("egl", "tiny")
    ]


def _simpler() -> list[Protocol]:
    """``simpler_bridge/ms2/{task}/v1``, judged at the last step, on ManiSkill2_real2sim as published numbers are, and
    ``simpler_bridge/ms3/{task}/v2`` on ManiSkill 3 (v1 moved and started otherwise than SimplerEnv);
    ``.../{task}/any/...``, ended by the first success; ``.../{task}/sticky/...``, judged at the last step with the
    gripper of VLM4VLA's release, which opens from the second action in a row that asks for it (also at an episode's
    start: its first step closes)."""
    last = "the object is on its target after the last step (carrot, stack: and touches nothing else)"
    any_step = "the object is on its target after any step (carrot, stack: and touches nothing else), which ends it"
    variants = (("", "last", last, None), ("any/", "any", any_step, None), ("sticky/", "last", last, 2))
    return [
        Protocol(
            name=f"simpler_bridge/{simulator}/{name}/{variant}{version}",
            sim=sim,
            sim_args={"task": name, "success": success},
            first_seed=0,
            max_steps=task.steps,
            execute=4,
            success_rule=rule,
            num_episodes=bridge.NUM_EPISODES,
            image="640 x 480 over the photograph, bicubic to the policy's square",
            open_after=open_after,
        )
        for simulator, sim, version in (("ms3", "simpler", "v2"), ("ms2", "simpler_ms2", "v1"))
        for name, task in bridge.TASKS.items()
        for variant, success, rule, open_after in variants
    ]


@cache
def _protocols() -> dict[str, Protocol]:
    return {p.name: p for p in (*_grinningface(), *_libero(), *_calvin(), *_simpler())}


def protocol_names() -> list[str]:
    return list(_protocols())


def protocol(name: str) -> Protocol:
    """Raises ``UserError`` naming the nearest protocols where there is none of that name, and on unknown options."""
    known = _protocols()
    plain, *options = name.split("+")
    if plain not in known:
        raise UserError(
            f"no protocol {plain!r}",
            "a name listed by: vlm4vla sims protocols",
            f"nearest: {nearest(plain, list(known))}",
        )
    changes: dict[str, Any] = {}
    for option in options:
        key, _, text = option.partition("=")
        try:
            changes[key] = {"execute": int, "ensemble": float}[key](text)
            if not 0 <= changes[key] < float("inf") or (key, changes[key]) == ("execute", 0):
                raise ValueError(text)
        except (KeyError, ValueError):
            raise UserError(
                f"the option {option!r} of {name}",
                "execute=<steps, 1 or more> or ensemble=<decay, 0 or more>",
                f"vlm4vla eval POLICY --protocol {plain}+execute=8",
            ) from None
    full = "+".join([plain, *(f"{key}={value:g}" for key, value in sorted(changes.items()))])
    if full != name:  # one name for one protocol: results are filed under it
        raise UserError(
            f"the protocol {name}", f"its options once each, in order and shortest form: {full}", "name that"
        )
    return replace(known[plain], name=full, **changes)
