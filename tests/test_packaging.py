"""The package as it is installed: what the base install imports, what the wheel holds, what set-up pins."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = ("sims", "evaluation", "studies", "reporting", "cli", "demo", "doctor", "spec", "types", "convention")
"""Never import torch at module level: the base install has none (import-linter cannot tell eager from lazy)."""
WITHOUT_SIMULATOR = ("evaluation", "studies", "reporting", "cli", "demo", "doctor")


def modules(*parts: str) -> list[str]:
    """Every module of these parts."""
    package = ROOT / "src" / "vlm4vla"
    found = []
    for part in parts:
        paths = (package / part).rglob("*.py") if (package / part).is_dir() else [package / f"{part}.py"]
        found += [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in found)


def imported(names: list[str]) -> set[str]:
    """Top-level packages in ``sys.modules`` of a fresh interpreter that imported ``names``."""
    script = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_parts_of_the_base_install_imports_no_torch():
    names = modules(*WITHOUT_TORCH)
    assert "vlm4vla.studies.runner" in names
    assert not imported(names) & {"torch", "transformers", "accelerate"}


def test_importing_results_and_reports_imports_no_simulator():
    assert not imported(modules(*WITHOUT_SIMULATOR)) & {"mujoco", "gymnasium", "av", "torch"}


def test_constraints_pin_everything_that_is_required():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines), "no local versions"
    pinned = {normal(name): version for name, _, version in (line.partition("==") for line in lines)}
    wanted = {normal(re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]) for requirement in requires("vlm4vla") or []}
    assert wanted <= pinned.keys()
    # Torchvision 0.(n + 15) asks for exactly torch 2.n: of another pair, pip would exchange a CPU build of torch.
    torch, torchvision = (pinned[name].split(".") for name in ("torch", "torchvision"))
    assert (torch[0], torchvision[0]) == ("2", "0")
    assert int(torchvision[1]) == int(torch[1]) + 15


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): number
        for path in (ROOT / "src").rglob("*.py")
        if (number := len(path.read_text().splitlines())) > 400
    }
    assert not long, "split them: no file above 400 lines"


def test_the_documented_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        named = set(re.findall(r"`make ([a-z-]+)`", page.read_text()))
        assert named <= targets, page


@pytest.mark.slow
def test_the_wheel_holds_code_licence_and_every_data_file(tmp_path: Path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in inside if name.endswith("/METADATA"))
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.removeprefix("src/") for name in tracked.split()} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert "vlm4vla/recipes/demo.yaml" in inside
    assert not any(name.startswith("tests/") for name in inside)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(base) == len(dependencies)
    assert not any("torch" in line for line in base)
