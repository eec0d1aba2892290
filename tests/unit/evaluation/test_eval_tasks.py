"""The local tasks that are written: their questions, their prompts, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from skipmega.errors import ConfigError, DataError
from skipmega.evaluation import write_benchmark_tasks, write_continuation_task


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_jsonl(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_continuation_questions_are_true_to_the_documents(documents, tmp_path):
    names = write_continuation_task(
        documents, tmp_path, "next", num_examples=6, context_chars=120, continuation_chars=50
    )
    assert names == ["next", "next_bits"]
    questions = {split: read_jsonl(tmp_path / f"next.{split}.jsonl") for split in ("train", "validation")}
    assert len(questions["train"]) == 6
    assert len(questions["validation"]) == len(documents) - 6
    for question in questions["train"] + questions["validation"]:
        right = question["choices"][question["gold"]]
        assert len(set(question["choices"])) == 4
        assert any(text.startswith(question["context"] + right) for text in documents)
        assert 60 <= len(question["context"]) <= 120
        assert 25 <= len(right) <= 50
        assert right[0].isspace()
        assert not question["context"][-1].isspace()
    contexts = {split: {question["context"] for question in asked} for split, asked in questions.items()}
    assert contexts["train"].isdisjoint(contexts["validation"])
    assert {question["gold"] for question in questions["validation"]} == {0, 1, 2, 3}


def test_continuation_task_is_a_function_of_its_arguments(documents, tmp_path):
    made = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_continuation_task(documents, tmp_path / folder, seed=seed, context_chars=200)
        made.append((tmp_path / folder / "continuation.validation.jsonl").read_bytes())
    assert made[0] == made[1] != made[2]


def test_repeated_and_short_documents_ask_nothing(documents, tmp_path):
    repeated = [*documents, *documents[:5], "short", "", "x" * 5000]
    write_continuation_task(
        repeated, tmp_path, num_examples=4, context_chars=100, continuation_chars=40, rolling_chars=77
    )
    assert len(read_jsonl(tmp_path / "continuation.validation.jsonl")) == len(documents) - 4
    texts = [record["text"] for record in read_jsonl(tmp_path / "continuation.rolling.jsonl")]
    assert {len(text) for text in texts} == {77}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "a name"}, ConfigError, "task name 'a name'"),
        ({"num_examples": 3}, ConfigError, "num_examples=3"),
        ({"context_chars": 100_000}, DataError, "0 of 40 documents"),
    ],
)
def test_continuation_task_refuses(documents, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        write_continuation_task(documents, tmp_path, **arguments)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"something": 1}, "records of something; known are"),
        ({"query": "", "choices": ["a", "b"], "gold": 0}, "line 1: query must be a text"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "choices must be a list of two or more"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "gold must be a number from 0 to 1"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "gold must be a number from 0 to 1"),
        ({"context": "c", "answer": "a", "aliases": "a"}, "aliases must be a list"),
        ({"context": "c", "continuation": 3}, "continuation must be a text"),
    ],
)
def test_records_that_are_no_benchmark_are_refused(tmp_path, record, message):
    write_jsonl(tmp_path / "set.jsonl", record)
    with pytest.raises(DataError, match=message):
        write_benchmark_tasks(tmp_path, tmp_path)


def test_files_that_are_no_benchmark_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a folder with jsonl files"):
        write_benchmark_tasks(tmp_path, tmp_path)
    (tmp_path / "piqa.jsonl").write_text("{}\nnot json\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        write_benchmark_tasks(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"has no pica\.jsonl; did you mean piqa"):
        write_benchmark_tasks(tmp_path, tmp_path, ["pica"])


def test_question_files_get_an_answer_line_only_if_they_ask(tmp_path):
    write_jsonl(tmp_path / "asks.jsonl", {"query": "Question: why?", "choices": ["a", "b"], "gold": 0})
    write_jsonl(tmp_path / "says.jsonl", {"query": "Because", "choices": ["a", "b"], "gold": 0})
    assert write_benchmark_tasks(tmp_path, tmp_path) == ["local_asks", "local_says"]
    prompts = [
        yaml.safe_load((tmp_path / f"local_{stem}.yaml").read_text(encoding="utf-8"))["doc_to_text"]
        for stem in ("asks", "says")
    ]
    assert prompts == ["{{query | trim}}\nAnswer:", "{{query | trim}}"]


def make_recorder() -> Any:
    """A model that keeps what lm-eval asks of it, and scores nothing."""
    from lm_eval.api.model import LM

    class Recorder(LM):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[tuple[Any, ...]] = []

        def record(self, requests: Any, answer: Any) -> list[Any]:
            self.asked += [request.args for request in requests]
            return [answer] * len(requests)

        def loglikelihood(self, requests: Any) -> list[Any]:
            return self.record(requests, (0.0, False))

        def loglikelihood_rolling(self, requests: Any) -> list[Any]:
            return self.record(requests, 0.0)

        def generate_until(self, requests: Any) -> list[Any]:
            return self.record(requests, " Beta!")

    return Recorder()


def prompts_of(folder: Path, task: str) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """What a one-shot run of ``task`` asks, and lm-eval's metrics of it."""
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    recorder = make_recorder()
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load([task])
    loaded["tasks"][task].set_config(key="num_fewshot", value=1)
    loaded["tasks"][task].set_fewshot_seed(1)
    report = evaluate(recorder, loaded, bootstrap_iters=0, log_samples=False)
    return recorder.asked, report["results"][task]


@pytest.fixture
def two_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets of two records: with one example each, the other record must be the example."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(
        tmp_path / "quiz.jsonl",
        {"query": "Question: one?\n", "choices": ["a", "b"], "gold": 1},
        {"query": "Question: two?\n", "choices": ["c", "d"], "gold": 0},
    )
    write_jsonl(
        tmp_path / "schema.jsonl",
        {"context_options": ["the ox", "the ant"], "continuation": "is big.", "gold": 0},
        {"context_options": ["the sun", "the ice"], "continuation": "is cold.", "gold": 1},
    )
    write_jsonl(
        tmp_path / "last.jsonl",
        {"context": "it rains", "continuation": "cats"},
        {"context": "it snows", "continuation": "dogs"},
    )
    write_jsonl(
        tmp_path / "trivia.jsonl",
        {"context": "Question: first?\nAnswer:", "answer": "Alpha", "aliases": ["A", 'it\'s "a"']},
        {"context": "Question: second?\nAnswer:", "answer": "Bet", "aliases": ["Beta"]},
    )
    write_benchmark_tasks(tmp_path, tmp_path)
    return tmp_path


def test_prompt_of_a_choice_task(two_records):
    asked, _ = prompts_of(two_records, "local_quiz")
    assert asked[0] == ("Question: two?\nAnswer: c\n\nQuestion: one?\nAnswer:", " a")
    assert [choice for _, choice in asked] == [" a", " b", " c", " d"]


def test_prompt_of_a_context_task(two_records):
    asked, _ = prompts_of(two_records, "local_schema")
    assert asked[:2] == [
        ("the ice is cold.\n\nthe ox", " is big."),
        ("the ice is cold.\n\nthe ant", " is big."),
    ]


def test_prompt_of_a_last_word_task(two_records):
    asked, _ = prompts_of(two_records, "local_last")
    assert asked[0] == ("it snows dogs\n\nit rains", " cats")


def test_prompt_and_scoring_of_an_answer_task(two_records):
    asked, metrics = prompts_of(two_records, "local_trivia")
    assert asked[1][0] == "Question: first?\nAnswer: Alpha\n\nQuestion: second?\nAnswer:"
    assert asked[1][1]["do_sample"] is False
    assert metrics["exact_match,remove_whitespace"] == 0.5  # " Beta!" is an alias of the second
