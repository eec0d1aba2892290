#!/usr/bin/env python3
"""The whole way on this machine: corpus, tokenizer, data, training with a stop and a resume, export,
one-shot evaluation, report. Every step is a command that a cluster runs too, and is printed.

    python pretrain/quickstart.py
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from skipmega.config import load_config
from skipmega.errors import SkipmegaError
from skipmega.launch.cli import run_script

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "pretrain/configs/quickstart.yaml"
HOME = Path("runs/quickstart")
CORPUS_BYTES = 12_000_000
PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="section.field=value for the training run")
    overrides = parser.parse_args().overrides
    os.chdir(ROOT)
    started = time.monotonic()
    config = load_config(CONFIG, overrides)
    if HOME.exists():
        print(f"removing {HOME} of an earlier quickstart")
        shutil.rmtree(HOME)

    make_data()
    half = config.training.steps // 2
    train(*overrides, f"training.stop_after={half}")
    train(*overrides)
    command("tools/export_hf.py", config.run_dir, str(HOME / "hf"))
    evaluate(config.run_dir)
    report(config.run_dir)
    inspect(config.run_dir)
    print(f"\nquickstart took {(time.monotonic() - started) / 60:.1f} minutes; open {HOME}/report/report.md")


def make_data() -> None:
    from skipmega.data.corpora.python_corpus import write_python_corpus

    corpus = HOME / "corpus.jsonl"
    written = write_python_corpus(corpus, CORPUS_BYTES)
    print(f"{corpus}: {written / 1e6:.1f} MB of the Python source on this machine", flush=True)
    model = str(HOME / "tokenizer.model")
    command("tools/train_tokenizer.py", str(corpus), "--output", model, "--vocab-size", "4096")
    prepare = ["--output", str(HOME / "data"), "--valid-fraction", "0.1", "--workers", str(PROCESSES)]
    command("tools/prepare_data.py", str(corpus), "--tokenizer", model, *prepare)


def train(*overrides: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command(*launcher, "pretrain/pretrain.py", CONFIG, *overrides)


def evaluate(run_dir: str) -> None:
    from skipmega.evaluation import write_continuation_task

    tasks = write_continuation_task(
        held_out_documents(),
        HOME / "tasks",
        "heldout",
        num_examples=8,
        context_chars=240,
        continuation_chars=80,
    )
    where = ["--include-path", str(HOME / "tasks"), "--output", str(HOME / "evaluation.json")]
    command("tools/evaluate.py", run_dir, "--tasks", ",".join(tasks), *where)


def report(run_dir: str) -> None:
    from skipmega.inspection.report import write_report

    # the run's own configuration, the vocabulary filled in
    config = load_config(Path(run_dir) / "config.yaml")
    text = max(held_out_documents(), key=lambda document: document.count("    # "))
    summary = write_report(
        config,
        HOME / "hf",
        HOME / "evaluation.json",
        held_out_text=text[text.find("\ndef ") + 1 :],  # behind the imports
        prompt="class Config:\n    def __init__(self",
        out_dir=HOME / "report",
    )
    print(f"\nheld-out loss {summary['held_out_loss']:.3f} nats/token")
    print(f"unigram entropy {summary['unigram_entropy']:.3f} nats/token")
    print(f"\n{(HOME / 'report' / 'sample.txt').read_text()}")


def inspect(run_dir: str) -> None:
    texts = HOME / "held-out.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out_documents()))
    where = ["--output", str(HOME / "report" / "routers"), "--max-tokens", "50000"]
    command("tools/inspect_routing.py", run_dir, "--text", f"code={texts}", *where)


def held_out_documents() -> list[str]:
    """The text of the held-out data set, document by document."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from skipmega.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(HOME / "tokenizer.model")
    dataset = IndexedDataset(str(HOME / "data-valid"))
    return [tokenizer.decode(dataset[i][:-1].tolist()) for i in range(len(dataset))]


def command(*arguments: str) -> None:
    """Run a script of this project, showing what was typed."""
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, *arguments], env=environment, check=False)
    if finished.returncode:
        raise SkipmegaError(f"the command above ended with exit code {finished.returncode}")


if __name__ == "__main__":
    run_script(main)
