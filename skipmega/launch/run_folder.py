"""A run's folder: ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``index_cache/``, ``slurm/`` (its
submissions); one run each."""

import json
from pathlib import Path
from typing import Any

from skipmega.checkpoint.store import Checkpoint, CheckpointStore
from skipmega.config import RunConfig, dump_config, load_config
from skipmega.data.files import atomic_write
from skipmega.errors import CheckpointError

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
_DATA = ("data.tokenizer", "data.train", "data.sequence_length", "training.seed")


class RunFolder:
    """The folder of one run.

    Args:
        config: the run's resolved configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.run_dir)
        self.store = CheckpointStore(self.path / "checkpoints", config.checkpoint.keep)
        self.index_cache = self.path / "index_cache"

    def check(self) -> Checkpoint | None:
        """Find where to continue; writes nothing.

        Returns:
            The checkpoint to resume from, or None to start from the beginning.

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
        return checkpoint

    def start_attempt(self) -> int:
        """Save the configuration; returns the number of this attempt at the run, from 1.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        counter = self.path / "attempts.json"
        attempt = int(json.loads(counter.read_text())["attempts"]) + 1 if counter.is_file() else 1
        try:
            for name, text in (
                ("config.yaml", dump_config(self.config)),
                ("attempts.json", json.dumps({"attempts": attempt})),
            ):
                with atomic_write(self.path / name) as stream:
                    stream.write(text.encode())
        except OSError as error:
            raise CheckpointError(
                f"cannot write run_dir={self.path}: {error.strerror}; make it writable or choose another"
            ) from None
        return attempt

    def _foreign(self) -> list[str]:
        """Names in a folder without a run; a start that failed may have left its sample indices, and a
        submission precedes the run."""
        if not self.path.is_dir():
            return [f"a file called {self.path.name}"] if self.path.exists() else []
        before = (self.index_cache, self.path / "slurm")
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


def _value(config: RunConfig, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)
