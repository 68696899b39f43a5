"""Off-screen pictures of a MuJoCo model: one camera, textures that change. The backend is ``backend.py``'s choice."""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's names come from compiled modules without type stubs.)

import importlib
import os
import weakref

import mujoco
import numpy as np

from vlm4vla.errors import UserError
from vlm4vla.sims.backend import BACKENDS, choose_backend


def open_gl(model: mujoco.MjModel, size: int):
    """A GL context of the chosen backend, and the model's MuJoCo context in it.

    Raises ``UserError`` naming the package where the backend does not load.
    """
    backend = choose_backend()
    # llvmpipe (software) otherwise starts one thread per core in each simulator process.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    try:
        gl = importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
        gl.make_current()
        return gl, mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    except (ImportError, AttributeError, OSError, RuntimeError, mujoco.FatalError) as error:
        raise UserError(
            f"the OpenGL backend {backend!r} does not load ({type(error).__name__}: {error})",
            "osmesa (software) or EGL (GPU) for off-screen rendering",
            f"{BACKENDS[backend]}; or choose another backend with MUJOCO_GL={'|'.join(BACKENDS)}",
        ) from error


class Renderer:
    """One camera's picture of a model, (size, size) pixels. Several may live in one process."""

    def __init__(self, model: mujoco.MjModel, size: int, camera: str):
        """Raises ``UserError`` where no OpenGL backend loads."""
        self._model, self._rect = model, mujoco.MjrRect(0, 0, size, size)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = model.camera(camera).id
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._gl, self._context = open_gl(model, size)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._pixels = np.empty((size, size, 3), np.uint8)
        # Freed before the interpreter takes PyOpenGL apart; MuJoCo's own clean-up prints errors at exit otherwise.
        self._free = weakref.finalize(self, _free, self._gl, self._context)

    def upload(self, texture: int) -> None:
        """Hand a texture whose ``tex_data`` changed to OpenGL."""
        self._gl.make_current()
        mujoco.mjr_uploadTexture(self._model, self._context, texture)

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """uint8 (size, size, 3), upright."""
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._model, data, self._option, self._perturb, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._context)
        return self._pixels[::-1].copy()  # OpenGL's first row is the bottom one

    def close(self) -> None:
        self._free()


def _free(gl, context: mujoco.MjrContext) -> None:
    gl.make_current()
    context.free()
    gl.free()
