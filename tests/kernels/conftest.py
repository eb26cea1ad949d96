"""Attention written out with positions as plain Python conditions, and memory that shows who reads or writes beside it.

Nothing here imports the kernels: what is compared with them must not share their code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

_GUARD = 64
_NUMBER = 101  # in integers, which have no NaN


def numbered(cu_seq_lens: Tensor, length: int) -> Tensor:
    """int64 [1, length]: the number of the packed sequence of each position."""
    ends = cu_seq_lens.tolist()[1:]
    return torch.tensor([[sum(end <= position for end in ends) for position in range(length)]], dtype=torch.long)


def visible(
    rows: int,
    queries: int,
    keys: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
) -> Tensor:
    """bool [B, Sq, Sk], True where the query may see the key."""
    allowed = torch.zeros(rows, queries, keys, dtype=torch.bool)
    for row in range(rows):
        real = [True] * keys if key_mask is None else key_mask[row].tolist()
        numbers_q = [0] * queries if segments_q is None else segments_q[row].tolist()
        numbers_k = [0] * keys if segments_k is None else segments_k[row].tolist()
        for i, number in enumerate(numbers_q):
            # The key that stands where the query stands, once both sides of its sequence are aligned at their ends.
            own = i + sum(n <= number for n in numbers_k) - sum(n <= number for n in numbers_q)
            if is_causal and key_mask is not None and not (0 <= own < keys and real[own]):
                continue
            for j in range(keys):
                allowed[row, i, j] = (
                    real[j]
                    and numbers_k[j] == number
                    and (not is_causal or j <= own)
                    and (window is None or abs(own - j) < window)
                )
    return allowed


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    keep: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(output [B, Sq, H, Dv], log-sum-exp [B, H, Sq]), every step rounded to `dtype`; `keep` is what dropout keeps."""
    (rows, heads, queries, _), (key_heads, keys) = query.shape, key.shape[1:3]
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        segments_q, segments_k = numbered(cu_seq_lens_q, queries), numbered(cu_seq_lens_k, keys)
    allowed = visible(
        rows, queries, keys, is_causal=is_causal, window=window, key_mask=key_mask,
        segments_q=segments_q, segments_k=segments_k,
    )[:, None]  # fmt: skip
    if mask is not None:
        allowed = allowed & mask
    key, value = (tensor.to(dtype).repeat_interleave(heads // key_heads, dim=1) for tensor in (key, value))
    scores = query.to(dtype) @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    scores = torch.where(allowed, scores, -torch.inf)
    sighted = allowed.any(-1, keepdim=True).expand(rows, heads, queries, 1)
    top = torch.zeros(rows, heads, queries, 1, dtype=dtype)
    if keys:
        top = torch.where(sighted, scores.detach().amax(-1, keepdim=True), 0.0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.to(dtype).expand(rows, heads)[..., None, None] - top).exp()
    total = torch.where(sighted, total, 1.0)
    weights = weights / total
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    lse = torch.where(sighted, total.log() + top, -torch.inf)
    return (weights @ value).transpose(1, 2), lse.squeeze(-1)


def philox(seed: int, *counter: np.ndarray) -> list[np.ndarray]:
    """Four 32-bit words of Philox4x32-10 (Salmon et al. 2011) for each of the given counters (four words)."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in np.broadcast_arrays(*counter))
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> shift) ^ c1 ^ np.uint64(k0), second & low
        c2, c3 = (first >> shift) ^ c3 ^ np.uint64(k1), first & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def kept(seed: int, rows: int, heads: int, queries: int, keys: int, dropout: float) -> Tensor:
    """bool [B, H, Sq, Sk], the weights that dropout keeps: a uniform number of 24 bits is at least `dropout`."""
    head = np.arange(rows * heads).reshape(rows, heads, 1, 1)
    bits = philox(seed, np.arange(keys), np.arange(queries)[:, None], head, np.zeros(1))[0]
    return torch.from_numpy((bits >> np.uint64(8)).astype(np.float64) * 2.0**-24 >= dropout)


def framed(tensor: Tensor, order: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    """A copy that lies inside a larger buffer of NaN, with its dimensions in memory in the given order."""
    shape = [tensor.shape[dimension] + 2 for dimension in order]
    inside = torch.full(shape, torch.nan, dtype=tensor.dtype)[(slice(1, -1),) * len(order)]
    copy = inside.permute(*sorted(range(len(order)), key=lambda dimension: order[dimension]))
    return copy.copy_(tensor)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Fresh memory holds NaN and is bordered by NaN; returns whether all borders are what they were.

    So an element that nobody wrote, one that was read where nothing lies, and one that was written there all show.
    """
    blocks: list[tuple[Tensor, int]] = []

    def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        length = int(np.prod(shape, dtype=np.int64))
        filling = torch.nan if dtype.is_floating_point else _NUMBER
        block = torch.full((length + 2 * _GUARD,), filling, dtype=dtype)
        blocks.append((block, length))
        return block[_GUARD : _GUARD + length].view(shape)

    def shape_of(size: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return fresh(shape_of(size), dtype or torch.get_default_dtype())

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return fresh(shape_of(size), dtype or self.dtype)

    def empty_like(tensor: Tensor, memory_format: Any = None) -> Tensor:
        return fresh(tuple(tensor.shape), tensor.dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(Tensor, "new_empty", new_empty)

    def unchanged() -> bool:
        borders = [border for block, length in blocks for border in (block[:_GUARD], block[_GUARD + length :])]
        return all(
            bool((border.isnan() if border.is_floating_point() else border == _NUMBER).all()) for border in borders
        )

    yield unchanged
    assert unchanged(), "a kernel wrote beside its memory"


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The functions of this file: test modules cannot import it."""
    functions: tuple[Callable, ...] = (numbered, visible, written_out, philox, kept, framed)
    return SimpleNamespace(**{function.__name__: function for function in functions})
