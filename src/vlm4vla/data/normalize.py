"""Statistics of actions, and the map between native units and what a head predicts. D dimensions; numpy only.

Pose dimensions go linearly from their 1 % and 99 % quantiles to [-1, 1]; the gripper stays apart as the {0, 1} target
of a binary cross-entropy. The head ends in tanh and cannot reach beyond [-1, 1], so ``normalize`` clips there; how much
it clips is never hidden: ``fraction_clipped`` reports it per dimension and every training run records it.
"""

from dataclasses import dataclass, fields

import numpy as np

from vlm4vla.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """Exact statistics per dimension, each float64 (D,). Quantiles interpolate linearly between neighbours."""

    mean: np.ndarray
    std: np.ndarray
    """Population standard deviation."""
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Statistics":
        """From (N, D) numbers.

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
        quantiles = np.stack([np.quantile(column, [0.01, 0.99]) for column in columns])
        return cls(
            mean=np.array([column.mean() for column in columns]),
            std=np.array([column.std() for column in columns]),
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


@dataclass(frozen=True)
class Normalizer:
    """Native units <-> [-1, 1] per dimension; with ``gripper`` the last dimension stays {0, 1}."""

    statistics: Statistics
    gripper: bool = True

    @classmethod
    def fit(cls, values: np.ndarray, gripper: bool = True) -> "Normalizer":
        """Fit (N, D) numbers in native units.

        Raises:
            UserError: no rows, numbers that are not finite, or a gripper dimension with others than 0 and 1.
        """
        normalizer = cls(Statistics.of(values), gripper)
        if gripper and not np.isin(values[:, -1], (0, 1)).all():
            strange = values[:, -1][~np.isin(values[:, -1], (0, 1))]
            raise UserError(
                f"gripper values other than 0 and 1, such as {strange[0]} ({len(strange)} of {len(values)} frames)",
                "a binary gripper in the last action dimension",
                "convert the data set with its gripper as 0 and 1 (see the data set's convention)",
            )
        return normalizer

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Native units (..., D) -> float32 (..., D): pose in [-1, 1], clipped there; the gripper as it is.

        A constant dimension (q01 == q99) becomes 0.
        """
        centre, half = self._centre_and_half()
        scaled = (values - centre) / np.where(half > 0, half, np.inf)
        return np.where(self._is_pose(), scaled.clip(-1, 1), values).astype(np.float32)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """The inverse of ``normalize`` inside the quantiles: (..., D) -> float32 (..., D) in native units.

        The gripper may be a probability; it comes out as 0 or 1 (1 from 0.5 on). A constant dimension comes out as its
        constant, exactly.
        """
        centre, half = self._centre_and_half()
        return np.where(self._is_pose(), centre + values * half, values >= 0.5).astype(np.float32)

    def fraction_clipped(self, values: np.ndarray) -> list[float]:
        """The share of (N, D) native values per dimension that lie outside the quantiles; 0 for the gripper."""
        outside = (values < self.statistics.q01) | (values > self.statistics.q99)
        return (outside & self._is_pose()).mean(0).tolist()

    def to_dict(self) -> dict:
        return {"gripper": self.gripper, "statistics": self.statistics.to_dict()}

    @classmethod
    def from_dict(cls, values: dict) -> "Normalizer":
        return cls(Statistics.from_dict(values["statistics"]), values["gripper"])

    def _centre_and_half(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.statistics.q01, self.statistics.q99
        return (low + high) / 2, (high - low) / 2

    def _is_pose(self) -> np.ndarray:
        dims = len(self.statistics.mean)
        return np.arange(dims) < dims - self.gripper
