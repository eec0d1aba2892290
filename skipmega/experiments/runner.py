"""Runs a ladder's trials, several at once on every device, each as the command a user would type."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from skipmega.config import load_config
from skipmega.data.files import atomic_write
from skipmega.errors import DataError, TrainingError
from skipmega.exit_codes import DONE, STOPPED_BY_FAULT
from skipmega.experiments.plan import LadderPlan, Trial, next_trials
from skipmega.inspection.metrics import read_metrics
from skipmega.models.flops import training_flops_per_token

PRETRAIN = Path(__file__).resolve().parents[2] / "pretrain" / "pretrain.py"


@dataclass(frozen=True)
class TrialResult:
    """What a finished trial came to.

    ``loss``: last held-out loss in nats per token (infinite if it diverged); ``flops``: training FLOPs per
    token as executed, mean over the run; ``density`` and ``held_out_density``: of each routed layer, mean of
    the last tenth of training and at the last evaluation; ``seconds_per_step``: median.
    """

    row: str
    rate: float
    seed: int
    loss: float
    flops: float
    density: list[float]
    held_out_density: list[float]
    dropped: float
    seconds_per_step: float

    @property
    def trial(self) -> Trial:
        """Which it is of."""
        return Trial(self.row, self.rate, self.seed)


class LadderRunner:
    """Runs what is missing of a ladder and keeps results in ``OUTPUT/results.json``.

    Args:
        path: the plan's file.
        plan: the ladder.
        output: a folder; finished trials in it are not repeated.
        devices: numbers of GPUs to use, as torch counts those visible here; empty for a CPU host.
        at_once: trials on one device, or on the host, at a time; on the host they share its cores.
        deadline: no trial starts after so many seconds, and those still running then are ended and will be
            repeated; None for no limit.
        script: what trains, called with a configuration file and overrides.
    """

    def __init__(
        self,
        path: Path,
        plan: LadderPlan,
        output: Path,
        devices: list[int],
        at_once: int,
        deadline: float | None,
        script: Path = PRETRAIN,
    ) -> None:
        self.path, self.plan, self.output, self.script = path, plan, output, script
        self.results: dict[Trial, TrialResult] = read_results(output)
        self._end = None if deadline is None else time.monotonic() + deadline
        self._places: SimpleQueue[int | None] = SimpleQueue()
        self._workers = max(1, len(devices)) * at_once
        for place in range(self._workers):
            self._places.put(devices[place % len(devices)] if devices else None)
        self._threads = max(1, (os.cpu_count() or 1) // self._workers)
        self._begun = time.monotonic()

    def run(self, rows: list[str]) -> None:
        """Run the missing trials of ``rows``; returns when none is left or the deadline has passed.

        Raises:
            TrainingError: rows that could not start; the others have been run all the same.
        """
        losses: dict[Trial, float | None] = {t: result.loss for t, result in self.results.items()}
        running: dict[Future[TrialResult | None], Trial] = {}
        broken: dict[str, str] = {}
        with ThreadPoolExecutor(self._workers) as pool:
            while True:
                for row in (row for row in rows if row not in broken):
                    for trial in next_trials(self.plan, row, losses):
                        losses[trial] = None
                        running[pool.submit(self._run_one, trial)] = trial
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    trial = running.pop(future)
                    try:
                        result = future.result()
                    except TrainingError as error:
                        broken.setdefault(trial.row, str(error))
                        continue
                    if result is not None:
                        losses[trial] = result.loss
                        self._keep(result)
        if broken:
            raise TrainingError("; ".join(f"row {row}: {why}" for row, why in broken.items()))

    def time_rows(self, rows: list[str], steps: int) -> dict[str, float]:
        """Seconds per step of each row when it has a device to itself: median after the first quarter."""
        timed = {}
        for row in rows:
            trial = Trial(f"{row}-timing", self.plan.rates[0], self.plan.seeds[0])
            metrics = self._train(
                trial, self.plan.overrides(row), [f"training.stop_after={steps}", "training.eval_interval=0"]
            )
            if metrics is not None:
                timed[row] = _median_step(metrics.parent / "metrics.jsonl", skip=0.5)
                print(f"{row}: {timed[row] * 1e3:.1f} ms per step alone", flush=True)
        return timed

    def _run_one(self, trial: Trial) -> TrialResult | None:
        config = self._train(trial, self.plan.overrides(trial.row), [])
        return None if config is None else summarise(trial, config)

    def _train(self, trial: Trial, overrides: list[str], more: list[str]) -> Path | None:
        """Train one trial in a process of its own; its config.yaml, or None if there was no time."""
        folder = self.output / trial.name
        place = self._places.get()
        try:
            remaining = None if self._end is None else self._end - time.monotonic()
            if remaining is not None and remaining <= 0:
                return None
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable, str(self.script), str(self.path.parent / self.plan.base), *overrides, *more,
                f"run_dir={folder}", f"optimizer.learning_rate={trial.rate!r}", f"training.seed={trial.seed}",
            ]  # fmt: skip
            if not _finishes(command, Path(f"{folder}.log"), self._environment(place), remaining):
                return None
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return folder / "config.yaml"
        finally:
            self._places.put(place)

    def _environment(self, place: int | None) -> dict[str, str]:
        if place is None:
            return {"OMP_NUM_THREADS": str(self._threads), **os.environ}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # torch counts only these
        name = visible.split(",")[place] if visible else str(place)
        return {**os.environ, "CUDA_VISIBLE_DEVICES": name}

    def _keep(self, result: TrialResult) -> None:
        self.results[result.trial] = result
        write_results(self.output, self.results)
        done = f"{(time.monotonic() - self._begun) / 60:5.1f} min, {len(self.results)} done"
        print(
            f"[{done}] {result.trial.name}: held out {result.loss:.4f}, "
            f"{result.seconds_per_step * 1e3:.0f} ms per step, "
            f"density {_range(result.held_out_density)}",
            flush=True,
        )


def summarise(trial: Trial, config_path: Path) -> TrialResult:
    """Read a trial's folder."""
    config = load_config(config_path)
    metrics = read_metrics(config_path.parent / "metrics.jsonl")
    finished = metrics.train[-1]["step"] == config.training.steps and bool(metrics.evaluations)
    flops = []
    for record in metrics.train:
        share = dict(zip(record["routed_layers"], _executed(record), strict=True))
        everybody = config.routing.computes_all
        flops.append(training_flops_per_token(config, {i: 1.0 if everybody else s for i, s in share.items()}))
    tail = metrics.train[-max(1, len(metrics.train) // 10) :]
    dropped = [sum(r["dropped"]) / len(r["dropped"]) for r in metrics.train if r["dropped"]]
    return TrialResult(
        row=trial.row,
        rate=trial.rate,
        seed=trial.seed,
        loss=metrics.evaluations[-1]["loss"] if finished else float("inf"),
        flops=sum(flops) / len(flops),
        density=[sum(column) / len(tail) for column in zip(*(r["density"] for r in tail), strict=True)],
        held_out_density=metrics.evaluations[-1]["density"] if metrics.evaluations else [],
        dropped=sum(dropped) / len(dropped) if dropped else 0.0,
        seconds_per_step=_median_step(config_path.parent / "metrics.jsonl", skip=0.1),
    )


def read_results(output: Path) -> dict[Trial, TrialResult]:
    """Finished trials of an output folder."""
    path = output / "results.json"
    if not path.is_file():
        return {}
    results = [TrialResult(**fields) for fields in json.loads(path.read_text())]
    return {result.trial: result for result in results}


def write_results(output: Path, results: dict[Trial, TrialResult]) -> None:
    """Replace ``OUTPUT/results.json``."""
    text = json.dumps([asdict(result) for result in results.values()], indent=1)
    with atomic_write(output / "results.json") as stream:
        stream.write(text.encode())


def _executed(record: dict[str, list[float]]) -> list[float]:
    return [d * (1 - lost) for d, lost in zip(record["density"], record["dropped"], strict=True)]


def _median_step(metrics: Path, skip: float) -> float:
    times = [record["seconds_per_step"] for record in read_metrics(metrics).train]
    times = sorted(times[int(len(times) * skip) :])
    return times[len(times) // 2]


def _finishes(command: list[str], log: Path, environment: dict[str, str], limit: float | None) -> bool:
    """Run ``command`` with its output in ``log``; False if it outlasts ``limit`` seconds and is ended.

    Raises:
        TrainingError: it failed; not if its numbers were at fault after its first record, which is a result.
    """
    with log.open("w") as stream:
        try:
            ended = subprocess.run(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=limit,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    if ended.returncode == DONE:
        return True
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    if ended.returncode != STOPPED_BY_FAULT or not _has_records(log.with_suffix("") / "metrics.jsonl"):
        raise TrainingError(
            f"{shlex.join(command)} ended with status {ended.returncode}: {last} (all of it: {log})"
        )
    print(f"{log.stem} diverged: {last}", flush=True)
    return True


def _has_records(metrics: Path) -> bool:
    try:
        read_metrics(metrics)
    except DataError:
        return False
    return True


def _range(density: list[float]) -> str:
    return f"{min(density):.2f}-{max(density):.2f}" if density else "1"
