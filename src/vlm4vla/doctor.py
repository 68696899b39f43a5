"""``vlm4vla doctor``: what is installed, what is missing, and the command that mends it."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlm4vla.errors import UserError
from vlm4vla.sims.environments import ENVIRONMENTS

DEMO_MEMORY_GB = 4
DEMO_DISK_GB = 2
"""Measured with ``make demo``: recordings, checkpoints and strips stay below it."""
RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 2"/><geom size="1" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
print(int(renderer.render().max()))
renderer.close()
"""
RENDER_TIMEOUT_S = 60
EMBEDDED_VLM = Path(__file__).parent / "backbones" / "tiny_vlm"
"""``backbones.tiny.FOLDER``; that module needs torch."""


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    found: str
    mend: str = ""
    needed: bool = True
    """Whether the demo needs it."""


def doctor() -> tuple[list[str], bool]:
    """The lines to print, and whether the demo can run here."""
    findings = [check() for check in CHECKS]
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok  " if finding.ok else ("MISS" if finding.needed else "-   ")
        lines.append(f"{mark} {finding.name:<{width}}  {finding.found}")
        if not finding.ok:
            lines.append(f"     {'':<{width}}  mend: {finding.mend}")
    return lines, all(finding.ok or not finding.needed for finding in findings)


def python() -> Finding:
    return Finding(
        "python", sys.version_info >= (3, 11), f"{platform.python_version()} {sys.executable}", "Python 3.11"
    )


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package(name: str, extra: str, needed: bool = True) -> Callable[[], Finding]:
    def check() -> Finding:
        mend = f"pip install 'vlm4vla[{extra}]'   (in the repository: make setup)"
        found = installed(name)
        return Finding(name, found is not None, found or "not installed", mend, needed)

    return check


def device() -> Finding:
    if installed("torch") is None:
        return Finding("device", False, "unknown without torch", "make setup")
    import torch

    if torch.cuda.is_available():
        return Finding("device", True, f"{torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})")
    if shutil.which("nvidia-smi"):
        mend = (
            f"pip install torch=={torch.__version__.split('+')[0]} from PyPI (CUDA); the demo runs on the CPU as well"
        )
        return Finding("device", False, "CPU, though this machine has nvidia-smi", mend, needed=False)
    return Finding("device", True, "CPU")


def renderer() -> Finding:
    """Really render with the backend that the simulator will choose, in a process of its own: a wrong one can abort
    the interpreter."""
    from vlm4vla.sims.backend import BACKENDS, choose_backend

    if installed("mujoco") is None:
        return Finding("rendering", False, "unknown without mujoco", "make setup")
    try:
        chosen = choose_backend()
    except UserError as error:
        return Finding("rendering", False, error.found, error.next_step)
    if renders(chosen):
        return Finding("rendering", True, f"MuJoCo with {chosen}")
    others = [backend for backend in BACKENDS if backend != chosen and renders(backend)]
    mend = f"export MUJOCO_GL={others[0]}" if others else BACKENDS[chosen]
    return Finding("rendering", False, f"{chosen}, which the simulator chooses here, does not render", mend)


def vulkan() -> Finding:
    """The devices that SimplerEnv's renderers could take."""
    from vlm4vla.sims.vulkan import MEND, SEMAPHORES, devices

    lacks = f" (without {SEMAPHORES}: for simpler, not for simpler_ms2)"
    try:
        found = "; ".join(each.name + ("" if each.semaphores else lacks) for each in devices())
    except UserError as error:
        return Finding("vulkan", False, error.found, error.next_step, needed=False)
    return Finding("vulkan", bool(found), found or "no device, which SimplerEnv's pictures need", MEND, needed=False)


def renders(backend: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": backend}
    try:
        done = subprocess.run(
            [sys.executable, "-c", RENDER], env=environment, capture_output=True, timeout=RENDER_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and done.stdout.strip().isdigit() and int(done.stdout) > 0


def emoji_font() -> Finding:
    from vlm4vla.sims.grinningface.emoji import CATALOGUE_FONT, font, font_version

    try:
        path = str(font().path)
    except UserError as error:
        return Finding("emoji font", False, error.found, error.next_step)
    if font_version() != CATALOGUE_FONT:
        found = f"{path}: not the font the emojis were chosen with ({font_version()}, that was {CATALOGUE_FONT})"
        mend = "Debian 12's fonts-noto-color-emoji, where numbers are to be compared; this one draws other pictures"
        return Finding("emoji font", False, found, mend, needed=False)
    return Finding("emoji font", True, path)


def embedded_vlm() -> Finding:
    weights = EMBEDDED_VLM / "model.safetensors"
    mend = f"install again, or make it anew: vlm4vla vlm train --out {EMBEDDED_VLM}"
    if not weights.is_file():
        return Finding("embedded VLM", False, f"no {weights}", mend)
    return Finding("embedded VLM", True, f"{weights.stat().st_size / 2**20:.1f} MB")


def simulator(name: str) -> Callable[[], Finding]:
    def check() -> Finding:
        from vlm4vla.sims.environments import folder, missing

        problem = missing(name)
        return Finding(name, problem is None, problem or str(folder(name)), f"vlm4vla sims setup {name}", needed=False)

    return check


def memory() -> Finding:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Finding("memory", True, "unknown on this system", needed=False)
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    mend = f"the demo needs {DEMO_MEMORY_GB} GB: vlm4vla demo --jobs 1"
    return Finding("memory", size >= DEMO_MEMORY_GB, f"{size:.1f} GB", mend)


def cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", count >= 2, f"{count} usable", "the demo takes twice as long: --jobs 1", needed=False)


def disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    mend = f"free {DEMO_DISK_GB} GB, or --out on another disk"
    return Finding("disk", free >= DEMO_DISK_GB, f"{free:.0f} GB free here", mend)


CHECKS = (
    python,
    package("torch", "train"),
    device,
    package("transformers", "train"),
    package("accelerate", "train"),
    package("mujoco", "grinningface"),
    *(package(name, "data", needed=False) for name in ("av", "h5py", "google-crc32c", "huggingface_hub")),
    *(package(name, "serve", needed=False) for name in ("msgpack", "websockets")),
    renderer,
    vulkan,
    emoji_font,
    embedded_vlm,
    *(simulator(name) for name in ENVIRONMENTS),
    memory,
    cores,
    disk,
)
