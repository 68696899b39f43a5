"""``vlm4vla sims``: set up, look at and check simulators."""

from pathlib import Path

import click

from vlm4vla.errors import UserError, nearest
from vlm4vla.verbs.shared import FOLDER, Verbs, next_step, sim_python_option


@click.group(cls=Verbs)
def sims() -> None:
    """Set the simulators up, look at them and check them."""


@sims.command("protocols")
def sims_protocols() -> None:
    """List the evaluation protocols."""
    from vlm4vla.sims.protocols import protocol, protocol_names

    rules: dict[str, list[str]] = {}
    for name in protocol_names():
        each = protocol(name)
        rules.setdefault(each.success_rule, []).append(
            f"  {name:<42} {each.max_steps} steps, looks every {each.execute}"
        )
    for rule, lines in rules.items():
        click.echo("\n".join([f"success: {rule}", *lines]))
    next_step("vlm4vla eval POLICY --protocol NAME")


@sims.command("demo")
@click.argument("sim", type=click.Choice(["grinningface"]))
@click.option("--level", default="place", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", type=FOLDER, default=Path("runs/sims"), show_default=True)
def sims_demo(sim: str, level: str, seed: int, out: Path) -> None:
    """Run the scripted expert of SIM once; write a film strip and an MP4."""
    from vlm4vla.sims.grinningface.demo import demo as run

    for path in run(out, level, seed):
        click.echo(path)
    next_step("vlm4vla data record --help")


@sims.command("setup")
@click.argument("sim")
@click.option("--assets", type=FOLDER, help="A folder with the simulator's assets.")
@click.option("--fetch", is_flag=True, help="Fetch the assets (their size and licence are said first).")
@click.option("--python", metavar="PATH", help="The Python to build on. [default: this one]")
def sims_setup(sim: str, assets: Path | None, fetch: bool, python: str | None) -> None:
    """Make the environment of SIM: an isolated Python with pinned packages, proved by one rendered frame."""
    from vlm4vla.sims.environments import ENVIRONMENTS, setup

    if sim not in ENVIRONMENTS:
        raise UserError(
            f"the simulator {sim!r}",
            f"one of {', '.join(ENVIRONMENTS)}: others need no environment of their own",
            f"vlm4vla sims setup NAME   (nearest: {nearest(sim, [*ENVIRONMENTS])})",
        )
    click.echo(setup(sim, assets=assets, fetch=fetch, python=python, say=lambda text: click.echo(text, err=True)))
    next_step("vlm4vla sims check {}; vlm4vla sims protocols", sim)


@sims.command("check")
@click.argument("sim")
@sim_python_option
def sims_check(sim: str, sim_python: str | None) -> None:
    """Check that SIM (a name, or module:Class) keeps the simulator protocol."""
    from vlm4vla.sims.check import SimCheckError, check_sim
    from vlm4vla.sims.worker import WorkerFault

    try:
        check_sim(sim, python=sim_python)
    except (SimCheckError, WorkerFault) as error:
        raise UserError(
            f"{sim}: {str(error).strip()}",
            "a simulator that keeps the protocol of sims/base.py",
            f"mend it, then: vlm4vla sims check {sim}",
        ) from error
    click.echo(f"{sim}: keeps the simulator protocol")
    next_step("vlm4vla sims protocols")
