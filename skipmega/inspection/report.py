"""The report of a run: figures, a sample of text, the numbers, and a page that shows them together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipmega.config import RunConfig
from skipmega.inspection.entropy import count_dataset, unigram_entropy
from skipmega.inspection.figures import plot_density, plot_tokens_depth, plot_training
from skipmega.inspection.metrics import read_metrics

_SHOWN_TOKENS = 400


def write_report(
    config: RunConfig,
    export_dir: str | Path,
    evaluation_json: str | Path,
    held_out_text: str,
    prompt: str,
    out_dir: str | Path,
) -> dict[str, float]:
    """Write ``loss.png``, ``density.png``, ``depth.png``, ``sample.txt``, ``summary.json``, ``report.md``.

    Args:
        config: of a finished run with one training and one held-out data set.
        export_dir: its Hugging Face export.
        evaluation_json: what ``tools/evaluate.py --output`` wrote.
        held_out_text: its beginning is coloured by the number of layers each token executed.
        prompt: what the sample continues.
        out_dir: created if absent.

    Returns:
        ``held_out_loss`` and ``unigram_entropy`` in nats/token, ``density`` (mean of the routed layers on
        held-out text).
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    metrics_path = Path(config.run_dir) / "metrics.jsonl"
    last = read_metrics(metrics_path).evaluations[-1]
    entropy = unigram_entropy(
        count_dataset(config.data.train[0].path, config.vocab_size),
        count_dataset(config.data.valid[0].path, config.vocab_size),
    )
    plot_training(metrics_path, out / "loss.png", entropy)
    plot_density(
        metrics_path, out / "density.png", sum(config.densities.values()) / max(len(config.densities), 1)
    )
    sample = _use_export(export_dir, held_out_text, prompt, out / "depth.png")
    (out / "sample.txt").write_text(sample)
    summary = {
        "held_out_loss": float(last["loss"]),
        "unigram_entropy": entropy,
        "density": float(np.mean(last["density"])),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    evaluation = json.loads(Path(evaluation_json).read_text())
    (out / "report.md").write_text(_page(summary, sample, evaluation))
    return summary


def _use_export(export_dir: str | Path, text: str, prompt: str, depth_png: Path) -> str:
    """Draw the depth of ``text``'s tokens; return ``prompt`` with its continuation."""
    from transformers import AutoTokenizer

    from skipmega.hf.export import load_export

    model = load_export(export_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(export_dir), trust_remote_code=True)
    length = min(_SHOWN_TOKENS, model.config.max_position_embeddings)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    with torch.no_grad():
        executed = torch.stack(model(ids, output_execution=True).executed)[:, 0].numpy()
    plot_tokens_depth([tokenizer.decode([token]) for token in ids[0].tolist()], executed, depth_png)
    torch.manual_seed(0)
    start = tokenizer(prompt, return_tensors="pt").input_ids
    generated = model.generate(start, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=40)
    return str(tokenizer.decode(generated[0]))


def _page(summary: dict[str, float], sample: str, evaluation: dict[str, Any]) -> str:
    rows = [
        f"| {task['name']} | {task['num_fewshot']} | {task['num_samples']} | {metric['name']} | "
        f"{metric['value']:.4f} | {_error(metric)} |"
        for task in evaluation["tasks"]
        for metric in task["metrics"]
    ]
    return "\n".join(
        [
            "# Report",
            "",
            f"Held-out loss **{summary['held_out_loss']:.3f}** nats/token; knowing only how frequent each "
            f"token is costs {summary['unigram_entropy']:.3f}. Mean density of the routed layers on "
            f"held-out text: {summary['density']:.3f}.",
            "",
            "![loss](loss.png)",
            "![density](density.png)",
            "![layers executed per token](depth.png)",
            "",
            "| task | shots | samples | metric | value | stderr |",
            "|---|---:|---:|---|---:|---:|",
            *rows,
            "",
            "A sample:",
            "",
            "```",
            sample,
            "```",
            "",
        ]
    )


def _error(metric: dict[str, Any]) -> str:
    return "" if metric["stderr"] is None else f"{metric['stderr']:.4f}"
