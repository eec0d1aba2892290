"""A Hugging Face folder as a language model: tokens in, logits out, in one process."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from skipmega.errors import CheckpointError
from skipmega.hf.configuration_skipmega import SkipmegaConfig
from skipmega.inference.work import Work


class HuggingFaceCache:
    """Keys and values of a batch of texts, with gaps: ``there`` [b, slots] is 1 where a slot holds a token, 0
    where a row was padded."""

    def __init__(self, keys_values: DynamicCache, there: Tensor, config: Any) -> None:
        self.keys_values = keys_values
        self.there = there
        self._config = config

    @property
    def lengths(self) -> Tensor:
        """[b] int64: tokens of each text."""
        return self.there.sum(dim=1)

    def take(self, rows: Sequence[int]) -> "HuggingFaceCache":
        """A copy of these rows of the batch, any number of times each."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.there.device)
        taken = DynamicCache(config=self._config)
        for number, layer in enumerate(self.keys_values.layers):
            if layer.get_seq_length():
                taken.update(layer.keys[index], layer.values[index], number)
        return HuggingFaceCache(taken, self.there[index], self._config)


class HuggingFaceModel:
    """A causal language model of transformers in evaluation mode, for :mod:`skipmega.evaluation`.

    Any architecture reads texts whole; those whose cache is keys and values of all tokens read on. Exports of
    skipmega tell which layers their tokens executed.

    Args:
        model: as ``AutoModelForCausalLM`` gives it, on its device.
        max_length: the longest input, in tokens.
    """

    replica = 0
    replicas = 1

    def __init__(self, model: Any, max_length: int) -> None:
        self.model = model.eval()
        self.max_length = max_length
        self._is_ours = model.config.model_type == SkipmegaConfig.model_type
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._work = Work()

    @classmethod
    def load(
        cls, directory: str, max_length: int, device: str, dtype: torch.dtype = torch.float32
    ) -> "HuggingFaceModel":
        """Read a folder; its own code is run (``trust_remote_code``)."""
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype)
        return cls(model.to(device), max_length)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where logits are left."""
        device: torch.device = self.model.device
        return device

    @property
    def reads_on(self) -> bool:
        """Whether what a token sees depends on nothing but keys and values of the tokens before it."""
        layers = DynamicCache(config=self.model.config).layers
        plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
        return plain and not self.model._is_stateful

    def exchange(self, found: Any) -> list[Any]:
        """There is one replica."""
        return [found]

    def take_work(self) -> Work:
        """What was read since the last call."""
        done, self._work = self._work, Work()
        return done.on_host()

    @torch.no_grad()
    def logits(self, tokens: Tensor, at: Tensor) -> Tensor:
        """As :meth:`skipmega.evaluation.LanguageModel.logits`."""
        counts = (at.max(dim=1).values + 1).tolist()
        return self._run(tokens, counts, at, attention_mask=None, position_ids=None, use_cache=False)

    def new_cache(self, batch: int) -> HuggingFaceCache:
        """For :meth:`read`: of ``batch`` empty texts."""
        config = self.model.config
        there = torch.zeros(batch, 0, dtype=torch.int64, device=self.device)
        return HuggingFaceCache(DynamicCache(config=config), there, config)

    @torch.no_grad()
    def read(self, cache: HuggingFaceCache, tokens: Tensor, counts: Sequence[int], at: Tensor) -> Tensor:
        """As :meth:`skipmega.evaluation.LanguageModel.read`."""
        places = torch.arange(tokens.shape[1], device=self.device)
        positions = cache.lengths.unsqueeze(1) + places
        new = places < torch.tensor(counts, device=self.device).unsqueeze(1)
        cache.there = torch.cat([cache.there, new.long()], dim=1)
        return self._run(
            tokens,
            counts,
            at,
            attention_mask=cache.there,
            position_ids=positions.clamp(max=self.max_length - 1),
            past_key_values=cache.keys_values,
            use_cache=True,
        )

    def _run(self, tokens: Tensor, counts: Sequence[int], at: Tensor, **options: Any) -> Tensor:
        kept, place = at.unique(return_inverse=True)
        if self._keeps:
            options["logits_to_keep"] = kept.to(self.device)
        else:
            place = at
        if self._is_ours:
            options["output_execution"] = True
        output = self.model(tokens.to(self.device), **options)
        executed = torch.stack(output.executed) if self._is_ours else None
        self._work.add(counts, executed)
        rows = torch.arange(len(at), device=self.device).unsqueeze(1)
        picked: Tensor = output.logits[rows, place.to(self.device)]
        return picked.float()


class HuggingFaceTokenizer:
    """A tokenizer of transformers as lm-eval uses it: with the special tokens that it adds by itself, but no
    second beginning.

    Raises:
        CheckpointError: it has no token that ends a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"the tokenizer of {tokenizer.name_or_path} has no eos_token: name the one that ends a "
                "text in its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self.eod_id: int = tokenizer.eos_token_id
        begins = tokenizer.bos_token_id is not None
        self.begin_id: int = tokenizer.bos_token_id if begins else tokenizer.eos_token_id
        self.size: int = len(tokenizer)
        self._begin: str = tokenizer.decode([self.begin_id])

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        options = {"add_special_tokens": False} if text.startswith(self._begin) else {}
        ids: list[int] = self._tokenizer.encode(text, **options)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
