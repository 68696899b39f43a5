"""The scripted expert: a state machine on the simulator's state, without memory, so that it recovers from any state."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vlm4vla.sims.grinningface.env import GrinningFace

GRASP_HEIGHT, RELEASE_HEIGHT, CARRY_HEIGHT, HOVER_HEIGHT = 0.017, 0.026, 0.09, 0.075
"""Heights of the finger pads' centre, metres. Carrying clears a cube that lies on the way."""
STEP = 0.03
"""Largest component of a step, metres: below the controller's limit, so that disturbed steps are rarely cut."""
OVER_CARD, LOW_OVER_CARD = 0.025, 0.05
"""Horizontal distance (metres) at which the cube counts as above the card; more when it is already low."""
ABOVE_CUBE = np.array([0.03, 0.012])
"""Largest offset in x and y (metres) at which the open gripper may come down: less across the fingers."""
CENTRED = 0.009
"""Horizontal distance (metres) from the cube at which the gripper closes."""


def next_action(env: "GrinningFace") -> np.ndarray:
    """float32 (7,): towards the cube, grasp, lift, to the target card, lower, release, retreat."""
    gripper, cube = env.ee_position, env.cube_position
    card = env.card_positions[env.target]
    if env.grasped:
        return _carry(gripper, cube, card)
    if np.linalg.norm(cube[:2] - card) < LOW_OVER_CARD:  # just released over the target
        return _towards(gripper, np.array([*gripper[:2], CARRY_HEIGHT]), opened=True)
    offset = np.abs(cube[:2] - gripper[:2])
    if (offset < ABOVE_CUBE).all():
        low = gripper[2] < GRASP_HEIGHT + 0.008
        return _towards(gripper, np.array([*cube[:2], GRASP_HEIGHT]), opened=not (low and np.hypot(*offset) < CENTRED))
    far = offset.max() > 0.04 or gripper[2] > HOVER_HEIGHT
    height = HOVER_HEIGHT if far else max(gripper[2], HOVER_HEIGHT - 0.02)
    return _towards(gripper, np.array([*cube[:2], height]), opened=True)


def _carry(gripper: np.ndarray, cube: np.ndarray, card: np.ndarray) -> np.ndarray:
    away, low = float(np.linalg.norm(card - cube[:2])), gripper[2] < RELEASE_HEIGHT + 0.012
    if away < (LOW_OVER_CARD if gripper[2] < CARRY_HEIGHT - 0.02 else OVER_CARD):
        return _towards(gripper, np.array([*gripper[:2], RELEASE_HEIGHT]), opened=low)
    lifted = gripper[2] > CARRY_HEIGHT - 0.04
    goal = gripper[:2] + (card - cube[:2] if lifted else 0)
    return _towards(gripper, np.array([*goal, CARRY_HEIGHT]), opened=False)


def _towards(position: np.ndarray, goal: np.ndarray, opened: bool) -> np.ndarray:
    """A straight step of at most ``STEP`` per component."""
    delta = goal - position
    delta *= min(1.0, STEP / max(float(np.abs(delta).max()), 1e-9))
    return np.array([*delta, 0, 0, 0, float(opened)], np.float32)
