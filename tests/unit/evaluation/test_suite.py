"""The suite: every task on rows of its data set's columns or finished questions, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from skipmega.errors import ConfigError, DataError
from skipmega.evaluation.averages import average_families
from skipmega.evaluation.results import MetricResult, TaskResult
from skipmega.evaluation.suite import SUITES_DIR, find_suite, write_suite_tasks

pytest.importorskip("lm_eval")

from skipmega.evaluation import evaluate_tasks

CHOICES = {"text": ["red", "blue"], "label": ["A", "B"]}
NLI = {"premise": "It rains.", "hypothesis": "It is wet."}
# One row of each task's data set; the second row differs by a number in its first text.
ROWS: dict[str, dict[str, Any]] = {
    "triviaqa": {"question": "Who", "answer": {"aliases": ["Ann", "Anna"], "value": "Ann"}},
    "nq_open": {"question": "who", "answer": ["Ann"]},
    "webqs": {"question": "who?", "answers": ["Ann", "Bob"]},
    "squadv2": {"title": "T", "context": "Ann sang.", "question": "Who?", "answers": {"text": ["Ann"]}},
    "hellaswag": {
        "activity_label": "Run",
        "ctx_a": "A man",
        "ctx_b": "he",
        "endings": ["x", "y"],
        "label": "1",
    },
    "storycloze": {
        "input_sentence_1": "A.",
        "input_sentence_2": "B.",
        "input_sentence_3": "C.",
        "input_sentence_4": "D.",
        "sentence_quiz1": "E.",
        "sentence_quiz2": "F.",
        "answer_right_ending": 2,
    },
    "winograd": {
        "text": "Ann saw Eve as she ran.",
        "pronoun": "she",
        "pronoun_loc": 15,
        "options": ["Ann", "Eve"],
        "label": 1,
    },
    "winogrande": {"sentence": "Ann saw Eve as _ ran.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    "race_m": {
        "article": "Ann ran.",
        "problems": str([{"question": "Who?", "options": list("abcd"), "answer": "B"}]),
    },
    "piqa": {"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1},
    "arc_easy": {"question": "Which?", "choices": CHOICES, "answerKey": "B"},
    "openbookqa": {"question_stem": "Which", "choices": CHOICES, "answerKey": "B"},
    "boolq": {"passage": "It rains.", "question": "is it wet", "label": 1},
    "cb": {**NLI, "label": 1},
    "copa": {"premise": "It rained.", "question": "effect", "choice1": "Dry.", "choice2": "Wet.", "label": 1},
    "rte": {**NLI, "label": 1},
    "wic": {
        "sentence1": "a bank",
        "sentence2": "the bank",
        "start1": 2,
        "end1": 6,
        "word": "bank",
        "label": 1,
    },
    "wsc": {
        "text": "Ann ran as she sang",
        "span1_text": "Ann",
        "span2_text": "she",
        "span2_index": 3,
        "label": 1,
    },
    "multirc": {"paragraph": "Ann ran.", "question": "Who?", "answer": "Ann", "label": 1},
    "record": {
        "passage": "Ann ran.\n@highlight\nA run",
        "query": "@placeholder ran",
        "entities": ["Ann", "Bob"],
        "answers": ["Ann"],
    },
    "anli_r1": {**NLI, "label": 1},
    "lambada": {"text": "one two three four"},
}
ROWS |= {"race_h": ROWS["race_m"], "arc_challenge": ROWS["arc_easy"]}
ROWS |= {"anli_r2": ROWS["anli_r1"], "anli_r3": ROWS["anli_r1"]}
QUESTIONS = [{"query": f"Question: {n}?", "choices": ["a", "b"], "gold": n % 2} for n in range(4)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def all_sets(tmp_path: Path) -> Path:
    suite = find_suite("skiplayer24")
    assert suite is not None
    for name, task in suite.tasks.items():
        first = ROWS[name]
        text = next(field for field, value in first.items() if isinstance(value, str))
        second = first | {text: first[text] + " 2"}
        if name in ("winogrande", "winograd"):  # whose first text has a structure
            second = first | {text: first[text].replace("ran", "sang")}
        for split in {task.split, task.examples}:
            write_rows(tmp_path / name / f"{split}.jsonl", [first, second])
    return tmp_path


def test_every_task_of_the_suite_asks_and_scores(make_bigram, byte_tokenizer, all_sets):
    result = evaluate_tasks(make_bigram(2048), byte_tokenizer, ["skiplayer24"], data_dir=all_sets)
    suite = find_suite("skiplayer24")
    assert {task.name for task in result.tasks} == {f"skiplayer24_{name}" for name in ROWS}
    assert suite.tasks.keys() == ROWS.keys()
    assert result.missing == {}
    for name, task in suite.tasks.items():
        assert result.metric(f"skiplayer24_{name}", task.metric) >= 0
    assert {(each.family, each.present, each.complete) for each in result.averages} == {
        ("generation", 4, True),
        ("understanding", 21, True),
    }
    assert all(task.num_fewshot == 1 and task.num_samples == 2 for task in result.tasks)
    assert all(average.stderr is not None for average in result.averages)


def test_one_example_is_shared_and_never_the_question(tmp_path):
    from skipmega.evaluation.loading import _find_tasks, _load_task, _set_shots

    write_rows(tmp_path / "data" / "arc_easy.jsonl", QUESTIONS)
    written = write_suite_tasks(find_suite("skiplayer24"), tmp_path / "data", tmp_path / "tasks")
    assert written.tasks == ["skiplayer24_arc_easy"]
    manager, (name,) = _find_tasks(written.tasks, [str(tmp_path / "tasks")])
    task = _load_task(manager, name)["tasks"][name]
    _set_shots(name, task, 1, seed=5)
    prompts = [task.fewshot_context(doc, 1) for doc in task.eval_docs]
    first, second = "Question: 0?\nAnswer: a\n\n", "Question: 1?\nAnswer: b\n\n"
    asked = [f"Question: {n}?\nAnswer:" for n in range(4)]
    assert prompts == [second + asked[0], *[first + question for question in asked[1:]]]


def test_a_set_that_is_not_there_is_listed(make_bigram, byte_tokenizer, tmp_path):
    write_rows(tmp_path / "arc_easy.jsonl", QUESTIONS)
    result = evaluate_tasks(make_bigram(512), byte_tokenizer, ["skiplayer24"], data_dir=tmp_path)
    assert [task.name for task in result.tasks] == ["skiplayer24_arc_easy"]
    assert len(result.missing) == 25
    generation, understanding = result.averages
    assert generation.value is None
    assert len(generation.missing) == 4
    assert (understanding.present, len(understanding.missing)) == (1, 20)
    printed = result.table()
    assert "no average;" in printed
    assert "missing: skiplayer24_cb:" in printed


def test_without_data_nothing_is_evaluated_and_all_is_listed(make_bigram, byte_tokenizer, tmp_path):
    result = evaluate_tasks(make_bigram(512), byte_tokenizer, ["skiplayer24"], data_dir=tmp_path)
    assert result.tasks == []
    assert len(result.missing) == 26


def test_averages_weigh_tasks_alike():
    suite = find_suite("skiplayer24")

    def score(name: str, value: float, stderr: float) -> TaskResult:
        metrics = [MetricResult(suite.tasks[name].metric, "none", value, stderr, True)]
        return TaskResult(f"skiplayer24_{name}", "1", 1, 10, 10, metrics)

    values = {"triviaqa": (0.1, 0.03), "nq_open": (0.3, 0.04), "webqs": (0.2, 0.0), "squadv2": (0.6, 0.0)}
    results = [score(name, *numbers) for name, numbers in values.items()] + [score("lambada", 0.9, 0.1)]
    generation, understanding = average_families(suite, results)
    assert generation.value == pytest.approx(0.3)
    assert generation.stderr == pytest.approx(0.05 / 4)
    assert generation.complete
    assert understanding.value is None


def test_squad_scores_follow_the_published_rules():
    from skipmega.evaluation.suites.squad import score_answer, score_entity

    asked = {"answers": {"text": ["the Norman Conquest", "Normans"]}}
    unanswerable = {"answers": {"text": []}}
    assert score_answer(asked, ["Norman conquest."]) == {"exact": 1.0, "f1": 1.0}
    assert score_answer(asked, [" the big Normans"]) == {"exact": 0.0, "f1": pytest.approx(2 / 3)}
    assert score_answer(asked, ["unanswerable"]) == {"exact": 0.0, "f1": 0.0}
    assert score_answer(unanswerable, ["Unanswerable."]) == {"exact": 1.0, "f1": 1.0}
    assert score_answer(unanswerable, ["Normans"]) == {"exact": 0.0, "f1": 0.0}
    query = {"entities": ["Bob", "Ann Lee", "Bob"], "answers": ["the Ann"]}  # choices are sorted and distinct
    found = score_entity(query, [(-1.0, False), (-2.0, False)])
    assert found == {"em": 0.0, "f1": pytest.approx(2 / 3)}


def test_the_list_is_the_users_to_choose(make_bigram, byte_tokenizer, tmp_path):
    shipped = yaml.safe_load((SUITES_DIR / "skiplayer24.yaml").read_text())
    own = shipped | {"name": "mine", "tasks": {name: shipped["tasks"][name] for name in ("cb", "copa")}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    write_rows(tmp_path / "copa.jsonl", QUESTIONS)
    result = evaluate_tasks(
        make_bigram(512), byte_tokenizer, [str(tmp_path / "mine.yaml")], data_dir=tmp_path
    )
    assert [task.name for task in result.tasks] == ["mine_copa"]
    assert [average.missing for average in result.averages] == [["cb"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {}}, "tasks"),
        ({"shots": -1}, "shots"),
        ({"speed": 3}, "speed"),
        ({"tasks": {"x": {"base": "nowhere.yaml"}}}, "family"),
    ],
)
def test_a_suite_that_is_none_is_refused(change, message, tmp_path):
    values = yaml.safe_load((SUITES_DIR / "skiplayer24.yaml").read_text()) | change
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        find_suite(str(tmp_path / "bad.yaml"))
    with pytest.raises(ConfigError, match="cannot read suite"):
        find_suite(str(tmp_path / "absent.yaml"))


def test_names_and_folders_that_are_not_there_are_refused(make_bigram, byte_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="did you mean skiplayer24"):
        evaluate_tasks(make_bigram(), byte_tokenizer, ["skiplayer"], data_dir=tmp_path)
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        evaluate_tasks(make_bigram(), byte_tokenizer, ["skiplayer24"], data_dir=tmp_path / "nowhere")
    suite = find_suite("skiplayer24")
    task = suite.tasks["cb"].model_copy(update={"base": "nowhere.yaml"})
    suite = suite.model_copy(update={"tasks": {"cb": task}})
    with pytest.raises(ConfigError, match=r"base nowhere\.yaml is not a task file"):
        write_suite_tasks(suite, None, tmp_path)


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("copa.jsonl", [QUESTIONS[0], QUESTIONS[1] | {"gold": 7}], r"copa\.jsonl, line 2: gold must be"),
        ("copa.jsonl", [{"context": "a", "answer": "b", "aliases": ["b"]}], "scored by exact_match, but"),
        ("cb/validation.jsonl", [{**NLI, "label": 0}, NLI], r"validation\.jsonl, line 2: no field label"),
        ("cb/validation.jsonl", [{"premises": "x", "hypothesis": "y", "label": 0}], "is premises meant"),
        ("cb/validation.jsonl", [], r"validation\.jsonl is empty"),
        ("cb/validation.jsonl", [[1]], r"validation\.jsonl, line 1 is not a JSON object"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(file, lines, message, tmp_path):
    write_rows(tmp_path / "cb" / "train.jsonl", [{**NLI, "label": 0}])
    write_rows(tmp_path / file, lines)
    with pytest.raises(DataError, match=message):
        write_suite_tasks(find_suite("skiplayer24"), tmp_path, tmp_path / "tasks")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("copa.jsonl", b'{"query": "a"\n', r"copa\.jsonl, line 1 is not JSON"),
        ("copa.jsonl", b"\n", r"copa\.jsonl, line 1 is not JSON"),
        ("copa.jsonl", b"", r"copa\.jsonl is empty"),
        ("copa.jsonl", b'{"query": "a", "choices": ["b", "\xff"], "gold": 0}\n', "line 1 is not UTF-8"),
        ("cb/validation.jsonl", json.dumps(NLI | {"label": 1}).encode() + b"\n{", "line 2 is not JSON"),
        ("cb/validation.jsonl", b"\xff\n", r"validation\.jsonl, line 1 is not UTF-8"),
        ("rte/validation.parquet", b"PAR1, or so it says", r"validation\.parquet cannot be read as parquet"),
    ],
)
def test_files_that_cannot_be_read_are_refused(file, content, message, tmp_path):
    write_rows(tmp_path / "cb" / "train.jsonl", [{**NLI, "label": 0}])
    write_rows(tmp_path / "rte" / "train.jsonl", [{**NLI, "label": 0}])
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        write_suite_tasks(find_suite("skiplayer24"), tmp_path, tmp_path / "tasks")


def test_a_copy_of_the_suite_finds_its_task_files(tmp_path):
    copy = tmp_path / "copy.yaml"
    copy.write_text((SUITES_DIR / "skiplayer24.yaml").read_text())
    assert len(write_suite_tasks(find_suite(str(copy)), None, tmp_path / "tasks").tasks) == len(ROWS)


def test_a_set_without_examples_is_refused(tmp_path):
    write_rows(tmp_path / "cb" / "validation.jsonl", [{**NLI, "label": 0}])
    with pytest.raises(DataError, match=r"no train\.jsonl for the examples"):
        write_suite_tasks(find_suite("skiplayer24"), tmp_path, tmp_path / "tasks")


def test_a_question_is_no_example_of_itself(make_bigram, byte_tokenizer, tmp_path):
    asked = [{"query": f"{n} is", "choices": ["odd", "even"], "gold": n % 2} for n in range(2)]
    write_rows(tmp_path / "copa.jsonl", asked[:1])
    with pytest.raises(
        ConfigError, match="copa has 1 examples to choose from, the question itself among them"
    ):
        evaluate_tasks(make_bigram(512), byte_tokenizer, ["skiplayer24"], data_dir=tmp_path)
    write_rows(tmp_path / "copa.jsonl", asked)
    result = evaluate_tasks(make_bigram(512), byte_tokenizer, ["skiplayer24"], data_dir=tmp_path)
    assert [task.num_samples for task in result.tasks] == [2]


def test_parquet_is_read_like_jsonl(make_bigram, byte_tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (tmp_path / "cb").mkdir()
    rows = pa.Table.from_pylist([{**NLI, "label": 0}, {**NLI, "label": 1}])
    for split in ("train", "validation"):
        parquet.write_table(rows, tmp_path / "cb" / f"{split}.parquet")
    result = evaluate_tasks(make_bigram(512), byte_tokenizer, ["skiplayer24"], data_dir=tmp_path)
    assert [task.name for task in result.tasks] == ["skiplayer24_cb"]
    parquet.write_table(rows.drop_columns(["label"]), tmp_path / "cb" / "train.parquet")
    with pytest.raises(DataError, match="no field label"):
        write_suite_tasks(find_suite("skiplayer24"), tmp_path, tmp_path / "tasks")
