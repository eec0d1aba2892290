"""The data scripts, run as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

from skipmega.data.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[3]


def _run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY)


def test_from_a_corpus_to_a_verified_data_set(tmp_path: Path, source_texts: list[str]) -> None:
    corpus, model, output = tmp_path / "corpus.jsonl", tmp_path / "t.model", tmp_path / "data"
    corpus.write_text("".join(json.dumps({"content": text}) + "\n" for text in source_texts) + "{bad\n")
    common = ("--text-field", "content", "--skip-bad")
    trained = _run("train_tokenizer.py", corpus, "--output", model, "--vocab-size", "400", *common)
    assert trained.returncode == 0, trained.stderr
    assert "400 ids" in trained.stdout
    assert "1 bad records" in trained.stdout
    prepared = _run(
        "prepare_data.py", corpus, "--output", output, "--tokenizer", model, "--workers", "2", *common
    )
    assert prepared.returncode == 0, prepared.stderr
    assert f"{output}: {len(source_texts)} documents" in prepared.stdout
    with open(f"{output}.bin", "r+b") as stream:
        stream.write(b"\xff")
    verified = _run("prepare_data.py", "--output", output, "--verify")
    assert verified.returncode == 2
    assert f"error: {output}.bin is damaged" in verified.stderr


def test_errors_are_sentences(tmp_path: Path) -> None:
    missing = _run("train_tokenizer.py", tmp_path / "nowhere.jsonl", "--output", tmp_path / "t.model")
    assert missing.returncode == 2
    assert missing.stderr.strip() == f"error: corpus {tmp_path}/nowhere.jsonl does not exist"


def test_from_a_corpus_over_a_cleaning_to_a_data_set(tmp_path: Path, source_texts: list[str]) -> None:
    """What was dropped, and why, is known of the tokens."""
    corpus, config, output = tmp_path / "corpus.jsonl", tmp_path / "c.yaml", tmp_path / "clean"
    twice = [*source_texts, *(text.upper() for text in source_texts), " "]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in twice))
    config.write_text(f"input: [{corpus}]\noutput: {output}\n")
    cleaned = _run("clean_data.py", config, "deduplicate.partitions=3", "--workers", "2")
    assert cleaned.returncode == 0, cleaned.stderr
    assert re.search(r"^duplicate: exact +2 +40\.00%", cleaned.stdout, re.MULTILINE)
    train_tokenizer(source_texts, tmp_path / "t.model", 400)
    prepared = _run(
        "prepare_data.py", output, "--output", tmp_path / "d", "--tokenizer", tmp_path / "t.model"
    )
    assert f"{tmp_path}/d: 2 documents" in prepared.stdout, prepared.stderr
    info = _run("data.py", "info", tmp_path / "d")
    assert "of 5 documents 2 kept; 1 empty, 2 duplicate: exact" in info.stdout
