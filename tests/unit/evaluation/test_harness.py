"""Whole evaluations: native and export agree, and what cannot work says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skipmega.errors import CheckpointError, ConfigError, DataError
from skipmega.evaluation import (
    evaluate_by_lm_eval,
    evaluate_export,
    evaluate_tasks,
    harness,
    write_benchmark_tasks,
    write_continuation_task,
)

pytest.importorskip("lm_eval")

REAL_SETS = Path(__file__).resolve().parents[4] / "shared" / "eval_data"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """One task of every kind: choices, contexts, generation, likelihood, rolling."""
    folder = tmp_path_factory.mktemp("tasks")
    write_continuation_task(
        documents, folder, "next", num_examples=8, context_chars=150, continuation_chars=40
    )
    sets = {
        "choices": [
            {"query": f"Question: {text[:60]}", "choices": [text[60:75], text[80:99]], "gold": index % 2}
            for index, text in enumerate(documents)
        ],
        "contexts": [
            {"context_options": [text[:30], text[40:70]], "continuation": text[71:90], "gold": index % 2}
            for index, text in enumerate(documents)
        ],
        # short ones: a perplexity is an exponential, and magnifies the rounding of a long one
        "words": [{"context": text[:200], "continuation": text[200:203]} for text in documents],
        "answers": [
            {"context": f"{text[:90]}\nAnswer:", "answer": "it", "aliases": ["it", 'that\'s "it"']}
            for text in documents
        ],
    }
    for stem, records in sets.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{stem}.jsonl").write_text(lines, encoding="utf-8")
    write_benchmark_tasks(folder, folder, list(sets))
    return folder


@pytest.mark.parametrize("num_fewshot", [0, 1])
def test_native_and_export_get_the_same_metrics(native, export, task_folder, num_fewshot):
    model, tokenizer = native
    tasks = ["next", "next_bits", "local_*"]
    settings = {"num_fewshot": num_fewshot, "include_paths": [task_folder], "limit": 12}
    ours = evaluate_tasks(model, tokenizer, tasks, batch_size=5, **settings)
    for theirs in (
        evaluate_export(export, tasks, batch_size=3, **settings),
        evaluate_by_lm_eval(export, tasks, batch_size=3, **settings),
    ):
        check_same(ours, theirs, num_fewshot)


def check_same(ours, theirs, num_fewshot):
    assert [task.name for task in ours.tasks] == [task.name for task in theirs.tasks]
    for mine, other in zip(ours.tasks, theirs.tasks, strict=True):
        assert mine.num_fewshot == (0 if mine.name == "next_bits" else num_fewshot)
        assert mine.num_samples == other.num_samples == 12
        for left, right in zip(mine.metrics, other.metrics, strict=True):
            assert (left.name, left.filter) == (right.name, right.filter)
            assert left.value == pytest.approx(right.value, rel=1e-6)
            assert (left.stderr is None) == (right.stderr is None)
            # that of a perplexity is drawn anew of exponentials, and magnifies rounding
            near = 1e-5 if left.name == "perplexity" else 1e-6
            assert left.stderr is None or left.stderr == pytest.approx(right.stderr, rel=near)


def test_result_is_printed_and_written(make_bigram, byte_tokenizer, task_folder, tmp_path):
    result = evaluate_tasks(
        make_bigram(512), byte_tokenizer, ["next", "next_bits"], include_paths=[task_folder], limit=4
    )
    lines = result.table().split("\n\n")[0].splitlines()
    assert lines[0].split() == ["task", "version", "shots", "samples", "metric", "value", "stderr"]
    assert [line.split()[0] for line in lines[2:]] == ["next"] * 2 + ["next_bits"] * 3
    result.write_json(tmp_path / "new" / "result.json")
    written = json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8"))
    assert written["tasks"][0]["num_samples"] == 4
    assert written["settings"]["limit"] == 4
    assert {"skipmega", "lm_eval", "torch"} <= set(written["versions"])
    values = {metric["name"]: metric["value"] for metric in written["tasks"][1]["metrics"]}
    assert result.metric("next_bits", "bits_per_byte") == values["bits_per_byte"]
    with pytest.raises(KeyError, match="no metric 'f1'"):
        result.metric("next", "f1")


@pytest.mark.parametrize("reader", ["native", "export"])
def test_contexts_longer_than_the_model_are_counted(native, export, task_folder, tmp_path, reader):
    settings = {"num_fewshot": 1, "include_paths": [task_folder], "limit": 6}
    tasks = ["local_words", "local_answers"]
    if reader == "native":
        result = evaluate_tasks(*native, tasks, **settings)
    else:
        result = evaluate_export(export, tasks, **settings)
    assert result.truncated == 12, "a model of 128 tokens, and an example of 200 characters"
    assert "12 requests lost their beginning: they are longer than the model" in result.table()
    result.write_json(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["truncated"] == 12


@pytest.mark.parametrize("first_rank", [True, False])
def test_only_the_first_rank_prints(make_bigram, byte_tokenizer, task_folder, monkeypatch, capfd, first_rank):
    monkeypatch.setattr(harness, "_is_first_rank", lambda: first_rank)
    result = evaluate_tasks(make_bigram(512), byte_tokenizer, ["next"], include_paths=[task_folder], limit=2)
    assert result.tasks[0].num_samples == 2
    printed = "".join(capfd.readouterr())
    assert ("score: 100%" in printed) == first_rank
    assert first_rank or not printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "no tasks"),
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"num_fewshot": 9}, "has 8 examples"),
        ({"include_paths": ["/nowhere"]}, "/nowhere is not a folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_bigram, byte_tokenizer, task_folder, settings, message):
    settings = {"tasks": ["next"], "include_paths": [task_folder]} | settings
    tasks = settings.pop("tasks")
    with pytest.raises(ConfigError, match=message):
        evaluate_tasks(make_bigram(512), byte_tokenizer, tasks, **settings)


def test_unknown_task_names_the_nearest(make_bigram, byte_tokenizer, task_folder, monkeypatch):
    import lm_eval.tasks

    def without_defaults(include_path, include_defaults, manager=lm_eval.tasks.TaskManager):
        return manager(include_path=include_path, include_defaults=False)  # saves ten seconds

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_defaults)
    with pytest.raises(ConfigError, match=r"'local_chioces'.*did you mean local_choices"):
        evaluate_tasks(make_bigram(), byte_tokenizer, ["local_chioces"], include_paths=[task_folder])


def test_missing_data_names_the_task(make_bigram, byte_tokenizer, task_folder, tmp_path):
    gone = (task_folder / "next.yaml").read_text(encoding="utf-8").replace(str(task_folder), "/nowhere")
    (tmp_path / "next.yaml").write_text(gone, encoding="utf-8")
    with pytest.raises(DataError, match="task next: its data set cannot be loaded"):
        evaluate_tasks(make_bigram(), byte_tokenizer, ["next"], include_paths=[tmp_path])


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        evaluate_export(tmp_path, ["any"])


def test_importing_the_package_needs_no_lm_eval_and_preparing_goes_offline():
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import skipmega.evaluation, huggingface_hub.constants as hub\n"
        "from skipmega.evaluation.harness import _stay_offline\n"
        "assert not hub.HF_HUB_OFFLINE\n"
        "_stay_offline()\n"
        "import datasets\n"
        "assert hub.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE\n"
    )
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=240)


@pytest.mark.skipif(not REAL_SETS.is_dir(), reason=f"no benchmark files in {REAL_SETS}")
def test_real_benchmark_files_become_tasks(make_bigram, byte_tokenizer, tmp_path):
    tasks = write_benchmark_tasks(REAL_SETS, tmp_path)
    result = evaluate_tasks(
        make_bigram(4096), byte_tokenizer, tasks, num_fewshot=1, include_paths=[tmp_path], limit=2
    )
    assert sorted(task.name for task in result.tasks) == tasks
    assert all(task.num_samples == 2 for task in result.tasks)
