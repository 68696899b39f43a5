"""One MuJoCo scene: the model with its state, cards, colours, arm poses and picture. Physics is in ``env.py``.

Non-obvious: a card's texture is turned by a quarter, because MuJoCo maps a box's texture along its own axes; the camera
looks at the robot from the front, so the picture's right is +y and its bottom is +x.
"""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's names come from compiled modules without type stubs.)

from collections.abc import Sequence

import mujoco
import numpy as np

from vlm4vla.errors import UserError
from vlm4vla.sims.grinningface import emoji
from vlm4vla.sims.grinningface.control import DOWN, REST_JOINTS, InverseKinematics
from vlm4vla.sims.grinningface.model import (
    ARM_JOINTS,
    CARD_HALF,
    CARD_HEIGHT,
    CARD_PIXELS,
    FINGER_OPEN,
    MAX_CARDS,
    TABLE_COLOUR,
    WALL_COLOUR,
    build_model,
)
from vlm4vla.sims.grinningface.render import Renderer

NUM_ARM = len(ARM_JOINTS)
AWAY = np.array([0.0, 0.0, -1.0])
"""Where unused cards and an absent cube are kept: below the table."""
_SOLID = np.ones(6, np.uint8)
"""Geom groups that a line of sight can hit: all."""


class Scene:
    """Model, state and camera. The renderer starts with the first picture."""

    def __init__(self, image_size: int):
        if not 32 <= image_size <= 224:
            raise UserError(f"image_size {image_size}", "32 to 224 pixels", "mend data.image_size")
        self.image_size = image_size
        self.model = build_model(image_size)
        self.data = mujoco.MjData(self.model)
        self.ik = InverseKinematics(self.model)
        self.codepoints: tuple[int, ...] = ()
        self._shown: list[int | None] = [None] * MAX_CARDS
        self._renderer: Renderer | None = None
        self._site = self.model.site("ee").id
        self._cube_body = self.model.body("cube").id
        self._cube_qpos = int(self.model.jnt_qposadr[self.model.joint("cube").id])
        self._fingers = [int(self.model.jnt_qposadr[self.model.joint(n).id]) for n in ("finger_left", "finger_right")]

    def clear(self) -> None:
        """Back to the model's initial state, without cards, in the base colours."""
        mujoco.mj_resetData(self.model, self.data)
        self.set_colours(TABLE_COLOUR, WALL_COLOUR)
        self.set_cards((), np.empty((0, 2)))

    def set_cards(self, codepoints: Sequence[int], positions: np.ndarray) -> None:
        """Lay out cards at ``positions`` (n, 2) metres, n <= 9."""
        self.codepoints = tuple(codepoints)
        self.data.mocap_pos[:] = AWAY
        self.data.mocap_pos[: len(positions), :2] = positions
        self.data.mocap_pos[: len(positions), 2] = CARD_HEIGHT / 2

    def set_colours(self, table: Sequence[float], wall: Sequence[float]) -> None:
        """RGB in [0, 1]; the table's is a tint of its wood."""
        self.model.mat_rgba[self.model.material("table").id, :3] = table
        self.model.mat_rgba[self.model.material("wall").id, :3] = wall

    def set_cube(self, position: np.ndarray) -> None:
        self.data.qpos[self._cube_qpos : self._cube_qpos + 7] = [*position, 1, 0, 0, 0]

    def set_arm(self, position: np.ndarray, rotation: np.ndarray = DOWN, opening: float = FINGER_OPEN) -> np.ndarray:
        """Put the arm there without physics -> its joint angles (6,)."""
        joints, _ = self.ik.solve(position, rotation, REST_JOINTS, iterations=60)
        self.data.qpos[:NUM_ARM] = joints
        self.data.qpos[self._fingers] = opening
        return joints

    def forward(self) -> None:
        """Make every derived quantity agree with the state."""
        mujoco.mj_forward(self.model, self.data)

    @property
    def ee_position(self) -> np.ndarray:
        return self.data.site_xpos[self._site].copy()

    @property
    def ee_rotation(self) -> np.ndarray:
        return self.data.site_xmat[self._site].reshape(3, 3).copy()

    @property
    def gripper_width(self) -> float:
        """Metres between the pads."""
        return float(self.data.qpos[self._fingers].sum())

    @property
    def cube_position(self) -> np.ndarray:
        return self.data.xpos[self._cube_body].copy()

    @property
    def card_positions(self) -> np.ndarray:
        """(n, 2) metres."""
        return self.data.mocap_pos[: len(self.codepoints), :2].copy()

    def pixel(self, point: np.ndarray) -> np.ndarray:
        """World point(s) (..., 3) -> (u, v) (..., 2) in [0, 1] from the picture's top left (outside: not in view)."""
        axes = self.data.cam_xmat[0].reshape(3, 3)
        x, y, z = np.moveaxis((np.asarray(point, float) - self.data.cam_xpos[0]) @ axes, -1, 0)
        focal = 0.5 / np.tan(np.radians(self.model.cam_fovy[0]) / 2)
        return np.stack([0.5 - focal * x / z, 0.5 + focal * y / z], axis=-1)

    def card_boxes(self) -> np.ndarray:
        """(n, 4): u and v of each card's centre, its width and height in the picture."""
        corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * CARD_HALF
        points = np.zeros((len(self.codepoints), 4, 3))
        points[:, :, :2] = self.card_positions[:, None] + corners
        uv = self.pixel(points)
        centres = self.pixel(np.pad(self.card_positions, ((0, 0), (0, 1))))
        return np.concatenate([centres, uv.max(1) - uv.min(1)], axis=1)

    def sees(self, points: np.ndarray) -> np.ndarray:
        """Points on the table (..., 3) -> bool (...): in the picture, and neither arm nor cube is in front."""
        flat = np.asarray(points, float).reshape(-1, 3)
        eye = self.data.cam_xpos[0].copy()
        uv = self.pixel(flat)
        seen = np.asarray((uv.min(axis=1) >= 0) & (uv.max(axis=1) <= 1))
        hit = np.zeros(1, np.int32)
        for i in np.flatnonzero(seen):
            ray = flat[i] - eye
            distance = mujoco.mj_ray(self.model, self.data, eye, ray, _SOLID, True, -1, hit)
            # The direction is not normalised, so the table itself is met at about 1.
            seen[i] = distance < 0 or distance > 0.98
        return seen.reshape(points.shape[:-1])

    def render(self) -> np.ndarray:
        """uint8 (image_size, image_size, 3), upright."""
        if self._renderer is None:
            self._renderer = Renderer(self.model, self.image_size, "main")
        for i, codepoint in enumerate(self.codepoints):
            if self._shown[i] != codepoint:
                pixels = np.rot90(emoji.picture(codepoint, CARD_PIXELS))
                texture = self.model.texture(f"card{i}").id
                start = self.model.tex_adr[texture]
                self.model.tex_data[start : start + pixels.size] = pixels.ravel()
                self._renderer.upload(texture)
                self._shown[i] = codepoint
        return self._renderer.render(self.data)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
            self._shown = [None] * MAX_CARDS
