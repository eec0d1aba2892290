"""The numbers of an inspection, as they are written to JSON: everything that page and figures show."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.inspection.routers import kinds, statistics
from skipmega.inspection.routers.statistics import Floats, Ranking
from skipmega.inspection.routers.subject import Subject
from skipmega.inspection.routers.texts import Texts
from skipmega.inspection.routers.tracing import Traces

FORMAT = 1
_BINS, _POSITION_BINS = 10, 16
_RESAMPLES = 1000
_FEWEST_UNITS = 8

Findings = dict[str, Any]


def find_out(
    subject: Subject,
    texts: Texts,
    traces: Traces,
    kind: NDArray[np.int64],
    counts: NDArray[np.int64],
    seed: int,
    show_progress: bool = True,
) -> Findings:
    """Everything that is known of the routers.

    Args:
        subject: the model.
        texts: what was read.
        traces: of n tokens.
        kind: [n] indices of :data:`kinds.KINDS`.
        counts: [n] how often each token's id occurs, wherever frequency was counted.
        seed: of the bootstrap.
        show_progress: draw a bar for the bootstrap.

    Returns:
        numbers, lists, strings and None (for what is not defined) under names; ``docs/inspection.md`` says
        what each is.
    """
    density = traces.executed.mean(axis=1)
    alike, correlation = statistics.agreement(traces.executed)
    chance = statistics.chance_correlation(traces.ids.size)
    findings = {
        "format": FORMAT,
        "model": _describe(subject),
        "text": _describe_texts(texts, traces),
        "confidence": statistics.CONFIDENCE,
        "density": density,
        "mean_depth": density.sum(),
        "mean_loss": traces.loss.mean(dtype=np.float64),
        "depth": {
            "share": np.bincount(traces.depth, minlength=len(density) + 1) / traces.ids.size,
            "random": statistics.depth_distribution(density),
        },
        "groupings": _groupings(texts, traces, kind, counts, subject.max_length, density),
        "agreement": {
            "share": alike,
            "random": 1 - density[:, None] - density[None, :] + 2 * np.outer(density, density),
            "correlation": correlation,
            "random_correlation": [-chance, chance],
        },
        "rank_correlation": _rank_correlations(traces, counts, chance, seed, show_progress),
    }
    plain: Findings = _plain(findings)
    plain["headlines"] = _headlines(plain)
    plain["warnings"] = _warnings(subject, plain)
    return plain


def _plain(value: Any) -> Any:
    """As JSON has it: arrays as lists, what is no number as None."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _describe(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "router": subject.router,
        "step": subject.step,
        "num_layers": subject.num_layers,
        "routed_layers": subject.routed_layers,
        "sequence_length": subject.max_length,
    }


def _describe_texts(texts: Texts, traces: Traces) -> dict[str, Any]:
    tokens = np.bincount(traces.source, minlength=len(texts.sources))
    documents = np.bincount(texts.source_of, minlength=len(texts.sources))
    return {
        "tokens": traces.ids.size,
        "documents": len(texts.documents),
        "sequences": int(traces.sequence[-1]) + 1,
        "sources": [
            {
                "name": source.name,
                "path": str(source.path),
                "documents": int(documents[number]),
                "tokens": int(tokens[number]),
                "complete": source.complete,
            }
            for number, source in enumerate(texts.sources)
        ],
    }


def _groupings(
    texts: Texts,
    traces: Traces,
    kind: NDArray[np.int64],
    counts: NDArray[np.int64],
    max_length: int,
    density: Floats,
) -> dict[str, Any]:
    """Densities by what tokens have in common; each grouping has every token once."""
    width = -(-max_length // _POSITION_BINS)
    loss, surprise = (statistics.quantile_bins(values, _BINS) for values in (traces.loss, traces.surprise))
    frequency = statistics.quantile_bins(counts, _BINS)
    last = max_length - 1
    grouped = {
        "kind": (kind, kinds.KINDS),
        "position": (
            traces.position // width,
            [f"{begin} to {min(begin + width - 1, last)}" for begin in range(0, max_length, width)],
        ),
        "source": (traces.source, [source.name for source in texts.sources]),
        "loss": (loss, _ranges(traces.loss, loss, "{:.2f}")),
        "surprise": (surprise, _ranges(traces.surprise, surprise, "{:.2f}")),
        "frequency": (frequency, _ranges(counts, frequency, "{:,}")),
    }
    return {name: _densities_by(group, labels, traces, density) for name, (group, labels) in grouped.items()}


def _ranges(values: NDArray[Any], group: NDArray[np.int64], style: str) -> list[str]:
    """What lies in each group: its smallest and its largest value."""
    labels = []
    for number in range(int(group.max()) + 1):
        inside = values[group == number]
        low, high = (style.format(value) for value in (inside.min(), inside.max()))
        labels.append(low if low == high else f"{low} to {high}")
    return labels


def _densities_by(
    group: NDArray[np.int64], labels: Sequence[str], traces: Traces, density: Floats
) -> list[dict[str, Any]]:
    found = []
    for number, label in enumerate(labels):
        inside = group == number
        tokens = int(inside.sum())
        if tokens == 0:
            continue
        here = traces.executed[:, inside].mean(axis=1)
        found.append(
            {
                "label": label,
                "tokens": tokens,
                "density": here,
                "random": statistics.share_band(density, tokens),
                "depth": here.sum(),
                "random_depth": statistics.depth_band(density, tokens),
                "loss": traces.loss[inside].mean(dtype=np.float64),
            }
        )
    return found


def _rank_correlations(
    traces: Traces,
    counts: NDArray[np.int64],
    chance: float,
    seed: int,
    show_progress: bool,
) -> dict[str, Any]:
    """Spearman's correlation of depth with other things; sampled by document, or by sequence where documents
    are too few."""
    depth = Ranking(traces.depth)
    others = {
        "loss": Ranking(traces.loss),
        "surprise": Ranking(traces.surprise),
        "frequency": Ranking(counts),
    }

    rho = statistics.rank_correlation(depth, others, np.ones(traces.ids.size))
    defined = {name: others[name] for name, value in rho.items() if np.isfinite(value)}

    def correlate(weights: Floats) -> dict[str, float]:
        return statistics.rank_correlation(depth, defined, weights)

    units = {"document": traces.document, "sequence": traces.sequence}
    numbers = {name: int(unit[-1]) + 1 for name, unit in units.items()}
    unit = next((name for name, number in numbers.items() if number >= _FEWEST_UNITS), None)
    intervals: dict[str, Any] = {}
    if unit is not None:
        intervals = statistics.bootstrap(correlate, units[unit], _RESAMPLES, seed, show_progress)
    return {
        "with": {name: {"rho": value, "interval": intervals.get(name)} for name, value in rho.items()},
        "random": [-chance, chance],
        "sampled": unit,
        "units": numbers.get(unit or ""),
        "resamples": _RESAMPLES,
        "seed": seed,
    }


def _headlines(findings: Findings) -> list[str]:
    groups, lines = findings["groupings"]["kind"], []
    if len(groups) > 1:
        most, least = (choose(groups, key=lambda group: group["depth"]) for choose in (max, min))
        lines.append(
            f"Layers per token, by kind: from {least['depth']:.2f} ({least['label']}) to {most['depth']:.2f} "
            f"({most['label']})."
        )
    outside = [
        not low <= share <= high
        for group in groups
        for share, (low, high) in zip(group["density"], group["random"], strict=True)
    ]
    lines.append(
        f"Of {len(outside)} densities by kind and layer, {sum(outside)} lie outside of what a random "
        "gate gives 95% of the time."
    )
    for name, found in findings["rank_correlation"]["with"].items():
        if found["rho"] is not None:
            interval = "" if found["interval"] is None else " ({:+.3f} to {:+.3f})".format(*found["interval"])
            lines.append(f"Rank correlation of depth with {name}: {found['rho']:+.3f}{interval}.")
    return lines


def _warnings(subject: Subject, findings: Findings) -> list[str]:
    warnings = []
    knows_nothing = float(np.log(subject.vocab_size))
    if findings["mean_loss"] > knows_nothing:
        warnings.append(
            f"The mean loss, {findings['mean_loss']:.2f} nats, is above that of knowing nothing "
            f"({knows_nothing:.2f}): is this the model's own tokenizer, and the model trained?"
        )
    warnings += [
        f"Only the beginning of {source['name']} was read: {source['tokens']:,} tokens (--max-tokens)."
        for source in findings["text"]["sources"]
        if not source["complete"]
    ]
    if findings["rank_correlation"]["sampled"] is None:
        warnings.append(
            f"No confidence intervals: they need {_FEWEST_UNITS} documents, or as many sequences of "
            f"{subject.max_length} tokens."
        )
    return warnings
