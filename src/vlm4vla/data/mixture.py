"""Several sources in one stream of samples: robot sets and vision-language sets, each with its share of every batch.

Nothing is remembered: which sample stands at position p follows from seed and p alone. So a run goes on at the exact
sample after a kill, and processes that take disjoint positions never see a sample twice. An epoch of a source is a
seeded permutation of it; how long it lasts follows from the source's size and share.

The stream is made of blocks of ``BLOCK`` batches. In a block each source has a fixed number of samples (its share,
rounded), spread evenly, so a batch differs from its shares by about one sample.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vlm4vla.errors import UserError

BLOCK = 64
"""Batches. Shares are rounded to 1 / (64 B): a share smaller than that is refused."""


class Mixture:
    """Draws (source, sample) by position. K sources, B samples a batch."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, names: Sequence[str] = ()):
        """
        Args:
            sizes: samples of each source (K,).
            weights: shares of a batch (K,), in any unit.
            names: of the sources (K,), for errors; their numbers otherwise.

        Raises:
            UserError: no source, an empty one, or a share that is not positive or too small for a block.
        """
        if not sizes or len(sizes) != len(weights) or min(sizes) < 1 or not all(0 < w < np.inf for w in weights):
            raise UserError(
                f"sources of {list(sizes)} samples with the weights {list(weights)}",
                "at least one source, each with samples and a positive weight",
                "mend the mixture",
            )
        self.sizes = np.array(sizes, np.int64)
        self.counts = _round_to_sum(np.array(weights, float), BLOCK * batch_size)
        """int64 (K,): samples of each source in a block."""
        if not self.counts.all():
            rows = zip(names or range(len(sizes)), weights, self.counts, strict=True)
            small = [f"{name} ({weight:g})" for name, weight, number in rows if not number]
            raise UserError(
                f"the weights {list(weights)}, too small for {', '.join(small)}",
                f"of each source at least one sample in {BLOCK} batches of {batch_size}",
                "raise the small weights, or leave those sources out",
            )
        self._order = lru_cache(4)(self._make_order)
        self._permutation = lru_cache(2 * len(sizes) + 2)(self._make_permutation)

    @property
    def shares(self) -> list[float]:
        """What each source really has of the stream."""
        return (self.counts / self.counts.sum()).tolist()

    def draw(self, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at ``positions`` (n,) of the stream: source and sample within it, int64 (n,) each.

        Step s of one process takes positions [s B, (s + 1) B); of R processes, each takes its part of them.
        """
        positions = np.asarray(positions, np.int64)
        blocks, within = np.divmod(positions, self.counts.sum())
        source, rank = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            here = blocks == block
            order, ranks = self._order(seed, int(block))
            source[here], rank[here] = order[within[here]], ranks[within[here]]
        epoch, place = np.divmod(blocks * self.counts[source] + rank, self.sizes[source])
        sample = np.empty_like(positions)
        for k, e in np.unique(np.stack([source, epoch], 1), axis=0):
            here = (source == k) & (epoch == e)
            sample[here] = self._permutation(seed, int(k), int(e))[place[here]]
        return source, sample

    def _make_order(self, seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source at each place of a block, and how many of that source come before it there."""
        rng = np.random.default_rng((seed, 2, block))
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        rank = np.concatenate([np.arange(count) for count in self.counts])
        # Even spacing with a jitter within the spacing: evenly spread, without a fixed pattern.
        time = (rank + rng.random(len(rank))) / self.counts[source]
        order = np.argsort(time, kind="stable")
        return source[order], rank[order]

    def _make_permutation(self, seed: int, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 3, source, epoch)).permutation(self.sizes[source])


def shuffled(number: int, positions: np.ndarray, seed: int) -> np.ndarray:
    """The samples at ``positions`` of the stream of one source: a seeded permutation of it an epoch."""
    return np.array([_epoch(seed, int(p // number), number)[p % number] for p in positions])


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, number: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(number)


def _round_to_sum(weights: np.ndarray, total: int) -> np.ndarray:
    """Integers that add up to ``total``, as close to proportional as they can be (largest remainder)."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts
