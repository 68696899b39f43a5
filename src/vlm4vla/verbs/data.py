"""``vlm4vla data``: record, convert, describe, look."""

import sys
from pathlib import Path

import click

from vlm4vla.errors import UserError
from vlm4vla.verbs.shared import FILE, FOLDER, Verbs, next_step, out_option, set_option, workers_option


@click.group(cls=Verbs)
def data() -> None:
    """Record demonstrations, look into a data set."""


@data.command("record")
@click.argument("run", type=FILE, required=False)
@out_option
@set_option
@workers_option
def data_record(run: Path | None, out: Path, overrides: tuple[str, ...], workers: int) -> None:
    """Record the scripted expert as the `data` section of RUN (a YAML file of run keys) says; resumes."""
    from vlm4vla.arguments import run_spec, with_set

    spec = run_spec(run, overrides)
    if spec.data.protocol is None:
        raise UserError("data.folder, an existing data set", "data.protocol to record", "add --set data.protocol=NAME")
    from vlm4vla.data.record import record

    click.echo(record(spec.data, out, workers, progress=sys.stderr.isatty()))
    arguments = [*([str(run)] if run else []), "--data", str(out), *with_set(overrides), "--out", "runs/mine"]
    next_step("vlm4vla data inspect {}; vlm4vla train " + " ".join(["{}"] * len(arguments)), out, *arguments)


@data.command("inspect")
@click.argument("folder", type=FOLDER)
def data_inspect(folder: Path) -> None:
    """Say what a LeRobotDataset v3 folder holds."""
    from vlm4vla.data.inspect import inspect

    click.echo(inspect(folder))
    next_step("vlm4vla train --data {} --out runs/mine", folder)


@data.command("describe")
@click.argument("folder", metavar="DATA", type=FOLDER)
@click.option("--convention", help="What its actions mean: libero, calvin, bridge, or a YAML file of a convention.")
@click.option("--camera", "cameras", multiple=True, metavar="NAME=FEATURE", help="E.g. main=observation.images.image.")
def data_describe(folder: Path, convention: str | None, cameras: tuple[str, ...]) -> None:
    """Say of a foreign data set (a folder, or hub:owner/name) what its files do not."""
    from vlm4vla.arguments import named_convention, pairs
    from vlm4vla.data.hub import describe

    meaning = named_convention(convention).to_dict() if convention else None
    click.echo(describe(folder, meaning, pairs("--camera", cameras)))
    next_step("vlm4vla data inspect {}", folder)
