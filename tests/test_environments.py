"""Simulators in interpreters of their own: which one is taken, what is refused, and that a bare one suffices."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from test_hub import COMMIT, stand_in
from vlm4vla import sims
from vlm4vla.errors import UserError
from vlm4vla.sims import environments
from vlm4vla.sims.check import SimCheckError, check_sim
from vlm4vla.sims.remote import Remote
from vlm4vla.sims.worker import Worker
from vlm4vla.verbs.sims import sims as sims_command

TESTS = Path(__file__).parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM4VLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter with numpy and the fake simulator, and without this package or any other of its dependencies."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    packages = folder / "packages"
    packages.mkdir()
    installed = Path(np.__file__).parents[1]
    for path in (*installed.glob("numpy"), *installed.glob("numpy.libs"), TESTS / "fake_sim.py"):
        (packages / path.name).symlink_to(path)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "extra.pth").write_text(f"{packages}\n")
    return str(folder / "venv" / "bin" / "python")


def test_a_worker_runs_where_only_numpy_is(bare_python, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    worker = Worker("fake_sim:FakeSim", {}, python=bare_python)
    try:
        assert worker.receive().made["versions"]["numpy"] == np.__version__
        assert worker.ask("reset", seed=3, look=True).observation.instruction == "go to 0 (seed 3)"
        assert Path(f"/proc/{worker.pid}/exe").resolve() == Path(bare_python).resolve()
        assert bare_python in Path(f"/proc/{worker.pid}/cmdline").read_text()
    finally:
        worker.kill()


def test_a_remote_simulator_looks_like_a_local_one(bare_python, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    sim = Remote("fake_sim:FakeSim", python=bare_python)
    try:
        sim.reset(3)
        assert sim.execute(np.zeros((2, 7), np.float32)).steps == 2
        assert sim.observe().images["main"].shape == (8, 8, 3)
        with pytest.raises(ValueError, match="negative seed"):
            sim.reset(-1)
    finally:
        sim.close()
    with pytest.raises(SimCheckError, match="too short was accepted"):
        check_sim("fake_sim:FakeSim", python=bare_python)


def test_the_interpreter_is_never_guessed(cache):
    assert environments.interpreter("grinningface") == sys.executable
    assert environments.interpreter("libero", sys.executable) == sys.executable
    with pytest.raises(UserError, match="no executable /no/such"):
        environments.interpreter("libero", "/no/such")
    with pytest.raises(UserError, match="vlm4vla sims setup libero"):
        environments.interpreter("libero")


def test_a_finished_environment_is_taken_while_it_fits(cache, tmp_path):
    folder = cache / "sims" / "libero"
    folder.mkdir(parents=True)
    assets = tmp_path / "assets"
    assets.mkdir()
    ready = {"requirements": environments._digest("libero"), "assets": str(assets)}
    (folder / "ready.json").write_text(json.dumps(ready))
    assert environments.interpreter("libero") == str(folder / "venv" / "bin" / "python")
    assets.rmdir()
    assert "no longer at" in str(environments.missing("libero"))
    (folder / "ready.json").write_text(json.dumps(ready | {"requirements": "0"}))
    assert "other versions" in str(environments.missing("libero"))
    (folder / "ready.json").write_text("{")
    assert "damaged" in str(environments.missing("libero"))


def test_what_cannot_be_set_up_is_said(cache, tmp_path, monkeypatch):
    def setup(**changes):
        options = {"assets": None, "fetch": False, "python": None, "say": lambda _: None} | changes
        return environments.setup("libero", **options)

    old = replace(environments.ENVIRONMENTS["libero"], pythons=((3, 2),))
    monkeypatch.setitem(environments.ENVIRONMENTS, "libero", old)
    with pytest.raises(UserError, match=r"(?s)which is Python 3\..*Python 3\.2 for libero"):
        setup()
    monkeypatch.undo()
    monkeypatch.setenv("VLM4VLA_CACHE", str(cache))
    installed = []
    monkeypatch.setattr(environments, "_run", lambda command: f"{tmp_path}\n3 11")
    monkeypatch.setattr(environments, "_install", lambda name, *what: installed.append(what))
    monkeypatch.setattr(environments, "_fit", lambda name, python: python)
    with pytest.raises(UserError, match=r"(?s)420 MB; licence: .*--assets FOLDER"):
        setup()
    assert not installed, "said before minutes of installing"
    assert environments.missing("libero")


def test_a_finished_environment_outlives_a_mistyped_folder_or_python(cache, tmp_path):
    ready = cache / "sims" / "libero" / "ready.json"
    ready.parent.mkdir(parents=True)
    ready.write_text("{}")
    (tmp_path / "empty").mkdir()
    options = {"assets": None, "fetch": False, "python": None, "say": lambda _: None}
    for mistake, words in (
        ({"assets": tmp_path / "empty"}, "without articulated_objects, scenes"),
        ({"python": "/no/such"}, "no executable /no/such"),
    ):
        with pytest.raises(UserError, match=words):
            environments.setup("libero", **{**options, **mistake})
        assert [path.name for path in ready.parent.iterdir()] == ["ready.json"], "nothing was touched"


def test_without_a_package_index_the_error_says_so_in_whole_lines(cache):
    retries = "WARNING: Retrying (Retry(total=4)) after connection broken by 'name resolution': /simple/numpy/\n" * 30
    error = "ERROR: No matching distribution found for numpy==2.4.6"
    script(cache / "sims" / "libero" / "venv" / "bin" / "python", f'printf "%s" "{retries}{error}" >&2; exit 1')
    with pytest.raises(UserError) as caught:
        environments._install("libero", "--no-deps", "numpy==2.4.6")
    assert caught.value.found.splitlines()[1:] == [error]
    assert "a package index that can be reached" in caught.value.expected
    assert "vlm4vla sims setup libero again" in caught.value.next_step
    assert "PIP_INDEX_URL" in caught.value.next_step


FETCH = """
import sys
from dataclasses import replace
from pathlib import Path
from vlm4vla.errors import UserError
from vlm4vla.sims import environments

changed = replace(environments.ENVIRONMENTS["libero"], source="lab/demos", must_hold=("scenes/table.xml",))
environments.ENVIRONMENTS["libero"] = changed
link = Path(sys.argv[1])
try:
    found = environments._assets("libero", None, link, True, print)
except UserError as error:
    sys.exit(str(error))
link.symlink_to(found)
print(environments._revision(found))
"""


def test_assets_come_from_a_hub_whole_or_not_at_all(cache, tmp_path):
    """Over the hub's own protocol, from a stand-in on the loopback. A half one is not taken, and fetching goes on."""
    source, link = tmp_path / "source", tmp_path / "link"
    for name, size in {"scenes/table.xml": 10, "textures/wood.png": 50_000, "README.md": 5}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(bytes(size))
    target = cache / "sims" / "libero" / "assets"
    target.parent.mkdir(parents=True)

    def fetch(broken=None):
        with stand_in(source, broken) as (address, asked):
            env = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1"}
            command = [sys.executable, "-c", FETCH, str(link)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
        return done, {name for name, _ in asked}

    done, _ = fetch(broken="textures/wood.png")
    assert done.returncode == 1
    assert "lab/demos could not be fetched" in done.stderr
    assert "run it again (it continues)" in done.stderr
    assert "420 MB; licence: LIBERO's data" in done.stdout, "said before anything is fetched"
    assert environments._revision(target) is None

    done, asked = fetch()
    assert done.returncode == 0, done.stderr
    assert "textures/wood.png" in asked
    assert "scenes/table.xml" not in asked, "it was there"
    assert done.stdout.splitlines()[-1] == COMMIT
    assert environments._revision(target) == COMMIT
    for path in source.rglob("*.*"):
        assert (link / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert link.resolve() == target


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_half_built_environment_is_built_anew_and_a_whole_one_kept(cache, tmp_path):
    """Pythons are shell scripts here: they tell a version, have pip or not, and ``-m venv`` makes one with pip."""
    target = cache / "sims" / "libero"
    own = target / "venv" / "bin" / "python"
    without_pip, with_pip = '[ "$2" = pip ] && exit 1; echo 3 12', "echo 3 12"

    def python(version):
        made = f"#!/bin/sh\\necho {version}\\n# by venv"
        text = f'[ "$2" = venv ] && [ "$3" = --clear ] && printf "{made}" > {own}; echo {version}'
        return str(script(tmp_path / f"python{version.replace(' ', '.')}", text))

    def build(named=None):
        environments._build("libero", target, named, lambda _: None)
        return own.read_text().endswith("# by venv"), environments._version(str(own))

    script(own, with_pip)
    assert build() == (False, (3, 12)), "whole: kept"
    assert build(python("3 12")) == (False, (3, 12)), "of the version that was asked for: kept"
    assert build(python("3 11")) == (True, (3, 11)), "of another version"
    script(own, without_pip)
    assert build(python("3 12")) == (True, (3, 12)), "killed before pip was there"
    script(own, "exit 127")
    assert build(python("3 13")) == (True, (3, 13)), "its Python is gone"
    with pytest.raises(UserError, match=r"which is Python 3\.9"):
        build(python("3 9"))


def test_the_pinned_revision_is_fetched_recorded_and_compared(cache, tmp_path, monkeypatch):
    origin, source = tmp_path / "origin", "https://example.org/assets"

    def git(*command):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", "-C", origin, *who, *command], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    origin.mkdir()
    git("init", "-q")
    commits = []
    for text in ("first", "second"):
        (origin / "scene").write_text(text)
        git("add", ".")
        git("commit", "-qm", text)
        commits.append(git("rev-parse", "HEAD"))
    for name, value in {"COUNT": "1", "KEY_0": f"url.file://{origin}.insteadOf", "VALUE_0": source}.items():
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)

    def pin(revision):
        changed = replace(real, must_hold=("scene",), source=source, revision=revision)
        monkeypatch.setitem(environments.ENVIRONMENTS, "calvin", changed)

    def assets(given=None):
        found = environments._assets("calvin", given, link, True, lambda _: None)
        link.unlink(missing_ok=True)
        link.symlink_to(found)
        return (found / "scene").read_text(), environments._revision(found)

    real, target = environments.ENVIRONMENTS["calvin"], cache / "sims" / "calvin"
    target.mkdir(parents=True)
    link = target / "link"
    pin(commits[0])
    assert assets() == ("first", commits[0])
    assert (target / "assets.revision").read_text() == f"{commits[0]}\n"
    with pytest.raises(UserError, match=f"of revision {commits[1]}"):
        assets(origin)
    pin(None)
    assert assets() == ("first", commits[0]), "what is there is kept"
    assert assets(origin) == ("second", commits[1]), "a clone knows its commit"

    ready = {"requirements": environments._digest("calvin"), "assets": str(target / "assets"), "revision": commits[0]}
    (target / "ready.json").write_text(json.dumps(ready))
    assert environments.missing("calvin") is None
    pin(commits[1])
    assert "as pinned" in str(environments.missing("calvin"))
    link.unlink()
    link.symlink_to(target / "assets")
    assert assets() == ("second", commits[1]), "fetched again"

    monkeypatch.setattr(sys, "prefix", str(target / "venv"))
    assert sims.versions(None)["assets"] == commits[0]
    (target / "ready.json").write_text(json.dumps(ready | {"revision": None}))
    assert sims.versions(None)["assets"] == "unknown", "the user brought them"
    assert environments.missing("calvin") is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["check", "json:JSONDecoder"], "has no attribute 'convention'"),
        (["check", "fake_sim:FakeSim"], "too short was accepted"),
        (["setup", "libro"], "nearest: libero"),
    ],
)
def test_what_is_no_simulator_is_told_with_what_to_do(command, words, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    error = CliRunner().invoke(sims_command, command).exception
    assert isinstance(error, UserError)
    assert words in str(error)
    assert f"vlm4vla sims {command[0]}" in error.next_step
    assert ("sims/base.py" in error.expected) == (command[0] == "check")


def test_pinned_lists_are_complete():
    """Nothing is resolved, so every line is one exact version."""
    for name in environments.ENVIRONMENTS:
        lines = environments._requirements(name).read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert pins
        assert all(line.count("==") == 1 for line in pins)
