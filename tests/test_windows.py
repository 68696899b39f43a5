"""Action chunks against a definition written with loops."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm4vla.data.windows import windows


def episodes(lengths):
    """Frame i has the action (i, -i)."""
    n = np.arange(sum(lengths), dtype=np.float32)
    return SimpleNamespace(actions=np.stack([n, -n], 1), episode_to=np.cumsum(lengths))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12), st.data())
def test_windows_end_with_their_episode(lengths, horizon, data):
    e = episodes(lengths)
    indices = np.array(data.draw(st.lists(st.integers(0, sum(lengths) - 1), max_size=20)), np.int64)
    actions, valid = windows(e, indices, horizon)
    assert actions.shape == (len(indices), horizon, 2)
    assert valid.shape == (len(indices), horizon)
    assert actions.dtype == np.float32
    assert valid.dtype == bool
    owner = [i for i, length in enumerate(lengths) for _ in range(length)]
    last = {i: max(f for f, o in enumerate(owner) if o == i) for i in owner}
    for b, index in enumerate(indices):
        for h in range(horizon):
            inside = index + h < len(owner) and owner[index + h] == owner[index]
            assert valid[b, h] == inside
            assert actions[b, h].tolist() == e.actions[index + h if inside else last[owner[index]]].tolist()


def test_the_first_action_is_that_of_the_frame_itself():
    e = episodes([4, 1, 3])
    actions, valid = windows(e, np.arange(8), 3)
    assert actions[:, 0, 0].tolist() == list(range(8))
    assert valid[:, 0].all()
    assert valid.sum() == (3 + 3 + 2 + 1) + 1 + (3 + 2 + 1)


@pytest.mark.parametrize("index", [-1, 8])
def test_frames_that_do_not_exist_are_refused(index):
    with pytest.raises(IndexError, match="of 8 frames"):
        windows(episodes([4, 1, 3]), np.array([0, index]), 3)


def test_the_caller_may_write_into_a_window():
    e = episodes([4])
    windows(e, np.array([0]), 2)[0][:] = 9
    assert e.actions[0, 0] == 0
