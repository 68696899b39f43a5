"""Environments of their own for simulators whose packages a training environment cannot hold.

``vlm4vla sims setup NAME`` makes ``<cache>/sims/<NAME>``:

    venv/        Python with exactly the packages of ``requirements/<NAME>.txt`` (nothing is resolved), and a link to
                 the simulator's assets where its code looks for them
    assets/      what was fetched, and of which revision in ``assets.revision``; written after it
    frame.png    the picture that proved it
    ready.json   written last: where it is and fits the pinned versions, workers of NAME run here by themselves

``<cache>`` is ``files.cache()``. This package is not installed there: ``sims/worker.py`` brings itself along, and needs
numpy only.
"""

import contextlib
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm4vla.errors import UserError
from vlm4vla.files import cache, replacing, write_text
from vlm4vla.locks import locked

Say = Callable[[str], None]
LAST_LINES = 5
"""Of what pip says of a failure."""
FIRST_FRAME_S = 900.0
"""For each reply of a simulator that starts for the first time: it compiles its Python (LIBERO's numba too) from a cold
disk, and 120 s were too few on two cores beside other work."""


@dataclass(frozen=True)
class Environment:
    """What a simulator needs beside this package."""

    pythons: tuple[tuple[int, int], ...]
    """Versions of Python for which all pinned packages exist."""
    link: str
    """Where below ``site-packages`` the simulator's code looks for its assets."""
    must_hold: tuple[str, ...]
    """Paths by which an assets folder is recognised."""
    source: str | None
    """The hub data set (``owner/name``) or the Git repository (an https address) that holds the assets; None: the user
    brings them (ManiSkill: ``python -m mani_skill.utils.download_asset``, which fills its ``MS_ASSET_DIR``)."""
    size: str
    licence: str
    revision: str | None = None
    """The commit of ``source`` that is fetched; None: its newest, and which one that was is kept."""
    resolved: tuple[str, ...] = ()
    """Packages to install with what they depend on: torch, whose build is the machine's."""


ENVIRONMENTS = {
    "libero": Environment(
        pythons=((3, 11), (3, 12), (3, 13)),
        link="libero/libero/assets",
        must_hold=("articulated_objects", "scenes", "stable_hope_objects", "textures"),
        source="lerobot/libero-assets",
        size="420 MB",
        licence="LIBERO's data is CC BY 4.0; of the meshes nothing is said, and some look CC BY-NC-SA",
    ),
    "calvin": Environment(
        pythons=((3, 11),),
        link="calvin",
        must_hold=("calvin_env/calvin_env", "calvin_env/data", "calvin_models/conf/annotations"),
        source="https://github.com/mees/calvin",
        size="45 MB with its submodule calvin_env",
        licence="MIT; the meshes of the arm Apache-2.0",
        revision="fa03f01f19c65920e18cf37398a9ce859274af76",
    ),
    "simpler": Environment(
        pythons=((3, 11),),
        link="maniskill_assets",
        must_hold=("data/tasks/bridge_v2_real2sim_dataset/custom", "data/robots/widowx"),
        source=None,
        size="size not measured",
        licence="none is stated for the scenes and objects",
        resolved=("torch==2.13.0",),
    ),
    "simpler_ms2": Environment(
        pythons=((3, 11),),
        link="ManiSkill2_real2sim",
        must_hold=(
            "mani_skill2_real2sim/assets/descriptions/widowx_description",
            "data/custom/models",
            "data/hab2_bench_assets/stages",
            "data/real_inpainting",
        ),
        source="https://github.com/simpler-env/ManiSkill2_real2sim",
        size="more than 240 MB, not measured whole",
        licence="the code's is Apache-2.0; of the objects, scenes and photographs nothing is said",
        revision="ef7a4d4fdf4b69f2c2154db5b15b9ac8dfe10682",
    ),
}


def folder(name: str) -> Path:
    return cache() / "sims" / name


def interpreter(sim: str, asked: str | None = None) -> str:
    """The Python that runs ``sim``: the one asked for, else that of the simulator's own environment, else this one.

    Raises:
        UserError: there is no such interpreter, or the simulator's environment is missing, unfinished or outdated.
    """
    if asked:
        if found := shutil.which(asked):
            return found
        raise UserError(f"no executable {asked}", "a Python interpreter", "name one: --sim-python /path/to/bin/python")
    if sim not in ENVIRONMENTS:
        return sys.executable
    if problem := missing(sim):
        raise UserError(problem, "an environment of its own", f"vlm4vla sims setup {sim}, or name one: --sim-python")
    return str(_python(folder(sim)))


def missing(name: str) -> str | None:
    """What is not as it should be with a simulator's environment, in words; None where all is well."""
    path = folder(name) / "ready.json"
    if not path.is_file():
        return f"the simulator {name} is not set up in {folder(name)}"
    try:
        ready = json.loads(path.read_text())
        versions, assets = ready["requirements"], Path(ready["assets"])
    except (ValueError, KeyError, TypeError):
        return f"{path} is damaged"
    if versions != _digest(name):
        return f"{folder(name)} was set up with other versions than this vlm4vla pins"
    if not assets.is_dir():
        return f"the assets of {name} are no longer at {assets}"
    if not _wanted(name, ready.get("revision")):
        return f"{assets} is of revision {ready['revision']}, not {ENVIRONMENTS[name].revision} as pinned"
    return None


def assets_version() -> dict[str, str]:
    """``{"assets": revision}`` where this process runs in a simulator's environment; empty elsewhere."""
    path = Path(sys.prefix).parent / "ready.json"
    if not path.is_file():
        return {}
    return {"assets": json.loads(path.read_text()).get("revision") or "unknown"}


def setup(name: str, *, assets: Path | None, fetch: bool, python: str | None, say: Say) -> Path:
    """Make the environment of ``name`` and prove it with a rendered frame -> that picture. Run again to continue.

    Args:
        assets: a folder with the simulator's assets; None where they are in place from an earlier start or fetched.
        fetch: whether assets may be fetched.
        python: the interpreter whose version the environment gets; where None the one that it has, at first this one.

    Raises:
        UserError: an unfit interpreter or assets folder, a failed installation or download, or no picture.
    """
    environment, target = ENVIRONMENTS[name], folder(name)
    if assets:  # before anything is touched: a finished environment outlives a mistyped name
        _check_assets(name, assets)
    new = not _python(target).exists()
    if python or new:
        _fit(name, python or sys.executable)
    if new and not (assets or fetch):
        raise _no_assets(name)
    with locked(target / "lock", f"environment of {name}"):
        (target / "ready.json").unlink(missing_ok=True)
        _build(name, target, python, say)
        say(f"installing the packages of {_requirements(name).name}")
        if environment.resolved:
            _install(name, *environment.resolved)
        _install(name, "--no-deps", "-r", str(_requirements(name)))
        link = _site_packages(target) / environment.link
        found = _assets(name, assets, link, fetch, say)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(found.resolve(), target_is_directory=True)
        say(f"rendering a frame (the first start compiles; it is given {FIRST_FRAME_S / 60:g} minutes a reply)")
        picture = _prove(name, target)
        ready = {"requirements": _digest(name), "assets": str(found.resolve()), "revision": _revision(found)}
        write_text(target / "ready.json", json.dumps(ready, indent=1) + "\n")
    return picture


def _build(name: str, target: Path, python: str | None, say: Say) -> None:
    """A virtual environment with pip, of the version of ``python``; what is there is kept where it is one."""
    base, own = _fit(name, python) if python else None, str(_python(target))
    if _python(target).exists():
        with contextlib.suppress(UserError):  # killed before pip was in it, or its Python is gone: built anew
            _run([own, "-m", "pip", "--version"])
            if _version(own) in ([_version(base)] if base else ENVIRONMENTS[name].pythons):
                return
    base = base or _fit(name, sys.executable)
    say(f"{target}: a virtual environment of {base}")
    _run([base, "-m", "venv", "--clear", str(target / "venv")])


def _install(name: str, *what: str) -> None:
    """Raises: UserError: pip fails, with what it calls an error."""
    command = [str(_python(folder(name))), "-m", "pip", "install", "-q", *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()  # most are of retries
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise UserError(
            f"{shlex.join(command)} ended with status {done.returncode}:\n" + "\n".join(errors[-LAST_LINES:]),
            "a package index that can be reached, with these packages",
            f"vlm4vla sims setup {name} again (it continues), PIP_INDEX_URL=ADDRESS before it for another index",
        )


def _assets(name: str, given: Path | None, link: Path, fetch: bool, say: Say) -> Path:
    environment = ENVIRONMENTS[name]
    fetched = folder(name) / "assets"
    if given is None and link.is_dir() and _wanted(name, _revision(link.resolve())):
        return link.resolve()
    if given is None:
        if environment.source is None or not fetch:
            raise _no_assets(name)
        say(f"fetching {environment.source} ({environment.size}; licence: {environment.licence})")
        link.unlink(missing_ok=True)  # half-fetched assets are not taken for whole ones
        try:
            _fetch(environment.source, environment.revision, fetched)
        except Exception as error:  # the hub's own, the network's and the disk's: many types, one meaning
            raise UserError(
                f"{environment.source} could not be fetched: {error}",
                "a network that reaches it",
                f"run it again (it continues), or bring a copy: vlm4vla sims setup {name} --assets FOLDER",
            ) from error
        given = fetched
    _check_assets(name, given)
    return given


def _no_assets(name: str) -> UserError:
    environment = ENVIRONMENTS[name]
    if environment.source is None:
        return UserError(
            f"no assets for {name}, which cannot be fetched from one place",
            f"a folder with {', '.join(environment.must_hold)} ({environment.size}; licence: {environment.licence})",
            f"vlm4vla sims setup {name} --assets FOLDER   (docs/evaluation.md says how to get them)",
        )
    return UserError(
        f"no assets for {name}",
        f"a copy of {environment.source} ({environment.size}; licence: {environment.licence})",
        f"vlm4vla sims setup {name} --assets FOLDER, or let it be fetched: vlm4vla sims setup {name} --fetch",
    )


def _check_assets(name: str, given: Path) -> None:
    """Raises: UserError: not the assets of ``name``, or of another revision than is pinned."""
    environment = ENVIRONMENTS[name]
    lacking = [path for path in environment.must_hold if not (given / path).exists()]
    if lacking:
        raise UserError(
            f"{given} without {', '.join(lacking)}",
            f"the assets of {name}: {', '.join(environment.must_hold)}",
            f"ls {given}",
        )
    if not _wanted(name, revision := _revision(given)):
        raise UserError(
            f"{given} of revision {revision}",
            f"{environment.revision}, with which {name} was checked",
            f"git -C {given} checkout --recurse-submodules {environment.revision}",
        )


def _wanted(name: str, revision: str | None) -> bool:
    """Whether assets of ``revision`` (None: not known, the user brought them) are those that are pinned."""
    return revision is None or ENVIRONMENTS[name].revision in (None, revision)


def _revision(assets: Path) -> str | None:
    """What ``_fetch`` wrote down, or the commit of a clone; None where neither is known."""
    record = _record(assets)
    if record.is_file():
        return record.read_text().strip()
    if not (assets / ".git").exists() or shutil.which("git") is None:
        return None
    return _run(["git", "-c", "safe.directory=*", "-C", str(assets), "rev-parse", "HEAD"]).strip()


def _record(assets: Path) -> Path:
    return assets.with_name(f"{assets.name}.revision")


def _fetch(source: str, revision: str | None, target: Path) -> None:
    """Bring ``revision`` of ``source`` (None: the newest) to ``target``, then write down which it was."""
    _record(target).unlink(missing_ok=True)
    if source.startswith("https://"):
        shutil.rmtree(target, ignore_errors=True)
        git = ["git", "-C", str(target)]
        _run(["git", "init", "-q", str(target)])
        _run([*git, "fetch", "-q", "--depth=1", source, revision or "HEAD"])
        _run([*git, "checkout", "-q", "FETCH_HEAD"])
        _run([*git, "submodule", "update", "-q", "--init", "--recursive", "--depth=1"])
        revision = _run([*git, "rev-parse", "HEAD"]).strip()
    else:
        from huggingface_hub import HfApi, snapshot_download

        revision = HfApi().dataset_info(source, revision=revision).sha
        snapshot_download(source, repo_type="dataset", revision=revision, local_dir=target)
    write_text(_record(target), f"{revision}\n")


def _prove(name: str, target: Path) -> Path:
    from PIL import Image

    from vlm4vla.sims.worker import Worker, WorkerFault

    worker = Worker(name, {}, FIRST_FRAME_S, str(_python(target)))
    try:
        worker.receive()
        seen = worker.ask("reset", seed=0, look=True).observation
    except WorkerFault as fault:
        raise UserError(
            f"the simulator {name} does not render: {fault}", "one frame", "vlm4vla doctor; then set it up again"
        ) from fault
    finally:
        worker.kill()
    assert seen is not None
    image = seen.images["main"]
    if image.min() == image.max():
        raise UserError(f"{name} rendered one colour only", "a picture", "try MUJOCO_GL=egl or MUJOCO_GL=osmesa")
    path = target / "frame.png"
    with replacing(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")
    return path


def _requirements(name: str) -> Path:
    return Path(__file__).parent / "requirements" / f"{name}.txt"


def _digest(name: str) -> str:
    return hashlib.sha256(_requirements(name).read_bytes()).hexdigest()[:10]


def _python(target: Path) -> Path:
    return target / "venv" / "bin" / "python"


def _site_packages(target: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(_run([str(_python(target)), "-c", code]).strip())


def _fit(name: str, python: str) -> str:
    """``python`` where its version has all pinned packages."""
    python = interpreter("", python)
    version, known = _version(python), ENVIRONMENTS[name].pythons
    if version not in known:
        raise UserError(
            f"{python}, which is Python {version[0]}.{version[1]}",
            f"Python {' or '.join(f'{a}.{b}' for a, b in known)} for {name}",
            f"vlm4vla sims setup {name} --python /usr/bin/python{known[0][0]}.{known[0][1]}",
        )
    return python


def _version(python: str) -> tuple[int, int]:
    major, minor = _run([python, "-c", "import sys; print(*sys.version_info[:2])"]).split()
    return int(major), int(minor)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.strip()[-2000:]}",
            "status 0",
            "mend the cause and run the same command again: it continues",
        )
    return done.stdout
