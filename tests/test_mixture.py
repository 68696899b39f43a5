"""Mixtures of sources: shares, epochs, disjoint processes, resuming."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm4vla.data.mixture import BLOCK, Mixture
from vlm4vla.errors import UserError

sources = st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4)


@settings(deadline=None)
@given(sources, st.integers(1, 9), st.integers(0, 3), st.data())
def test_any_part_of_the_stream_is_the_same_whoever_asks(parts, batch, seed, data):
    sizes, weights = zip(*parts, strict=True)
    try:
        mixture = Mixture(sizes, weights, batch)
    except UserError:
        return  # a share too small for a block
    number = 3 * BLOCK * batch
    source, sample = mixture.draw(np.arange(number), seed)
    assert (sample >= 0).all()
    assert (sample < np.array(sizes)[source]).all()
    positions = np.array(data.draw(st.lists(st.integers(0, number - 1), max_size=20)), np.int64)
    again = Mixture(sizes, weights, batch).draw(positions, seed)
    assert (again[0] == source[positions]).all()
    assert (again[1] == sample[positions]).all()


@settings(deadline=None)
@given(sources, st.integers(1, 9))
def test_every_source_is_seen_epoch_by_epoch_without_a_gap(parts, batch):
    sizes, weights = zip(*parts, strict=True)
    try:
        mixture = Mixture(sizes, weights, batch)
    except UserError:
        return
    source, sample = mixture.draw(np.arange(2 * BLOCK * batch), 0)
    for k, size in enumerate(sizes):
        seen = sample[source == k]
        for start in range(0, len(seen) - size + 1, size):
            assert sorted(seen[start : start + size]) == list(range(size))


def test_shares_hold_in_every_batch():
    weights = np.array([0.5, 0.3, 0.2])
    mixture = Mixture([1000, 50, 7], weights, 20)
    assert mixture.shares == pytest.approx(weights, abs=1 / (BLOCK * 20))
    source, _ = mixture.draw(np.arange(20 * 500), 1)
    counts = np.stack([np.bincount(batch, minlength=3) for batch in source.reshape(500, 20)])
    assert np.abs(counts - 20 * weights).max() <= 3
    assert counts.mean(0) == pytest.approx(20 * weights, rel=0.01)
    # A draw of each place by itself would be twice as uneven.
    assert counts.std(0)[0] < 0.5 * np.sqrt(20 * 0.25)


def test_shares_smaller_than_one_a_batch_are_kept():
    mixture = Mixture([100, 100], [0.99, 0.01], 4)
    source, _ = mixture.draw(np.arange(4 * BLOCK * 50), 0)
    assert (source == 1).mean() == pytest.approx(0.01, abs=0.003)


def test_processes_share_the_stream_without_duplicates():
    mixture = Mixture([500, 300], [3, 1], 16)
    whole = np.stack(mixture.draw(np.arange(16 * 30), 2), 1)
    parts = []
    for rank in range(4):
        mine = np.arange(16 * 30).reshape(30, 4, 4)[:, rank].ravel()
        parts.append(np.stack(Mixture([500, 300], [3, 1], 16).draw(mine, 2), 1))
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, whole))
    epoch = whole[whole[:, 0] == 0][:360]
    assert len(set(map(tuple, epoch))) == 360


def test_seeds_and_epochs_differ():
    draws = [Mixture([50], [1], 10).draw(np.arange(100), seed)[1].tolist() for seed in (0, 1)]
    assert draws[0] != draws[1]
    assert draws[0][:50] != draws[0][50:]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], [], "at least one source"),
        ([3, 0], [1, 1], "each with samples"),
        ([3, 3], [1, -1], "positive weight"),
        ([3, 3], [1, np.nan], "positive weight"),
        ([3, 3], [1], "positive weight"),
        ([3, 3], [1, 1e-6], r"too small for 1 \(1e-06\)"),
    ],
)
def test_impossible_mixtures_are_refused(sizes, weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(sizes, weights, 8)
