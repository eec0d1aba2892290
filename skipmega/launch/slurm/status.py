"""How far a submitted run is: from its folder and, while SLURM knows the job, from scontrol."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipmega.errors import LaunchError
from skipmega.launch.slurm.client import has_ended, show_job
from skipmega.launch.slurm.jobs import Submission, submissions

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Event:
    """A line of ``attempts.tsv``: ``kind`` is start, saved, failed, left, done, gave-up, ..."""

    time: str
    restart: int
    kind: str
    checkpoint: str
    detail: str


@dataclass(frozen=True)
class RunStatus:
    """A run's last submission.

    ``state`` is SLURM's as long as the job lives (``is_live``: it is queued, runs, or comes back by itself),
    then the last event's kind; ``record`` the last training
    record of ``metrics.jsonl``, empty before the first.
    """

    submission: Submission
    job: str
    state: str
    is_live: bool
    reason: str
    nodes: str
    events: list[Event]
    record: dict[str, Any]

    @property
    def attempts(self) -> int:
        return sum(event.kind == "start" for event in self.events)

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    def describe(self) -> str:
        """One line."""
        parts = [f"job {self.job}", self.state + (f" ({self.reason})" if self.reason else "")]
        parts.append(f"attempt {self.attempts}" + (f" on {self.nodes}" if self.nodes else ""))
        if self.record:
            step, steps, loss = (self.record[name] for name in ("step", "steps", "loss"))
            parts.append(f"step {step}/{steps}  loss {loss:.4f}")
            if self.is_live:
                parts.append(f"ETA {self.record['eta_seconds'] / 3600:.1f} h of training")
        return "  ".join(parts)


def runs_of(folder: Path) -> list[Path]:
    """The runs of the last array that was submitted in a folder; the folder itself if it is a run."""
    arrays = [submission.runs for submission in submissions(folder) if submission.runs.is_file()]
    return [folder / name for name in json.loads(arrays[-1].read_text())] if arrays else [folder]


def read_status(run: Path) -> RunStatus:
    """The state of a run's last submission that was queued.

    Raises:
        LaunchError: the folder has none.
    """
    queued = [submission for submission in submissions(run) if submission.job]
    if not queued:
        raise LaunchError(f"{run} was never submitted to SLURM: it has no folder slurm/NNN with a job.json")
    submission = queued[-1]
    job = str(submission.job["job"])
    shown, events = show_job(job), read_events(submission)
    state, reason = shown.get("JobState", "UNKNOWN"), shown.get("Reason", "None")
    is_live = not has_ended(shown.get("JobState"))
    if not is_live:
        ended = (submission.path / "exit_status").is_file() and events
        state, reason = (events[-1].kind, events[-1].detail) if ended else (state, "no exit status was left")
    nodes = shown.get("NodeList", "") if state == "RUNNING" else ""
    return RunStatus(
        submission=submission,
        job=job,
        state=state,
        is_live=is_live,
        reason="" if reason == "None" else reason,
        nodes="" if nodes == "(null)" else nodes,
        events=events,
        record=_last_record(run / "metrics.jsonl"),
    )


def ask_to_stop(run: Path) -> None:
    """Make a run save, and its job end without another attempt.

    Raises:
        LaunchError: the run was never submitted, or its job does not live.
    """
    status = read_status(run)
    if not status.is_live:
        raise LaunchError(f"{run} is not in the queue: {status.describe()}")
    (status.submission.path / "stop").touch()
    (run / "stop").touch()


def read_events(submission: Submission) -> list[Event]:
    """What happened to a submission's attempts, in order."""
    file = submission.path / "attempts.tsv"
    if not file.is_file():
        return []
    rows = [line.split("\t", 4) for line in file.read_text().splitlines()]
    return [Event(row[0], int(row[1]), *row[2:]) for row in rows if len(row) == 5]


def follow(
    run: Path, show: Callable[[str], None] = lambda line: print(line, flush=True), every: float = 2.0
) -> RunStatus:
    """Show a run's state, whenever it changes, until no attempt follows any more; returns the last state.

    Args:
        every: seconds between looks.
    """
    last = ""
    while True:
        status = read_status(run)
        line = status.describe()
        if line != last:
            show(line)
            last = line
        if not status.is_live:
            return status
        time.sleep(every)


def _last_record(metrics: Path) -> dict[str, Any]:
    """The last whole training record; the file may be long, and may end in the middle of a line."""
    if not metrics.is_file():
        return {}
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "train":
            return dict(record)
    return {}
