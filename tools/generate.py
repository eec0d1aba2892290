#!/usr/bin/env python3
"""Goes on with a text, by a native checkpoint, and tells how many layers its tokens ran.

python tools/generate.py runs/quickstart/run --prompt "def main(" --max-tokens 60
python tools/generate.py RUN --prompt "Once" --temperature 0.8 --top-k 50 --seed 1 --eval-density 0.3
torchrun --nproc-per-node 2 tools/generate.py RUN --tensor-parallel 2 --prompt "Once"
"""

import argparse
import time

from skipmega.launch.cli import run_script


def main() -> None:
    arguments = _parse()
    from skipmega.checkpoint.store import Checkpoint
    from skipmega.config import ParallelConfig
    from skipmega.data.tokenizer import Tokenizer
    from skipmega.inference.generation import Sampling, generate
    from skipmega.inference.native import NativeModel
    from skipmega.launch.environment import discover_process
    from skipmega.parallel.grid import create_grid, end_communication

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.seed)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    tokenizer = Tokenizer.load(checkpoint.config.data.tokenizer)
    grid = create_grid(
        discover_process(),
        ParallelConfig(
            tensor_parallel=arguments.tensor_parallel, pipeline_parallel=arguments.pipeline_parallel
        ),
    )
    model = NativeModel.load(checkpoint, grid, arguments.precision, arguments.eval_density)
    prompt = tokenizer.encode(arguments.prompt) or [tokenizer.eod_id]
    found: list[int] = []
    shown = tokenizer.decode(prompt)
    if grid.rank == 0:
        print(shown, end="", flush=True)
    began = time.perf_counter()
    ids = (tokenizer.eod_id, tokenizer.size)
    for token in generate(model, prompt, arguments.max_tokens, *ids, sampling):
        found.append(token)
        whole = tokenizer.decode([*prompt, *found])
        if grid.rank == 0 and whole.startswith(shown) and not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
    seconds, work = time.perf_counter() - began, model.take_work()
    if grid.rank == 0:
        print(
            f"\n\n{len(found)} tokens in {seconds:.2f} s ({len(found) / seconds:.1f} tokens/s); "
            f"{sum(work.executed) / work.tokens:.2f} of {model.config.model.num_layers} layers a token"
        )
    end_communication()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run folder or a checkpoint")
    parser.add_argument("--prompt", default="", help="the text to go on with (left out: a new document)")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (0)")
    parser.add_argument("--top-k", type=int, help="draw among so many likeliest tokens (left out: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--eval-density", type=float, help="share of tokens that execute a routed layer")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
