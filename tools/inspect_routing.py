#!/usr/bin/env python3
"""Shows what the routers of a model do with text: a page that opens anywhere, figures, and the numbers.

    python tools/inspect_routing.py runs/quickstart/run --text notes.txt --output inspected
    python tools/inspect_routing.py EXPORT --text code=FOLDER --text talk=talk.jsonl --output inspected

A text is any file or folder that tools/prepare_data.py reads; NAME=PATH names it. Writes index.html,
inspection.json and PNG files.
"""

import argparse

from skipmega.launch.cli import run_script


def main() -> None:
    arguments = _parse()
    from skipmega.inspection.entropy import count_dataset
    from skipmega.inspection.routers import inspect_routers, named_paths, open_subject
    from skipmega.inspection.routers.report import PAGE, prepare_output

    paths = named_paths(arguments.text)
    output = prepare_output(arguments.output)
    with open_subject(arguments.model, arguments.tokenizer, arguments.eval_density) as subject:
        counted = arguments.frequencies and count_dataset(arguments.frequencies, subject.vocab_size)
        findings = inspect_routers(
            subject,
            paths,
            output,
            max_tokens=arguments.max_tokens,
            shown_tokens=arguments.shown_tokens,
            batch_size=arguments.batch_size,
            frequencies=counted,
            seed=arguments.seed,
            text_field=arguments.text_field,
            skip_bad=arguments.skip_bad,
        )
    layers, loss = len(findings["model"]["routed_layers"]), findings["mean_loss"]
    print(f"{findings['mean_depth']:.2f} of {layers} routed layers and {loss:.3f} nats per token")
    print(*findings["headlines"], *findings["warnings"], sep="\n")
    print(f"\nopen {output / PAGE}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run folder, a checkpoint, or a Hugging Face export")
    parser.add_argument(
        "--text", action="append", required=True, help="PATH or NAME=PATH; any number of them"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--max-tokens", type=_positive, default=200_000, help="of each text (200000)")
    parser.add_argument(
        "--shown-tokens", type=_positive, default=3_000, help="of each text on the page (3000)"
    )
    parser.add_argument("--batch-size", type=_positive, default=4, help="sequences at a time (4)")
    parser.add_argument(
        "--frequencies",
        metavar="DATA",
        help="tokenized data, without ending, to count how frequent tokens are in (left out: the texts)",
    )
    parser.add_argument("--eval-density", type=float, help="of a native model, as for tools/evaluate.py")
    parser.add_argument("--tokenizer", help="sentencepiece model (left out: the model's own)")
    parser.add_argument("--text-field", default="text", help="of JSON lines and parquet files (text)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out records without usable text")
    parser.add_argument("--seed", type=int, default=0, help="of the confidence intervals (0)")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


if __name__ == "__main__":
    run_script(main)
