"""Cleanings: their result is a function of the documents, however they are cut and whenever tasks run."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipmega.config import load_model
from skipmega.data.cleaning.config import CleaningConfig
from skipmega.data.cleaning.keys import KeyMaker
from skipmega.data.cleaning.local import clean
from skipmega.data.cleaning.records import read_record, task_path
from skipmega.data.cleaning.report import write_report
from skipmega.data.cleaning.stages import STAGES, check_cleaning, count_tasks, run_task
from skipmega.data.corpora.readers import Corpus, read_lines
from skipmega.errors import ConfigError, DataError

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
TEXTS = st.sampled_from(["", " \n", "a b c", "A  B c", "x y z", LONG, f"{LONG} fifteen", f"so {LONG}", "d"])
QUESTION = "which of these numbers is the largest one that a clock shows at noon or at midnight"


def write_corpus(folder: Path, files: list[list[str]]) -> Path:
    folder.mkdir(parents=True)
    for number, texts in enumerate(files):
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{number}.jsonl").write_text("\n".join([*lines, " "]))
    return folder


def configured(corpus: Path, output: Path, **fields: Any) -> CleaningConfig:
    return CleaningConfig.model_validate({"input": [str(corpus)], "output": str(output), **fields})


def run(config: CleaningConfig) -> None:
    for stage in STAGES:
        for number in range(count_tasks(config, stage)):
            run_task(config, stage, number)
    write_report(config)


def texts_of(output: Path) -> list[str]:
    return [document.text for document in Corpus([output])]


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@settings(deadline=None, max_examples=30)
@given(
    files=st.lists(st.lists(TEXTS, max_size=5), min_size=1, max_size=4),
    shards=st.integers(1, 4),
    partitions=st.integers(1, 3),
)
def test_what_stays_is_what_shares_no_key_with_one_before(
    files: list[list[str]], shards: int, partitions: int
) -> None:
    files[0].insert(0, "the first")
    with tempfile.TemporaryDirectory() as name:
        corpus, output = write_corpus(Path(name) / "corpus", files), Path(name) / "out"
        config = configured(
            corpus,
            output,
            shards=min(shards, len(files)),
            deduplicate={"shingle": 2, "bands": 6, "rows": 2, "partitions": partitions},
        )
        run(config)
        maker, seen, expected = KeyMaker(config.deduplicate), set[int](), []
        for text in (text for texts in files for text in texts if text.strip()):
            keys = set(maker.keys(text).tolist())
            if not keys & seen:
                expected.append(text)
            seen |= keys
        assert texts_of(output) == expected


@pytest.fixture
def cleaning(tmp_path: Path) -> CleaningConfig:
    """Three files; an evaluation set of which one document holds a question."""
    evaluation = tmp_path / "questions.jsonl"
    examples = [{"query": "too short", "choices": ["yes", "no"]}, {"query": "Q: " + QUESTION, "choices": []}]
    evaluation.write_text("".join(json.dumps(example) + "\n" for example in examples))
    texts = [[f"document {file} {number}" for number in range(4)] for file in range(3)]
    texts[1] += ["", "DOCUMENT 0  1", f"He asks: {QUESTION.upper()}?"]
    sets = {"clock": {"path": str(evaluation), "fields": ["query", "choices"], "ignore": ["Q:"]}}
    corpus = write_corpus(tmp_path / "corpus", texts)
    return configured(
        corpus, tmp_path / "out", shards=3, deduplicate={"partitions": 2}, decontaminate={"sets": sets}
    )


def test_the_report_says_what_went_and_why(cleaning: CleaningConfig) -> None:
    report = clean(cleaning, workers=2)
    assert report.given == 15
    assert report.dropped == {"empty": 1, "duplicate: exact": 1, "evaluation set: clock": 1}
    assert report.kept == 12 == len(texts_of(Path(cleaning.output)))
    (found,) = report.evaluation_sets.values()
    assert (found.examples, found.too_short, found.found, found.documents) == (2, 1, 1, 1)
    assert "clock: 1 of 2 examples found in 1 documents; 1 too short" in report.table()
    folder, (source,) = Path(cleaning.output) / "dropped", cleaning.input
    gone = [
        json.loads(line)
        for stage in ("filter", "sift")
        for line in read_lines(folder / stage / "00001.jsonl.zst")
    ]
    assert gone == [
        {"from": f"{source}/1.jsonl:5", "reason": "empty"},
        {"from": f"{source}/1.jsonl:6", "reason": "duplicate: exact"},
        {"from": f"{source}/1.jsonl:7", "reason": "evaluation set: clock"},
    ]


def test_only_what_is_missing_is_done_again_and_is_the_same(cleaning: CleaningConfig) -> None:
    output = Path(cleaning.output)
    run(cleaning)
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*/0*")}
    for stage, kind in (("filter", "keys"), ("match", "duplicates"), ("sift", "text")):
        task_path(output, stage, 1).unlink()
        for path in (output / kind).glob("00001*"):
            path.unlink()
    with pytest.raises(DataError, match="task 1 of stage filter is not done"):
        run_task(cleaning, "match", 0)
    run(cleaning)
    assert contents(output) == before
    again = {str(path.relative_to(output)) for path in times if path.stat().st_mtime_ns != times[path]}
    assert again == {name for name in map(str, before) if "/00001" in name}


def test_a_task_that_fails_leaves_nothing(cleaning: CleaningConfig) -> None:
    (Path(cleaning.input[0]) / "2.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"2\.jsonl:2: field 'text' holds int"):
        run_task(cleaning, "filter", 2)
    assert not [path for path in Path(cleaning.output).rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"text_field": "body"}, "text_field: text there, body here"),
        ({"deduplicate": {"partitions": 2, "near": False}}, "deduplicate: "),
        ({"filter": {"language": "fra"}}, "filter: "),
        ({"decontaminate": {}}, "decontaminate: "),
    ],
)
def test_results_of_another_configuration_are_refused(
    cleaning: CleaningConfig, change: dict[str, Any], what: str
) -> None:
    run(cleaning)
    changed = CleaningConfig.model_validate(cleaning.model_dump() | change)
    with pytest.raises(DataError, match=f"was made of something else: {what}.*remove"):
        run(changed)
    with (Path(cleaning.input[0]) / "0.jsonl").open("a") as stream:
        stream.write('{"text": "new"}')
    with pytest.raises(DataError, match="was made of something else: input: 1 files of"):
        run_task(cleaning, "filter", 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("kind", ["filtered", "keys", "duplicates"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flipped", "cut", "missing"])
def test_damage_between_stages_is_named(
    cleaning: CleaningConfig, kind: str, damage: Callable[[Path], None]
) -> None:
    output = Path(cleaning.output)
    run(cleaning)
    for stage in ("match", "sift") if kind == "keys" else ("sift",):
        shutil.rmtree(output / "records" / stage)
    (path,) = (path for path in (output / kind).glob("00000*") if path.stat().st_size)
    damage(path)
    with pytest.raises(DataError, match=str(path)):
        run(cleaning)


def test_another_shards_file_in_a_shards_place_is_named(cleaning: CleaningConfig) -> None:
    output = Path(cleaning.output)
    run(cleaning)
    task_path(output, "sift", 0).unlink()
    shutil.copy(output / "filtered" / "00002.jsonl.zst", output / "filtered" / "00000.jsonl.zst")
    with pytest.raises(DataError, match=r"filtered/00000\.jsonl\.zst"):
        run_task(cleaning, "sift", 0)


@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "missing"])
def test_a_cleaned_folder_that_is_not_whole_is_no_corpus(
    cleaning: CleaningConfig, damage: Callable[[Path], None]
) -> None:
    run(cleaning)
    damage(path := Path(cleaning.output) / "text" / "00001.jsonl.zst")
    with pytest.raises(DataError, match=rf"{path}.*cleaning\.json"):
        Corpus([cleaning.output])


def test_a_record_that_is_none_is_named(cleaning: CleaningConfig) -> None:
    path = task_path(Path(cleaning.output), "filter", 0)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(DataError, match=rf"{path} is not a record that this version reads"):
        read_record(Path(cleaning.output), "filter", 0)


def test_what_cannot_be_is_refused_before_any_work(cleaning: CleaningConfig, tmp_path: Path) -> None:
    def refused(**change: Any) -> str:
        with pytest.raises((DataError, ConfigError)) as error:
            check_cleaning(CleaningConfig.model_validate(cleaning.model_dump() | change))
        return str(error.value)

    assert "4 shards of a corpus of 3 files" in refused(shards=4)
    assert "lies in input" in refused(output=f"{cleaning.input[0]}/clean")
    sets = {"x": {"path": str(tmp_path / "none"), "fields": ["a"]}}
    assert f"decontaminate.sets.x: cannot read {tmp_path}/none" in refused(decontaminate={"sets": sets})
    sets["x"]["path"] = str(Path(cleaning.input[0]) / "0.jsonl")
    assert "0.jsonl:1: field 'a' holds NoneType" in refused(decontaminate={"sets": sets})
    assert "shortest=20 must be at most ngram=13" in refused(decontaminate={"shortest": 20})
    with pytest.raises(DataError, match="task 3 of stage filter: there are 3, numbered from 0"):
        run_task(cleaning, "filter", 3)


def test_a_misspelt_field_is_named_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("input: [x]\noutput: y\ndecontaminate: {sets: {a: {path: z, feilds: [q]}}}")
    with pytest.raises(ConfigError) as error:
        load_model(CleaningConfig, path, ["deduplicate.bandz=3"])
    assert "deduplicate.bandz: no such field; did you mean deduplicate.bands?" in str(error.value)
    assert "did you mean decontaminate.sets.a.fields?" in str(error.value)
