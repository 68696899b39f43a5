"""Statistics of actions, and the map between native units and what a head predicts. D dimensions; numpy only.

Each pose dimension goes linearly from an interval to [-1, 1]; the mode says which: from the 1 % to the 99 % quantile
(``quantile``), from minimum to maximum (``min_max``), mean +- standard deviation (``mean_std``), or [-1, 1] itself
(``fixed`` with a clip there, ``none`` without). The gripper stays apart as the {0, 1} target of a binary cross-entropy.
What lies outside the interval is never hidden: ``fraction_clipped`` reports it per dimension and every training run
records it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_args

import numpy as np

from vlm4vla.errors import UserError
from vlm4vla.spec import Mode

DEFAULT: tuple[Mode, ...] = ("quantile",)
UNTOUCHED: tuple[Mode, ...] = ("none",)
CLIPPED: tuple[Mode, ...] = ("quantile", "min_max", "fixed")
"""Modes that clip to [-1, 1]. ``mean_std`` and ``none`` let numbers pass that a head ending in tanh cannot reach."""


@dataclass(frozen=True)
class Statistics:
    """Exact statistics per dimension, each float64 (D,). Quantiles interpolate linearly between neighbours; of weighted
    numbers, they are the inverse of the distribution function."""

    mean: np.ndarray
    std: np.ndarray
    """Population standard deviation."""
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> "Statistics":
        """From (N, D) numbers, each as often as ``weights`` (N,) says, relative to the others.

        Raises:
            UserError: no rows, or a number that is not finite.
        """
        if values.ndim != 2 or not len(values):
            raise UserError(f"an array of shape {values.shape}", "(N, D) with N >= 1", "check the data set")
        if not (finite := np.isfinite(values)).all():
            row, dim = np.argwhere(~finite)[0]
            raise UserError(
                f"{values[row, dim]} in dimension {dim} of frame {row}, {int((~finite).sum())} such numbers in all",
                "finite numbers",
                "look at the episode with: vlm4vla data inspect FOLDER; then record or convert it again",
            )
        # float64 first: sums of millions of float32 lose digits. One column at a time keeps the copy small.
        columns = [values[:, d].astype(np.float64) for d in range(values.shape[1])]
        method = "linear" if weights is None else "inverted_cdf"  # the one that numpy has for weights
        quantiles = np.stack([np.quantile(c, [0.01, 0.99], method=method, weights=weights) for c in columns])
        return cls(
            mean=np.array([np.average(column, weights=weights) for column in columns]),
            std=np.array([_std(column, weights) for column in columns]),
            min=values.min(0).astype(np.float64),
            max=values.max(0).astype(np.float64),
            q01=quantiles[:, 0],
            q99=quantiles[:, 1],
        )

    def to_dict(self) -> dict[str, list[float]]:
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> "Statistics":
        return cls(**{f.name: np.array(values[f.name], np.float64) for f in fields(cls)})


def _std(values: np.ndarray, weights: np.ndarray | None) -> float:
    if weights is None:
        return values.std()
    return np.average((values - np.average(values, weights=weights)) ** 2, weights=weights) ** 0.5


@dataclass(frozen=True)
class Normalizer:
    """Native units <-> [-1, 1] per pose dimension."""

    statistics: Statistics
    gripper: bool = True
    """The last dimension is a gripper, 0 or 1, and stays as it is."""
    modes: tuple[Mode, ...] = ()
    """One for each pose dimension; empty: ``quantile`` for all."""
    bound: float = 1.0
    """Factor on half the interval's width. ``fixed`` with 0.65 is VLM4VLA's for CALVIN; ``quantile`` with 0.65 is the
    double normalisation of its release: to quantiles, clipped to +-0.65, divided by 0.65."""

    @classmethod
    def fit(
        cls,
        values: np.ndarray,
        gripper: bool = True,
        mode: Mode | Sequence[Mode] = "quantile",
        bound: float = 1.0,
        weights: np.ndarray | None = None,
    ) -> "Normalizer":
        """Fit (N, D) numbers in native units, drawn as often as ``weights`` (N,) says; ``mode`` is for all pose
        dimensions, or one for each.

        Raises:
            UserError: no rows, numbers that are not finite, a gripper dimension with others than its two values, or
                another number of modes than of pose dimensions.
        """
        statistics, dims = Statistics.of(values, weights), values.shape[1] - gripper
        modes = (mode,) * dims if isinstance(mode, str) else tuple(mode)
        if len(modes) != dims or not set(modes) <= set(get_args(Mode)):
            raise UserError(f"the modes {modes}", f"{dims} of {get_args(Mode)}", "one mode, or one a pose dimension")
        if gripper and not np.isin(values[:, -1], (0, 1)).all():
            strange = values[:, -1][~np.isin(values[:, -1], (0, 1))]
            raise UserError(
                f"gripper values other than 0 and 1, such as {strange[0]} ({len(strange)} of {len(values)} frames)",
                "a binary gripper in the last action dimension",
                "convert the data set with its gripper as 0 and 1 (see the data set's convention)",
            )
        return cls(statistics, gripper, modes, bound)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Native units (..., D) -> float32 (..., D): pose around [-1, 1], clipped there as the mode says; the gripper
        as it is.

        A constant dimension becomes 0 where the interval comes from the data.
        """
        centre, half = self._centre_and_half()
        scaled = (values - centre) / np.where(half > 0, half, np.inf)
        scaled = np.where(np.isin(self._modes(), CLIPPED), scaled.clip(-1, 1), scaled)
        return np.where(self._is_pose(), scaled, values).astype(np.float32)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """The inverse of ``normalize`` inside the interval: (..., D) -> float32 (..., D) in native units.

        The gripper may be a probability; it comes out as 0 or 1 (1 from 0.5 on). A constant dimension comes out as its
        constant, exactly.
        """
        centre, half = self._centre_and_half()
        return np.where(self._is_pose(), centre + values * half, values >= 0.5).astype(np.float32)

    def fraction_clipped(self, values: np.ndarray, weights: np.ndarray | None = None) -> list[float]:
        """The share of (N, D) native values per dimension that lie outside the interval, clipped or out of a tanh
        head's reach; 0 for the gripper."""
        low, high = self._interval()
        outside = ((values < low) | (values > high)) & self._is_pose()
        return np.average(outside, axis=0, weights=weights).tolist()

    def to_dict(self) -> dict:
        settings = {"gripper": self.gripper, "modes": list(self.modes), "bound": self.bound}
        return settings | {"statistics": self.statistics.to_dict()}

    @classmethod
    def from_dict(cls, values: dict) -> "Normalizer":
        # Policies saved by earlier versions name no modes: quantiles, as by default.
        modes, bound = tuple(values.get("modes", ())), values.get("bound", 1.0)
        return cls(Statistics.from_dict(values["statistics"]), values["gripper"], modes, bound)

    def _interval(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 (D,) each: what becomes -1 and 1."""
        s, ones = self.statistics, np.ones(len(self.statistics.mean))
        std = np.where(s.min == s.max, 0, s.std)  # a constant's may be a rounding error instead of 0
        intervals = {
            "quantile": (s.q01, s.q99),
            "min_max": (s.min, s.max),
            "mean_std": (s.mean - std, s.mean + std),
            "fixed": (-ones, ones),
            "none": (-ones, ones),
        }
        modes = self._modes()
        low, high = (np.array([intervals[mode][end][d] for d, mode in enumerate(modes)]) for end in (0, 1))
        if self.bound == 1.0:
            return low, high  # not through centre and half: the limits themselves lie inside to the bit
        centre, half = (low + high) / 2, (high - low) / 2
        return centre - self.bound * half, centre + self.bound * half

    def _centre_and_half(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self._interval()
        return (low + high) / 2, (high - low) / 2

    def _is_pose(self) -> np.ndarray:
        dims = len(self.statistics.mean)
        return np.arange(dims) < dims - self.gripper

    def _modes(self) -> tuple[Mode, ...]:
        """One for each dimension, the gripper's included."""
        pose, dims = int(self._is_pose().sum()), len(self.statistics.mean)
        return (self.modes or DEFAULT * pose) + UNTOUCHED * (dims - pose)
