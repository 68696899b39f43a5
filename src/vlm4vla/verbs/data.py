"""``vlm4vla data``: record, convert, describe, look."""

import sys
from pathlib import Path
from typing import Any

import click

from vlm4vla.errors import UserError
from vlm4vla.verbs.shared import FILE, FOLDER, Verbs, next_step, out_option, set_option, workers_option


@click.group(cls=Verbs)
def data() -> None:
    """Record demonstrations, convert data sets, look into them."""


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


@data.group("convert", cls=Verbs)
def data_convert() -> None:
    """Convert raw data sets into LeRobotDataset v3; run again to resume."""


def _convert(source: Any, out: Path, workers: int, drop_damaged: bool) -> None:
    from vlm4vla.data.convert.base import convert

    click.echo(convert(source, out, workers, sys.stderr.isatty(), drop_damaged))
    next_step("vlm4vla data inspect {}", out)


processes_option = click.option(
    "--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes."
)
drop_option = click.option("--drop-damaged", is_flag=True, help="Leave out what cannot be read, and list it.")


@data_convert.command("calvin")
@click.argument("source", metavar="SRC", type=FOLDER)
@out_option
@processes_option
@drop_option
def data_convert_calvin(source: Path, out: Path, workers: int, drop_damaged: bool) -> None:
    """SRC: `training` or `validation` of a CALVIN data set; its annotated segments."""
    from vlm4vla.data.convert.calvin import Calvin

    _convert(Calvin(source), out, workers, drop_damaged)


@data_convert.command("libero")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@out_option
@click.option("--keep-noops", is_flag=True, help="Keep steps without motion.")
@processes_option
@drop_option
def data_convert_libero(source: Path, out: Path, keep_noops: bool, workers: int, drop_damaged: bool) -> None:
    """SRC: a folder of LIBERO's HDF5 files, or one of them."""
    from vlm4vla.data.convert.libero import Libero

    _convert(Libero(source, keep_noops), out, workers, drop_damaged)


@data_convert.command("rlds")
@click.argument("source", metavar="SRC", type=FOLDER)
@out_option
@click.option("--mapping", required=True, help="bridge, libero, or a YAML file (docs/data.md).")
@processes_option
@drop_option
def data_convert_rlds(source: Path, out: Path, mapping: str, workers: int, drop_damaged: bool) -> None:
    """SRC: a TFDS folder of *.tfrecord-* files in RLDS form."""
    from vlm4vla.data.convert.rlds import Rlds, load_mapping

    _convert(Rlds(source, load_mapping(mapping)), out, workers, drop_damaged)


@data.command("inspect")
@click.argument("folder", metavar="DATA", type=FOLDER)
def data_inspect(folder: Path) -> None:
    """Say what a LeRobotDataset holds (a folder, or hub:owner/name), and what looks suspicious."""
    from vlm4vla.data.inspect import inspect

    report = inspect(folder)
    click.echo(report)
    if report.next_step:
        click.secho(f"next: {report.next_step}", fg="yellow", err=True)
    else:
        next_step("vlm4vla data view {} --episode 0; vlm4vla train --data {} --out runs/mine", folder, folder)


@data.command("view")
@click.argument("folder", metavar="DATA", type=FOLDER)
@click.option("--episode", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", type=FILE, help="HTML file. [default: runs/view/NAME-EPISODE.html]")
def data_view(folder: Path, episode: int, out: Path | None) -> None:
    """Write an episode as one self-contained HTML page: pictures, action curves, instruction."""
    from vlm4vla.data.view import view

    name = folder.name.replace(":", "-")
    page = view(folder, episode, out or Path("runs/view") / f"{name}-{episode:06d}.html")
    click.echo(page)
    next_step("open {}", page)


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
