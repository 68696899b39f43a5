"""What the numbers of an action mean. A data set, a policy and a simulator each carry one; a mismatch raises."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from vlm4vla.errors import UserError


@dataclass(frozen=True)
class Convention:
    """The meaning of one action vector and of the camera that goes with it.

    Actions are relative end-effector poses: ``(x, y, z, roll, pitch, yaw, gripper)``, in ``names`` order.
    """

    names: tuple[str, ...]
    """One name per action dimension; the last is the gripper."""
    control: str
    """``delta_ee``: each action moves the *commanded* end-effector pose by that much; ``delta_measured_ee``: the
    commanded pose becomes the *measured* one moved by that much."""
    frame: str
    """The frame of the deltas, e.g. ``base``."""
    rotation: str
    """``euler_xyz`` (extrinsic) or ``axis_angle``, in radians; ``..., unit 0.5 rad`` where 1 stands for that much."""
    position_unit: str
    """``metre``, or how much 1 stands for: ``0.05 metre``."""
    gripper: str
    """``1=open,0=closed``: what the gripper dimension's two values mean. Adapters and converters translate to this,
    whatever their source has, because the heads predict it with a cross-entropy."""
    control_hz: float
    """Actions per simulated second."""
    camera: str
    """Orientation of stored frames. ``upright``: the first row is the top of the picture; ``upright_mirrored``: and its
    left is the scene's right."""

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "Convention":
        """From what JSON or YAML holds; ``UserError`` where that is no convention."""
        known, mend = {f.name for f in fields(cls)}, "mend it, or record or convert the data set again"
        if not isinstance(values, dict) or set(values) != known:
            keys = sorted(map(str, values)) if isinstance(values, dict) else repr(values)
            raise UserError(f"a convention with the keys {keys}", f"exactly the keys {sorted(known)}", mend)
        for name, value in values.items():
            if name == "names":
                good = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(n, str) for n in value)
            elif name == "control_hz":
                good = isinstance(value, int | float) and 0 < value < math.inf
            else:
                good = isinstance(value, str)
            if not good:
                kind = {"names": "a list of texts", "control_hz": "a number above 0"}.get(name, "a text")
                raise UserError(f"a convention with {name}: {value!r}", kind, mend)
        return cls(**{**values, "names": tuple(values["names"])})


MEND = "convert the data set to the simulator's convention, or evaluate on the simulator it was made for"


def check_same(a: Convention, a_name: str, b: Convention, b_name: str, mend: str = MEND) -> None:
    """Raise ``UserError`` naming every field in which two conventions differ."""
    differ = [
        f"{f.name}: {a_name} has {getattr(a, f.name)!r}, {b_name} has {getattr(b, f.name)!r}"
        for f in fields(Convention)
        if getattr(a, f.name) != getattr(b, f.name)
    ]
    if differ:
        raise UserError(
            "; ".join(differ),
            f"{a_name} and {b_name} with one convention",
            mend,
        )


POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
LIBERO = Convention(
    names=POSE,
    control="delta_measured_ee",
    frame="base",
    rotation="axis_angle, unit 0.5 rad",
    position_unit="0.05 metre",
    gripper="1=open,0=closed",
    control_hz=20.0,
    camera="upright_mirrored",
)
"""LIBERO's demonstrations and simulator: robosuite's OSC_POSE in its units of [-1, 1]. The raw gripper is -1 = open,
1 = closed. Raw frames are upside down; everybody rotates them by 180 degrees, which mirrors them."""
CALVIN = Convention(
    names=POSE,
    control="delta_ee",
    frame="base",
    rotation="euler_xyz, unit 0.05 rad",
    position_unit="0.02 metre",
    gripper="1=open,0=closed",
    control_hz=30.0,
    camera="upright",
)
"""CALVIN's ``rel_actions``, in [-1, 1]. The raw gripper is 1 = open, -1 = closed."""
BRIDGE = Convention(
    names=POSE,
    control="delta_ee",
    frame="base",
    rotation="euler_xyz",
    position_unit="metre",
    gripper="1=open,0=closed",
    control_hz=5.0,
    camera="upright",
)
"""Bridge V2 as it is distributed in RLDS, and SimplerEnv's WidowX tasks (whose adapter turns the angles into the
controller's rotation vector)."""
NAMED = {"libero": LIBERO, "calvin": CALVIN, "bridge": BRIDGE}
