"""The command line: fast, without torch where torch is not needed, and clear where something is wrong."""

import errno
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from vlm4vla import cli as module
from vlm4vla import doctor
from vlm4vla.arguments import run_spec, study_file
from vlm4vla.cli import cli
from vlm4vla.errors import UserError
from vlm4vla.sims import vulkan
from vlm4vla.sims.grinningface import emoji
from vlm4vla.spec import RunSpec
from vlm4vla.studies import matrix

COMMAND = [sys.executable, "-m", "vlm4vla.cli"]
VERBS = ("demo", "backbones", "data", "train", "eval", "study", "report", "sims", "doctor")
BASE_INSTALL = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "accelerate", "safetensors", "mujoco", "gymnasium", "av"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
sys.argv = ["vlm4vla", *sys.argv[1:]]
from vlm4vla.cli import main
main()
"""


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, **options)


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        return [path]
    return [path, *(leaf for name, sub in command.commands.items() for leaf in leaves(sub, (*path, name)))]


@pytest.mark.parametrize("path", leaves(cli), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]):
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_is_fast_and_imports_nothing_heavy():
    script = (
        "import sys; from vlm4vla.cli import cli; cli.main(['--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'matplotlib', 'mujoco') if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
        times.append(time.monotonic() - started)
    assert done.stdout.splitlines()[-1] == "[]"
    assert min(times) < 0.5
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "nearest: train"),
        (["train", "--out", "x", "--set", "treatmnt=full"], "nearest: treatment"),
        (["train", "--out", "x", "--set", "treatment"], "KEY=VALUE"),
        (["train", "--out", "x", "--set", "seed.deep=1", "--set", "seed=1"], "seed"),
        (["train", "--out", "x", "--set", "seed=[1,"], "not YAML"),
        (["train", "--out", "x", "--set", "data=null"], "data: "),
        (["train", "--out", "x", "--tracker", "wandbb"], "'wandb'"),
        (["train", "--out", "x"], "vlm4vla data record"),
        (["train", "missing.yaml", "--out", "x"], "missing.yaml"),
        (["eval", "nowhere", "--protocol", "grinningface/place/vall/v1"], "grinningface/place/val/v1"),
        (["study", "plan", "missing.yaml"], "missing.yaml"),
        (["report", "nowhere"], "vlm4vla study run"),
        (["data", "record", "--out", "x", "--set", "data.protocol=null"], "data.protocol"),
    ],
)
def test_what_a_user_can_mend_exits_2_without_traceback(arguments: list[str], says: str, tmp_path: Path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_user_error_says_found_expected_and_next():
    lines = run("report", "nowhere").stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["found", "expected", "next"]


def test_a_defect_exits_1_with_traceback():
    script = (
        "import sys, vlm4vla.reporting.html as html\n"
        "def fail(*_): raise ZeroDivisionError('a defect')\n"
        "html.report = fail\n"
        "sys.argv = ['vlm4vla', 'report', '.']\n"
        "from vlm4vla.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a defect" in done.stderr


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_cannot_be_written_exits_2_without_traceback(kind: int, monkeypatch, capsys):
    def fail(*_):
        raise OSError(kind, os.strerror(kind), "some/file")

    monkeypatch.setattr(sys, "argv", ["vlm4vla", "report", "."])
    monkeypatch.setattr("vlm4vla.reporting.html.report", fail)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "some/file" in said
    assert "next: " in said


def test_a_file_where_a_folder_should_be_is_no_defect(tmp_path: Path):
    (tmp_path / "file").touch()
    done = run("data", "record", "--out", "file/demos", cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_the_next_command_can_be_pasted(study_folder, tmp_path):
    folder = study_folder({"full": {"grinningface/place/val/v1": (0.9, 0.8)}}, seeds=(0,), episodes=2)
    page = tmp_path / "my {0} $report.html"
    done = CliRunner().invoke(cli, ["report", str(folder), "--out", str(page)], catch_exceptions=False)
    (line,) = done.stderr.splitlines()
    assert shlex.split(line) == ["next:", "open", str(page)]


def test_ctrl_c_exits_130_and_says_how_to_resume():
    script = (
        "import sys, time, vlm4vla.reporting.html as html\n"
        "def wait(*_): print('waiting', flush=True); time.sleep(30)\n"
        "html.report = wait\n"
        "sys.argv = ['vlm4vla', 'report', 'my study']\n"
        "from vlm4vla.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "vlm4vla report 'my study'" in stderr
    assert "Traceback" not in stderr


def test_base_install_helps_plans_and_reports_without_torch(study_folder):
    full = {"grinningface/place/val/v1": (0.9, 0.8)}
    folder = study_folder({"full": full}, seeds=(0,), episodes=5)
    for arguments in (["--help"], ["study", "plan", "demo"], ["sims", "protocols"], ["report", str(folder)]):
        done = subprocess.run(
            [sys.executable, "-c", BASE_INSTALL, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (folder / "report.html").is_file()


def test_a_verb_that_needs_more_than_the_base_install_names_the_extra():
    command = ["train", "--data", "nowhere", "--out", "x"]
    done = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL, *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "vlm4vla[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {
        re.split("[<>=]", line)[0]: name for name, lines in project["optional-dependencies"].items() for line in lines
    }
    assert {package: extra for package, extra in declared.items() if extra not in ("dev", "compat")} == module.EXTRAS


def test_doctor_names_what_is_missing_and_what_mends_it(monkeypatch: pytest.MonkeyPatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in ("torch", "mujoco") else real(name))
    result = CliRunner().invoke(cli, ["doctor"])
    assert isinstance(result.exception, UserError)
    lines = result.output.splitlines()
    missing = [line.split()[1] for line in lines if line.startswith("MISS")]
    assert set(missing) >= {"torch", "device", "mujoco", "rendering"}
    assert not {"python", "numpy", "emoji", "memory"} & set(missing)
    assert all("mend:" in after for line, after in itertools.pairwise(lines) if line.startswith("MISS"))


def test_doctor_looks_for_what_serving_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    lines = doctor.doctor()[0]
    for name in ("msgpack", "websockets"):
        (at,) = (i for i, line in enumerate(lines) if line.split()[1] == name)
        assert lines[at].startswith("- "), "the demo does without"
        assert "vlm4vla[serve]" in lines[at + 1]


@pytest.mark.sim
def test_doctor_really_renders():
    found = doctor.renderer()
    assert found.ok
    assert "MuJoCo with" in found.found


@pytest.mark.parametrize(("working", "ok", "said"), [("osmesa", True, "osmesa"), ("egl", False, "MUJOCO_GL=egl")])
def test_doctor_judges_the_backend_that_the_simulator_chooses(monkeypatch: pytest.MonkeyPatch, working, ok, said):
    monkeypatch.setattr("vlm4vla.sims.backend.choose_backend", lambda: "osmesa")
    monkeypatch.setattr(doctor, "renders", lambda backend: backend == working)
    found = doctor.renderer()
    assert found.ok is ok
    assert said in found.found + found.mend


def test_doctor_says_which_vulkan_there_is_and_needs_none(monkeypatch: pytest.MonkeyPatch):
    for variable in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):  # the second is the older name
        monkeypatch.setenv(variable, "/nowhere.json")
    none = doctor.vulkan()
    assert (none.ok, none.needed) == (False, False)
    assert "mesa-vulkan-drivers" in none.mend
    monkeypatch.setattr(vulkan, "devices", lambda: (vulkan.Device("a GPU", 1, True), vulkan.Device("pipe", 2, False)))
    some = doctor.vulkan()
    assert some.ok
    assert some.found == "a GPU; pipe (without VK_KHR_external_semaphore_fd: for simpler, not for simpler_ms2)"


def test_doctor_refuses_the_backends_that_the_simulator_refuses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MUJOCO_GL", "cgl")
    monkeypatch.setattr(doctor, "renders", lambda backend: True)
    assert not doctor.renderer().ok


def test_doctor_says_where_the_font_is_not_the_one_emojis_were_chosen_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emoji, "font_version", lambda: emoji.CATALOGUE_FONT)
    assert doctor.emoji_font().ok
    monkeypatch.setattr(emoji, "font_version", lambda: "NotoColorEmoji.ttf 0123456789")
    found = doctor.emoji_font()
    assert (found.ok, found.needed) == (False, False)
    assert "0123456789" in found.found


def has_emoji_font(home: Path, fonts: Path) -> bool:
    """What ``scripts/setup.sh`` finds."""
    text = (Path(__file__).parents[1] / "scripts" / "setup.sh").read_text()
    function = re.search(r"^has_emoji_font\(\) \{.*?^\}", text, re.DOTALL | re.MULTILINE)[0]
    script = f"set -euo pipefail; fonts={fonts}; {function}\nhas_emoji_font"
    return subprocess.run(["bash", "-c", script], env={**os.environ, "HOME": str(home)}).returncode == 0


def test_setup_looks_for_fonts_where_the_simulator_does(tmp_path: Path):
    (tmp_path / "fonts.txt").write_text("/nowhere/a.ttf\n~/some fonts/b.ttf\n")
    assert not has_emoji_font(tmp_path, tmp_path / "fonts.txt")
    (tmp_path / "some fonts").mkdir()
    (tmp_path / "some fonts" / "b.ttf").touch()
    assert has_emoji_font(tmp_path, tmp_path / "fonts.txt")
    listed = re.search(r"^fonts=(\S+)$", (Path(__file__).parents[1] / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    assert (Path(__file__).parents[1] / listed[1]).read_text().splitlines() == list(emoji.FONTS)


def test_setup_runs_in_the_bash_of_macos():
    """Bash 3.2: no mapfile, and an empty array is an unbound variable under ``set -u``."""
    text = (Path(__file__).parents[1] / "scripts" / "setup.sh").read_text()
    assert not re.search(r"\b(mapfile|readarray|declare -A)\b|=\(\)", text)


def test_doctor_looks_for_the_embedded_vlm_where_it_is_loaded_from():
    from vlm4vla.backbones import tiny

    assert doctor.EMBEDDED_VLM == tiny.FOLDER


@pytest.mark.sim
def test_doctor_does_not_believe_a_backend_that_does_not_render():
    assert not doctor.renders("no-such-backend")


def test_overrides_reach_into_sections(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"treatment": "scratch", "training": {"steps": 7}}))
    spec = run_spec(path, ("training.steps=9", "head.chunk=8", "data.folder=null", "training.schedule=cosine"))
    assert (spec.treatment, spec.training.steps, spec.head.chunk, spec.data.folder) == ("scratch", 9, 8, None)
    assert spec.training.schedule == "cosine"
    assert run_spec(None, ("data.episodes=3",)).data.protocol == RunSpec().data.protocol
    with pytest.raises(UserError, match="no section"):
        run_spec(path, ("treatment.kind=full",))


def test_shipped_studies_build_and_a_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("demo", "smoke"):
        cells = matrix.load(study_file(name)).cells()
        assert {cell.run.treatment for cell in cells} == {"full", "freeze_vision", "scratch"}
        assert len({cell.run.training for cell in cells}) == 1, "every treatment gets the same budget"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("name: mine")
    assert matrix.load(study_file("demo")).name == "mine"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_this_program(shell: str):
    result = CliRunner().invoke(cli, ["completion", shell])
    assert "_VLM4VLA_COMPLETE" in result.output


def test_completion_completes():
    environment = {**os.environ, "_VLM4VLA_COMPLETE": "bash_complete", "COMP_WORDS": "vlm4vla stu", "COMP_CWORD": "1"}
    script = "import sys; sys.argv = ['vlm4vla']; from vlm4vla.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["plain,study"]


def test_verbs_are_listed_in_the_order_of_use():
    names = module.cli.list_commands(click.Context(module.cli))
    positions = [names.index(verb) for verb in VERBS]
    assert positions == sorted(positions)


@pytest.mark.sim
@pytest.mark.slow
def test_by_hand_from_the_expert_to_a_judged_policy(tmp_path: Path):
    """The README's commands, each the next step that the one before it names (with an untrained tiny VLM)."""
    from vlm4vla.backbones import tiny
    from vlm4vla.backbones.vlm import save_vlm
    from vlm4vla.skills.questions import words
    from vlm4vla.skills.scenes import names

    (tmp_path / "vlm").mkdir()
    save_vlm(*tiny.build(names(), words(), 0), tmp_path / "vlm")
    sets = ["--set", f"backbone={tmp_path / 'vlm'}", "--set", "data.episodes=2"]
    sets += ["--set", "training.steps=2", "--set", "training.batch_size=4"]
    protocol = "grinningface/place/val/dev"
    chain = [
        (["sims", "check", "grinningface"], "keeps the simulator protocol"),
        (["sims", "demo", "grinningface", "--out", "look"], ".mp4"),
        (["data", "record", *sets, "--out", "data"], "2 episodes"),
        (["data", "inspect", "data"], "episodes"),
        (["train", *sets, "--data", "data", "--out", "mine"], ""),
        (["eval", "mine/policy", "--protocol", protocol, "--episodes", "2", "--strips", "1"], "n = 2"),
    ]
    for arguments, says in chain:
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert says in done.stdout
        assert "next: " in done.stderr
    assert (tmp_path / "mine" / "strips" / "grinningface-place-val-dev-0000.png").is_file()
    again = run(*chain[-1][0], cwd=tmp_path)
    assert again.stdout == done.stdout, "finished episodes are kept"
