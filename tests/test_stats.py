"""Intervals against published values, against scipy, and by how often they cover."""

import numpy as np
import pytest
from scipy.stats import binomtest

from vlm4vla.evaluation.interval import wilson
from vlm4vla.studies import stats
from vlm4vla.studies.stats import difference, mean_length, paired, pooled, summarise
from vlm4vla.types import EpisodeResult


def episodes(outcomes, first_seed=0, **changes):
    return [EpisodeResult("fake/v1", i, first_seed + i, o, 5, **changes) for i, o in enumerate(outcomes)]


def counts(k, n):
    return episodes([True] * k + [False] * (n - k))


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [  # Newcombe 1998, Stat. Med. 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_scipys():
    for k, n, confidence in [(0, 1, 0.95), (1, 1, 0.9), (3, 10, 0.95), (50, 100, 0.99), (199, 200, 0.95), (7, 7, 0.95)]:
        expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
        assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [  # Newcombe 1998, Stat. Med. 17:873, table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0000),
        ((10, 10), (0, 10), 0.6075, 1.0000),
    ],
)
def test_newcombe_published(first, second, low, high):
    result = difference(summarise(counts(*first)), summarise(counts(*second)))
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-4)
    assert result.estimate == pytest.approx(first[0] / first[1] - second[0] / second[1])


def test_newcombe_covers():
    rng = np.random.default_rng(0)
    rates = {k: summarise(counts(k, 60)) for k in range(61)}
    for p, q in [(0.5, 0.5), (0.9, 0.7), (0.98, 0.33)]:
        pairs = rng.binomial(60, [p, q], size=(1500, 2))
        found = [difference(rates[a], rates[b]) for a, b in pairs]
        coverage = np.mean([d.low <= p - q <= d.high for d in found])
        assert 0.935 <= coverage <= 0.985, (p, q, coverage)


def test_summarise_leaves_faults_out_and_counts_them():
    rate = summarise(episodes([True, None, False, True, None]))
    assert (rate.k, rate.n, rate.faults, rate.undefined) == (2, 3, 2, 0)
    assert (rate.low, rate.high) == wilson(2, 3)
    assert str(rate) == "67% [21%, 94%], n = 3"
    assert str(summarise(episodes([None]))) == "no episode"


def test_summarise_takes_credits():
    results = episodes([True, True], credits={"recognition": True}) + episodes([False], credits={"recognition": None})
    results += episodes([False], credits={"recognition": False}) + episodes([None])
    rate = summarise(results, "recognition")
    assert (rate.k, rate.n, rate.faults, rate.undefined) == (2, 3, 1, 1)
    with pytest.raises(KeyError):
        summarise(results, "recognitoin")


def test_paired_is_mcnemars_exact_test():
    first = episodes([True] * 12 + [True] * 9 + [False] * 1 + [False] * 8)
    second = episodes([True] * 12 + [False] * 9 + [True] * 1 + [False] * 8)
    result = paired(first, second)
    assert (result.both, result.only_first, result.only_second, result.neither, result.n) == (12, 9, 1, 8, 30)
    assert result.p_value == pytest.approx(2 * (1 + 10) / 2**10)  # two tails of ten coins: 0 or 1 heads
    assert paired(first, first).p_value == 1.0
    assert paired(first, second[:15]).n == 15
    assert paired(episodes([None, True]), episodes([True, None])).n == 0
    with pytest.raises(ValueError, match="seed"):
        paired(first, episodes([True] * 30, first_seed=1))


def test_pooling_few_seeds_says_what_it_does_not_know():
    rate = pooled([counts(5, 10), counts(9, 10)])
    assert (rate.low, rate.high) == wilson(14, 20)
    assert "without the spread" in rate.method
    assert pooled([]).n == 0


def test_pooling_widens_with_the_spread_over_seeds():
    even = pooled([counts(50, 100)] * 3)
    uneven = pooled([counts(20, 100), counts(50, 100), counts(80, 100)])
    assert even.estimate == uneven.estimate == 0.5
    assert uneven.high - uneven.low > 2 * (even.high - even.low)
    assert uneven.low < 0.3
    perfect = pooled([counts(40, 40)] * 3)
    assert (perfect.low, perfect.high) == wilson(120, 120), "never without width"
    assert pooled([counts(7, 10)] * 4) == pooled([counts(7, 10)] * 4), "seeded"


def test_pooling_leaves_faults_out():
    rate = pooled([episodes([True, None, True, False]), episodes([True, True, None, None]), episodes([True] * 4)])
    assert (rate.k, rate.n, rate.faults) == (8, 9, 3)


@pytest.mark.parametrize(("num_seeds", "floor"), [(3, 0.85), (6, 0.90)])
def test_pooling_covers(monkeypatch, num_seeds, floor):
    """Seeds and initial states both random: success where seed skill + state ease + luck exceed 0."""
    monkeypatch.setattr(stats, "REPLICATES", 500)
    rng = np.random.default_rng(1)
    truth, hits, plain = 0.5, 0, 0
    trials = 150
    for _ in range(trials):
        score = (
            rng.normal(size=(num_seeds, 1)) * 0.3 + rng.normal(size=(1, 60)) * 0.7 + rng.normal(size=(num_seeds, 60))
        )
        rate = pooled([episodes([bool(v) for v in row]) for row in score > 0])
        hits += rate.low <= truth <= rate.high
        low, high = wilson(rate.k, rate.n)
        plain += low <= truth <= high
    assert hits / trials >= floor
    assert plain / trials < 0.85, "Wilson alone would be too narrow here; otherwise this test shows nothing"


def chains(lengths):
    return [EpisodeResult("calvin_abc_d/v1", i, i, n == 5, 9, {"length": n}) for i, n in enumerate(lengths)]


def test_the_average_length_has_the_width_that_its_spread_gives():
    """With many chains the bootstrap's interval is the normal one; seeds that differ make it wider."""
    lengths = np.random.default_rng(0).integers(0, 6, 400)
    one = mean_length([chains(lengths)])
    half = 1.96 * lengths.std() / np.sqrt(400)
    assert one.estimate == pytest.approx(lengths.mean())
    assert (one.low, one.high) == pytest.approx((one.estimate - half, one.estimate + half), abs=0.03)
    assert (one.n, one.method) == (400, "bootstrap over chains")
    seeds = [chains(np.clip(lengths + shift, 0, 5)) for shift in (-1, 0, 1)]
    three = mean_length(seeds)
    assert three.high - three.low > 2 * (one.high - one.low)
    assert three.method == "bootstrap over 3 training seeds and chains"
    assert mean_length(seeds[:2]).method == "bootstrap over chains"
    gap = difference(one, three)
    assert gap.low < one.estimate - three.estimate < gap.high


def test_chains_of_one_length_leave_room_for_others():
    none, all_five = mean_length([chains([0] * 20)]), mean_length([chains([5] * 20)])
    assert none.low == 0
    assert none.high == pytest.approx(5 * summarise(episodes([False] * 20)).high)
    assert all_five.high == 5
    assert all_five.low == pytest.approx(5 * summarise(episodes([True] * 20)).low)
    with pytest.raises(ValueError, match="needs a chain"):
        mean_length([[]])
