"""Choice of the OpenGL backend; nothing is loaded, so that ``doctor`` can ask too.

The backend is ``MUJOCO_GL`` where that is set (``osmesa``, ``egl``, ``glfw``). Otherwise, on Linux, EGL where a GPU
device is present and osmesa (software) elsewhere. Pixels are the same to the bit for one backend on one machine, not
across backends.
"""

import glob
import os
import platform

from vlm4vla.errors import UserError

BACKENDS = {
    "osmesa": "apt-get install libosmesa6",
    "egl": "apt-get install libegl1 libgl1-mesa-dri",
    "glfw": "apt-get install libglfw3, and start a display",
}
"""OpenGL backend -> what brings its system library on Debian."""


def choose_backend() -> str:
    """The name of the OpenGL backend. Raises ``UserError`` on an unknown ``MUJOCO_GL``."""
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    if asked in BACKENDS:
        return asked
    if asked:
        raise UserError(
            f"MUJOCO_GL={asked}", f"one of {', '.join(BACKENDS)}, or nothing", "unset MUJOCO_GL, or name one of them"
        )
    if platform.system() != "Linux":
        return "glfw"
    return "egl" if glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dri/renderD*") else "osmesa"
