import pytest
import torch

from vlm4vla.heads.mlp import MLPHead, action_loss, decode


@pytest.mark.parametrize(
    ("width", "millions"), [(2048, 6.58), (2304, 7.27), (2560, 8.02), (3584, 11.69), (4096, 13.92)]
)
def test_parameters_are_those_of_the_paper_at_chunk_10(width, millions):
    """Counts computed from VLM4VLA's released head."""
    assert sum(p.numel() for p in MLPHead(width, 10).parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_shapes_range_and_zero_bias():
    head = MLPHead(32, 5, hidden=64)
    pose, gripper = head(100 * torch.randn(3, 32))
    assert pose.shape == (3, 5, 6)
    assert gripper.shape == (3, 5)
    assert pose.abs().max() <= 1
    assert all((p == 0).all() for name, p in head.named_parameters() if name.endswith("bias"))


def test_invalid_steps_do_not_count():
    torch.manual_seed(0)
    pose, gripper = torch.rand(2, 4, 6), torch.randn(2, 4)
    target = torch.cat([torch.rand(2, 4, 6), torch.ones(2, 4, 1)], -1)
    valid = torch.tensor([[True, True, False, False], [True, False, False, False]])
    changed = target.clone()
    changed[~valid] = 1 - changed[~valid]
    first, parts = action_loss(pose, gripper, target, valid, 0.01)
    second, _ = action_loss(pose, gripper, changed, valid, 0.01)
    assert first == second
    by_hand = (pose - target[..., :6]).square()[valid].mean() / 2  # Huber with delta 1, all errors below 1
    assert parts["loss_pose"] == pytest.approx(by_hand.item())
    assert first == pytest.approx((parts["loss_pose"] + 0.01 * parts["loss_gripper"]).item())


def test_decoded_gripper_has_the_targets_convention():
    gripper = torch.tensor([[3.0, -3.0]])
    chunk = decode(torch.zeros(1, 2, 6), gripper)
    assert chunk[0, :, 6].tolist() == [1.0, 0.0]
    right, _ = action_loss(torch.zeros(1, 2, 6), gripper, chunk, torch.ones(1, 2, dtype=torch.bool), 1.0)
    wrong, _ = action_loss(torch.zeros(1, 2, 6), -gripper, chunk, torch.ones(1, 2, dtype=torch.bool), 1.0)
    assert right < 0.1 < wrong
