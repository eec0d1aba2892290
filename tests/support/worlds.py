"""Runs a function in a freshly spawned world of processes, with a limit after which a hang is an error."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_CHILD = """
import faulthandler, importlib, os, pickle, sys, traceback, warnings
warnings.simplefilter("ignore")
folder, module, name, limit = sys.argv[1:]
faulthandler.dump_traceback_later(float(limit), exit=True)
with open(os.path.join(folder, "arguments"), "rb") as file:
    arguments = pickle.load(file)
result = getattr(importlib.import_module(module), name)(*arguments)
with open(os.path.join(folder, f"result-{os.environ['RANK']}"), "wb") as file:
    pickle.dump(result, file)
os._exit(0)
"""


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
    are added to the environment.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments").write_bytes(pickle.dumps(arguments))
        command = [sys.executable, "-c", _CHILD, name, function.__module__, function.__qualname__, str(limit)]
        outputs = [open(folder / f"output-{rank}", "w+") for rank in range(world_size)]  # noqa: SIM115
        port = free_port()
        children = [
            subprocess.Popen(
                command,
                env={**_environment(function, rank, world_size, port), **(variables or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
            for rank, out in enumerate(outputs)
        ]
        try:
            codes = _wait(children, limit + 10)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
        for out in outputs:
            out.close()
        if any(codes):
            texts = [
                f"--- rank {r}, exit {codes[r]}\n" + (folder / f"output-{r}").read_text()[-4000:]
                for r in range(world_size)
            ]
            raise AssertionError("\n".join(texts))
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _wait(children: list[subprocess.Popen[bytes]], limit: float) -> list[int]:
    """Exit codes; returns early when one fails, since the others may then wait for it forever."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        codes = [child.poll() for child in children]
        if all(code is not None for code in codes):
            return [int(code or 0) for code in codes]
        if any(codes):
            time.sleep(1.0)  # let the others print why
            return [child.poll() if child.poll() is not None else -1 for child in children]  # type: ignore[misc]
        time.sleep(0.05)
    return [-1] * len(children)


def _environment(function: Callable[..., Any], rank: int, world_size: int, port: int) -> dict[str, str]:
    home = Path(str(sys.modules[function.__module__].__file__)).parent
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{home}:{ROOT / 'tests'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
