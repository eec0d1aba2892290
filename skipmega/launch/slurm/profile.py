"""What a cluster is like, so that configurations need not know: a site profile, one YAML file."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from skipmega.config.base import Section
from skipmega.errors import ConfigError


class Profile(Section):
    """A site. ``partition`` to ``constraint`` are sbatch's; ``sbatch`` are further directives as they are
    typed (``--mail-type=END``), ``setup`` shell lines before anything runs (modules, an environment),
    ``environment`` variables of every process (NCCL's, say), ``python`` the interpreter in them.

    ``gpu_option`` is how the site asks for GPUs. ``srun_options`` go to every srun, ``containers`` says how a
    container is started, ``container_mounts`` what it sees, as its runtime writes them. ``gpu_memory_gib``
    and ``peak_tflops`` (10^12 operations per second, dense bf16) are those of one device: a job that needs
    more memory is refused, and times are estimated, at model-FLOPs utilisation ``mfu``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_option: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    cpus_per_process: int | None = Field(None, ge=1)
    memory_per_node: str | None = None
    sbatch: list[str] = Field(default_factory=list)
    srun_options: list[str] = Field(default_factory=list)
    setup: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    python: str = "python"
    containers: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: list[str] = Field(default_factory=list)
    gpu_memory_gib: float | None = Field(None, gt=0)
    peak_tflops: float = Field(989.0, gt=0)
    mfu: float = Field(0.4, gt=0, le=1)


def load_profile(path: str | Path | None) -> Profile:
    """Read a site profile; without one every field has its default.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or of the wrong type.
    """
    if path is None:
        return Profile()
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read site profile {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"site profile {path} is not valid YAML: {error}") from None
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail["loc"], detail["msg"]) for detail in error.errors()]
        raise ConfigError(f"{path} is not a valid site profile:\n  " + "\n  ".join(lines)) from None


def _explain(location: tuple[str | int, ...], message: str) -> str:
    field = ".".join(map(str, location)) or "the file"
    known = "" if field in Profile.model_fields else f"; known fields: {', '.join(Profile.model_fields)}"
    return f"{field}: {message}{known}"
