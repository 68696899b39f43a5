"""What the numbers of an action mean. A data set, a policy and a simulator each carry one; a mismatch raises."""

from dataclasses import asdict, dataclass, fields

from vlm4vla.errors import UserError


@dataclass(frozen=True)
class Convention:
    """The meaning of one action vector and of the camera that goes with it.

    Actions are relative end-effector poses: ``(x, y, z, roll, pitch, yaw, gripper)``, in ``names`` order.
    """

    names: tuple[str, ...]
    """One name per action dimension; the last is the gripper."""
    control: str
    """``delta_ee``: each action moves the *commanded* end-effector pose by that much."""
    frame: str
    """The frame of the deltas, e.g. ``base``."""
    rotation: str
    """``euler_xyz`` in radians, extrinsic."""
    position_unit: str
    """``metre``."""
    gripper: str
    """``1=open,0=closed``: what the gripper dimension's two values mean."""
    control_hz: float
    """Actions per simulated second."""
    camera: str
    """Orientation of stored frames: ``upright`` means the first row is the top of the picture."""

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Convention":
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise UserError(
                f"a convention with the keys {sorted(values)}",
                f"exactly the keys {sorted(known)}",
                "record or convert the data set again with this version",
            )
        return cls(**{**values, "names": tuple(values["names"])})


def check_same(a: Convention, a_name: str, b: Convention, b_name: str) -> None:
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
            "convert the data set to the simulator's convention, or evaluate on the simulator it was made for",
        )
