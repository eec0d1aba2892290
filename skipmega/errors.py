"""The errors a user can cause. Each message names the field or file, the value found and the mend."""


class SkipmegaError(Exception):
    """Base of every error that is the user's to mend; scripts print it without a traceback."""


class ConfigError(SkipmegaError):
    """A config field, override or combination of fields that cannot be used."""


class DataError(SkipmegaError):
    """A corpus, tokenizer or tokenized data set that is missing, damaged or does not fit."""


class CheckpointError(SkipmegaError):
    """A checkpoint that is missing, damaged, or belongs to another run or architecture."""


class TrainingError(SkipmegaError):
    """A run that cannot sensibly go on, e.g. because its loss is not finite."""
