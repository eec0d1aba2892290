"""Why a run or a tool ends early. Each message names the field or file, the value found and the mend."""

from typing import ClassVar

from skipmega import exit_codes


class SkipmegaError(Exception):
    """Base of all; scripts print it without a traceback, after ``label``, and exit with ``exit_code``."""

    exit_code: ClassVar[int] = exit_codes.USER_ERROR
    label: ClassVar[str] = "error"


class ConfigError(SkipmegaError):
    """A config field, override or combination of fields that cannot be used."""


class DataError(SkipmegaError):
    """A corpus, tokenizer or tokenized data set that is missing, damaged or does not fit."""


class DataFaultError(DataError):
    """Storage that does not give data that were there when the run began."""

    exit_code = exit_codes.STOPPED_BY_FAULT


class CheckpointError(SkipmegaError):
    """A checkpoint that is missing, damaged, or belongs to another run or architecture."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint that is not what was written."""


class StorageFaultError(CheckpointError):
    """Storage that does not take a checkpoint: full, read-only, or failing; what was saved is untouched."""

    exit_code = exit_codes.STOPPED_BY_FAULT


class TrainingError(SkipmegaError):
    """A run that cannot sensibly go on, e.g. because it failed before its first record."""


class RunFaultError(TrainingError):
    """Numbers or storage failed in a way that starting again as it is would repeat."""

    exit_code = exit_codes.STOPPED_BY_FAULT


class ReplicaDriftError(TrainingError):
    """Ranks that should hold the same do not; nothing was saved since it was so."""

    exit_code = exit_codes.DRIFTED


class RunStopped(SkipmegaError):  # noqa: N818 (nothing went wrong)
    """A signal, a stop file or the longest duration ended the run before its last step; state is saved."""

    exit_code = exit_codes.REQUEUE
    label = "stopped"


class RunFencedError(SkipmegaError):
    """A newer attempt owns the run folder; nothing more is written to it."""

    exit_code = exit_codes.FENCED


class LaunchError(SkipmegaError):
    """A cluster, node or launcher that lacks or refuses something."""
