"""``vlm4vla train``."""

import os
import shlex
from pathlib import Path
from typing import Any, get_args

import click

from vlm4vla.errors import UserError
from vlm4vla.metrics import Tracker
from vlm4vla.verbs.shared import FILE, FOLDER, device_option, next_step, out_option, set_option, threads_option


@click.command()
@click.argument("run", type=FILE, required=False)
@click.option("--data", "data_folder", type=FOLDER, help="Recorded demonstrations; else data.folder of RUN.")
@out_option
@set_option
@device_option
@threads_option
@click.option(
    "--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Parts of a batch: less memory."
)
@click.option("--gradient-checkpointing", is_flag=True, help="Activations are computed twice: less memory.")
@click.option("--compile", "compiled", is_flag=True, help="Layers through torch.compile; not with --shard.")
@click.option("--shard", is_flag=True, help="Spread the weights over all processes (FSDP2) instead of repeating them.")
@click.option("--tracker", "trackers", type=click.Choice(get_args(Tracker)), multiple=True, help="Repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what it would take: memory, time, what is frozen. Trains nothing.")
@click.option("--no-cache", "cache", flag_value=False, default=True, help="Decode pictures each time; keep no file.")
def train(
    run: Path | None,
    data_folder: Path | None,
    out: Path,
    overrides: tuple[str, ...],
    device: str,
    threads: int,
    accumulate: int,
    gradient_checkpointing: bool,
    compiled: bool,
    shard: bool,
    trackers: tuple[str, ...],
    dry_run: bool,
    cache: bool,
) -> None:
    """Train one policy as RUN (a YAML file of run keys) says; run again to resume.

    On several GPUs: torchrun --nproc-per-node 8 --no-python vlm4vla train ... (docs/training.md).
    """
    from vlm4vla.arguments import run_spec, runtime, trained_on, with_set

    spec = run_spec(run, overrides)
    how = runtime(
        device=device,
        threads=threads,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        compile=compiled,
        shard=shard,
        trackers=trackers,
        cache=cache,
    )
    folder = data_folder or (Path(spec.data.folder) if spec.data.folder else None)
    if dry_run and data_folder is None and not (folder and folder.is_dir()):
        _dry_run(spec, how, None)
        return
    if folder is None:
        arguments = [*([str(run)] if run else []), *with_set(overrides), "--out", "runs/data"]
        raise UserError(
            "no demonstrations",
            "--data FOLDER, or data.folder in the run's keys",
            f"vlm4vla data record {shlex.join(arguments)}",
        )
    from vlm4vla.training.imitation import train as train_policy

    true, protocol = trained_on(spec, folder)
    if true != spec:
        click.echo(f"{folder}: not what RUN's data section describes; the policy's spec names the folder", err=True)
    if dry_run:
        _dry_run(true, how, folder)
        return
    train_policy(true, folder, out, how)
    if os.environ.get("RANK", "0") == "0":
        next_step("vlm4vla eval {} --protocol {}", out / "policy", protocol or "NAME")


def _dry_run(spec: Any, how: Any, folder: Path | None) -> None:
    from vlm4vla.data.sources import Sources
    from vlm4vla.training import processes
    from vlm4vla.training.forecast import forecast

    sources = Sources.open(spec.data, folder) if folder else None
    size = spec.data.image_size or (sources.sets[0].image_size if sources else None)
    if size is None:
        raise UserError("no size of pictures", "data.image_size, or a data set", "add --set data.image_size=224")
    click.echo("\n".join(forecast(spec, how, size, processes.number(), sources)))


@click.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True)
@set_option
def audit(specs: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Say what runs do and what they do not have in common, as they would be executed; no weight is read.

    SPEC is a YAML file of run keys, or a study (a file, or a shipped one), whose cells are all compared.
    """
    from vlm4vla.arguments import run_spec, study_file
    from vlm4vla.audit import Audit, differences, text
    from vlm4vla.spec import load_yaml
    from vlm4vla.studies.matrix import Study, load
    from vlm4vla.studies.runner import audits, picture_size

    found: dict[str, Audit] = {}
    for name in specs:
        path = study_file(name)
        if load_yaml(path).keys() & Study.model_fields.keys():
            found |= audits(load(path))
        else:
            from vlm4vla.training.examine import examine

            spec = run_spec(path, overrides)
            found[path.stem] = examine(spec, picture_size(spec.data))
    click.echo(text(found))
    unequal = ", ".join(differences(found)) or "nothing"
    click.secho(f"not the same in all {len(found)}: {unequal}", fg="green", err=True)
