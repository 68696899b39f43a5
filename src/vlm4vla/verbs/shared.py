"""What the verbs' modules share: options, the line that says what to run next, groups that know their verbs."""

import shlex
from pathlib import Path
from typing import Any

import click

from vlm4vla.errors import nearest

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
out_option = click.option("--out", type=FOLDER, required=True, help="Folder to write.")
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. training.steps=200.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Simulator processes."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="E.g. cuda:1; auto says which it takes."
)
backbone_option = click.option(
    "--backbone", metavar="NAME", help="Folder or hub id of POLICY's VLM, where it is not what it was in training."
)
sim_python_option = click.option(
    "--sim-python",
    metavar="PATH",
    help="Python that runs the simulator. [default: what `sims setup` made, or this one]",
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="BLAS threads."
)


def next_step(text: str, *paths: object) -> None:
    """Tell what to run next, ``{}`` standing for each path; on stderr, so that a command's output can be piped."""
    click.secho(f"next: {text.format(*(shlex.quote(str(path)) for path in paths))}", fg="green", err=True)


class Verbs(click.Group):
    """A group that lists its verbs in the order they are used, and names the nearest one for a misspelt one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            ctx.fail(f"no command {args[0]!r} (nearest: {nearest(args[0], list(self.commands))})")
        return super().resolve_command(ctx, args)
