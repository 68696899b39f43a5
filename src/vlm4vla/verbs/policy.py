"""``vlm4vla policy``: what can be done with a policy folder beside judging it."""

from pathlib import Path

import click

from vlm4vla.errors import UserError
from vlm4vla.verbs.shared import FOLDER, Verbs, backbone_option, next_step, out_option


@click.group(cls=Verbs)
def policy() -> None:
    """Make policy folders whole, share them."""


@policy.command("merge")
@click.argument("folder", metavar="POLICY", type=FOLDER)
@out_option
@backbone_option
def policy_merge(folder: Path, out: Path, backbone: str | None) -> None:
    """Write POLICY, whose VLM has adapters, with a whole VLM: OUT/vlm opens in plain transformers."""
    from vlm4vla.files import new_folder
    from vlm4vla.policy import Policy

    if out.exists():
        raise UserError(f"{out}, which is there already", "a new folder", "name another")
    loaded = Policy.load(folder, backbone=backbone)
    loaded.merge()
    with new_folder(out) as partial:
        loaded.save(partial)
    next_step("vlm4vla eval {} --protocol NAME", out)


@policy.command("push")
@click.argument("folder", metavar="POLICY", type=FOLDER)
@click.argument("name", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Where the repository is made.")
@backbone_option
def policy_push(folder: Path, name: str, private: bool, backbone: str | None) -> None:
    """Upload POLICY to the Hugging Face hub; hub:OWNER/NAME then names it wherever a policy folder does."""
    from vlm4vla.hub import PREFIX, push
    from vlm4vla.policy import Policy

    Policy.load(folder, backbone=backbone)  # a damaged one stays here
    click.echo(push(folder, name, private))
    next_step("vlm4vla eval {} --protocol NAME", PREFIX + name.removeprefix(PREFIX))
