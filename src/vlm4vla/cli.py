"""The command line: verbs -> functions, nothing else.

Everything heavy is imported inside the verb that needs it, so that ``--help`` and completion stay fast and the base
install (no torch, no simulator) can read and render results.
Exit status: 0 done, 1 a defect (traceback), 2 something the user can mend, 130 interrupted.
"""

import shlex
import sys
from pathlib import Path
from typing import Literal

import click

from vlm4vla import __version__
from vlm4vla.errors import UserError, mendable
from vlm4vla.verbs.backbones import backbones
from vlm4vla.verbs.data import data
from vlm4vla.verbs.policy import policy
from vlm4vla.verbs.serve import serve
from vlm4vla.verbs.shared import (
    FILE,
    FOLDER,
    Verbs,
    backbone_option,
    device_option,
    next_step,
    out_option,
    sim_python_option,
    threads_option,
    workers_option,
)
from vlm4vla.verbs.sims import sims
from vlm4vla.verbs.train import audit, train

EXTRAS = {
    **dict.fromkeys(
        ("torch", "torchvision", "transformers", "accelerate", "peft", "safetensors", "num2words"), "train"
    ),
    **dict.fromkeys(("mujoco", "gymnasium"), "grinningface"),
    **dict.fromkeys(("msgpack", "websockets"), "serve"),
    **dict.fromkeys(("av", "google-crc32c", "h5py", "huggingface_hub"), "data"),
}
"""What the base install leaves out, and the extra that brings it (``pyproject.toml``)."""


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vlm4vla")
def cli() -> None:
    """Turn a vision-language model into a robot policy, judge it in closed loop, report what survived.

    \b
    First time here:      vlm4vla doctor && vlm4vla demo
    One run by hand:      data record -> train -> eval
    A declared matrix:    study plan -> study run -> report
    """


@cli.command()
@click.option("--out", type=FOLDER, default=Path("runs/demo"), show_default=True, help="Folder to write.")
@click.option("--smoke", is_flag=True, help="A few steps and episodes: proves the machinery, not the result.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Runs at a time.")
def demo(out: Path, smoke: bool, jobs: int) -> None:
    """The main job at CPU scale: train, evaluate and compare three treatments, write a report."""
    from vlm4vla.demo import demo as run

    page = run(out, smoke=smoke, jobs=jobs)
    next_step("open {}", page)


@cli.group(cls=Verbs)
def vlm() -> None:
    """Make and question the embedded VLM."""


@vlm.command("train")
@click.option("--work", type=FOLDER, default=Path("runs/vlm"), show_default=True, help="Scenes and checkpoints.")
@out_option
@workers_option
@device_option
@threads_option
def vlm_train(work: Path, out: Path, workers: int, device: str, threads: int) -> None:
    """Train the embedded VLM from nothing on generated scenes and score it on unseen ones; resumes."""
    from vlm4vla.arguments import runtime
    from vlm4vla.skills.build import build_vlm, score_table

    click.echo(score_table(build_vlm(work, out, runtime(workers=workers, device=device, threads=threads))))
    next_step("vlm4vla train --set {} --help", f"backbone={out}")


@vlm.command("score")
@click.argument("folder", type=FOLDER, default=None, required=False)
@click.option("--work", type=FOLDER, default=Path("runs/vlm"), show_default=True, help="Scenes are rendered into it.")
@workers_option
def vlm_score(folder: Path | None, work: Path, workers: int) -> None:
    """Ask FOLDER's VLM (the shipped one without) questions about scenes that it never saw."""
    from vlm4vla.arguments import runtime
    from vlm4vla.backbones.tiny import FOLDER as SHIPPED
    from vlm4vla.skills.build import score_folder, score_table, test_scenes

    scenes = test_scenes(work, runtime(workers=workers))
    click.echo(score_table(score_folder(folder or SHIPPED, scenes)))
    next_step("vlm4vla demo")


@vlm.command("questions")
@click.option("--scenes", type=click.IntRange(min=1), default=2000, show_default=True, help="Rounded up to 500s.")
@click.option("--each", type=click.IntRange(min=1), default=4, show_default=True, help="Questions about a scene.")
@click.option("--seed", type=click.IntRange(min=0), default=2, show_default=True, help="0 and 1: the VLM's own scenes.")
@click.option("--work", type=FOLDER, default=Path("runs/vlm"), show_default=True, help="Scenes are rendered into it.")
@click.option("--all-emojis", is_flag=True, help="Name val's and hard's too: they are unseen no more.")
@workers_option
@out_option
def vlm_questions(scenes: int, each: int, seed: int, work: Path, all_emojis: bool, workers: int, out: Path) -> None:
    """Write questions about rendered scenes, and the pictures, to be trained beside demonstrations."""
    from vlm4vla.arguments import runtime
    from vlm4vla.skills.build import questions

    there = out.exists()
    path = questions(scenes, each, seed, all_emojis, work, out, runtime(workers=workers))
    click.echo(f"{path}: {'there already, nothing done' if there else 'written'}")
    mixture = f"data.mixture=[{{conversations: {path}}}]"
    next_step("vlm4vla train --data DEMONSTRATIONS --set {} --out runs/mine", mixture)


cli.add_command(backbones)
cli.add_command(data)


# ------------------------------------------------------------------------------------------------------- train and eval


cli.add_command(train)
cli.add_command(audit)
cli.add_command(policy)


@cli.command("eval")
@click.argument("policy", metavar="POLICY")
@click.option("--protocol", "protocols", multiple=True, required=True, help="Repeatable; see: vlm4vla sims protocols.")
@click.option(
    "--episodes", type=click.IntRange(min=1), help="Of each protocol. [default: 100, or all where it has fewer]"
)
@click.option("--store", "store_path", type=FILE, help="SQLite file of results. [default: eval.sqlite beside POLICY]")
@click.option("--baseline", metavar="NAME|FILE", help="How another project's policy sees and acts (docs/serving.md).")
@click.option("--name", help="What results shall call another project's policy.")
@click.option("--token", envvar="VLM4VLA_TOKEN", help="What the policy's server asks for.")
@click.option(
    "--strips", type=click.IntRange(min=0), default=4, show_default=True, help="Episodes to keep film strips of."
)
@click.option(
    "--video",
    type=click.Choice(["failures", "all", "none"]),
    default="none",
    show_default=True,
    help="MP4 of episodes.",
)
@backbone_option
@sim_python_option
@workers_option
@device_option
def evaluate(
    policy: str,
    protocols: tuple[str, ...],
    episodes: int | None,
    store_path: Path | None,
    baseline: str | None,
    name: str | None,
    token: str | None,
    strips: int,
    video: Literal["failures", "all", "none"],
    backbone: str | None,
    sim_python: str | None,
    workers: int,
    device: str,
) -> None:
    """Judge POLICY in closed loop; finished episodes are kept, run again to resume.
    Status 2 where episodes ended in faults of the infrastructure.

    \b
    POLICY is a folder, hub:OWNER/NAME, openpi://host:port, starvla://host:port,
    openvla://host:port, replay:DATA (recorded actions) or random:DATA.
    """
    from vlm4vla.sims.protocols import protocol

    wanted = [(each, each.episodes(episodes)) for each in map(protocol, protocols)]  # wrong ones before loading
    from vlm4vla.evaluation.faults import require_decided
    from vlm4vla.evaluation.rollout import evaluate as roll_out
    from vlm4vla.serving.sources import album, home, opened
    from vlm4vla.studies.stats import credit_lines, summarise
    from vlm4vla.studies.store import Store

    with opened(policy, device, baseline, name, token, backbone) as source:
        folder = home(policy, source)
        strip_folder, video_folder = (folder / kind / album(policy) for kind in ("strips", "videos"))
        with Store(store_path or folder / "eval.sqlite") as store:
            everything = []
            for each, number in wanted:
                results = roll_out(
                    source.policy,
                    each,
                    number,
                    store,
                    source.name,
                    image_size=source.image_size,
                    cameras=source.cameras,
                    workers=workers,
                    progress=sys.stderr.isatty(),
                    strips=strip_folder,
                    num_strips=strips,
                    sim_python=sim_python,
                    videos=video,
                    video_folder=video_folder,
                )
                rate = summarise(results)
                click.echo(f"{each.name}: success {rate}" + (f", faults: {rate.faults}" if rate.faults else ""))
                everything += results
                for line in credit_lines(results):
                    click.echo(f"  {line}")
            require_decided(everything, str(store.path), "the same command again: only these are repeated")
    next_step(("film strips in {}; " if strips else "") + "compare treatments: vlm4vla study plan --help", strip_folder)


cli.add_command(serve)


# --------------------------------------------------------------------------------------------------- study and report


@cli.group(cls=Verbs)
def study() -> None:
    """Plan and run a declared matrix: treatments x seeds x protocols."""


@study.command("plan")
@click.argument("matrix", metavar="STUDY")
@click.option("--out", type=FOLDER, help="Study folder; says what is finished there.")
def study_plan(matrix: str, out: Path | None) -> None:
    """List the cells of STUDY (a YAML file, or a shipped one: demo, smoke) and what each still needs."""
    from vlm4vla.arguments import study_file
    from vlm4vla.studies.matrix import load, plan

    path = study_file(matrix)
    click.echo(str(plan(load(path), out)))
    next_step("vlm4vla study run {} --out {}", matrix, out or f"runs/{path.stem}")


@study.command("run")
@click.argument("matrix", metavar="STUDY")
@out_option
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Cells at a time.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Simulators per cell.")
@device_option
def study_run(matrix: str, out: Path, jobs: int, workers: int, device: str) -> None:
    """Run the cells of STUDY; finished ones are never redone, so run again to resume."""
    from vlm4vla.arguments import runtime, study_file
    from vlm4vla.studies.matrix import load
    from vlm4vla.studies.runner import run

    run(load(study_file(matrix)), out, runtime(workers=workers, device=device), jobs)
    next_step("vlm4vla report {}", out)


@cli.command()
@click.argument("folder", metavar="STUDY_FOLDER", type=FOLDER)
@click.option("--out", type=FILE, help="HTML file. [default: report.html in STUDY_FOLDER]")
def report(folder: Path, out: Path | None) -> None:
    """Render a study's results as one self-contained HTML page (works while the study still runs)."""
    from vlm4vla.reporting.html import report as render

    page = render(folder, out or folder / "report.html")
    click.echo(page)
    next_step("open {}", page)


cli.add_command(sims)


# -------------------------------------------------------------------------------------------------- doctor, completion


@cli.command()
def doctor() -> None:
    """Say what is installed, what is missing, and the command that mends it."""
    from vlm4vla.doctor import doctor as examine

    lines, healthy = examine()
    click.echo("\n".join(lines))
    if not healthy:
        raise UserError("a machine that cannot run the demo yet", "`ok` in every line", "what the `mend` lines say")
    next_step("vlm4vla demo --smoke (3 min), or vlm4vla demo (20 min)")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL, e.g. for bash: eval "$(vlm4vla completion bash)"."""
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "vlm4vla", "_VLM4VLA_COMPLETE").source())


def main() -> None:
    """Console entry point."""
    try:
        cli.main(prog_name="vlm4vla", standalone_mode=False)
    except (UserError, OSError) as error:
        if (told := mendable(error)) is None:
            raise
        click.echo(str(told), err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(module, EXTRAS.get(module.replace("_", "-")))
        if extra is None:
            raise
        mend = f"pip install 'vlm4vla[{extra}]'   (in the repository: make setup)"
        click.echo(str(UserError(f"no package {error.name}", f"vlm4vla with the extra {extra!r}", mend)), err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        command = shlex.join(["vlm4vla", *sys.argv[1:]])
        click.echo(f"\ninterrupted; what is finished is kept\nnext: {command}   (the same command resumes)", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
