"""Simulators by name. Outsiders name theirs as ``module:Class``."""

import importlib
import inspect
import sys
from typing import Any

from vlm4vla.errors import UserError, nearest
from vlm4vla.sims.base import Sim
from vlm4vla.sims.environments import ENVIRONMENTS, assets_version

SIMS = {
    "grinningface": "vlm4vla.sims.grinningface.env:GrinningFace",
    "calvin": "vlm4vla.sims.calvin:Calvin",
    "libero": "vlm4vla.sims.libero:Libero",
    "simpler": "vlm4vla.sims.simpler:Simpler",
    "simpler_ms2": "vlm4vla.sims.simpler_ms2:SimplerMs2",
}
"""Name -> ``module:Class``; imported on use, so that a simulator's packages are needed by its users only."""

PACKAGES = ("numpy", "mujoco", "gymnasium", "mani_skill", "sapien", "robosuite", "pybullet")
"""Those that a process has imported are named with their versions: they can change a result."""


def make(name: str, **kwargs: Any) -> Sim:
    """Build a simulator. Raises ``UserError`` on an unknown name, cameras it does not have, or missing packages."""
    target = SIMS.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise UserError(
            f"the simulator {name!r}",
            f"one of {', '.join(SIMS)}, or module:Class",
            f"nearest: {nearest(name, [*SIMS])}",
        )
    if name not in SIMS:
        mend = f"check that {module} is on PYTHONPATH"
    elif name in ENVIRONMENTS:
        mend = f"vlm4vla sims setup {name}, or install its packages for {sys.executable}"
    else:
        mend = f'pip install "vlm4vla[{name}]"'
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the simulator {name!r} does not import: {error}", f"{target} and its packages", mend
        ) from error
    if "cameras" in kwargs and "cameras" not in inspect.signature(cls).parameters:
        raise UserError(
            f"the simulator {name}, which renders the camera main alone",
            f"the cameras {', '.join(kwargs['cameras'])}, which this policy was trained with",
            "evaluate it where these cameras are, or a policy that needs main only",
        )
    try:
        return cls(**kwargs)
    except ImportError as error:
        raise UserError(f"the simulator {name!r} does not start: {error}", "its packages", mend) from error


def versions(sim: Sim) -> dict[str, str]:
    """What a result in ``sim`` depends on: the packages imported here, the revision of the assets in an environment of
    ``sims setup``, and what it names in an attribute ``versions`` (optional; GrinningFace: emoji font and OpenGL
    backend)."""
    loaded = {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
    packages = {name: str(getattr(module, "__version__", "unknown")) for name, module in loaded.items()}
    return {**packages, **assets_version(), **getattr(sim, "versions", {})}
