"""VLM4VLA's action head: hidden state -> action chunk, deterministic. B batch, D hidden size, H chunk."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSE_DIMS = 6


class MLPHead(nn.Module):
    """Trunk ``D -> D/2 -> hidden``, then one branch for the pose (tanh) and one for the gripper (logits).

    Widths, ReLU, tanh, Xavier-uniform weights and zero biases as in VLM4VLA's release, where ``hidden`` is 1024 and
    the branches are ``hidden -> hidden -> hidden/2 -> hidden/4 -> out``.
    """

    def __init__(self, hidden_size: int, chunk: int, hidden: int = 1024, state_size: int = 0):
        super().__init__()
        self.chunk = chunk
        inputs = hidden_size + state_size

        def branch(outputs: int) -> nn.Sequential:
            return mlp(hidden, hidden, hidden // 2, hidden // 4, outputs)

        self.trunk = mlp(inputs, hidden_size // 2, hidden)
        self.pose = branch(chunk * POSE_DIMS)
        self.gripper = branch(chunk)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> pose in [-1, 1] (B, H, 6) and gripper logits (B, H)."""
        trunk = self.trunk(hidden)
        return self.pose(trunk).tanh().unflatten(-1, (self.chunk, POSE_DIMS)), self.gripper(trunk)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


def action_loss(
    pose: Tensor, gripper: Tensor, target: Tensor, valid: Tensor, gripper_weight: float, steps: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Huber (delta 1) on the pose + ``gripper_weight`` x BCE on the gripper, over valid steps only.

    Args:
        pose: (B, H, 6) predictions in [-1, 1].
        gripper: (B, H) logits; 1 is open.
        target: (B, H, 7) normalised pose and a gripper of 0 or 1.
        valid: bool (B, H), False past the end of the episode.
        steps: valid steps that the means are over, where these are a part of them; without it, those given here.
    """
    mask = valid.float()
    steps = mask.sum() if steps is None else steps
    huber = F.huber_loss(pose, target[..., :POSE_DIMS], reduction="none").mean(-1)
    bce = F.binary_cross_entropy_with_logits(gripper, target[..., POSE_DIMS], reduction="none")
    loss_pose, loss_gripper = (huber * mask).sum() / steps, (bce * mask).sum() / steps
    parts = {"loss_pose": loss_pose.detach(), "loss_gripper": loss_gripper.detach()}
    return loss_pose + gripper_weight * loss_gripper, parts


def decode(pose: Tensor, gripper: Tensor) -> Tensor:
    """Predictions -> (B, H, 7): the pose still normalised, the gripper 0 or 1 (the targets' convention)."""
    return torch.cat([pose, (gripper > 0).float().unsqueeze(-1)], -1)
