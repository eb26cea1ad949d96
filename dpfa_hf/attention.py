"""`attn_implementation="dp_flash"`: Transformers' attention and mask interfaces in, one kernel call out.

Attention holds no parameters, so exact attention is right for private training (P2). What this module owes to it is
isolation (P3): what an example gives depends on that example and the weights alone, whatever mask arrives, and what is
not understood is refused.

How a pattern travels from the mask function to the attention function, all on the device and without looking at values:

- None: causal if the module is causal, else every key.
- bool [B, Sk]: causal, with False where a key is padding. Only causal modules accept it.
- bool [B, 1, 1, W, Sk], the same along W: a sliding window of W keys in all, which the module must ask for too: up to
  the query's own in a causal module, around it in another. A stride of 0 along Sk says that nothing is padding.
- integer of that shape: the number of each token's sequence in a packed row, in a causal module; W >= Sk is no window.
- bool [B | 1, H | 1, Sq | 1, Sk]: the whole pattern, whatever the module says; True may attend.
- floating point of that shape: the same, added to the scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
    logging,
    masking_utils,
)
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from dpfa_hf._kernel import attention as exact_attention
from dpfa_hf.attention_operator import flash_attention
from dpfa_hf.errors import PrivacyError

logger = logging.get_logger(__name__)

NAMES = ("dp_flash", "dpfa")

# Additive masks hold the lowest number of some dtype, or -1e4 since BERT, where a key is masked; -1e4 is -9984 in bf16.
_MASKED_BELOW = -9e3

# They speak about the whole model or about a kernel's work space, and change nothing inside attention. `position_ids`
# are already in query and key, and in the mask where they announce packing.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "labels",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)

_MADE_FROM = "_dpfa_made_from"

# Transformers vouches for these, but some of their layers go round the attention interface.
_PARTLY_OWN_ATTENTION = {
    "pegasus_x": "its encoder has global-local attention of its own",
    "timm_wrapper": "timm's layers compute attention of their own",
}


def dp_flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface on exact, isolated attention.

    Args:
        module: the attention layer; `module.is_causal` counts where `is_causal` is None.
        query: [B, H, Sq, D].
        key: [B, Hkv, Sk, D]; H is a multiple of Hkv.
        value: [B, Hkv, Sk, Dv].
        attention_mask: one of the forms listed at the head of this module.
        dropout: probability of dropping a weight while `module` trains.
        scaling: factor on the scores, D ** -0.5 by default.
        is_causal: overrides `module.is_causal`.
        sliding_window: only keys less than this many positions away; a mask that is the whole pattern overrides it.
        softcap: scores become softcap * tanh(scores / softcap).
        position_bias: broadcastable to [B, H, Sq, Sk], added to the scores.
        s_aux: [H] or [B, H], learned attention sinks.
        cu_seq_lens_q: int [n + 1], boundaries of the sequences packed into one row; also applied to a given mask.
        cu_seq_lens_k: the same for the keys.
        max_length_q: length of the longest of those sequences; counts where it is an int.
        max_length_k: the same for the keys.
        kwargs: arguments known to be harmless, or None. As under SDPA, `output_attentions` warns and gives no weights.

    Returns:
        ([B, Sq, H, Dv], None): no attention weights.

    Raises:
        PrivacyError: a mask or an argument that is not understood (P3).

    Guarantee:
        One example's output and gradient depend on that example and the weights alone, for rows and for sequences
        packed into a row. Packing is announced by `cu_seq_lens_q` and `cu_seq_lens_k`. Transformers also announces it
        through the mask when `position_ids` restart, but in some families only, without `attention_mask` and with
        use_cache=False; otherwise it hands over the row as one sequence, and nothing here can tell.
        A query that may attend nothing gives 0, and so does a query of a causal module whose own token is padding.
    """
    if kwargs.pop("output_attentions", False):
        logger.warning_once("dp_flash keeps no attention weights: output_attentions=True returns none; use 'eager'")
    if kwargs.get("seq_idx") is not None and cu_seq_lens_q is not None:
        del kwargs["seq_idx"]
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown:
        raise PrivacyError(
            f"{type(module).__name__} passes {', '.join(unknown)}, which dp_flash does not understand and will not "
            f"ignore; load the model with attn_implementation='eager'"
        )
    pattern = _pattern(module, query, key, attention_mask, is_causal, sliding_window)
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        # A mask made from the same packed row's positions says the same sequences again.
        pattern.pop("segments_q", None)
        pattern.pop("segments_k", None)
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        # Rotary positions leave query and key in float32; for SDPA, autocast casts all three.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = pattern.pop("bias", None)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    try:
        output = exact_attention(
            query,
            key,
            value,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            bias=bias,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q if isinstance(max_length_q, int) else None,
            max_length_k=max_length_k if isinstance(max_length_k, int) else None,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout if module.training else 0.0,
            flash=flash_attention,
            **pattern,
        )
    except ValueError as error:
        raise PrivacyError(
            f"dp_flash refuses a call of {type(module).__name__}: {error}; load with attn_implementation='eager'"
        ) from error
    return output, None


def _pattern(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> dict[str, Any]:
    """The kernel's arguments that say who attends whom."""
    if mask is not None and not isinstance(mask, Tensor):
        raise PrivacyError(
            f"{type(module).__name__} got an attention mask of type {type(mask).__name__}, which dp_flash does not "
            f"understand; pass a tensor or load with attn_implementation='eager'"
        )
    if mask is not None and mask.ndim == 4:
        if mask.is_floating_point():
            allowed = mask > _MASKED_BELOW
            return {"mask": allowed, "bias": mask.masked_fill(~allowed, 0.0)}
        # A stride of 0 says that all queries see the same keys: padding, which the kernel need not read per query.
        by_key = mask.shape[2] == 1 or (mask.stride(2) == 0 and mask.shape[2] == query.shape[2])
        if by_key and mask.shape[:2] == (query.shape[0], 1):
            return {"key_mask": mask[:, 0, 0]}
        return {"mask": mask}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if is_causal is None:
        raise PrivacyError(
            f"{type(module).__name__} has no is_causal and no mask says whether a token may attend later ones; "
            f"load the model with attn_implementation='eager'"
        )
    if mask is None:
        return {"is_causal": is_causal, "window": sliding_window}
    if mask.ndim == 5 and mask.shape[1:3] == (1, 1):
        seen, keys = mask.shape[3:]
        fits = seen >= keys or sliding_window == (seen if is_causal else (seen + 1) // 2)
        fits = fits and (is_causal or mask.dtype == torch.bool)
        mask = mask[:, 0, 0, 0]
    else:
        fits = mask.ndim == 2 and is_causal and mask.dtype == torch.bool
    if not fits:
        raise PrivacyError(
            f"{type(module).__name__} (is_causal={is_causal}, sliding_window={sliding_window}) got an attention mask "
            f"{mask.dtype} {tuple(mask.shape)}, which dp_flash does not understand; pass [batch, 1, queries, keys] or "
            f"attn_implementation='eager'"
        )
    pattern: dict[str, Any] = {"is_causal": is_causal, "window": sliding_window}
    if mask.dtype != torch.bool:
        return {**pattern, "segments_q": mask[:, -query.shape[2] :], "segments_k": mask}
    return pattern if mask.stride(1) == 0 else {**pattern, "key_mask": mask}


def dp_flash_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Transformers' mask interface: padding or packing alone where the pattern is plain or a sliding window, the whole
    pattern otherwise.

    Unlike `sdpa_mask` it never reads the mask's values, so it neither waits for the device nor breaks a compiled graph.

    Args:
        batch_size: B.
        q_length: Sq.
        kv_length: Sk.
        q_offset: position of the first query, an int, or a tensor under a static cache.
        kv_offset: position of the first key.
        mask_function: from (batch, head, query, key) indices to bool.
        attention_mask: bool [B, positions seen so far], False where a token is padding.
        local_size: size of the sliding window or chunk, where there is one.
        allow_is_causal_skip: whether a causal pattern may be left to the attention function.
        allow_is_bidirectional_skip: whether a pattern of every key may be left to it.
        kwargs: for `sdpa_mask`.

    Returns:
        One of the forms at the head of this module.

    Raises:
        PrivacyError: an `attention_mask` that is not bool of two dimensions.
    """
    if _is_own_form(attention_mask, batch_size, kv_length):
        return attention_mask  # generation makes masks ahead and passes them through here again
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.dtype != torch.bool):
        raise PrivacyError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}: "
            f"dp_flash takes [batch, length], or a bool or floating-point [batch, heads, queries, keys]"
        )
    seen = kv_offset + kv_length
    covered = attention_mask is None or attention_mask.shape == (batch_size, seen)
    # The kernel aligns causal patterns at the end; a static cache has room left there.
    aligned = isinstance(q_offset, int) and q_offset + q_length == seen
    # A window or chunk that holds every position seen so far hides nothing.
    local_is_whole = local_size is not None and kv_offset == 0 and kv_length <= local_size
    config = kwargs.get("config")
    is_window = local_size is not None and local_size == getattr(config, "sliding_window", None)
    is_window = is_window and getattr(config, "attention_chunk_size", None) is None
    padding = None if attention_mask is None else attention_mask[:, kv_offset:]
    if allow_is_causal_skip and aligned and covered:
        if mask_function is causal_mask_function or local_is_whole:
            return padding
        if local_size is not None and is_window:
            return _windowed(padding, batch_size, local_size, kv_length, kwargs.get("device"))
    if allow_is_bidirectional_skip and covered and getattr(config, "is_causal", True):
        if mask_function is bidirectional_mask_function:
            return None if padding is None else padding[:, None, None].expand(-1, 1, q_length, -1)
        if local_size is not None and is_window and aligned:
            # Its ends are inclusive.
            return _windowed(padding, batch_size, 2 * local_size + 1, kv_length, kwargs.get("device"))
    if attention_mask is None and aligned:
        segments = _packed_sequences(mask_function, local_size)
        if segments is not None:
            return _windowed(segments, batch_size, local_size or kv_length, kv_length, None)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def _is_own_form(mask: Tensor | None, batch: int, length: int) -> bool:
    return mask is not None and mask.ndim == 5 and (mask.shape[0], mask.shape[4]) == (batch, length)


def _windowed(keys: Tensor | None, batch: int, window: int, length: int, device: Any) -> Tensor:
    """[B, 1, 1, W, Sk]: what is known of the keys, and the number of them in the window as its shape."""
    if keys is None:
        keys = torch.ones((), dtype=torch.bool, device=device).expand(batch, length)
    return keys[:, None, None, None].expand(batch, 1, 1, window, length)


def _packed_sequences(mask_function: Any, window: int | None) -> Tensor | None:
    """[B, Sk], the number of each token's packed sequence, if the pattern is causal within the sequences, with this
    window, and nothing else; None for any other one, which is then written out."""
    maker, *parts = getattr(mask_function, _MADE_FROM, (None,))
    if maker != "packed_sequence_compatibility_function":
        return None
    inside, _, numbers = parts
    is_plain = window is None and inside is causal_mask_function
    made_from = getattr(inside, _MADE_FROM, None)
    return numbers if is_plain or made_from == ("sliding_window_causal_mask_function", window) else None


def _label(name: str) -> None:
    """Makes a function of Transformers' write on the mask functions that it makes what they are made from."""
    make = getattr(masking_utils, name, None)
    if make is None:
        return

    @functools.wraps(make)
    def labelled(*args: Any) -> Any:
        mask_function = make(*args)
        setattr(mask_function, _MADE_FROM, (name, *args))
        return mask_function

    setattr(masking_utils, name, labelled)


def refuse_unsupported_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Raise for a model that would ignore `attn_implementation="dp_flash"` or misuse its mask.

    Decided by facts about the class: whether the source of its module has attention layers that go round the attention
    interface (DeBERTa, BLOOM, GPT-J), and whether Transformers vouches for the class under any backend but eager.
    Without that its layers may rely on a dense mask alone: NLLB-MoE's decoder calls itself not causal, and LongT5 and
    GIT add the mask to scores of their own.

    Raises:
        PrivacyError: naming the class and the way out.
    """
    vouched = model_class._supports_sdpa or model_class._supports_flash_attn or model_class._supports_attention_backend
    if config.model_type in _PARTLY_OWN_ATTENTION:
        reason = _PARTLY_OWN_ATTENTION[config.model_type]
    elif not model_class._can_set_attn_implementation():
        reason = "it computes attention of its own and would ignore the name or misuse the mask"
    elif not vouched:
        reason = "Transformers vouches for no backend of it but eager"
    else:
        return
    raise PrivacyError(f"{model_class.__name__} cannot use attn_implementation='dp_flash': {reason}; use 'eager'")


@functools.cache
def register() -> None:
    """Make "dp_flash" and "dpfa" known to Transformers; calling it again changes nothing.

    Registering alone is not enough: Transformers takes every name that contains "flash" for one of its own kernels, and
    `set_attn_implementation` only warns where a model ignores the name. And a mask function does not say what pattern
    it stands for, so those of packed rows and windows are labelled, which changes nothing for other implementations.
    """
    for name in NAMES:
        AttentionInterface.register(name, dp_flash_attention)
        AttentionMaskInterface.register(name, dp_flash_mask)
    for name in ("packed_sequence_compatibility_function", "sliding_window_causal_mask_function"):
        _label(name)
    check = PreTrainedModel._check_and_adjust_attn_implementation
    set_implementation = PreTrainedModel.set_attn_implementation

    @functools.wraps(check)
    def guarded_check(self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in NAMES:
            return check(self, attn_implementation, *args, **kwargs)
        refuse_unsupported_model(type(self), self.config)
        return self.get_correct_attn_implementation(attn_implementation)

    @functools.wraps(set_implementation)
    def guarded_set(
        self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        requested: dict[int, str | None] = {}
        _resolve(self.config, attn_implementation, requested)
        own = requested[id(self.config)]
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and requested.get(id(module.config), own) in NAMES:
                refuse_unsupported_model(type(module), module.config)
        set_implementation(self, attn_implementation, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = guarded_check  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = guarded_set  # type: ignore[method-assign]


def _resolve(config: PreTrainedConfig, requested: Any, found: dict[int, str | None]) -> None:
    """Which implementation each sub-configuration would get, by identity, as `set_attn_implementation` reads a dict."""
    nested = isinstance(requested, dict)
    found[id(config)] = requested.get("", config._attn_implementation) if nested else requested
    for name in config.sub_configs:
        sub_config = getattr(config, name, None)
        if sub_config is not None:
            _resolve(sub_config, requested.get(name, sub_config._attn_implementation) if nested else requested, found)
