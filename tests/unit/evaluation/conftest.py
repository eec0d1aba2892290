"""Small models and tokenizers that evaluation is tested with; no network, no files but temporary ones."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from skipmega.inference.work import Work


class Alone:
    """The one copy of a model that reads texts whole."""

    device = torch.device("cpu")
    reads_on = False
    replica = 0
    replicas = 1

    def take_work(self) -> Work:
        return Work()

    def exchange(self, found: Any) -> list[Any]:
        return [found]


class BigramModel(Alone):
    """Logits that depend on the current token alone, from a fixed random table."""

    vocab_size = 264

    def __init__(self, max_length: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(self.vocab_size, self.vocab_size, generator=generator)
        self.max_length = max_length
        self.batches: list[tuple[int, ...]] = []

    def logits(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        assert tokens.shape[1] <= self.max_length
        self.batches.append(tuple(tokens.shape))
        return self.table[tokens.gather(1, at)]


class HistoryModel(BigramModel):
    """Logits that depend on the whole text, order included, and may be read on from a digest of it."""

    def __init__(self, max_length: int = 64, reads_on: bool = True) -> None:
        super().__init__(max_length)
        self.reads_on = reads_on

    def logits(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        assert tokens.shape[1] <= self.max_length
        self.batches.append(tuple(tokens.shape))
        return self.table[self._digests(torch.zeros(len(tokens), dtype=torch.int64), tokens).gather(1, at)]

    def new_cache(self, batch: int) -> "Digests":
        return Digests([0] * batch)

    def read(
        self, cache: "Digests", tokens: torch.Tensor, counts: list[int], at: torch.Tensor
    ) -> torch.Tensor:
        assert self.reads_on
        self.batches.append(tuple(tokens.shape))
        digests = self._digests(torch.tensor(cache.rows), tokens)
        cache.rows = [int(row[count - 1]) for row, count in zip(digests, counts, strict=True)]
        return self.table[digests.gather(1, at)]

    def _digests(self, digest: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        digests = []
        for column in tokens.unbind(dim=1):
            digest = (3 * digest + column + 1) % self.vocab_size
            digests.append(digest)
        return torch.stack(digests, dim=1)


class Digests:
    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def take(self, rows: list[int]) -> "Digests":
        return Digests([self.rows[row] for row in rows])


class ByteTokenizer:
    """One id a byte; 256 ends a document."""

    eod_id = begin_id = 256
    size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


class WrappedModel(Alone):
    """A Hugging Face causal model as a native one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.max_length: int = model.config.max_position_embeddings
        self.vocab_size: int = model.config.vocab_size

    def logits(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens).logits
        return logits.gather(1, at.unsqueeze(2).expand(-1, -1, logits.shape[2]))


class WrappedTokenizer:
    """A ``tokenizers`` tokenizer as a native one."""

    def __init__(self, tokenizer: Any, eod_id: int) -> None:
        self.tokenizer = tokenizer
        self.eod_id = self.begin_id = eod_id
        self.size: int = tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture
def make_bigram() -> Callable[..., BigramModel]:
    return BigramModel


@pytest.fixture
def make_history() -> Callable[..., HistoryModel]:
    return HistoryModel


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Forty texts of different lengths, over a vocabulary of invented words."""
    generator = random.Random(7)
    letters = "abcdefghilmnoprstu"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 8))) for _ in range(150)]
    return [
        "\n".join(
            " ".join(generator.choices(words, k=9)).capitalize() + "."
            for _ in range(generator.randint(9, 25))
        )
        for _ in range(40)
    ]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A folder with a random two-layer Llama of 128 tokens, whose vocabulary is padded by 37."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eod>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 37,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.25,
        eos_token_id=tokenizer.token_to_id("<eod>"),
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eod>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def native(export: Path) -> tuple[WrappedModel, WrappedTokenizer]:
    """The model of ``export`` and its tokenizer, behind the native interfaces."""
    import transformers
    from tokenizers import Tokenizer

    model = transformers.LlamaForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    return WrappedModel(model), WrappedTokenizer(tokenizer, tokenizer.token_to_id("<eod>"))
