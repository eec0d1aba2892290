"""Causal attention of packed queries over the keys and values of all tokens.

Implementations of one operation: ``sdpa`` (any device; the reference, with an explicit mask), ``flex`` (CUDA
under ``torch.compile``; block-sparse, skips what no query of a block may see) and ``flash`` (the same blocks
by FlashAttention-4, an extra package; Hopper GPUs and newer). One is chosen at the start. Where all tokens
ask, and of one document, it is causal attention, of which torch's is the fastest.
"""

import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from skipmega.errors import ConfigError
from skipmega.kernels.blocks import BLOCK, seen_blocks

AttentionBackend = Literal["sdpa", "flex", "flash"]


def choose_attention(
    wanted: AttentionBackend | Literal["auto"], device: torch.device, compiled: bool, head_size: int
) -> AttentionBackend:
    """The implementation that ``training.attention`` asks for.

    Raises:
        ConfigError: it cannot run here.
    """
    if wanted == "auto":
        return "flex" if compiled and device.type == "cuda" else "sdpa"
    if wanted == "flash" and device.type != "cuda":
        raise ConfigError("training.attention=flash needs a GPU, and there is none: leave it at auto")
    if wanted == "flash" and not has_flash():
        raise ConfigError(
            "training.attention=flash needs the package flash-attn-4: pip install 'skipmega[flash]', or "
            "leave it at auto"
        )
    if wanted == "flash" and (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        raise ConfigError(
            "training.attention=flash has kernels for GPUs of compute capability 9.0 (H100) and newer, and "
            f"this one has {capability[0]}.{capability[1]}: leave it at auto"
        )
    if wanted == "flash" and (head_size > 128 or head_size % 8):
        raise ConfigError(
            "training.attention=flash has kernels for heads of 8, 16, 24, ... 128 channels, and these have "
            f"{head_size} (model.head_dim): leave it at auto"
        )
    if wanted == "flex" and not compiled:
        raise ConfigError("training.attention=flex needs training.compile=true: set it, or leave it at auto")
    return wanted


def has_flash() -> bool:
    """Whether FlashAttention-4 is installed, whose older namesakes have no ``cute``."""
    return bool(importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    since: Tensor | None,
    backend: AttentionBackend,
) -> Tensor:
    """Softmax attention; the query at position p attends keys ``since[p]`` to p.

    Args:
        query: [q, b, heads, d]; already rotated.
        key: [s, b, kv_heads, d]; kv_heads divides heads (grouped-query attention).
        value: [s, b, kv_heads, d].
        positions: [q, b] int64, each query's position in its sequence, ascending along q; None when the
            queries are all tokens (q = s).
        since: [b, s] int64, the first position each token may see, ascending within each sequence (the start
            of its document, see :func:`document_starts`); None for 0.
        backend: which implementation.

    Returns:
        [q, b, heads, d], dtype of ``query``.
    """
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    if positions is None and since is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    elif backend == "flex":
        out = _flex(q, k, v, positions, since)
    elif backend == "flash":
        return _flash(query, key, value, positions, since)
    else:
        mask = visibility(positions, since, k.shape[2], k.shape[0], k.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.unsqueeze(1), enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.permute(2, 0, 1, 3)


def document_starts(documents: Tensor) -> Tensor:
    """Position of the first token of each token's document.

    Args:
        documents: [b, s] int64, document numbers, ascending within each sequence.

    Returns:
        [b, s] int64.
    """
    position = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(begins, position, 0).cummax(dim=1).values


def visibility(
    positions: Tensor | None, since: Tensor | None, length: int, batch: int, device: torch.device
) -> Tensor:
    """Which keys each query may see: [b, q, s] bool; arguments as in :func:`packed_attention`."""
    keys = torch.arange(length, device=device)
    at = keys.expand(batch, -1) if positions is None else positions.t()
    visible = keys.view(1, 1, -1) <= at.unsqueeze(2)
    if since is not None:
        visible = visible & (keys.view(1, 1, -1) >= since.gather(1, at).unsqueeze(2))
    return visible


def _flex(q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, since: Tensor | None) -> Tensor:
    block_mask = packed_block_mask(positions, since, k.shape[2], k.shape[0])
    out = flex_attention(
        q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1],
        # fewer than 128 queries would go to the decoding kernel, which compiles for few shapes
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _flash(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, since: Tensor | None
) -> Tensor:
    from skipmega.kernels.attention_flash import attention

    seen = seen_blocks(positions, since, *key.shape[:2])
    bounds = [seen.until] if since is None else [seen.until, seen.since]
    return attention(query, key, value, bounds, [*seen.keys, *seen.queries])[0]


def packed_block_mask(positions: Tensor | None, since: Tensor | None, length: int, batch: int) -> BlockMask:
    """The block mask of ascending queries, from positions alone (no [q, s] mask is made).

    Arguments as in :func:`skipmega.kernels.blocks.seen_blocks`.
    """
    seen = seen_blocks(positions, since, length, batch)
    until, first = seen.until, seen.since
    lists = [part.unsqueeze(1) for part in (*seen.keys, *seen.queries)]

    def visible(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return k_index <= until[b, q_index]

    def visible_of_document(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (k_index <= until[b, q_index]) & (k_index >= first[b, q_index])

    mask = visible if since is None else visible_of_document
    return BlockMask((until.shape[1], length), *lists, (BLOCK, BLOCK), mask)  # type: ignore
