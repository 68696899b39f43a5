"""The scripted expert: a state machine on the simulator's state, without memory, so that it recovers from any state."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vlm4vla.sims.grinningface.env import GrinningFace

GRASP_HEIGHT, RELEASE_HEIGHT, CARRY_HEIGHT, HOVER_HEIGHT = 0.017, 0.026, 0.09, 0.075
"""Heights of the finger pads' centre, metres. Carrying clears a cube that lies on the way."""
STEP = 0.03
"""Largest component of a step, metres: below the controller's limit, so that disturbed steps are rarely cut."""
OVER_CARD, OVER_CUBE = 0.025, 0.009
"""Horizontal distances (metres) at which the gripper counts as above the card or the cube."""


def next_action(env: "GrinningFace") -> np.ndarray:
    """float32 (7,): towards the cube, grasp, lift, to the target card, lower, release, retreat."""
    gripper, cube = env.ee_position, env.cube_position
    card = env.card_positions[env.target]
    goal = gripper.copy()
    if env.grasped:
        return _carry(gripper, cube, card)
    if np.linalg.norm(cube[:2] - card) < OVER_CARD * 2:  # just released over the target
        goal[2] = CARRY_HEIGHT
        return _towards(gripper, goal, opened=True)
    away = float(np.linalg.norm(cube[:2] - gripper[:2]))
    if away > OVER_CUBE:
        goal[:2] = cube[:2]
        goal[2] = HOVER_HEIGHT if away > 0.04 or gripper[2] > HOVER_HEIGHT else max(gripper[2], HOVER_HEIGHT - 0.02)
        return _towards(gripper, goal, opened=True)
    goal[:2], goal[2] = cube[:2], GRASP_HEIGHT
    return _towards(gripper, goal, opened=gripper[2] > GRASP_HEIGHT + 0.008)


def _carry(gripper: np.ndarray, cube: np.ndarray, card: np.ndarray) -> np.ndarray:
    goal, away = gripper.copy(), float(np.linalg.norm(card - cube[:2]))
    if away < OVER_CARD:
        goal[2] = RELEASE_HEIGHT
        return _towards(gripper, goal, opened=gripper[2] < RELEASE_HEIGHT + 0.012)
    goal[2] = CARRY_HEIGHT
    if gripper[2] > CARRY_HEIGHT - 0.04:
        goal[:2] += card - cube[:2]
    return _towards(gripper, goal, opened=False)


def _towards(position: np.ndarray, goal: np.ndarray, opened: bool) -> np.ndarray:
    """A straight step of at most ``STEP`` per component."""
    delta = goal - position
    delta *= min(1.0, STEP / max(float(np.abs(delta).max()), 1e-9))
    return np.array([*delta, 0, 0, 0, float(opened)], np.float32)
