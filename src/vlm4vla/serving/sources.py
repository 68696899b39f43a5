"""Where a policy comes from: one text names it, on the command line and in results.

runs/mine/policy             a checkpoint folder of ours
openpi://host:port           openpi's server, or ours (``vlm4vla serve``), which says all about itself
starvla://host:port          StarVLA's server, or ours
openvla://host:port          OpenVLA's REST service
replay:FOLDER                the actions that were recorded in a data set, open loop
random:FOLDER                actions drawn evenly between a data set's smallest and largest
"""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlm4vla import hub
from vlm4vla.convention import Convention
from vlm4vla.errors import UserError
from vlm4vla.spec import content_hash
from vlm4vla.types import BatchPolicy

SERVERS = ("openpi", "starvla", "openvla")
OF_DATA = ("replay", "random")
ADDRESS = re.compile(r"[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9A-Fa-f:]+\]:[0-9]{1,5}")

LAST_PORT = 65535


@dataclass(frozen=True)
class Source:
    """A policy that can be evaluated and served."""

    policy: BatchPolicy
    name: str
    """As results call it; two policies that could act differently never share one."""
    chunk: int
    """H, actions in one answer."""
    image_size: int
    """Height and width in pixels of the picture that the policy sees."""
    state_size: int = 0
    """S, numbers of proprioception that the policy needs; 0: none."""
    cameras: tuple[str, ...] = ("main",)
    """The simulator's cameras that the policy sees."""


@contextmanager
def opened(
    text: str,
    device: str = "auto",
    view: str | None = None,
    name: str | None = None,
    token: str | None = None,
    backbone: str | None = None,
) -> Iterator[Source]:
    """Open the policy that ``text`` names.

    Args:
        view: baseline (``baseline.py``) for another project's server; ours needs none.
        name: what results call another project's policy: its server does not say which weights it has.
        backbone: see ``checkpoint``.

    Raises:
        UserError: nothing there, or something is not said that would have to be guessed.
    """
    scheme, separator, rest = text.partition(":")
    server = separator == ":" and scheme in SERVERS
    if not server and (view is not None or name is not None):
        raise UserError(f"--baseline or --name with {text}", "another project's server", "leave them out")
    if backbone is not None and (server or (separator and scheme in OF_DATA)):
        raise UserError(f"--backbone with {text}", "a policy folder, or hub:OWNER/NAME", "leave it out")
    if server:
        address = rest.removeprefix("//").rstrip("/")
        if not ADDRESS.fullmatch(address) or int(address.rpartition(":")[2]) > LAST_PORT:
            raise UserError(f"the address {text!r}", f"{scheme}://host:port", f"e.g. {scheme}://127.0.0.1:8000")
        with _remote(scheme, address, view, name, token) as source:
            yield source
    elif separator and scheme in OF_DATA:
        from vlm4vla.serving import replay

        if not rest:
            raise UserError(f"{text} without a folder", f"{scheme}:DATA", f"e.g. {scheme}:data/mine")
        yield getattr(replay, scheme)(Path(rest))
    else:
        yield checkpoint(text, device, backbone=backbone)


def home(text: str, source: Source) -> Path:
    """Where the results of an evaluation belong: beside a checkpoint folder, else ``runs/<name>``."""
    return Path(text).parent if Path(text).is_dir() else Path("runs") / re.sub(r"[^A-Za-z0-9@._-]", "-", source.name)


def album(text: str) -> str:
    """Where a policy's films lie below ``strips`` and ``videos`` of its home: directly there where nobody else's can be
    (a run's ``policy``; whoever has a home of its own), else in a folder of its name, as for ``policies/step-*``."""
    name = Path(text).resolve().name
    return name if Path(text).is_dir() and name != "policy" else ""


@contextmanager
def _remote(scheme: str, address: str, view: str | None, name: str | None, token: str | None) -> Iterator[Source]:
    from vlm4vla.serving.baseline import Baseline, baseline
    from vlm4vla.serving.clients import DIALECTS, metadata
    from vlm4vla.serving.service import FORMAT, OWN_KEY

    about = metadata(address, token).get(OWN_KEY) if scheme != "openvla" else None
    convention, state_size = None, 0
    if about is not None:
        if view is not None or name is not None:
            raise UserError(f"--baseline or --name for {address}", "our own server, which says both", "leave them out")
        try:
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}")
            convention, state_size = Convention.from_dict(about["convention"]), int(about["state_size"])
            size, name = int(about["image_size"]), f"{about['policy']}"
            values = {
                "dialect": scheme,
                "form": about["form"],
                "chunk": about["chunk"],
                "picture": {"render": size, "size": size},
                "cameras": {"main": "observation/image"},
                "state": {"openpi": "observation/state", "starvla": "state"}[scheme] if state_size else None,
            }
            look = Baseline.model_validate(values)
        except (KeyError, TypeError, ValueError) as error:
            found = f"{address} says of itself what this version does not know ({error})"
            raise UserError(found, "a server of the same version", "use one version on both sides") from error
    else:
        if view is None or name is None:
            raise UserError(
                f"a server of another project at {address}",
                "how its policy sees and acts (--baseline) and what results shall call it (--name)",
                "docs/serving.md lists the baselines, docs/baselines/ shows how to write one",
            )
        look = baseline(view)
        if look.dialect != scheme:
            found = f"the baseline {view} of dialect {look.dialect} for {scheme}://{address}"
            raise UserError(found, "one dialect", f"use {look.dialect}://{address}")
        name = f"{name}-{content_hash(look.model_dump(mode='json'))}"
    policy = DIALECTS[scheme](address, look, convention, token)
    try:
        yield Source(policy, name, look.chunk, look.picture.render, state_size, tuple(look.cameras))
    finally:
        policy.close()


def checkpoint(text: str, device: str, threads: int | None = None, backbone: str | None = None) -> Source:
    """A policy folder of ours, or one on the hub. Raises ``UserError`` as ``Policy.load`` and ``hub.fetch``.

    Args:
        backbone: where the VLM that its adapters were trained on is here, if not where it was then.
    """
    scheme, separator, _ = text.partition(":")
    if separator and scheme in (*SERVERS, *OF_DATA):
        mend = f"judge it: vlm4vla eval {shlex.quote(text)} --protocol NAME"
        raise UserError(f"{text}, which is no policy of ours", "a policy folder, or hub:OWNER/NAME", mend)
    others = ", ".join([*(f"{server}://host:port" for server in SERVERS), *(f"{each}:DATA" for each in OF_DATA)])
    folder = hub.policy_folder(text, f", or for eval one of {others}")  # said before torch is imported
    import torch

    from vlm4vla.policy import Policy, torch_device, weights_hash

    if threads is not None:
        torch.set_num_threads(threads)
    there = torch_device(device)  # a misspelt one is found before weights are read
    policy = Policy.load(folder, backbone=backbone).for_acting(there)
    # A run has several policies (policies/step-*), and may be trained again: its id alone does not say which this is.
    step = f"@{folder.resolve().name}" if folder.resolve().name.startswith("step-") else ""
    name = f"{policy.spec.run_id}{step}-{weights_hash(folder)}"
    state_size = policy.vla.state_size if policy.state else 0
    return Source(policy, name, policy.spec.head.chunk, policy.image_size, state_size)
