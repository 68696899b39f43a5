"""From a study folder to the numbers of a report: rates with intervals, differences, what is missing.

Nothing here decides what to say (``conclusions.py``) or how it looks (``html.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vlm4vla.errors import UserError
from vlm4vla.sims.calvin import CHAIN
from vlm4vla.sims.protocols import protocol
from vlm4vla.studies import matrix, stats
from vlm4vla.studies.stats import Difference, Estimate
from vlm4vla.studies.store import RunRow, Store
from vlm4vla.types import EpisodeResult

STUDY = "study.yaml"
"""The matrix in a study's folder, as it was run."""
CARDS = {"cards5": 5}
"""Cards on the table in GrinningFace's variants; 3 in all others (``sims/grinningface/episode.py``)."""
LENGTH = "length"
"""Of a chain of tasks: how many were done in a row. An average, where all other metrics are rates."""
IN_A_ROW = {f"success_{i}": f"{i} in a row" for i in range(1, CHAIN + 1)}
METRICS = {"grinningface": ("success", "execution", "recognition"), "calvin": (*IN_A_ROW, LENGTH)}
"""What is shown of a simulator's episodes; ``success`` alone of others."""
LABELS = {**IN_A_ROW, LENGTH: "average length"}
"""Metrics that are called otherwise than in the results."""


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
    step: int
    """Training steps of the policy."""

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
    rates: dict[str, Estimate]
    """By metric, ``success`` and those of ``metrics``; one that the simulator does not give is absent."""
    seeds: int
    """Training seeds with a finished episode."""
    planned_seeds: int


@dataclass(frozen=True)
class Results:
    """All that a report is made of."""

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    curve: tuple[Cell, ...]
    """Cells of policies saved on the way (``Cell.step``)."""
    runs: dict[str, RunRow]
    chance: dict[str, float] = field(default_factory=dict)
    """Recognition by chance, by protocol."""

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

    @cached_property
    def rows(self) -> list[Row]:
        """Protocols in their order, treatments within each."""
        cells = [self.select(name, treatment) for name in self.protocol_names for treatment in self.treatments]
        return [pool(group) for group in cells if group]

    def select(self, protocol: str, treatment: str) -> list[Cell]:
        return [cell for cell in self.cells if (cell.protocol, cell.treatment) == (protocol, treatment)]

    def rate(self, treatment: str, protocol: str, metric: str) -> Estimate | None:
        """None where nothing was measured."""
        for row in self.rows:
            if (row.treatment, row.protocol) == (treatment, protocol):
                found = row.rates.get(metric)
                return found if found and found.n else None
        return None


@dataclass(frozen=True)
class Comparison:
    """``first`` minus ``second`` on one protocol and metric."""

    first: str
    second: str
    rates: tuple[Estimate, Estimate]
    difference: Difference

    @property
    def apart(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


def metrics(name: str) -> tuple[str, ...]:
    """What is shown of a protocol's episodes."""
    return METRICS.get(protocol(name).sim, ("success",))


def label(metric: str) -> str:
    return LABELS.get(metric, metric)


def setting(protocol: str) -> str:
    """``grinningface/place`` of ``grinningface/place/val/v1``; another kind of name stands for itself."""
    parts = protocol.split("/")
    return "/".join(parts[:2]) if len(parts) == 4 else protocol


def split(protocol: str) -> str:
    """``val`` of ``grinningface/place/val/v1``."""
    parts = protocol.split("/")
    return parts[2] if len(parts) == 4 else ""


def pool(cells: Sequence[Cell]) -> Row:
    """One treatment's cells under one protocol, pooled over training seeds."""
    by_seed = [cell.results for cell in cells]
    finished = [result for results in by_seed for result in results if result.success is not None]
    rates: dict[str, Estimate] = {"success": stats.pooled(by_seed, "success")}
    for metric in metrics(cells[0].protocol):
        if metric != "success" and finished and all(metric in result.credits for result in finished):
            rates[metric] = stats.mean_length(by_seed) if metric == LENGTH else stats.pooled(by_seed, metric)
    seeds = sum(cell.finished > 0 for cell in cells)
    return Row(cells[0].treatment, cells[0].protocol, rates, seeds, len(cells))


def comparisons(results: Results, protocol: str, metric: str) -> list[Comparison]:
    """Every pair of treatments that was measured, the higher one first."""
    rates = [(name, results.rate(name, protocol, metric)) for name in results.treatments]
    known = sorted(((name, rate) for name, rate in rates if rate), key=lambda pair: -pair[1].estimate)
    return [
        Comparison(a, b, (first, second), stats.difference(first, second))
        for i, (a, first) in enumerate(known)
        for b, second in known[i + 1 :]
    ]


def load(folder: Path) -> Results:
    """Read a study's folder, finished or not.

    Raises:
        UserError: no study there, or a damaged one.
    """
    for name in (STUDY, matrix.RESULTS):
        if not (folder / name).is_file():
            raise UserError(
                f"no {folder / name}",
                "the folder of a study that was started",
                f"ls {folder}; vlm4vla study run STUDY --out {folder}",
            )
    study = matrix.load(folder / STUDY)
    with Store(folder / matrix.RESULTS) as store:
        runs = store.runs()
        final, curve = [], []
        for planned in study.cells():
            for run_id, name, expected in planned.wanted():
                _, _, step = run_id.partition("@step-")
                cell = Cell(
                    planned.title,
                    planned.run.seed,
                    planned.run_id,
                    name,
                    expected,
                    tuple(r for r in store.results(run_id, name) if r.episode < expected),
                    int(step or planned.run.training.steps),
                )
                (curve if step else final).append(cell)
    chances = {name: chance(name) for name in study.evaluate.protocols}
    return Results(
        study.name, folder, tuple(final), tuple(curve), runs, {k: v for k, v in chances.items() if v is not None}
    )


def chance(name: str) -> float | None:
    """Recognition by chance under a protocol: one over the number of cards; None for a simulator without cards."""
    each = protocol(name)
    if each.sim != "grinningface":
        return None
    return 1 / CARDS.get(each.sim_args["variant"], 3)
