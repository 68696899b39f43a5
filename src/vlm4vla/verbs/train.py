"""``vlm4vla train``."""

import os
import shlex
from pathlib import Path

import click

from vlm4vla.errors import UserError
from vlm4vla.verbs.shared import FILE, FOLDER, device_option, next_step, out_option, set_option, threads_option

TRACKERS = ("tensorboard", "wandb", "trackio")


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
@click.option("--shard", is_flag=True, help="Spread the weights over all processes (FSDP2) instead of repeating them.")
@click.option("--tracker", "trackers", type=click.Choice(TRACKERS), multiple=True, help="Repeatable.")
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
    shard: bool,
    trackers: tuple[str, ...],
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
        shard=shard,
        trackers=trackers,
        cache=cache,
    )
    if data_folder is None and spec.data.folder is None:
        arguments = [*([str(run)] if run else []), *with_set(overrides), "--out", "runs/data"]
        raise UserError(
            "no demonstrations",
            "--data FOLDER, or data.folder in the run's keys",
            f"vlm4vla data record {shlex.join(arguments)}",
        )
    from vlm4vla.training.imitation import train as train_policy

    folder = data_folder or Path(str(spec.data.folder))
    true, protocol = trained_on(spec, folder)
    if true != spec:
        click.echo(f"{folder}: not what RUN's data section describes; the policy's spec names the folder", err=True)
    train_policy(true, folder, out, how)
    if os.environ.get("RANK", "0") == "0":
        next_step("vlm4vla eval {} --protocol {}", out / "policy", protocol or "NAME")
