"""A run's folder: ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``index_cache/``, ``slurm/`` (its
submissions); one run each.

``attempts/`` holds a file for each time the run was started, by number; the newest owns the folder. A file
called ``stop`` ends the run after its present step.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from skipmega.checkpoint.store import Checkpoint, CheckpointStore
from skipmega.config import RunConfig, dump_config, load_config
from skipmega.data.files import atomic_write
from skipmega.data.order.left_out import LeftOut
from skipmega.errors import CheckpointError, DataError, RunFencedError

_ARCHITECTURE = (
    "routing.router",
    "routing.wrap",
    "routing.dense_first",
    "routing.dense_last",
    "routing.every",
    "routing.keys_values",
    "routing.router_input",
    "routing.router_bias",
    "routing.stand_in",
    "optimizer.name",
)
_DATA = (
    "data.tokenizer",
    "data.train",
    "data.order",
    "data.temperature",
    "data.stages",
    "data.sequence_length",
    "training.seed",
)


class RunFolder:
    """The folder of one run.

    Args:
        config: the run's resolved configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.run_dir)
        self.store = CheckpointStore(
            self.path / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every
        )
        self.index_cache = self.path / "index_cache"
        self.stop_file = self.path / "stop"
        self._attempts = self.path / "attempts"
        self._data = self.path / "data.sha256"

    def check(self) -> Checkpoint | None:
        """Find where to continue, reading no tensors and writing nothing.

        Returns:
            The newest checkpoint that seems complete, or None to start from the beginning.

        Raises:
            CheckpointError: the folder holds another run or something else, ``checkpoint.resume`` names
                no checkpoint, or the checkpoint is of another architecture.
        """
        resume = self.config.checkpoint.resume
        saved = self.path / "config.yaml"
        if saved.is_file():
            if resume == "never":
                raise CheckpointError(
                    f"checkpoint.resume=never, but run_dir={self.path} already holds a run: choose another "
                    "run_dir, or checkpoint.resume=auto to continue it"
                )
            refuse_changes(load_config(saved), self.config, (*_ARCHITECTURE, *_DATA), f"run_dir={self.path}")
        elif foreign := self._foreign():
            raise CheckpointError(
                f"run_dir={self.path} is not empty and holds no run (found {', '.join(foreign[:3])}): "
                "choose another run_dir"
            )
        checkpoint = self.store.latest()
        if checkpoint is None and resume not in ("auto", "never"):
            checkpoint = Checkpoint.open(resume)
        if checkpoint is not None:
            refuse_changes(checkpoint.config, self.config, _ARCHITECTURE, f"checkpoint {checkpoint.path}")
            _refuse_moved_samples(checkpoint, self.config)
        return checkpoint

    def candidates(self) -> list[Checkpoint]:
        """Checkpoints to try to resume from, newest first; the one that ``checkpoint.resume`` names if the
        run has none of its own."""
        own, resume = self.store.all_newest_first(), self.config.checkpoint.resume
        return own if own or resume in ("auto", "never") else [Checkpoint.open(resume)]

    def claim_attempt(self) -> int:
        """Own the run from now on; returns the number of this attempt at it, from 1.

        An attempt that still runs finds out (:meth:`check_owned`), and what it is saving never becomes a
        checkpoint; look for checkpoints after this.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            self._attempts.mkdir(parents=True, exist_ok=True)
            attempt = 1 + max((int(entry.name) for entry in self._attempts.iterdir()), default=0)
            while not self._create(attempt):
                attempt += 1
            self.store.remove_unfinished(attempt - 1)
        except OSError as error:
            raise self._unwritable(error) from None
        return attempt

    def heartbeats(self, attempt: int) -> Path:
        """Folder where the processes of an attempt say how far they are."""
        return self.path / "heartbeats" / str(attempt)

    def check_owned(self, attempt: int) -> None:
        """Does nothing as long as ``attempt`` is the newest.

        Raises:
            RunFencedError: a newer one has claimed the run; says where it runs.
        """
        newer = self._attempts / str(attempt + 1)
        if newer.exists():
            raise RunFencedError(
                f"attempt {attempt + 1} ({newer.read_text().strip()}) has taken over run_dir={self.path}; "
                f"attempt {attempt} writes nothing more"
            )

    def check_data(self, fingerprint: str | None) -> None:
        """Refuse to continue with data other than the run's; None says nothing of them.

        Raises:
            DataError: the sources hold something else than when the run began.
        """
        if fingerprint is None or not self._data.exists():
            return
        if (found := self._data.read_text().strip()) != fingerprint:
            raise DataError(
                f"run_dir={self.path} began with other data: the SHA-256 of files and split is "
                f"{fingerprint[:12]} now and was {found[:12]}: files were added, removed or replaced; put "
                "back what was there, or choose another run_dir"
            )

    def record_data(self, fingerprint: str | None) -> None:
        """Remember what the run's data are, for :meth:`check_data`."""
        if fingerprint is not None:
            with atomic_write(self._data) as stream:
                stream.write(f"{fingerprint}\n".encode())

    def begin_records(self, step: int) -> None:
        """Save the configuration and drop records of steps beyond ``step``, which are done anew.

        An older attempt that still writes records from now on writes them to a file without a name.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        metrics = self.path / "metrics.jsonl"
        try:
            with atomic_write(self.path / "config.yaml") as stream:
                stream.write(dump_config(self.config).encode())
            if metrics.is_file():
                kept = [line for line in metrics.read_text().splitlines(True) if _belongs(line, step)]
                with atomic_write(metrics) as stream:
                    stream.write("".join(kept).encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def _create(self, attempt: int) -> bool:
        """Make the file that says so; False if it is there already."""
        try:
            with (self._attempts / str(attempt)).open("x") as stream:
                stream.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
        except FileExistsError:
            return False
        return True

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"cannot write run_dir={self.path}: {error.strerror}; make it writable or choose another"
        )

    def _foreign(self) -> list[str]:
        """Names in a folder without a run; a start that failed may have left indices and its number, and a
        submission precedes the run."""
        if not self.path.is_dir():
            return [f"a file called {self.path.name}"] if self.path.exists() else []
        before = (self.index_cache, self._attempts, self.path / "slurm")
        return sorted(entry.name for entry in self.path.iterdir() if entry not in before)


def refuse_changes(there: RunConfig, here: RunConfig, fields: tuple[str, ...], owner: str) -> None:
    """Compare the model section and ``fields`` of two configurations.

    Raises:
        CheckpointError: names the first field that differs, both values and the mend.
    """
    names = [f"model.{name}" for name in type(here.model).model_fields]
    for name in (*names, *fields):
        old, new = _value(there, name), _value(here, name)
        if old != new:
            raise CheckpointError(
                f"{owner} holds another run: {name} is {old!r} there and {new!r} here; choose another "
                "run_dir, or set it back to continue that run"
            )


def _refuse_moved_samples(checkpoint: Checkpoint, here: RunConfig) -> None:
    """Refuse to leave out, or to take back, samples that the checkpoint's run is past: all that follow would
    move, and some be lost or read twice."""
    there, wanted = LeftOut(checkpoint.config.data.leave_out), LeftOut(here.data.leave_out)
    if there.ranges == wanted.ranges:
        return
    consumed = checkpoint.state["consumed_samples"]
    position = there.number(consumed - 1) + 1 if consumed else 0
    if there.before(position) != wanted.before(position):
        raise CheckpointError(
            f"checkpoint {checkpoint.path} has read the samples up to {position - 1}, and data.leave_out="
            f"{here.data.leave_out} differs there from its {checkpoint.config.data.leave_out}: change only "
            "what lies beyond, or resume from an earlier checkpoint (in a new run_dir, with "
            "checkpoint.resume=PATH)"
        )


def _belongs(line: str, step: int) -> bool:
    """Whether a line of ``metrics.jsonl`` is a record of the first ``step`` steps; a torn one is none."""
    try:
        return json.loads(line)["step"] <= step and line.endswith("\n")
    except (ValueError, KeyError, TypeError):
        return False


def _value(config: RunConfig, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)
