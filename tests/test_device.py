"""``on_device.py``, in a process of its own: where a pretended device is known, autograd starts a thread for it with
the first backward pass, and then no other test of that process could fork."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="make setup, or pip install 'vlm4vla[train]'")


@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_what_a_gpu_would_refuse_or_wait_for_is_seen_without_one(tier):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", tier]
    done = subprocess.run([*command, Path(__file__).with_name("on_device.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:]
