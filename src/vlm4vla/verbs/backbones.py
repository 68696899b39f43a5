"""``vlm4vla backbones``: which VLMs there are, what one is made of, whether one works."""

import click

from vlm4vla.errors import UserError
from vlm4vla.verbs.shared import Verbs, device_option, next_step, threads_option

size_option = click.option(
    "--image-size", type=click.IntRange(min=16), default=224, show_default=True, help="Pixels of a picture's side."
)


@click.group(cls=Verbs)
def backbones() -> None:
    """Look at the vision-language models a policy can be built on, and check new ones."""


@backbones.command("list")
def backbones_list() -> None:
    """List the known models and families; any other image-text-to-text model may work as well."""
    from vlm4vla.backbones.families import known

    click.echo(known())
    next_step("vlm4vla backbones show ID; vlm4vla backbones check ID")


@backbones.command("show")
@click.argument("name", metavar="ID")
@size_option
def backbones_show(name: str, image_size: int) -> None:
    """Say what ID (`tiny`, a folder, a hub id) is made of; its weights are not needed."""
    from vlm4vla.backbones.show import describe

    click.echo(describe(name, image_size))
    next_step("vlm4vla backbones check {}", name)


@backbones.command("check")
@click.argument("name", metavar="ID")
@size_option
@click.option("--forward-only", is_flag=True, help="Do not train it on eight samples (which takes 16 bytes a weight).")
@device_option
@threads_option
def backbones_check(name: str, image_size: int, forward_only: bool, device: str, threads: int) -> None:
    """Check that ID (`tiny`, a folder, a hub id) works as a backbone, in fp32."""
    import torch

    from vlm4vla.backbones.check import Check
    from vlm4vla.backbones.load import load_vlm
    from vlm4vla.backbones.vlm import Backbone
    from vlm4vla.policy import torch_device

    torch.set_num_threads(threads)
    backbone = Backbone(*load_vlm(name)).to(torch_device(device))
    failed = []
    for finding in Check(backbone, image_size).run(forward_only):
        click.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name:<28} {finding.detail}")
        failed += [] if finding.ok else [finding.name]
    if failed:
        raise UserError(
            f"{name} does not keep what a backbone promises: {', '.join(failed)}",
            "`ok` in every line",
            "docs/backbones.md says how a family gets a row",
        )
    next_step("vlm4vla train --set {} --help", f"backbone={name}")
