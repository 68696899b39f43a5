"""What a report may say. Every sentence is decided by an interval; none says more than it.

"Apart" is said only where the 95 % interval of a difference excludes 0. Where it does not, the report says how large a
difference could have been missed, not that there is none. Below ``stats.MIN_SEEDS`` training seeds, a statement is
about these trained policies, not about the treatment.
"""

from vlm4vla.reporting.tables import LENGTH, Comparison, Results, comparisons, label, metrics, setting, split
from vlm4vla.studies.stats import MIN_SEEDS, Estimate, Mean, Rate

UNSEEN = ("val", "hard")
"""Splits whose emojis are in no demonstration."""


def headline(results: Results) -> str:
    """One sentence: the clearest thing that the intervals allow."""
    name, metric = lead(results, results.settings[0])
    pairs = comparisons(results, name, metric)
    where = f"{label(metric)} on {_split_words(name)}"
    incomplete = " (preliminary)" if results.missing else ""
    if not pairs:
        known = [f"{t} {_rate(rate)}" for t in results.treatments if (rate := results.rate(t, name, metric))]
        return (f"{_capital(where)}: {'; '.join(known)}" if known else f"No {where} measured yet") + incomplete
    apart = [pair for pair in pairs if pair.apart]
    if not apart:
        return f"No two treatments can be told apart by {where}{incomplete}"
    widest = max(apart, key=lambda pair: pair.difference.estimate)
    rates = " against ".join(_value(rate.estimate, rate) for rate in widest.rates)
    few = " as trained here" if {widest.first, widest.second} & set(_few_seeds(results, name)) else ""
    return f"{_capital(where)}: {widest.first} lies above {widest.second}{few}, {rates}{incomplete}"


def lead(results: Results, where: str) -> tuple[str, str]:
    """The protocol and metric that a setting is judged by first: recognition of unseen emojis, the length of chains.

    Success, where that was measured of no treatment, or of only some of those that were evaluated.
    """
    names = [name for name in results.protocol_names if setting(name) == where]
    if LENGTH in metrics(names[0]):
        return names[0], LENGTH
    for wanted in UNSEEN:
        for name in names:
            evaluated = [t for t in results.treatments if results.rate(t, name, "success")]
            recognition = [t for t in evaluated if results.rate(t, name, "recognition")]
            if split(name) == wanted and evaluated and recognition == evaluated:
                return name, "recognition"
    return names[0], "success"


def paragraphs(results: Results) -> list[tuple[str, str]]:
    """Titles and texts: for each setting its leading protocol and metric, then success everywhere; then limits."""
    said = []
    for where in results.settings:
        first = lead(results, where)
        names = [name for name in results.protocol_names if setting(name) == where]
        rest = [(name, "success") for name in names if (name, "success") != first]
        said += [
            (f"{where}, {label(metric)} on {_split_words(name)}", _protocol(results, name, metric))
            for name, metric in (first, *rest)
        ]
    return [*said, ("What cannot be concluded", limits(results))]


def _protocol(results: Results, name: str, metric: str) -> str:
    """Rates, then chance, then every pair, for one protocol and metric."""
    rates = {t: rate for t in results.treatments if (rate := results.rate(t, name, metric))}
    if not rates:
        return "Not measured."
    seeds = {row.treatment: row.seeds for row in results.rows if row.protocol == name}
    parts = [f"{t} {_rate(rate)} from {_seeds(seeds[t])}" for t, rate in rates.items()]
    sentences = [f"{'; '.join(parts)}."]
    absent = [t for t in results.treatments if t not in rates]
    if absent:
        sentences.append(f"Not measured: {_list(absent)}.")
    if metric == "recognition":
        sentences += _against_chance(rates, results.chance.get(name))
        partly = {t: rate for t, rate in rates.items() if isinstance(rate, Rate) and rate.undefined}
        counted = [f"{rate.n} of {rate.n + rate.undefined} ({t})" for t, rate in partly.items()]
        if counted:
            sentences.append(f"The cube went to a card in {_list(counted)} episodes; only these count here.")
    return " ".join(sentences + _pairs(comparisons(results, name, metric), _few_seeds(results, name)))


def _few_seeds(results: Results, name: str) -> list[str]:
    """The treatments with fewer seeds than a statement about training needs."""
    return [row.treatment for row in results.rows if row.protocol == name and row.seeds < MIN_SEEDS]


def _against_chance(rates: dict[str, Estimate], chance: float | None) -> list[str]:
    if chance is None:
        return []
    groups = {
        "above chance": [t for t, rate in rates.items() if rate.low > chance],
        "below chance": [t for t, rate in rates.items() if rate.high < chance],
        "not told from chance": [t for t, rate in rates.items() if rate.low <= chance <= rate.high],
    }
    said = [f"{_list(names)} {'is' if len(names) == 1 else 'are'} {what}" for what, names in groups.items() if names]
    return [f"Chance is {chance:.0%}: {'; '.join(said)}."]


def _pairs(pairs: list[Comparison], few: list[str]) -> list[str]:
    apart = [pair for pair in pairs if pair.apart]
    sentences = []
    if apart:
        said = [f"{pair.first} above {pair.second} by {_points(pair)}" for pair in apart]
        scope = "Apart, as trained here" if any({p.first, p.second} & set(few) for p in apart) else "Apart"
        sentences.append(f"{scope}: {'; '.join(said)}.")
    for pair in pairs:
        if not pair.apart:
            missed = max(abs(pair.difference.low), abs(pair.difference.high))
            sentences.append(
                f"{pair.first} and {pair.second} are not told apart ({_points(pair)}): "
                f"a difference of up to {_size(missed, pair)} cannot be excluded."
            )
    return sentences


def limits(results: Results) -> str:
    """What cannot be concluded, and why."""
    sentences = []
    seeds = [row.seeds for row in results.rows]
    if seeds and min(seeds) < MIN_SEEDS:
        fewest = min(seeds)
        sentences.append(
            f"With {_seeds(fewest)} for some rows, nothing can be concluded about training again with another seed: "
            f"their intervals cover the choice of episodes only (at least {MIN_SEEDS} seeds are needed)."
        )
    else:
        sentences.append(
            "Intervals cover the choice of episodes and of training seeds; with few seeds still too narrowly."
        )
    if len(results.treatments) > 2:
        sentences.append("Each interval is a 95 % one by itself, not adjusted for the number of comparisons.")
    if results.missing:
        sentences.append(
            f"{_capital(_incomplete(results))} (listed below); rates are of what is there, nothing is filled in."
        )
    if results.faults:
        episodes = "episode" if results.faults == 1 else "episodes"
        sentences.append(
            f"{results.faults} {episodes} ended in an infrastructure fault and count as neither success nor failure."
        )
    sentences.append("What holds for these backbones in this simulator need not hold for others.")
    return " ".join(sentences)


def _incomplete(results: Results) -> str:
    absent = sum(cell.finished == 0 for cell in results.missing)
    partial = len(results.missing) - absent
    said = [f"{number} {word}" for number, word in ((absent, "missing"), (partial, "unfinished")) if number]
    return f"{' and '.join(said)} of {len(results.cells)} cells"


def _split_words(name: str) -> str:
    words = {
        "val": "unseen emojis (val)",
        "hard": "unseen emojis that have look-alikes (hard)",
        "train": "trained emojis (train)",
        "id": "the demonstrations' own episodes (id)",
    }
    return words.get(split(name), split(name) or name)


def _rate(rate: Estimate) -> str:
    shown = [_value(value, rate) for value in (rate.estimate, rate.low, rate.high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}] (n = {rate.n})"


def _value(value: float, of: Estimate) -> str:
    return f"{value:.2f}" if isinstance(of, Mean) else f"{value:.0%}"


def _points(pair: Comparison) -> str:
    gap = pair.difference
    low, high = (f"{v:.2f}" if isinstance(pair.rates[0], Mean) else f"{100 * v:.0f}" for v in (gap.low, gap.high))
    return f"{_size(gap.estimate, pair)} [{low}, {high}]"


def _size(difference: float, pair: Comparison) -> str:
    """A difference of means in tasks, of rates in points."""
    if isinstance(pair.rates[0], Mean):
        return f"{difference:.2f} tasks"
    points = f"{100 * difference:.0f}"
    return f"{points} point{'' if points == '1' else 's'}"


def _seeds(number: int) -> str:
    return f"{number} training seed{'' if number == 1 else 's'}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
