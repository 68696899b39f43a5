"""Rates with intervals, and comparisons. No number of the project is printed without its interval.

- One policy: Wilson's score interval (``evaluation.interval``).
- Two policies: Newcombe's interval of the difference, or the exact McNemar test where both met the same initial states.
- One treatment over training seeds: a bootstrap in which seeds and initial states are both random.
- Chains of tasks (CALVIN): how many were done in a row, on average, with a bootstrap over chains.

Episodes that failed for the infrastructure's reasons (``success is None``) are counted and left out of every rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm4vla.evaluation.interval import wilson
from vlm4vla.sims.calvin import CHAIN
from vlm4vla.types import EpisodeResult

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Below, a spread over seeds cannot be told from none."""
REPLICATES = 4000


@dataclass(frozen=True)
class Rate:
    """``k`` of ``n`` episodes, and the interval of the rate at 95 % confidence."""

    k: int
    n: int
    estimate: float
    """NaN where ``n`` is 0."""
    low: float
    high: float
    method: str
    """In words, with what it does not cover."""
    faults: int = 0
    """Episodes left out for the infrastructure's reasons."""
    undefined: int = 0
    """Finished episodes in which the credit has no value (recognition, where the cube was moved to no card)."""

    def __str__(self) -> str:
        if self.n == 0:
            return "no episode"
        return f"{self.estimate:.0%} [{self.low:.0%}, {self.high:.0%}], n = {self.n}"


@dataclass(frozen=True)
class Mean:
    """The average of a number over ``n`` episodes, and its interval at 95 % confidence."""

    n: int
    estimate: float
    low: float
    high: float
    method: str
    top: int
    """The largest that the number can be; the smallest is 0."""

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}"


Estimate = Rate | Mean


@dataclass(frozen=True)
class Difference:
    """Estimate of the first minus estimate of the second."""

    estimate: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Paired:
    """Two policies on the same initial states: in how many episodes which of them succeeded."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    """Exact McNemar test, two-sided: could the discordant episodes be a fair coin's?"""

    @property
    def n(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither


def outcome(result: EpisodeResult, metric: str) -> bool | None:
    """An episode's value of ``success`` or of a credit; None where it is a fault or has none.

    Raises ``KeyError`` where a finished episode lacks the credit altogether: another simulator's.
    """
    if result.success is None:
        return None
    return result.success if metric == "success" else result.credits[metric]


def summarise(results: Sequence[EpisodeResult], metric: str = "success") -> Rate:
    """The rate of ``metric`` over episodes with Wilson's interval."""
    values = [outcome(result, metric) for result in results]
    faults = sum(result.success is None for result in results)
    return _rate(sum(v is True for v in values), sum(v is not None for v in values), faults, len(values), "Wilson")


def credit_lines(results: Sequence[EpisodeResult]) -> list[str]:
    """Each credit that is a yes or no, as a rate; of chains also the average length."""
    credits = [result.credits for result in results if result.success is not None]
    names = {name: None for each in credits for name, value in each.items() if isinstance(value, bool)}
    lines = [f"{name} {summarise(results, name)}" for name in names if all(name in each for each in credits)]
    if credits and all("length" in each for each in credits):
        lines.append(f"average length {mean_length([results])}")
    return lines


def _rate(k: int, n: int, faults: int, total: int, method: str) -> Rate:
    low, high = wilson(k, n, CONFIDENCE) if n else (0.0, 1.0)
    return Rate(k, n, k / n if n else float("nan"), low, high, method, faults, total - faults - n)


def difference(first: Estimate, second: Estimate) -> Difference:
    """Newcombe's hybrid score interval for two independent rates (Newcombe 1998, Stat. Med. 17:873, method 10).

    It takes each one's own interval, so a pooled rate brings its spread over seeds along, and means do as well.

    Raises ``ValueError`` where one has no episode.
    """
    if first.n == 0 or second.n == 0:
        raise ValueError("a difference needs episodes on both sides")
    a, b = first.estimate, second.estimate
    low = a - b - float(np.hypot(a - first.low, second.high - b))
    high = a - b + float(np.hypot(first.high - a, b - second.low))
    return Difference(a - b, low, high, f"Newcombe, from the intervals: {first.method}; {second.method}")


def paired(first: Sequence[EpisodeResult], second: Sequence[EpisodeResult], metric: str = "success") -> Paired:
    """Compare two policies episode by episode; episodes without a value on either side are left out.

    Raises ``ValueError`` where an episode's protocol or seed differ: then the initial states do too.
    """
    by_episode = {result.episode: result for result in second}
    counts = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for one in first:
        other = by_episode.get(one.episode)
        if other is None:
            continue
        if (one.protocol, one.seed) != (other.protocol, other.seed):
            raise ValueError(f"episode {one.episode}: {one.protocol} seed {one.seed}, {other.protocol} {other.seed}")
        values = outcome(one, metric), outcome(other, metric)
        if None not in values:
            counts[bool(values[0]), bool(values[1])] += 1
    from scipy.stats import binomtest

    discordant = counts[True, False] + counts[False, True]
    p_value = binomtest(counts[True, False], discordant).pvalue if discordant else 1.0
    return Paired(counts[True, True], counts[True, False], counts[False, True], counts[False, False], float(p_value))


def pooled(by_seed: Sequence[Sequence[EpisodeResult]], metric: str = "success", random_seed: int = 0) -> Rate:
    """The rate over several training seeds of one treatment, all evaluated on the same initial states.

    Seeds and initial states are resampled independently (the pigeonhole bootstrap, Owen 2007, Ann. Appl. Stat. 1:386),
    since an easy state is easy for every seed; the percentile interval is widened to Wilson's of the pooled episodes
    where it is narrower (all seeds at 100 % would get no width at all). Simulated coverage at 100 episodes and a true
    rate of 50 %: 0.91 with 3 seeds and 0.95 with 5 (Wilson's alone: 0.61 and 0.60) where the seeds' own rates spread
    by 10 points (standard deviation), but 0.77 and 0.87 where by 26 (``tests/test_stats.py`` repeats a part of it).
    Below ``MIN_SEEDS`` seeds it is Wilson's alone, which knows no spread over seeds, and ``method`` says so.

    Args:
        by_seed: the episodes of each training seed.
    """
    everything = [result for results in by_seed for result in results]
    simple = summarise(everything, metric)
    values = [{r.episode: float(v) for r in results if (v := outcome(r, metric)) is not None} for results in by_seed]
    values = [seed for seed in values if seed]
    if len(values) < MIN_SEEDS:
        plural = "seed" if len(values) == 1 else "seeds"
        method = f"Wilson over {len(values)} training {plural}, without the spread over seeds"
        return _rate(simple.k, simple.n, simple.faults, len(everything), method)
    low, high = _pigeonhole(values, np.random.default_rng(random_seed))
    method = f"bootstrap over {len(values)} training seeds and initial states, at least Wilson"
    low, high = min(low, simple.low), max(high, simple.high)
    return Rate(simple.k, simple.n, simple.estimate, low, high, method, simple.faults, simple.undefined)


def mean_length(by_seed: Sequence[Sequence[EpisodeResult]], random_seed: int = 0) -> Mean:
    """How many tasks of a chain were done in a row, on average over chains and training seeds.

    Chains are resampled, and training seeds with them from ``MIN_SEEDS`` on, as in ``pooled``. Where all chains have
    one length, as many as Wilson's interval allows could have had another: no sample shows that nothing varies.

    Raises ``ValueError`` where no chain is finished.
    """
    values = [{r.episode: float(r.credits["length"]) for r in results if r.success is not None} for results in by_seed]
    lengths = np.array([length for seed in values for length in seed.values()])
    if not len(lengths):
        raise ValueError("an average length needs a chain")
    values = [seed for seed in values if seed]
    low, high = _pigeonhole(values, np.random.default_rng(random_seed))
    if low == high:
        unseen = wilson(0, len(lengths), CONFIDENCE)[1]
        low, high = (1 - unseen) * low, (1 - unseen) * high + unseen * CHAIN
    with_seeds = f"{len(values)} training seeds and " if len(values) >= MIN_SEEDS else ""
    return Mean(len(lengths), float(lengths.mean()), low, high, f"bootstrap over {with_seeds}chains", CHAIN)


def _pigeonhole(values: Sequence[dict[int, float]], rng: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of the mean of each seed's values by episode; episodes are resampled, and seeds where there
    are ``MIN_SEEDS`` of them."""
    episodes = sorted(set().union(*values))
    known = np.array([[episode in seed for episode in episodes] for seed in values], float)  # (seeds, episodes)
    table = np.array([[seed.get(episode, 0.0) for episode in episodes] for seed in values])
    num_seeds, num_episodes = table.shape
    # How often each row and each column is drawn: (REPLICATES, seeds) and (REPLICATES, episodes).
    rows = np.ones((REPLICATES, num_seeds), int)
    if num_seeds >= MIN_SEEDS:
        rows = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), REPLICATES)
    columns = rng.multinomial(num_episodes, np.full(num_episodes, 1 / num_episodes), REPLICATES)
    drawn = np.sum((rows @ known) * columns, axis=1)
    means = np.sum((rows @ table) * columns, axis=1)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
