"""The one place that checks a call of attention and decides, from the call alone, who computes it."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .pattern import Pattern

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

# In the order of preference. "sdpa" is torch's scaled_dot_product_attention without any mask, hence with its fused
# kernels; "varlen" is torch's FlashAttention on packed rows; "triton" is ours; "reference" is written-out PyTorch.
BACKENDS = ("sdpa", "varlen", "triton", "reference")
ENVIRONMENT_VARIABLE = "DPFA_ATTENTION_BACKEND"

Flash = Callable[..., tuple[Tensor, Tensor]]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_VARLEN = varlen_attn is not None and {"scale", "window_size", "enable_gqa"} <= set(
    inspect.signature(varlen_attn).parameters
)


class Call(NamedTuple):
    """What the choice of a backend depends on: the form of a call, nothing of its values."""

    device: str
    dtype: torch.dtype
    width: int
    value_width: int
    queries: int
    keys: int
    is_causal: bool = False
    window: int | None = None
    padded: bool = False
    packed: bool = False
    longest_known: bool = False
    dense: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    lse: bool = False


def choose(call: Call) -> str:
    """The backend of a call: the environment's `DPFA_ATTENTION_BACKEND` if set, else the first that can do it.

    Raises:
        ValueError: the environment names no backend, or one that cannot compute this call.
    """
    able = [name for name in BACKENDS if _ABLE[name](call)]
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if forced != "auto":
        if forced not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r} is none of auto, {', '.join(BACKENDS)}")
        if forced not in able:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={forced!r} cannot compute this call, only {', '.join(able)} can: {call}"
            )
        return forced
    if call.device == "cpu":
        # The interpreter is for tests, which ask for it.
        able = [name for name in able if name != "triton"]
    return able[0]


def _sdpa(call: Call) -> bool:
    """Nothing but a plain or a square causal pattern; SDPA's own causal flag is aligned at the first key."""
    needs_mask = call.window is not None or call.padded or call.packed or call.dense
    square = not call.is_causal or call.queries == call.keys or call.queries == 1
    return square and not (needs_mask or call.softcap or call.sinks or call.lse)


def _varlen(call: Call) -> bool:
    plain = not (call.padded or call.dense or call.softcap or call.sinks or call.dropout or call.lse)
    fits = call.device == "cuda" and call.dtype in (torch.float16, torch.bfloat16)
    fits = fits and call.width == call.value_width and call.width <= 256 and call.width % 8 == 0
    return call.packed and call.longest_known and plain and fits and _HAS_VARLEN and _flash_capable()


def _triton(call: Call) -> bool:
    fits = call.dtype in (torch.float16, torch.bfloat16, torch.float32) and max(call.width, call.value_width) <= 256
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return fits and not call.dense and (call.device == "cuda" or interpreted) and _HAS_TRITON


_ABLE: dict[str, Callable[[Call], bool]] = {
    "sdpa": _sdpa,
    "varlen": _varlen,
    "triton": _triton,
    "reference": lambda call: True,
}


def _flash_capable() -> bool:
    """Whether torch's FlashAttention runs on the GPU; without one, it is asked what a new one would do."""
    if torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8


_observers: list[Callable[[Call, str], None]] = []


@contextlib.contextmanager
def observed(observer: Callable[[Call, str], None]) -> Iterator[None]:
    """Tells `observer` the form and the backend of every call made meanwhile."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def attention(
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
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    flash: Flash | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(scale Q K^T) + bias, over the allowed keys) V, with dropout on the weights.

    A key is allowed when every pattern given allows it. Causal and window patterns are aligned at the end of the
    sequence (the last query sees the last key), which is right for a cache that holds earlier keys.

    Args:
        query: [B, H, Sq, D], floating point.
        key: [B, Hkv, Sk, D] with H a multiple of Hkv; query head h reads key head h // (H / Hkv).
        value: [B, Hkv, Sk, Dv].
        scale: factor on the scores, usually D ** -0.5.
        is_causal: no key after its query. With `key_mask`, a query whose own key is padding sees nothing.
        window: only keys less than this many positions away from the query, on both sides unless `is_causal`.
        key_mask: bool [B, Sk], False where the key is padding.
        mask: bool, broadcastable to [B, H, Sq, Sk], True where the query may attend.
        bias: floating point, broadcastable to [B, H, Sq, Sk], added to the scores; may require a gradient.
        cu_seq_lens_q: int [n + 1], boundaries of the sequences packed into the one row (B = 1); needs the next one.
        cu_seq_lens_k: the same for the keys.
        max_length_q: length of the longest packed sequence, if it is known without asking the device.
        max_length_k: the same for the keys.
        segments_q: int [B, Sq], the number of the packed sequence of each query, never decreasing along a row; instead
            of `cu_seq_lens_q`, for any B; needs the next one.
        segments_k: int [B, Sk].
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: floating point [H] or [B, H], a learned score that takes weight and gives no value (Xiao et al. 2023).
        dropout: probability in [0, 1) of dropping a weight.
        return_lse: also return the log of the sum of exp(scores), sinks included.
        flash: what runs the Triton kernels in place of `flash_attention`, such as a registered operator.

    Returns:
        [B, Sq, H, Dv] in the dtype of `query`; 0 for a query without an allowed key. With `return_lse` also the
        log-sum-exp, float32 (float64 for float64) [B, H, Sq], -inf for a query without an allowed key.

    Raises:
        ValueError: a shape, dtype or combination that is not described above.

    Guarantee:
        Output and gradient of one row, and of one packed sequence, depend on that row's or that sequence's finite
        inputs and on `sinks` and `bias` alone. Between rows this holds to the bit: no value of another row is read.
    """
    _check_tensors(query, key, value)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    _check_masks(batch, heads, queries, keys, key_mask, mask, bias)
    _check_packing(batch, queries, keys, cu_seq_lens_q, cu_seq_lens_k, segments_q, segments_k)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if sinks is not None and not (sinks.is_floating_point() and sinks.shape in ((heads,), (batch, heads))):
        raise ValueError(
            f"sinks must be floating point {(heads,)} or {(batch, heads)}, not {sinks.dtype} {tuple(sinks.shape)}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if window is not None and window >= max(queries, keys):
        window = None
    query, key, value = _autocast(query, key, value)
    call = Call(
        device=query.device.type,
        dtype=query.dtype,
        width=query.shape[3],
        value_width=value.shape[3],
        queries=queries,
        keys=keys,
        is_causal=is_causal,
        window=window,
        padded=key_mask is not None,
        packed=cu_seq_lens_q is not None or segments_q is not None,
        longest_known=cu_seq_lens_q is not None and max_length_q is not None and max_length_k is not None,
        dense=mask is not None or bias is not None,
        softcap=softcap is not None,
        sinks=sinks is not None,
        dropout=dropout > 0,
        lse=return_lse,
    )
    backend = choose(call)
    for observer in _observers:
        observer(call, backend)
    if backend == "sdpa":
        grouped = key.shape[1] != heads
        is_causal = is_causal and queries > 1
        output = F.scaled_dot_product_attention(
            query, key, value, None, dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        return output.transpose(1, 2)
    if backend == "varlen":
        return _varlen_attention(
            query, key, value, scale, is_causal, window, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        )
    pattern = Pattern(scale, is_causal, window, softcap, dropout)
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        # A compiled graph would break where the boundaries are read.
        readable = call.device == "cpu" and queries > 0 and not torch.compiler.is_compiling()
        if backend == "reference" and readable and not (call.padded or call.dense):
            output, lse = reference.packed_attention(
                query, key, value, cu_seq_lens_q, cu_seq_lens_k, sinks, pattern, lse=return_lse
            )
            return (output, lse) if return_lse else output
        segments_q, segments_k = _segments(cu_seq_lens_q, queries), _segments(cu_seq_lens_k, keys)
    if backend == "triton":
        if flash is None:
            from .flash import flash_attention

            flash = flash_attention
        if sinks is not None:
            sinks = sinks.to(torch.float32).expand(batch, heads).contiguous()
        seed = torch.randint(2**62, (1,), device=query.device) if dropout else None
        output, lse = flash(query, key, value, key_mask, segments_q, segments_k, sinks, seed, pattern)
    else:
        output, lse = reference.attention(
            query, key, value, key_mask, segments_q, segments_k, sinks, pattern, mask=mask, bias=bias, lse=return_lse
        )
    return (output, lse) if return_lse else output


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool,
    window: int | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
) -> Tensor:
    assert cu_seq_lens_q is not None and cu_seq_lens_k is not None
    side = -1 if window is None else window - 1
    # FlashAttention leaves what follows the last sequence unwritten, in the output and in the gradients.
    behind_q, behind_k = (
        torch.arange(tensor.shape[2], device=tensor.device)[:, None, None] >= cu_seq_lens[-1]
        for tensor, cu_seq_lens in ((query, cu_seq_lens_q), (key, cu_seq_lens_k))
    )
    output = varlen_attn(
        query.transpose(1, 2)[0].masked_fill(behind_q, 0.0),
        key.transpose(1, 2)[0].masked_fill(behind_k, 0.0),
        value.transpose(1, 2)[0].masked_fill(behind_k, 0.0),
        cu_seq_lens_q.to(torch.int32),
        cu_seq_lens_k.to(torch.int32),
        max_length_q,
        max_length_k,
        scale=scale,
        window_size=(side, 0 if is_causal else side),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output.masked_fill(behind_q, 0.0)[None]


def _segments(cu_seq_lens: Tensor, length: int) -> Tensor:
    """int64 [1, length], the number of each position's packed sequence; what follows the last one is one more."""
    position = torch.arange(length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    return torch.searchsorted(cu_seq_lens[1:].contiguous(), position, right=True)[None]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does for torch's own attention."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"query, key and value must be [batch, heads, sequence, width], not {shapes}")
    same_keys = key.shape[:3] == value.shape[:3] and key.shape[0] == query.shape[0] and key.shape[3] == query.shape[3]
    if not same_keys or query.shape[1] % key.shape[1]:
        raise ValueError(f"query, key and value do not fit together: {shapes}")
    if not query.is_floating_point():
        raise ValueError(f"query must be floating point, not {query.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, not {query.dtype}, {key.dtype}, {value.dtype}")


def _check_masks(
    batch: int, heads: int, queries: int, keys: int, key_mask: Tensor | None, mask: Tensor | None, bias: Tensor | None
) -> None:
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, keys)):
        raise ValueError(f"key_mask must be bool {(batch, keys)}, not {key_mask.dtype} {tuple(key_mask.shape)}")
    if mask is not None and (mask.dtype != torch.bool or not _broadcasts(mask, batch, heads, queries, keys)):
        raise ValueError(
            f"mask must be bool and broadcast to {(batch, heads, queries, keys)}, not {mask.dtype} {tuple(mask.shape)}"
        )
    if bias is not None and not (bias.is_floating_point() and _broadcasts(bias, batch, heads, queries, keys)):
        raise ValueError(
            f"bias must be floating point and broadcast to {(batch, heads, queries, keys)}, "
            f"not {bias.dtype} {tuple(bias.shape)}"
        )


def _check_packing(
    batch: int,
    queries: int,
    keys: int,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
) -> None:
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k describe the packing together: give both or neither")
    if (segments_q is None) != (segments_k is None):
        raise ValueError("segments_q and segments_k describe the packing together: give both or neither")
    if segments_q is not None and cu_seq_lens_q is not None:
        raise ValueError("cu_seq_lens and segments both describe the packing: give one of them")
    for cu_seq_lens in (cu_seq_lens_q, cu_seq_lens_k):
        if cu_seq_lens is None:
            continue
        if batch != 1 or cu_seq_lens.ndim != 1 or cu_seq_lens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seq_lens must be one row of integers for one packed row (batch 1), "
                f"not {cu_seq_lens.dtype} {tuple(cu_seq_lens.shape)} for batch {batch}"
            )
    for segments, length in ((segments_q, queries), (segments_k, keys)):
        if segments is None:
            continue
        if segments.shape != (batch, length) or segments.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"segments must be integers {(batch, length)}, not {segments.dtype} {tuple(segments.shape)}"
            )


def _broadcasts(tensor: Tensor, *shape: int) -> bool:
    """Whether a 4D tensor expands to `shape`; every key needs its own entry, so the last size must be equal."""
    if tensor.ndim != 4 or tensor.shape[3] != shape[3]:
        return False
    return all(given in (1, wanted) for given, wanted in zip(tensor.shape[:3], shape[:3], strict=True))
