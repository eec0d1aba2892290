"""Attempts at a run as processes that are forked from one that has imported everything: a start takes a
second, so that many can be killed."""

import faulthandler
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from skipmega.config import load_config
from skipmega.launch.cli import run_script
from skipmega.parallel.process import ProcessInfo
from support.worlds import WARM, free_port, print_into


class Attempt:
    """All processes of one start of a run; what they print is in ``output``.

    Args:
        config: file of the run.
        overrides: beside it.
        world_size: number of processes.
        output: file that is appended to.
        spoil: called in every process with its rank before it starts, to plant a fault.
        limit: seconds after which a process prints its stacks and ends with 1.
    """

    def __init__(
        self,
        config: Path,
        overrides: list[str],
        world_size: int,
        output: Path,
        spoil: Callable[[int], None] | None = None,
        limit: float = 100.0,
    ) -> None:
        self.output = output
        port = free_port()
        self.processes: list[ForkServerProcess] = [
            WARM.Process(
                target=_train, args=(config, overrides, rank, world_size, port, output, spoil, limit)
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        """Whether all processes live."""
        return all(process.is_alive() for process in self.processes)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait until it holds; False if a process ended before."""
        while not condition():
            if not self.running():
                return False
            time.sleep(0.002)
        return True

    def kill(self, *ranks: int) -> None:
        """SIGKILL those, or all of them; the rest is ended too."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()
        if ranks:
            self.processes[ranks[0]].join()
            time.sleep(0.2)  # some of what the others do alone
            self.kill()
        self.join()

    def signal(self, number: int, *ranks: int) -> None:
        """Send it to those, or to all."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def join(self) -> list[int | None]:
        """Wait for the end of all; their exit statuses by rank."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def _train(
    config: Path,
    overrides: list[str],
    rank: int,
    world_size: int,
    port: int,
    output: Path,
    spoil: Callable[[int], None] | None,
    limit: float,
) -> None:
    print_into(output)
    faulthandler.dump_traceback_later(limit, exit=True)
    torch.set_num_threads(1)  # several wait for each other where cores are shared
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    if spoil is not None:
        spoil(rank)

    def main() -> None:
        from skipmega.launch.run import pretrain

        pretrain(load_config(config, overrides), ProcessInfo(rank, world_size, rank, "torchrun"))

    run_script(main)
