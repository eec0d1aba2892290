"""Which process am I? The one place that reads a launcher's environment variables."""

import os

from skipmega.errors import ConfigError
from skipmega.parallel.process import ProcessInfo

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def discover_process() -> ProcessInfo:
    """Read the launcher's variables: torchrun's if present, otherwise a job of one process.

    Raises:
        ConfigError: some of torchrun's variables are set and others are missing or not numbers.
    """
    found = [name for name in _TORCHRUN if name in os.environ]
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none")
    missing = [name for name in _TORCHRUN if name not in found]
    if missing:
        raise ConfigError(
            f"the launcher set {', '.join(found)} but not {', '.join(missing)}: start with torchrun, or "
            "unset them to run as one process"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = os.environ[name]
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{name}={value!r} is not a whole number: start with torchrun, or unset it")
        numbers[name] = int(value)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise ConfigError(
            f"RANK={numbers['RANK']} is not below WORLD_SIZE={numbers['WORLD_SIZE']}: start with torchrun, "
            "or unset both"
        )
    return ProcessInfo(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], launcher="torchrun")
