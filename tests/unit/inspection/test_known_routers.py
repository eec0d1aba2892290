"""With routers that execute exactly the digits, or all but them, an inspection shows exactly that."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_model import LENGTH, STEP, DigitModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipmega.data.corpora.readers import Corpus
from skipmega.data.tokenizer import Tokenizer
from skipmega.inspection.routers import Subject, Vocabulary, inspect_routers, open_subject
from skipmega.inspection.routers.texts import read_texts
from skipmega.inspection.routers.tracing import Traces, trace_texts

NUMBERS, OTHERS = [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def findings(inspected: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((inspected / "inspection.json").read_text())
    return loaded


@pytest.fixture(scope="module", params=["checkpoint", "export"])
def vocabulary(request: pytest.FixtureRequest, digit_model: DigitModel) -> Vocabulary:
    with open_subject(getattr(digit_model, request.param)) as subject:
        return subject.vocabulary


def trace(subject: Subject, model: DigitModel, batch_size: int = 4) -> Traces:
    texts = read_texts(model.texts, subject.vocabulary, 10_000)
    return trace_texts(subject, texts, batch_size, show_progress=False)


def test_densities_by_kind_are_all_or_nothing(findings: dict[str, Any]) -> None:
    groups = {group["label"]: group for group in findings["groupings"]["kind"]}
    assert set(groups) == {
        "whitespace", "punctuation", "number", "identifier", "frequent word", "rare word",
    }  # fmt: skip
    for kind, group in groups.items():
        assert group["density"] == (NUMBERS if kind == "number" else OTHERS)
        assert group["depth"] == (2 if kind == "number" else 1)
        if group["tokens"] > 40:  # no random gate of these densities does so
            for share, (low, high) in zip(group["density"], group["random"], strict=True):
                assert share < low or share > high
    assert groups["number"]["tokens"] > 40


def test_everything_else_follows_from_the_share_of_digits(
    findings: dict[str, Any], digit_model: DigitModel
) -> None:
    tokenizer = Tokenizer.load(digit_model.tokenizer)
    pieces = [piece.lstrip("▁") for piece in tokenizer.pieces()]
    ids = [tokenizer.encode(document.text) for document in Corpus(list(digit_model.texts.values()))]
    share = np.mean([pieces[token].isdigit() for document in ids for token in document])
    assert findings["text"]["tokens"] == sum(map(len, ids))
    assert findings["text"]["documents"] == 13
    assert findings["text"]["sequences"] == sum(-(-(len(document) + 1) // LENGTH) for document in ids)
    assert findings["density"] == pytest.approx([share, 1 - share, share])
    assert findings["mean_depth"] == pytest.approx(1 + share)
    assert findings["depth"]["share"] == pytest.approx([0, 1 - share, share, 0])
    assert sum(i * coin for i, coin in enumerate(findings["depth"]["random"])) == pytest.approx(1 + share)
    assert findings["agreement"]["share"] == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert np.array(findings["agreement"]["correlation"]) == pytest.approx(
        np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1]])
    )
    assert findings["agreement"]["random"][0][1] == pytest.approx(2 * share * (1 - share))
    for groups in findings["groupings"].values():
        assert sum(group["tokens"] for group in groups) == findings["text"]["tokens"]
        mean = np.average([group["depth"] for group in groups], weights=[group["tokens"] for group in groups])
        assert mean == pytest.approx(1 + share)


def test_rank_correlations_are_scipys(findings: dict[str, Any], digit_model: DigitModel) -> None:
    stats = pytest.importorskip("scipy.stats")
    with open_subject(digit_model.checkpoint) as subject:
        traces = trace(subject, digit_model)
    others = {
        "loss": traces.loss,
        "surprise": traces.surprise,
        "frequency": np.bincount(traces.ids)[traces.ids],
    }
    found = findings["rank_correlation"]
    assert (found["sampled"], found["units"]) == ("document", 13)
    for name, values in others.items():
        assert found["with"][name]["rho"] == pytest.approx(stats.spearmanr(traces.depth, values).statistic)
        low, high = found["with"][name]["interval"]
        assert low < found["with"][name]["rho"] < high


def test_checkpoint_and_export_are_one_model(digit_model: DigitModel) -> None:
    with open_subject(digit_model.checkpoint) as subject:
        native = trace(subject, digit_model)
        assert (subject.step, subject.routed_layers, subject.num_layers) == (STEP, [1, 2, 3], 5)
    with open_subject(digit_model.export) as subject:
        exported = trace(subject, digit_model)
        assert (subject.step, subject.routed_layers, subject.num_layers) == (None, [1, 2, 3], 5)
    for name in ("ids", "executed", "position", "document", "sequence", "source"):
        np.testing.assert_array_equal(getattr(native, name), getattr(exported, name))
    np.testing.assert_allclose(native.loss, exported.loss, atol=1e-5)


@given(text=st.text(min_size=1))
def test_pieces_spell_what_was_encoded(vocabulary: Vocabulary, text: str) -> None:
    assert b"".join(vocabulary.pieces[token] for token in vocabulary.encode(text)) == text.encode()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_losses_are_those_of_each_sequence_alone(digit_model: DigitModel, batch_size: int) -> None:
    """Whatever shares its batch; and a token's surprise is the loss of the one before it."""
    with open_subject(digit_model.export) as subject:
        traces = trace(subject, digit_model, batch_size)
        tokenizer = Tokenizer.load(digit_model.tokenizer)
        documents = [tokenizer.encode(item.text) for item in Corpus(list(digit_model.texts.values()))]
        begin = 0
        for number, document in enumerate(documents):
            whole = [tokenizer.eod_id, *document, tokenizer.eod_id]
            losses: list[float] = []
            for at in range(0, len(whole) - 1, LENGTH):
                part = torch.tensor([whole[at : at + LENGTH + 1]])
                losses += subject.trace(part[:, :-1], part[:, 1:])[0][0].tolist()
            here = slice(begin, begin + len(document))
            np.testing.assert_allclose(traces.loss[here], losses[1:], atol=1e-5)
            np.testing.assert_allclose(traces.surprise[here], losses[:-1], atol=1e-5)
            assert (traces.document[here] == number).all()
            assert traces.position[here].tolist() == [at % LENGTH for at in range(1, len(document) + 1)]
            begin += len(document)


def test_coins_are_taken_for_coins(digit_model: DigitModel, tmp_path: Path) -> None:
    """Of 20 densities that are chance one lies outside of its range, and depth follows nothing."""
    generator = torch.Generator().manual_seed(3)
    density = torch.linspace(0.1, 0.9, 24)

    def toss(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        coins = torch.rand(24, *tokens.shape, generator=generator)
        return -torch.rand(tokens.shape, generator=generator).log(), coins < density[:, None, None]

    with open_subject(digit_model.export) as subject:
        coins = replace(subject, trace=toss, routed_layers=list(range(24)), num_layers=24)
        found = inspect_routers(
            coins, digit_model.texts, tmp_path, max_tokens=10_000, shown_tokens=5, show_progress=False
        )
    outside = [
        not low <= share <= high
        for groups in found["groupings"].values()
        for group in groups
        for share, (low, high) in zip(group["density"], group["random"], strict=True)
    ]
    assert len(outside) > 1000
    assert 0.01 < np.mean(outside) < 0.06
    np.testing.assert_allclose(found["depth"]["share"], found["depth"]["random"], atol=0.03)
    correlation = np.array(found["agreement"]["correlation"])[np.triu_indices(24, 1)]
    assert 0.92 < np.mean(np.abs(correlation) < found["agreement"]["random_correlation"][1]) < 0.98
    for entry in found["rank_correlation"]["with"].values():
        assert entry["interval"][0] < 0 < entry["interval"][1]


def test_figures_are_written(inspected: Path) -> None:
    from matplotlib.image import imread

    names = {path.name for path in inspected.iterdir()}
    by = {
        f"density_by_{name}.png" for name in ("kind", "loss", "surprise", "frequency", "position", "source")
    }
    pictures = {"text.png", "depth.png", "agreement.png", "rank_correlation.png", *by}
    assert names == {"index.html", "inspection.json", *pictures}
    for name in pictures:
        assert imread(inspected / name).std() > 0.02


def test_frequencies_may_come_from_elsewhere(digit_model: DigitModel, tmp_path: Path) -> None:
    """If every token occurs as often as its id says, depth follows the ids."""
    stats = pytest.importorskip("scipy.stats")
    with open_subject(digit_model.checkpoint) as subject:
        traces = trace(subject, digit_model)
        found = inspect_routers(
            subject, digit_model.texts, tmp_path, max_tokens=10_000, shown_tokens=5, show_progress=False,
            frequencies=np.arange(subject.vocab_size),
        )  # fmt: skip
    rho = stats.spearmanr(traces.depth, traces.ids).statistic
    assert found["rank_correlation"]["with"]["frequency"]["rho"] == pytest.approx(rho)
