"""What all config sections share."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all config sections: immutable, strict, closed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
