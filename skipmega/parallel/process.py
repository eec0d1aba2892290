"""One process of a job, as its launcher numbered it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessInfo:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str

    @property
    def is_alone(self) -> bool:
        """Whether no launcher started this process (a job of one)."""
        return self.launcher == "none"
