"""From a study folder to the numbers of a report: rates with intervals, differences, what is missing.

Nothing here decides what to say (``conclusions.py``) or how it looks (``html.py``).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm4vla.errors import UserError
from vlm4vla.studies import stats
from vlm4vla.studies.stats import Difference, Rate
from vlm4vla.studies.store import RunRow, Store
from vlm4vla.types import EpisodeResult

METRICS = ("success", "execution", "recognition")
STEP = "@step-"
"""``<run_id>@step-000200`` is that run's policy after 200 steps, evaluated for success over training steps."""


@dataclass(frozen=True)
class Cell:
    """One trained policy under one protocol: what was asked for and what is there."""

    treatment: str
    seed: int
    run_id: str
    protocol: str
    expected: int
    """Episodes asked for."""
    results: tuple[EpisodeResult, ...]
    """Faults included."""
    why: str = ""
    """Why its run failed, where it did."""

    @property
    def finished(self) -> int:
        return sum(result.success is not None for result in self.results)

    @property
    def faults(self) -> int:
        return len(self.results) - self.finished


@dataclass(frozen=True)
class Row:
    """A treatment under a protocol, over its training seeds."""

    treatment: str
    protocol: str
    rates: dict[str, Rate]
    """By metric; a metric that the simulator does not give is absent."""
    seeds: int
    """Training seeds with a finished episode."""
    planned_seeds: int


@dataclass(frozen=True)
class Study:
    """All that a report is made of."""

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    curve: tuple[Cell, ...]
    """Cells of policies saved on the way; their ``run_id`` ends in ``@step-...``."""
    runs: dict[str, RunRow]
    chance: dict[str, float] = field(default_factory=dict)
    """Recognition by chance, by protocol."""
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each protocol's name stands for."""

    @property
    def treatments(self) -> list[str]:
        return list(dict.fromkeys(cell.treatment for cell in self.cells))

    @property
    def protocol_names(self) -> list[str]:
        return list(dict.fromkeys(cell.protocol for cell in self.cells))

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(setting(name) for name in self.protocol_names))

    @property
    def missing(self) -> list[Cell]:
        """Cells without all their episodes."""
        return [cell for cell in self.cells if cell.finished < cell.expected]

    @property
    def faults(self) -> int:
        return sum(cell.faults for cell in self.cells)

    def rows(self) -> list[Row]:
        return [row(self.select(p, t)) for p in self.protocol_names for t in self.treatments if self.select(p, t)]

    def select(self, protocol: str, treatment: str) -> list[Cell]:
        return [cell for cell in self.cells if (cell.protocol, cell.treatment) == (protocol, treatment)]

    def rate(self, treatment: str, protocol: str, metric: str) -> Rate | None:
        """None where nothing was measured."""
        cells = self.select(protocol, treatment)
        found = row(cells).rates.get(metric) if cells else None
        return found if found and found.n else None


@dataclass(frozen=True)
class Comparison:
    """Rate of ``first`` minus rate of ``second`` on one protocol and metric."""

    first: str
    second: str
    difference: Difference

    @property
    def apart(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


def setting(protocol: str) -> str:
    """``grinningface/place`` of ``grinningface/place/val/v1``; another kind of name stands for itself."""
    parts = protocol.split("/")
    return "/".join(parts[:2]) if len(parts) == 4 else protocol


def split(protocol: str) -> str:
    """``val`` of ``grinningface/place/val/v1``."""
    parts = protocol.split("/")
    return parts[2] if len(parts) == 4 else ""


def row(cells: Sequence[Cell]) -> Row:
    """One treatment's cells under one protocol, pooled over training seeds."""
    by_seed = [cell.results for cell in cells]
    finished = [result for results in by_seed for result in results if result.success is not None]
    rates = {
        metric: stats.pooled(by_seed, metric)
        for metric in METRICS
        if metric == "success" or (finished and all(metric in result.credits for result in finished))
    }
    seeds = sum(cell.finished > 0 for cell in cells)
    return Row(cells[0].treatment, cells[0].protocol, rates, seeds, len(cells))


def comparisons(study: Study, protocol: str, metric: str) -> list[Comparison]:
    """Every pair of treatments that was measured, the higher rate first."""
    rates = [(name, study.rate(name, protocol, metric)) for name in study.treatments]
    known = sorted(((name, rate) for name, rate in rates if rate), key=lambda pair: -pair[1].estimate)
    return [
        Comparison(a, b, stats.difference(first, second))
        for i, (a, first) in enumerate(known)
        for b, second in known[i + 1 :]
    ]


def labels(specs: dict[str, dict]) -> dict[str, str]:
    """What to call each run's treatment: its name, and every other setting in which the runs of this study differ.

    The training seed is left out: runs that differ in nothing else share a label.
    """
    flat = {run_id: dict(_flatten(spec)) for run_id, spec in specs.items()}
    keys = sorted({key for values in flat.values() for key in values} - {"seed", "treatment"})
    varying = [key for key in keys if len({json.dumps(values.get(key)) for values in flat.values()}) > 1]
    return {
        run_id: ", ".join([values["treatment"], *(f"{key.split('.')[-1]}={values.get(key)}" for key in varying)])
        for run_id, values in flat.items()
    }


def _flatten(values: dict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_jsonl(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file; a last line cut short by a kill is passed over."""
    rows = []
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON", "one JSON object a line", f"mend {path}") from error
    return rows
