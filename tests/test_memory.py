"""Memory that runs out: the error says which knob, by how much."""

import pytest
import torch

from vlm4vla.errors import UserError
from vlm4vla.spec import Runtime
from vlm4vla.training.memory import advice, told


def next_step(states, each, samples, available, **how):
    return advice(states, each, samples, Runtime(**how), available).next_step


def test_a_batch_too_large_is_worked_through_in_parts():
    # 72 of 80 GiB are usable, 32 are the states': 40 GiB hold 20 samples of 2 GiB; 128 in 8 equal parts are 16 each.
    assert "--accumulate 8 (now 1)" in next_step(32, 2.0, 128, 80)


def test_an_estimate_that_was_too_low_is_halved():
    """It says that 20 samples fit and 16 did not."""
    assert "--accumulate 16 (now 8)" in next_step(32, 2.0, 128, 80, accumulate=8)


def test_not_even_one_sample_asks_for_checkpointing_then_for_less():
    assert "--gradient-checkpointing" in next_step(60, 20.0, 8, 80)
    assert "data.image_size" in next_step(60, 20.0, 8, 80, gradient_checkpointing=True)


def test_states_that_never_fit_are_spread_or_frozen():
    assert "over 4 devices (--shard)" in next_step(200, 1.0, 8, 80)


def test_only_memory_is_told():
    how = Runtime(device="cpu")
    with pytest.raises(UserError, match="out of memory"), told(lambda: (1.0, 1.0), 8, how):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match="out of memory"), told(lambda: (1.0, 1.0), 8, how):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="shapes"), told(lambda: (1.0, 1.0), 8, how):
        raise RuntimeError("shapes do not match")
