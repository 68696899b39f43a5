"""``check_sim``: what any simulator adapter must keep, in the spirit of Gymnasium's ``check_env``."""

from collections.abc import Callable

import numpy as np

from vlm4vla.sims.base import Sim, StepOutcome
from vlm4vla.sims.remote import Remote
from vlm4vla.types import Observation

SEEDS = (3, 4)
STEP_LIMIT = 10_000
"""Control steps after which an episode counts as endless."""

CAMERAS = ("upright", "upright_mirrored")
LARGE = 100.0
"""An action component that no convention's units make sense of: the adapter must limit it, and stay finite."""


class SimCheckError(AssertionError):
    """An adapter that breaks the protocol of ``sims/base.py``; the message says which rule, and how."""


def check_sim(sim: str | Callable[[], Sim], num_steps: int = 8, python: str | None = None) -> None:
    """Check the protocol on two instances of ``sim``: a name of ``SIMS`` or ``module:Class``, each instance in a
    process of its own (of the interpreter ``python``, where that is given), or a function that builds one here.

    Determinism from the seed to the bit (pixels, states, outcomes), shapes and dtypes, refusals, large actions,
    horizon, no success for doing nothing, close and reopen. Takes an episode and some. Raises ``SimCheckError``.
    """

    def build() -> Sim:
        return Remote(sim, python=python) if isinstance(sim, str) else sim()

    first, second = build(), build()
    try:
        actions = _actions(first, num_steps)
        once = _run(first, SEEDS[0], actions)
        _same(once, _run(first, SEEDS[0], actions), "the same seed and actions, run twice in one instance")
        _same(once, _run(second, SEEDS[0], actions), "the same seed and actions in two instances")
        _chunking(first, actions)
        other = _run(first, SEEDS[1], actions)
        if all(np.array_equal(a, b) for a, b in zip(_pixels(once[0]), _pixels(other[0]), strict=True)):
            raise SimCheckError(f"seeds {SEEDS[0]} and {SEEDS[1]} start with the same pictures")
        _refusals(first, actions)
        _bounds(first, actions)
        _horizon(first)
    finally:
        first.close()
        second.close()
    again = build()
    try:
        _same(once, _run(again, SEEDS[0], actions), "an instance opened after others were closed")
    finally:
        again.close()


Run = tuple[Observation, list[StepOutcome], Observation]


def _actions(sim: Sim, num_steps: int) -> np.ndarray:
    """(n, A): small random motions, gripper now closed, now open."""
    width = len(sim.convention.names)
    rng = np.random.Generator(np.random.PCG64(0))
    actions = rng.uniform(-0.01, 0.01, (num_steps, width)).astype(np.float32)
    actions[:, -1] = np.arange(num_steps) % 2
    return actions


def _run(sim: Sim, seed: int, actions: np.ndarray) -> Run:
    sim.reset(seed)
    before, outcomes = _observe(sim), []
    for action in actions:
        outcomes.append(sim.execute(action[None]))
        if outcomes[-1].done:
            break
    return before, outcomes, _observe(sim)


def _observe(sim: Sim) -> Observation:
    observation = sim.observe()
    if "main" not in observation.images:
        raise SimCheckError(f"cameras {sorted(observation.images)}; the third-person camera must be called main")
    for name, image in observation.images.items():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise SimCheckError(f"camera {name}: {image.dtype} {image.shape}, expected uint8 (height, width, 3)")
    if sim.convention.camera not in CAMERAS:
        raise SimCheckError(f"convention.camera is {sim.convention.camera!r}, expected one of {', '.join(CAMERAS)}")
    if not isinstance(observation.instruction, str) or not observation.instruction.strip():
        raise SimCheckError(f"the instruction {observation.instruction!r}, expected a sentence")
    state = observation.state
    if state is not None and (state.dtype != np.float32 or state.ndim != 1 or not np.isfinite(state).all()):
        raise SimCheckError(f"state {state.dtype} {state.shape}, expected finite float32 (S,)")
    return observation


def _pixels(observation: Observation) -> list[np.ndarray]:
    return [observation.images[name] for name in sorted(observation.images)]


def _same(a: Run, b: Run, what: str) -> None:
    for moment, x, y in (("at the start", a[0], b[0]), ("at the end", a[2], b[2])):
        if x.instruction != y.instruction:
            raise SimCheckError(f"{what}: instructions {x.instruction!r} and {y.instruction!r}")
        if not all(np.array_equal(p, q) for p, q in zip(_pixels(x), _pixels(y), strict=True)):
            raise SimCheckError(f"{what}: other pixels {moment}")
        if (x.state is None) != (y.state is None) or not np.array_equal(x.state, y.state):  # type: ignore[arg-type]
            raise SimCheckError(f"{what}: another state {moment}: {x.state} and {y.state}")
    if a[1] != b[1]:
        raise SimCheckError(f"{what}: outcomes {a[1]} and {b[1]}")


def _chunking(sim: Sim, actions: np.ndarray) -> None:
    """A chunk must be the same as its actions one by one."""
    one = _run(sim, SEEDS[0], actions)
    sim.reset(SEEDS[0])
    outcome = sim.execute(actions)
    after = sim.observe()
    if outcome.steps != len(one[1]) or (outcome.done, outcome.success) != (one[1][-1].done, one[1][-1].success):
        raise SimCheckError(f"a chunk of {len(actions)} came to {outcome}, its actions one by one to {one[1][-1]}")
    if not all(np.array_equal(p, q) for p, q in zip(_pixels(after), _pixels(one[2]), strict=True)):
        raise SimCheckError("a chunk ends in other pixels than its actions one by one")


def _refusals(sim: Sim, actions: np.ndarray) -> None:
    sim.reset(SEEDS[0])
    bad = actions[:1].copy()
    bad[0, 0] = np.nan
    refused = {
        "a negative seed": lambda: sim.reset(-1),
        "an action too short": lambda: sim.execute(actions[:1, :-1]),
        "a single action without the chunk's dimension": lambda: sim.execute(actions[0]),
        "a NaN": lambda: sim.execute(bad),
    }
    for what, call in refused.items():
        try:
            call()
        except ValueError:
            continue
        raise SimCheckError(f"{what} was accepted; expected ValueError")


def _bounds(sim: Sim, actions: np.ndarray) -> None:
    """Far too large actions are limited: the state stays finite, and the next episode does not remember them."""
    sim.reset(SEEDS[0])
    calm = sim.observe()
    sim.execute(np.full_like(actions[:2], LARGE))
    _observe(sim)
    sim.reset(SEEDS[0])
    again = sim.observe()
    if not all(np.array_equal(p, q) for p, q in zip(_pixels(calm), _pixels(again), strict=True)):
        raise SimCheckError("an episode starts with other pixels after one with large actions")


def _horizon(sim: Sim) -> None:
    """Doing next to nothing must end the episode by its step limit, without success."""
    sim.reset(SEEDS[0])
    still = np.zeros((1, len(sim.convention.names)), np.float32)
    for _ in range(STEP_LIMIT):
        outcome = sim.execute(still)
        if outcome.steps != 1:
            raise SimCheckError(f"one action executed, {outcome.steps} reported")
        if outcome.done:
            if outcome.success:
                raise SimCheckError("an episode of zero actions succeeded")
            return
    raise SimCheckError(f"no end after {STEP_LIMIT} steps")
