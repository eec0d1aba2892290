#!/usr/bin/env python3
"""Looks at tokenized data, and at what a run will read of them.

    python tools/data.py info 'data/web-*'                          what they hold, and what made them
    python tools/data.py verify 'data/web-*'                        every byte against the checksums
    python tools/data.py sample data/web-000 --tokenizer T.model    documents as text
    python tools/data.py diff data/web-000 data/web-001             how they differ
    python tools/data.py shuffle 'data/web-*' mixed/web --shards 100   their documents in another order
    python tools/data.py shuffle 'data/web-*' packed/web --pack 2048   and packed into samples
    python tools/data.py plan CONFIG [section.field=value ...]      tokens and epochs of each source of a run

Data are named without their ending; a pattern stands for all that it fits.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from skipmega.launch.cli import run_script


def main() -> None:
    """Do what the first argument says."""
    arguments = _parse_arguments()
    arguments.act(arguments)


def _info(arguments: argparse.Namespace) -> None:
    from skipmega.data.files import find_pairs
    from skipmega.data.pairs.comparison import describe, listed

    pairs = [prefix for path in arguments.data for prefix in find_pairs(path)]
    for prefix in pairs:
        print(describe(prefix))
    found = [listed(prefix) for prefix in pairs]
    documents, tokens = sum(each.documents for each in found), sum(each.tokens for each in found)
    print(f"{len(pairs)} pairs: {documents} documents, {tokens} tokens")


def _verify(arguments: argparse.Namespace) -> None:
    from skipmega.data.files import find_pairs
    from skipmega.data.pairs.indexed import verify_checksums
    from skipmega.errors import DataError

    damaged = []
    for prefix in (prefix for path in arguments.data for prefix in find_pairs(path)):
        try:
            verify_checksums(prefix)
            print(f"{prefix}: sound", flush=True)
        except DataError as error:
            print(f"{prefix}: {error}", flush=True)
            damaged.append(str(error))
    if damaged:
        raise DataError(f"{len(damaged)} pairs are not sound, the first: {damaged[0]}")


def _sample(arguments: argparse.Namespace) -> None:
    from skipmega.data.pairs.documents import sample_documents
    from skipmega.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(arguments.tokenizer)
    for number, text in sample_documents(arguments.data, tokenizer, arguments.count, arguments.seed):
        print(f"--- {arguments.data}, document {number}\n{text}")


def _diff(arguments: argparse.Namespace) -> None:
    from skipmega.data.pairs.comparison import differences

    lines = differences(arguments.data, arguments.other)
    print("\n".join(lines) or "the same")


def _shuffle(arguments: argparse.Namespace) -> None:
    from skipmega.data.files import find_pairs
    from skipmega.data.pairs.arrangement import Arrangement, arrange, arrange_shard
    from skipmega.data.pairs.comparison import describe

    arrangement = Arrangement(
        prefixes=tuple(find_pairs(arguments.data)),
        output=arguments.output,
        seed=arguments.seed,
        shards=arguments.shards,
        sequence_length=arguments.pack,
    )
    made = list(range(arguments.shards)) if arguments.shard is None else [arguments.shard]
    if arguments.shard is None:
        arrange(arrangement, arguments.workers)
    else:
        arrange_shard(arrangement, arguments.shard)
    for shard in made:
        print(describe(str(arrangement.target(shard))))


def _plan(arguments: argparse.Namespace) -> None:
    from skipmega.config import load_config
    from skipmega.errors import ConfigError
    from skipmega.launch.run import build_data, resolve

    config = load_config(arguments.config, arguments.overrides)
    if config.data.order != "stream":
        raise ConfigError(f"data.order={config.data.order} has no plan: set data.order=stream")
    config, tokenizer = resolve(config, config.parallel.processes_per_replica)
    print(build_data(config, tokenizer).plan)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(required=True)

    def add(name: str, act: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        action = actions.add_parser(name)
        action.set_defaults(act=act)
        return action

    add("info", _info).add_argument("data", nargs="+")
    add("verify", _verify).add_argument("data", nargs="+")
    sample = add("sample", _sample)
    sample.add_argument("data")
    sample.add_argument("--tokenizer", required=True, help="the .model file it was made with")
    sample.add_argument("--count", type=int, default=3)
    sample.add_argument("--seed", type=int, default=0)
    diff = add("diff", _diff)
    diff.add_argument("data")
    diff.add_argument("other")
    shuffle = add("shuffle", _shuffle)
    shuffle.add_argument("data")
    shuffle.add_argument("output", type=Path)
    shuffle.add_argument("--seed", type=int, default=0)
    shuffle.add_argument(
        "--shards", type=int, default=1, help="pairs to make of them: OUTPUT-00000 ... (1: OUTPUT)"
    )
    shuffle.add_argument(
        "--pack", type=int, metavar="LENGTH", help="for data.sequence_length LENGTH, best fit"
    )
    shuffle.add_argument("--workers", type=int, default=1, help="shards made at once (1)")
    shuffle.add_argument("--shard", type=int, help="make this one only, from 0")
    plan = add("plan", _plan)
    plan.add_argument("config", help="YAML file of the run")
    plan.add_argument("overrides", nargs="*", help="section.field=value")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
