"""Runs a function in a world of processes of its own, with a limit after which a hang is an error."""

import faulthandler
import importlib
import io
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# processes that are forked from one that has imported everything start in a second instead of seven
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["skipmega.launch.run"])
_FRESH = multiprocessing.get_context("spawn")


def run_world(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    limit: float = 150.0,
    variables: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``function(*arguments)`` in ``world_size`` processes; returns their results by rank.

    Arguments and results are pickled. If any process fails or ``limit`` seconds pass, all are ended and the
    output of each is raised as an AssertionError; a hanging process prints its stacks first. ``variables``
    are added to the environment; with them, and where there is a GPU, processes import everything anew, since
    libraries read variables and look for devices when they are imported.
    """
    context = _FRESH if variables or torch.cuda.is_available() else WARM
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments").write_bytes(pickle.dumps(arguments))
        port = free_port()
        children: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                environment = {**_environment(rank, world_size, port), **(variables or {})}
                call = (folder, function.__module__, function.__qualname__, rank, environment, limit)
                children.append(context.Process(target=_work, args=call))
                children[-1].start()
            codes = _wait(children, limit + 10)
        finally:
            for child in children:
                if child.exitcode is None:
                    child.kill()
                child.join()
        if any(codes):
            texts = [
                f"--- rank {r}, exit {codes[r]}\n" + (folder / f"output-{r}").read_text()[-4000:]
                for r in range(world_size)
            ]
            raise AssertionError("\n".join(texts))
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def print_into(output: Path) -> None:
    """What this process prints, its libraries included, goes to the end of ``output`` at once."""
    with output.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = io.FileIO(number, "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(raw, line_buffering=True, write_through=True))


def _work(folder: Path, module: str, name: str, rank: int, environment: dict[str, str], limit: float) -> None:
    print_into(folder / f"output-{rank}")
    faulthandler.dump_traceback_later(limit, exit=True)
    warnings.simplefilter("ignore")
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function = getattr(importlib.import_module(module), name)
    result = function(*pickle.loads((folder / "arguments").read_bytes()))
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    os._exit(0)


def _wait(children: list[BaseProcess], limit: float) -> list[int]:
    """Exit codes; returns early when one fails, since the others may then wait for it forever."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        codes = [child.exitcode for child in children]
        if all(code is not None for code in codes):
            return [code or 0 for code in codes]
        if any(codes):
            time.sleep(1.0)  # let the others print why
            return [-1 if child.exitcode is None else child.exitcode for child in children]
        time.sleep(0.05)
    return [-1] * len(children)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
