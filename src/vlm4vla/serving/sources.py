"""Where a policy comes from: a checkpoint folder of ours."""

from dataclasses import dataclass
from pathlib import Path

from vlm4vla.types import BatchPolicy


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


def checkpoint(folder: Path, device: str, threads: int = 1) -> Source:
    """A policy folder of ours. Raises ``UserError`` as ``Policy.load``."""
    import torch

    from vlm4vla.policy import Policy, weights_hash

    torch.set_num_threads(threads)
    policy = Policy.load(folder, device)
    # A run has several policies (policies/step-*), and may be trained again: its id alone does not say which this is.
    step = f"@{folder.resolve().name}" if folder.resolve().name.startswith("step-") else ""
    name = f"{policy.spec.run_id}{step}-{weights_hash(folder)}"
    state_size = policy.vla.state_size if policy.state else 0
    return Source(policy, name, policy.spec.head.chunk, policy.image_size, state_size)
