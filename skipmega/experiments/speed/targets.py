"""The targets, from records: a table, a file of plain numbers, a figure."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from skipmega.experiments.speed.layers import DENSITIES, PEERS

Record = Mapping[str, Any]
Records = Mapping[tuple[str, str], Record]
Value = Callable[[Records], tuple[float, str]]


class Target(NamedTuple):
    """A number to reach: at least ``must``, or with ``at_most`` no more; ``value`` also says of what."""

    name: str
    must: float
    aim: float
    at_most: bool
    value: Value


class Result(NamedTuple):
    """A target and what was measured; ``value`` None where a record is missing."""

    name: str
    must: float
    aim: float
    at_most: bool
    value: float | None
    note: str

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.value is None:
            return "not measured"
        sign = -1 if self.at_most else 1
        if sign * self.value >= sign * self.aim:
            return "aim"
        return "must" if sign * self.value >= sign * self.must else "MISSED"


EFFICIENCY = {
    "MHA": ((0.92, 0.96), (0.85, 0.92), (0.75, 0.86)),
    "GQA": ((0.90, 0.95), (0.78, 0.87), (0.62, 0.74)),
}
OVER_PEERS = {0.5: (0.02, 0.06), 0.125: (0.15, 0.30)}
OWN_MIXTURE = {0.5: (0.98, 0.93), 0.125: (0.85, 0.65)}


def targets() -> list[Target]:
    """Every row of the table."""
    rows = [
        Target("dense tokens/s over Hugging Face's, fp32 masters", 1.0, 1.15, False,
               _throughput("MHA dense", "Hugging Face, fp32 masters")),
        Target("dense tokens/s over Hugging Face's, bf16 weights", 1.0, 1.15, False,
               _throughput("own, bf16 weights", "Hugging Face, bf16 weights")),
    ]  # fmt: skip
    for heads, levels in EFFICIENCY.items():
        for mode, what in (("layer", "layer stack"), ("step", "whole step")):
            for density, (must, aim) in zip(DENSITIES, levels, strict=True):
                name = f"efficiency of skipping, {heads}, {what}, P={density}"
                value = _efficiency(mode, f"{heads} {density}", f"{heads} dense")
                rows.append(Target(name, must, aim, False, value))
    twice = "MHA 0.5, twice as many layers"
    rows.append(
        Target("twice the layers at P=0.5 against dense, step time over FLOPs ratio", 1.08, 1.02, True,
               _time_over_flops("step", twice, "MHA dense"))
    )  # fmt: skip
    for heads in EFFICIENCY:
        for length in (2048, 8192):
            name = f"packed attention at P=0.5 over P x causal, {heads}, {length}"
            rows.append(Target(name, 1.3, 1.1, True, _attention(heads, length)))
    for heads in EFFICIENCY:
        for density in DENSITIES:
            name = f"activation memory against dense over FLOPs ratio, {heads}, P={density}"
            rows.append(Target(name, 1.15, 1.0, True, _memory(f"{heads} {density}", f"{heads} dense")))
    for density, (must, aim) in OVER_PEERS.items():
        name = f"efficiency minus the best peer's, P={density}"
        rows.append(Target(name, must, aim, False, _over_peers(density)))
    for density, (must, aim) in OWN_MIXTURE.items():
        name = f"own Mixture-of-Depths router over the plain one, time, P={density}"
        rows.append(Target(name, must, aim, True, _mixture(density)))
    return rows


def results(records: list[dict[str, Any]]) -> list[Result]:
    """Every target, with what ``records`` say of it."""
    by_key = {(record["mode"], record["row"]): record for record in records}
    found = []
    for target in targets():
        try:
            value, note = target.value(by_key)
        except KeyError:
            found.append(Result(*target[:4], None, ""))
        else:
            found.append(Result(*target[:4], value, note))
    return found


def markdown(found: list[Result]) -> str:
    """The table of all targets."""
    lines = ["| | must | aim | measured | | |", "|---|---|---|---|---|---|"]
    for row in found:
        bound = "<= " if row.at_most else ""
        value = "" if row.value is None else f"{row.value:.3f}"
        bounds = [f"{bound}{limit:.2f}" for limit in (row.must, row.aim)]
        lines.append("| " + " | ".join([row.name, *bounds, value, row.verdict, row.note]) + " |")
    return "\n".join(lines) + "\n"


def record_table(records: list[dict[str, Any]]) -> str:
    """The records themselves: time and its spread, arithmetic per second, memory."""
    lines = ["| | ms (range) | TFLOP/s | executed | GiB |", "|---|---|---|---|---|"]
    for r in records:
        flops = f"{r['flops'] / r['seconds'] / 1e12:.0f}" if "flops" in r else ""
        executed = f"{r['executed']:.3f}" if "executed" in r else ""
        memory = r.get("peak_memory_gib", r.get("activation_bytes", 0) / 2**30)
        times = f"{r['seconds'] * 1e3:.2f} ({r['fastest'] * 1e3:.2f}-{r['slowest'] * 1e3:.2f})"
        lines.append(f"| {r['mode']}: {r['row']} | {times} | {flops} | {executed} | {memory:.2f} |")
    return "\n".join(lines) + "\n"


def write_report(records: list[dict[str, Any]], output: Path) -> str:
    """Write ``table.md``, ``targets.json`` and ``targets.png``; returns the table.

    Records of several devices or commits are named as such in it.
    """
    found = results(records)
    about = {
        key: sorted({record[key] for record in records}) for key in ("device", "versions", "commit", "date")
    }
    heading = "\n".join(f"{key}: {'; '.join(values)}" for key, values in about.items())
    text = f"{heading}\n\n{markdown(found)}\n{record_table(records)}"
    (output / "table.md").write_text(text)
    plain = {**about, "targets": [{**row._asdict(), "verdict": row.verdict} for row in found]}
    (output / "targets.json").write_text(json.dumps(plain, indent=2) + "\n")
    measured = [row for row in found if row.value is not None]
    if measured:
        plot_targets(measured, output / "targets.png")
    return text


def plot_targets(measured: list[Result], path: Path) -> None:
    """Every measured target as a bar, its bounds as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(11, 0.32 * len(measured) + 1))
    colours = {"aim": "#2a7f4f", "must": "#8fbf8f", "MISSED": "#c0504d"}
    places = range(len(measured))
    axis.barh(places, [row.value for row in measured], color=[colours[row.verdict] for row in measured])
    axis.plot([row.must for row in measured], places, "k|", markersize=11, label="must")
    axis.plot([row.aim for row in measured], places, "kx", markersize=6, label="aim")
    sides = ("", " (at most)")
    axis.set_yticks(places, [row.name + sides[row.at_most] for row in measured], fontsize=7)
    axis.invert_yaxis()
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def efficiency(skipping: Record, dense: Record) -> float:
    """(t_dense / t) x (FLOPs / FLOPs_dense), FLOPs being those of executed tokens."""
    return dense["seconds"] / skipping["seconds"] * skipping["flops"] / dense["flops"]


def _throughput(own: str, other: str) -> Value:
    def value(records: Records) -> tuple[float, str]:
        rates = [records["step", row]["tokens_per_second"] for row in (own, other)]
        return rates[0] / rates[1], f"{rates[0]:,.0f} and {rates[1]:,.0f} tokens/s"

    return value


def _efficiency(mode: str, row: str, dense: str) -> Value:
    def value(records: Records) -> tuple[float, str]:
        skipping, whole = records[mode, row], records[mode, dense]
        times, flops = (skipping[key] / whole[key] for key in ("seconds", "flops"))
        return efficiency(skipping, whole), f"{times:.3f} of the time, {flops:.3f} of the FLOPs"

    return value


def _time_over_flops(mode: str, row: str, dense: str) -> Value:
    def value(records: Records) -> tuple[float, str]:
        return 1 / efficiency(records[mode, row], records[mode, dense]), ""

    return value


def _attention(heads: str, length: int) -> Value:
    def value(records: Records) -> tuple[float, str]:
        packed, causal = (
            records["attention", f"{heads} {kind} {length}"]["seconds"] for kind in ("packed", "causal")
        )
        return packed / (0.5 * causal), f"{packed * 1e3:.2f} and {causal * 1e3:.2f} ms"

    return value


def _memory(row: str, dense: str) -> Value:
    def value(records: Records) -> tuple[float, str]:
        skipping, whole = records["layer", row], records["layer", dense]
        memory, flops = (skipping[key] / whole[key] for key in ("activation_bytes", "flops"))
        return memory / flops, f"{memory:.3f} of the memory"

    return value


def _over_peers(density: float) -> Value:
    def value(records: Records) -> tuple[float, str]:
        dense = records["peers", "dense"]
        own = efficiency(records["peers", f"own {density}"], dense)
        others = {
            peer: efficiency(records["peers", f"{peer} {density}"], dense)
            for peer in PEERS
            if ("peers", f"{peer} {density}") in records
        }
        if not others:
            raise KeyError(density)
        best = max(others, key=others.__getitem__)
        missing = [peer for peer in PEERS if peer not in others]
        note = f"{own:.3f}; " + ", ".join(f"{peer} {other:.3f}" for peer, other in others.items())
        return own - others[best], note + (f"; not measured: {', '.join(missing)}" if missing else "")

    return value


def _mixture(density: float) -> Value:
    def value(records: Records) -> tuple[float, str]:
        own = records["layer", f"own mixture-of-depths {density}"]["seconds"]
        plain = records["peers", f"mixture-of-depths {density}"]["seconds"]
        return own / plain, f"{own * 1e3:.2f} and {plain * 1e3:.2f} ms"

    return value
