"""Which process am I: the launcher's variables read, or refused by name."""

import pytest

from skipmega.errors import ConfigError
from skipmega.launch.environment import discover_process
from skipmega.parallel.process import ProcessInfo

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's variables."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_launcher_it_is_a_job_of_one(environment: pytest.MonkeyPatch) -> None:
    process = discover_process()
    assert process == ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none")
    assert process.is_alone


def test_a_left_over_master_address_starts_no_job(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MASTER_ADDR", "node0")
    assert discover_process().is_alone


def test_torchrun_s_variables_are_read(environment: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    process = discover_process()
    assert process == ProcessInfo(rank=5, world_size=8, local_rank=1, launcher="torchrun")
    assert not process.is_alone


@pytest.mark.parametrize("missing", TORCHRUN)
def test_an_incomplete_set_is_refused_by_what_is_missing(
    environment: pytest.MonkeyPatch, missing: str
) -> None:
    for name, value in TORCHRUN.items():
        if name != missing:
            environment.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"but not {missing}: start with torchrun"):
        discover_process()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "two", "-1", "1.0"])
def test_what_is_not_a_whole_number_is_refused(
    environment: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for other, number in TORCHRUN.items():
        environment.setenv(other, number)
    environment.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        discover_process()
    assert f"{name}={value!r} is not a whole number" in str(refused.value)


def test_a_rank_outside_the_world_is_refused(environment: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "9", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"
    }.items():  # fmt: skip
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match="RANK=9 is not below WORLD_SIZE=2"):
        discover_process()
