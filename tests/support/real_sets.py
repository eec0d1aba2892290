"""Real evaluation sets, or made ones of their format; suites of them; plain lm-eval to compare with."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from skipmega.evaluation.suite import SUITES_DIR
from support.tiny_run import run_command
from support.worlds import ROOT

REAL_SETS = ROOT.parent / "shared" / "eval_data"
STEMS = {"triviaqa": "triviaqa_sm_sub", "lambada": "lambada_openai", "openbookqa": "openbook_qa"}
STEMS |= {"winograd": "winograd_wsc"}  # others have the task's name
needs_real_sets = pytest.mark.skipif(not REAL_SETS.is_dir(), reason=f"no evaluation sets in {REAL_SETS}")

Scores = dict[tuple[str, str], float]


def write_own_suite(path: Path, tasks: Sequence[str], longest_answer: int = 32) -> Path:
    """A suite ``own`` of some tasks of skiplayer24, which generates at most ``longest_answer`` tokens."""
    suite = yaml.safe_load((SUITES_DIR / "skiplayer24.yaml").read_text())
    for task in suite["tasks"].values():
        if task["family"] == "generation":
            stops = task.get("overrides", {}).get("generation_kwargs", {}).get("until", ["\n"])
            task["overrides"] = {
                "generation_kwargs": {"until": stops, "do_sample": False, "max_gen_toks": longest_answer}
            }
    suite |= {"name": "own", "tasks": {name: suite["tasks"][name] for name in tasks}}
    path.write_text(yaml.safe_dump(suite))
    return path


def write_sets(folder: Path, tasks: Sequence[str], rows: int) -> None:
    """``rows`` questions of each task as ``folder/TASK.jsonl``: the first of its real set, or made ones."""
    folder.mkdir(exist_ok=True)
    for name in tasks:
        real = REAL_SETS / f"{STEMS.get(name, name)}.jsonl"
        if real.is_file():
            lines = real.read_text().split("\n")[:rows]
        else:
            lines = [json.dumps(made_row(name, number)) for number in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def made_row(task: str, number: int) -> dict[str, Any]:
    """A finished question with the fields of the real set of ``task``; another for each ``number``."""
    red, blue = f"the {number} red foxes", f"the {3 * number + 1} blue birds"
    match task:
        case "triviaqa":
            asked = f"Question: Who saw {red} near {blue}?\nAnswer:"
            return {"context": asked, "answer": "Nobody", "aliases": ["Nobody", "No one"]}
        case "lambada":
            return {"context": f"We met {red}, then {blue}, and once more the red", "continuation": "foxes"}
        case "winogrande" | "winograd":
            options = [f"Because {animals} saw the rain {animals}" for animals in (red, blue)]
            return {"context_options": options, "continuation": "went home.", "gold": number % 2}
        case _:
            asked, choices = f"Question: Of {red} and {blue}, which sang", [f"{red}.", f"{blue} did."]
            return {"query": asked, "choices": choices, "gold": number % 2}


def plain_lm_eval(model: Path, tasks_dir: Path, tasks: Sequence[str], out: Path, *options: str) -> Scores:
    """The scores that ``lm_eval run --model hf`` writes of a Hugging Face folder, one-shot."""
    run_command(
        "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8",
        "--model_args", f"pretrained={model},trust_remote_code=True,dtype=float32",
        "--include_path", tasks_dir, "--tasks", ",".join(tasks), "--num_fewshot", "1", "--output_path", out,
        *options,
        limit=900, HF_HOME=str(out / "hf"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
    )  # fmt: skip
    (report,) = out.glob("*/results_*.json")
    results = json.loads(report.read_text())["results"]
    return {
        (task, key.partition(",")[0]): value
        for task, values in results.items()
        for key, value in values.items()
        if "," in key and "_stderr" not in key
    }


def as_summed(scores: Scores) -> Scores:
    """Perplexities as the log-likelihoods they are the exponentials of, which magnify rounding: of a float32
    sum of 5 nats that is right to 1e-6, the perplexity is to 5e-6."""
    return {key: math.log(value) if "perplexity" in key[1] else value for key, value in scores.items()}


def written_scores(report: Path) -> Scores:
    """The scores that ``tools/evaluate.py --output`` wrote."""
    tasks = json.loads(report.read_text())["tasks"]
    return {(task["name"], metric["name"]): metric["value"] for task in tasks for metric in task["metrics"]}
