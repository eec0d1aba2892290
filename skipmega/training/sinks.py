"""Where records of a run go: JSONL always, the terminal, TensorBoard and Weights & Biases by config."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from skipmega.config import RunConfig, dump_config
from skipmega.errors import ConfigError

Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes records (``kind``, ``step`` and numbers or lists of numbers) in the order of the run."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, appended, with the operating system when :meth:`write` returns.

    What storage does not take (a full disk, say) is kept and written before the next record.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._warned = False

    def write(self, record: Record) -> None:
        self._waiting += (json.dumps(record) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                print(f"warning: {self._file.name} waits: {error.strerror}", file=sys.stderr, flush=True)
            self._warned = True

    def close(self) -> None:
        self._file.close()


class ConsoleSink:
    """One line a record for people."""

    def write(self, record: Record) -> None:
        print(_line(record), flush=True)

    def close(self) -> None:
        return


class TensorBoardSink:
    """Scalars under ``kind/name``, losses of sources under ``kind/source_loss/name``, densities under
    ``kind/density/layer``, and of other lists over layers the mean and the extremes, so that the number of
    keys stays bounded."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "logging.tensorboard=true needs the package tensorboard: pip install 'skipmega[logging]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases; a resumed run continues under the same id."""

    def __init__(self, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"logging.wandb={config.logging.wandb} needs the package wandb: "
                "pip install 'skipmega[logging]'"
            ) from None
        folder = Path(config.run_dir)
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=folder.name,
            id=folder.name,
            resume="allow",
            mode=config.logging.wandb,
            dir=str(folder),
            config={"yaml": dump_config(config)},
        )

    def write(self, record: Record) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def open_sinks(config: RunConfig) -> list[Sink]:
    """The sinks of the configuration; only the first process of a run opens any."""
    folder = Path(config.run_dir)
    sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl"), ConsoleSink()]
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if config.logging.wandb != "disabled":
        sinks.append(WandbSink(config))
    return sinks


def _scalars(record: Record) -> dict[str, float]:
    kind = record["kind"]
    scalars: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, int | float) and name != "step":
            scalars[f"{kind}/{name}"] = value
        elif isinstance(value, dict):
            scalars.update({f"{kind}/{name}/{key}": number for key, number in value.items()})
        elif name == "density" and isinstance(value, list):
            layers = record.get("routed_layers", range(len(value)))
            scalars.update({f"{kind}/density/{layer}": v for layer, v in zip(layers, value, strict=True)})
        elif isinstance(value, list) and name != "routed_layers" and value:
            scalars.update(
                {
                    f"{kind}/{name}/mean": sum(value) / len(value),
                    f"{kind}/{name}/min": min(value),
                    f"{kind}/{name}/max": max(value),
                }
            )
    return scalars


def _line(record: Record) -> str:
    step = record["step"]
    if record["kind"] == "start":
        return f"step {step}: start of attempt {record['attempt']}"
    if record["kind"] == "alarm":
        return f"step {step}: ALARM: {record['message']}"
    if record["kind"] == "tasks":
        numbers = [f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float)]
        return f"step {step}: {', '.join(numbers)}"
    density = record.get("density") or [1.0]
    shares = f"density {sum(density) / len(density):.3f} ({min(density):.2f}-{max(density):.2f})"
    if record["kind"] == "eval":
        sources = "".join(f"  {name} {loss:.4f}" for name, loss in record.get("source_loss", {}).items())
        return f"step {step}: held-out loss {record['loss']:.4f}{sources}  {shares}"
    tflops = f"{record['executed_tflops']:.3g} of {record['dense_tflops']:.3g} TFLOP/s"
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    joules = f"  {record['joules_per_token']:.3g} J/token" if "joules_per_token" in record else ""
    each = ", ".join(f"{1000 * seconds:.1f}" for seconds in record.get("stage_seconds", []))
    stages = f"  stages {each} ms" if each else ""
    return (
        f"step {step}/{record['steps']}  loss {record['loss']:.4f}  norm {record['grad_norm']:.3f}  "
        f"lr {record['learning_rate']:.2e}  {shares}  {record['tokens_per_second']:,.0f} tok/s  "
        f"{tflops}{mfu}{joules}{stages}  ETA {_duration(record['eta_seconds'])}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
