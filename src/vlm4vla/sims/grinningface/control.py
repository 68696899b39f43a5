"""From relative end-effector actions to joint targets: rotations, limits, damped least-squares inverse kinematics."""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's names come from compiled modules without type stubs.)

import mujoco
import numpy as np

from vlm4vla.sims.grinningface.model import ARM_JOINTS, JOINT_RANGE

DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
"""Orientation of the ``ee`` site with the gripper pointing down: its x axis is -z, the fingers open along y."""
MAX_POSITION_STEP, MAX_ROTATION_STEP = 0.05, 0.25
"""Metres and radians per control step and component; larger deltas are limited."""
WORKSPACE = np.array([[0.12, -0.32, 0.012], [0.56, 0.32, 0.32]])
"""Lowest and highest commanded position, metres."""
MAX_TILT = 0.8
"""Largest angle (radians) between the commanded orientation and ``DOWN``."""
REST_JOINTS = np.array([0.0, -0.35, 0.55, 0.0, 1.37, 0.0])
"""Where the search starts: elbow up, gripper down."""
_LOW, _HIGH = np.array(JOINT_RANGE).T
_DAMPING = 1e-4 * np.eye(6)


def rotation_from_vector(vector: np.ndarray) -> np.ndarray:
    """(3,) axis times angle -> (3, 3)."""
    quat, matrix = np.empty(4), np.empty(9)
    angle = float(np.linalg.norm(vector))
    mujoco.mju_axisAngle2Quat(quat, vector / angle if angle > 0 else np.array([1.0, 0.0, 0.0]), angle)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)


def vector_from_rotation(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) -> (3,) axis times angle."""
    quat, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quat, matrix.ravel())
    mujoco.mju_quat2Vel(vector, quat, 1.0)
    return vector


def rotation_from_euler(euler: np.ndarray) -> np.ndarray:
    """(3,) roll, pitch, yaw, extrinsic x-y-z -> (3, 3)."""
    roll, pitch, yaw = (rotation_from_vector(axis * angle) for axis, angle in zip(np.eye(3), euler, strict=True))
    return yaw @ pitch @ roll


def euler_from_rotation(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) -> (3,) roll, pitch, yaw, extrinsic x-y-z."""
    return np.array(
        [
            np.arctan2(matrix[2, 1], matrix[2, 2]),
            np.arctan2(-matrix[2, 0], np.hypot(matrix[0, 0], matrix[1, 0])),
            np.arctan2(matrix[1, 0], matrix[0, 0]),
        ]
    )


def limit_command(
    position: np.ndarray, rotation: np.ndarray, action: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Move a commanded pose by one action (A,) within all limits -> position, rotation, whether a limit acted."""
    delta, turn = action[:3], action[3:6]
    position_step = delta.clip(-MAX_POSITION_STEP, MAX_POSITION_STEP)
    rotation_step = turn.clip(-MAX_ROTATION_STEP, MAX_ROTATION_STEP)
    wanted = position + position_step
    reached = wanted.clip(*WORKSPACE)
    turned = rotation_from_euler(rotation_step) @ rotation if rotation_step.any() else rotation
    tilt = vector_from_rotation(turned @ DOWN.T)
    angle = float(np.linalg.norm(tilt))
    if angle > MAX_TILT:
        turned = rotation_from_vector(tilt * (MAX_TILT / angle)) @ DOWN
    limited = angle > MAX_TILT or any(
        (np.abs(a - b) > 1e-6).any() for a, b in ((delta, position_step), (turn, rotation_step), (wanted, reached))
    )
    return reached, turned, limited


class InverseKinematics:
    """Damped least squares on a private copy of the state."""

    def __init__(self, model: mujoco.MjModel):
        self._model, self._data = model, mujoco.MjData(model)
        self._site = model.site("ee").id
        self._jacobian = np.zeros((6, model.nv))

    def solve(
        self, position: np.ndarray, rotation: np.ndarray, start: np.ndarray, iterations: int = 15
    ) -> tuple[np.ndarray, float]:
        """Joint angles (6,) near ``start`` that bring the ``ee`` site to the pose, and the error left (m, rad)."""
        model, data, num = self._model, self._data, len(ARM_JOINTS)
        joints, error = start.copy(), np.empty(6)
        for _ in range(iterations):
            data.qpos[:num] = joints
            mujoco.mj_kinematics(model, data)
            error[:3] = position - data.site_xpos[self._site]
            error[3:] = vector_from_rotation(rotation @ data.site_xmat[self._site].reshape(3, 3).T)
            if np.abs(error).max() < 2e-4:
                break
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacSite(model, data, self._jacobian[:3], self._jacobian[3:], self._site)
            J = self._jacobian[:, :num]
            step = J.T @ np.linalg.solve(J @ J.T + _DAMPING, error)
            joints = (joints + step.clip(-0.3, 0.3)).clip(_LOW, _HIGH)
        return joints, float(np.abs(error).max())
