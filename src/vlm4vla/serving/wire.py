"""Actions as other projects' environments and policies write them, and their conversion to and from our conventions.

Inside, a gripper is 1 = open, 0 = closed, and each benchmark's poses keep the units of its data (``convention.py``).
Outside, everybody has an own form; a wrong one still moves the robot, wrongly. So a form is named, never guessed, and
only a policy of the form's convention can be asked for it. A = 7: x, y, z, three of rotation, gripper.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from vlm4vla.convention import BRIDGE, CALVIN, LIBERO, Convention, check_same
from vlm4vla.errors import UserError, nearest

NATIVE = "native"
"""No conversion: the policy's own convention, which the server's metadata names."""


@dataclass(frozen=True)
class Form:
    """One way to write an action of ``convention``."""

    convention: Convention
    gripper_open: float
    gripper_closed: float
    position: float = 1.0
    """One unit of the convention in units of the form."""
    rotation: float = 1.0
    rotation_vector: bool = False
    """The convention's angles about the axes x, y, z (extrinsic) become a rotation vector."""

    def written(self, actions: np.ndarray) -> np.ndarray:
        """(..., 7) of ``convention`` -> this form, float32."""
        values = np.array(actions, np.float32)
        values[..., :3] *= self.position
        values[..., 3:6] *= self.rotation
        if self.rotation_vector:
            turned = Rotation.from_euler("xyz", values[..., 3:6].reshape(-1, 3)).as_rotvec()
            values[..., 3:6] = turned.reshape(values[..., 3:6].shape)
        values[..., 6] = np.where(values[..., 6] > 0.5, self.gripper_open, self.gripper_closed)
        return values

    def read(self, actions: np.ndarray) -> np.ndarray:
        """(..., 7) of this form -> ``convention``, float32. The gripper becomes 1 or 0 at the middle of the form's two
        values, where its environments cut as well."""
        values = np.array(actions, np.float32)
        if self.rotation_vector:
            turned = Rotation.from_rotvec(values[..., 3:6].reshape(-1, 3)).as_euler("xyz")
            values[..., 3:6] = turned.reshape(values[..., 3:6].shape)
        values[..., :3] /= self.position
        values[..., 3:6] /= self.rotation
        middle = (self.gripper_open + self.gripper_closed) / 2
        is_open = values[..., 6] > middle if self.gripper_open > self.gripper_closed else values[..., 6] < middle
        values[..., 6] = is_open
        return values


FORMS = {
    # robosuite's OSC_POSE: LIBERO's env.step, openpi's LIBERO policies
    "libero": Form(LIBERO, gripper_open=-1, gripper_closed=1),
    # OpenVLA and others trained on LIBERO in RLDS, whose loader turns the gripper round
    "libero_rlds": Form(LIBERO, gripper_open=1, gripper_closed=0),
    # CALVIN's rel_actions
    "calvin": Form(CALVIN, gripper_open=1, gripper_closed=-1),
    # vla-eval's CALVIN benchmark: metres and radians
    "calvin_metric": Form(CALVIN, gripper_open=1, gripper_closed=-1, position=0.02, rotation=0.05),
    # policies trained on Bridge V2 in RLDS (OpenVLA)
    "bridge": Form(BRIDGE, gripper_open=1, gripper_closed=0),
    # SimplerEnv's env.step on WidowX, vla-eval's SimplerEnv benchmark
    "simpler": Form(BRIDGE, gripper_open=1, gripper_closed=-1, rotation_vector=True),
}
"""By the name that ``--form`` takes."""


def form(name: str) -> Form | None:
    """The named form, None for ``native``; ``UserError`` where there is none of that name."""
    if name != NATIVE and name not in FORMS:
        known = [NATIVE, *FORMS]
        raise UserError(f"the form {name!r}", f"one of {', '.join(known)}", f"nearest: {nearest(name, known)}")
    return FORMS.get(name)


def forms_of(convention: Convention) -> list[str]:
    """The forms in which actions of ``convention`` can be written."""
    return [NATIVE, *(name for name, known in FORMS.items() if known.convention == convention)]


def check_form(name: str, convention: Convention) -> None:
    """Raise ``UserError`` unless actions of ``convention`` can be written in the form ``name``."""
    if known := form(name):
        check_same(convention, "the policy", known.convention, f"the form {name!r}")
