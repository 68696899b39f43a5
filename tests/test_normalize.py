"""Statistics and normalisation. N frames, D dimensions."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from vlm4vla.data.normalize import Normalizer, Statistics
from vlm4vla.errors import UserError

numbers = st.floats(-100, 100, width=32)
values = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=numbers)


def actions(n=400, seed=0):
    """float32 (n, 7) like an expert's: limited steps, a constant dimension, a binary gripper."""
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 0.05, (n, 7)).clip(-0.05, 0.05).astype(np.float32)
    a[:, 3] = 0.125
    a[:, 6] = rng.random(n) < 0.5
    return a


@given(values)
def test_inside_the_quantiles_the_round_trip_is_the_identity(v):
    n = Normalizer.fit(v, gripper=False)
    s = n.statistics
    inside = (v >= s.q01) & (v <= s.q99)
    back = n.unnormalize(n.normalize(v))
    # float32 numbers in [-1, 1] resolve the range in steps of 6e-8 of its half.
    tolerance = 2e-7 * (np.abs(s.q01) + np.abs(s.q99) + s.q99 - s.q01)
    assert (np.abs(back - v) <= tolerance)[inside].all()


@given(values)
def test_what_is_outside_is_clipped_and_counted(v):
    n = Normalizer.fit(v, gripper=False)
    normalized = n.normalize(v)
    assert normalized.dtype == np.float32
    assert np.abs(normalized).max() <= 1
    expected = ((v < n.statistics.q01) | (v > n.statistics.q99)).sum(0) / len(v)
    assert n.fraction_clipped(v) == pytest.approx(expected)


@given(numbers, st.integers(1, 30))
def test_a_constant_becomes_zero_and_itself_again_exactly(c, count):
    v = np.full((count, 1), c, np.float32)
    n = Normalizer.from_dict(json.loads(json.dumps(Normalizer.fit(v, gripper=False).to_dict())))
    assert (n.normalize(v) == 0).all()
    assert (n.unnormalize(n.normalize(v)) == v).all()
    assert n.fraction_clipped(v) == [0]


def test_the_gripper_stays_apart():
    a = actions()
    n = Normalizer.fit(a)
    assert set(n.normalize(a)[:, 6].tolist()) == {0, 1}
    assert (n.normalize(a)[:, 6] == a[:, 6]).all()
    assert n.fraction_clipped(a)[6] == 0
    chunk = n.normalize(a).reshape(100, 4, 7)
    assert (n.unnormalize(chunk)[..., 6].ravel() == a[:, 6]).all()
    chunk[..., 6] = 0.7
    assert (n.unnormalize(chunk)[..., 6] == 1).all()


def test_limits_shared_by_many_actions_are_reached_exactly():
    a = actions()
    n = Normalizer.fit(a)
    assert (a[:, 0] == np.float32(0.05)).mean() > 0.1
    assert n.statistics.q99[0] == np.float32(0.05)
    assert n.normalize(a)[:, 0].max() == 1
    assert n.unnormalize(np.ones(7))[0] == np.float32(0.05)
    assert n.fraction_clipped(a)[0] == 0


def test_rare_motion_in_an_otherwise_constant_dimension_is_reported():
    a = actions(1000)
    a[:5, 3] = 0.5
    assert Normalizer.fit(a).fraction_clipped(a)[3] == pytest.approx(0.005)


def test_statistics_are_exact_despite_a_large_offset():
    rng = np.random.default_rng(1)
    v = (1000 + rng.normal(0, 1e-2, (100_000, 2))).astype(np.float32)
    s = Statistics.of(v)
    exact = np.sort(v.astype(np.longdouble), axis=0)
    assert s.mean == pytest.approx(exact.mean(0).astype(float), rel=1e-13)
    assert s.std == pytest.approx(exact.std(0).astype(float), rel=1e-9)
    place = 0.01 * (len(v) - 1)
    low, share = int(place), place - int(place)
    assert s.q01 == pytest.approx((exact[low] * (1 - share) + exact[low + 1] * share).astype(float), rel=1e-14)
    assert (s.min == exact[0]).all()
    assert (s.max == exact[-1]).all()


def test_the_dictionary_holds_all_bits():
    n = Normalizer.fit(actions())
    again = Normalizer.from_dict(json.loads(json.dumps(n.to_dict())))
    a = actions(seed=3)
    assert (again.normalize(a) == n.normalize(a)).all()
    assert again.gripper


def test_two_million_steps_take_seconds():
    v = np.random.default_rng(0).normal(size=(2_000_000, 7)).astype(np.float32)
    start = time.process_time()
    Statistics.of(v)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(bad):
    a = actions()
    a[7, 2] = bad
    with pytest.raises(UserError, match=r"in dimension 2 of frame 7, 1 such"):
        Normalizer.fit(a)


def test_a_gripper_that_is_not_binary_is_refused():
    a = actions()
    a[:, 6] = 2 * a[:, 6] - 1
    with pytest.raises(UserError, match=r"gripper values other than 0 and 1, such as -1"):
        Normalizer.fit(a)


def test_nothing_to_fit_is_refused():
    with pytest.raises(UserError, match=r"\(0, 7\)"):
        Normalizer.fit(np.empty((0, 7), np.float32))


MODES = ("quantile", "min_max", "mean_std", "fixed", "none")


@given(values, st.sampled_from(MODES), st.sampled_from([1.0, 0.65, 2.0]))
def test_every_mode_is_undone_inside_and_counted_outside(v, mode, bound):
    n = Normalizer.fit(v, gripper=False, mode=mode, bound=bound)
    n = Normalizer.from_dict(json.loads(json.dumps(n.to_dict())))
    normalized = n.normalize(v)
    low, high = n._interval()
    inside = (v >= low) & (v <= high)
    assert n.fraction_clipped(v) == pytest.approx((~inside).mean(0))
    tolerance = 4e-7 * (np.abs(low) + np.abs(high) + np.abs(v))
    undone = np.abs(n.unnormalize(normalized) - v) <= tolerance
    if mode in ("quantile", "min_max", "fixed"):
        assert np.abs(normalized).max() <= 1
        assert undone[inside].all()
    else:  # nothing is clipped
        assert undone[:, high > low].all()


def test_the_intervals_are_what_their_names_say():
    v = np.random.default_rng(0).normal(1, 2, (1000, 1)).astype(np.float32)
    for mode, low, high in (
        ("quantile", *np.quantile(v.astype(float), [0.01, 0.99])),
        ("min_max", v.min(), v.max()),
        ("mean_std", v.mean(dtype=float) - v.std(dtype=float), v.mean(dtype=float) + v.std(dtype=float)),
        ("fixed", -1, 1),
        ("none", -1, 1),
    ):
        n = Normalizer.fit(v, gripper=False, mode=mode)
        assert n.unnormalize(np.array([[-1.0], [1.0]])).ravel() == pytest.approx([low, high]), mode
    assert Normalizer.fit(v, gripper=False, mode="min_max").fraction_clipped(v) == [0]


def test_calvin_as_the_paper_does_it():
    a = actions()
    a[:, :6] *= 15
    n = Normalizer.fit(a, mode="fixed", bound=0.65)
    expected = a[:, :6].clip(-0.65, 0.65) / 0.65
    assert n.normalize(a)[:, :6] == pytest.approx(expected, abs=1e-6)
    assert n.fraction_clipped(a)[:3] == pytest.approx((np.abs(a[:, :3]) > 0.65).mean(0))


def test_the_released_double_normalisation_is_quantiles_with_a_bound():
    a = actions(3000)
    once = Normalizer.fit(a).normalize(a)
    twice = Normalizer.fit(a, bound=0.65)
    assert twice.normalize(a)[:, :6] == pytest.approx(once[:, :6].clip(-0.65, 0.65) / 0.65, abs=1e-6)
    assert min(f for d, f in enumerate(twice.fraction_clipped(a)) if d not in (3, 6)) > 0.05
    inside = np.abs(once[:, :6]) < 0.65
    assert twice.unnormalize(twice.normalize(a))[:, :6][inside] == pytest.approx(a[:, :6][inside], abs=1e-6)


def test_each_dimension_may_have_its_own_mode():
    a = actions()
    n = Normalizer.fit(a, mode=("none", "min_max", "quantile", "none", "none", "none"))
    assert (n.normalize(a)[:, 0] == a[:, 0]).all()
    assert np.abs(n.normalize(a)[:, 1]).max() == 1
    assert (n.normalize(a)[:, 6] == a[:, 6]).all()
    with pytest.raises(UserError, match="6 of"):
        Normalizer.fit(a, mode=("none", "min_max"))


def test_policies_of_earlier_versions_open():
    a = actions()
    n = Normalizer.fit(a)
    old = {"gripper": True, "statistics": n.statistics.to_dict()}
    assert (Normalizer.from_dict(old).normalize(a) == n.normalize(a)).all()
