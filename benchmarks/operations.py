"""How many floating-point operations a training step takes at least, and so how cheap a private one could be.

Counted are the matrix products: of the linear layers from their shapes, of attention from the configuration. A product
of [m, k] with [k, n] counts 2 m k n. What is left out (norms of embeddings, the cross term of tied weights,
elementwise work) is small beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from dpfa_hf.per_example.layers import MORE_MEMORY


class LinearCall(NamedTuple):
    """One call of a linear layer: `tokens` vectors of `columns` numbers of each row become vectors of `rows`."""

    tokens: int
    columns: int
    rows: int
    needs_weight_gradient: bool
    needs_input_gradient: bool


class Operations(NamedTuple):
    """Floating-point operations for one row of a batch."""

    forward: int
    backward: int
    norms: int

    @property
    def limit(self) -> float:
        """Time of a private step over that of a plain one, if all operations ran at one speed and nothing else cost.

        The clipped sum costs what the weight gradients cost that it replaces, so the norms are all that is added; and
        where these gradients are written out for each row, which then need no second product, nothing is.
        """
        return 1 + self.norms / (self.forward + self.backward)


def linear_calls(model: nn.Module, batch: Mapping[str, Any]) -> list[LinearCall]:
    """The calls of linear layers in one forward pass of `batch`, tensors [1, T, ...] or [1]."""
    calls = []

    def note(module: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        vectors = args[0]
        weight = module.weight
        calls.append(
            LinearCall(
                vectors.numel() // vectors.shape[-1],
                weight.shape[1],
                weight.shape[0],
                weight.requires_grad,
                vectors.requires_grad,
            )
        )

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        with torch.enable_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def squared_norm_operations(tokens: int, columns: int, rows: int, *, written_out: bool) -> int:
    """The cheaper of the two forms: half of both Gram matrices, or the gradient itself, tile by tile.

    None if long rows' gradients are `written_out`: those that are about as small as what they are made of.
    """
    if written_out and columns * rows <= MORE_MEMORY * tokens * (columns + rows):
        return 0
    return min(tokens**2 * (columns + rows), 2 * tokens * columns * rows)


def attention_operations(config: Any, tokens: int, *, causal: bool) -> tuple[int, int]:
    """(forward, backward): two products forward; backward five, with the scores computed again."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head
    product = 2 * tokens**2 * width * config.num_hidden_layers // (2 if causal else 1)
    return 2 * product, 5 * product


def count(model: nn.Module, batch: Mapping[str, Any], config: Any, *, causal: bool) -> Operations:
    """Operations for each row of batches like `batch`, which has one row. Kernels on a GPU write nothing out."""
    calls, written_out = linear_calls(model, batch), batch["input_ids"].device.type == "cpu"
    forward, backward = attention_operations(config, batch["input_ids"].shape[1], causal=causal)
    for call in calls:
        product = 2 * call.tokens * call.columns * call.rows
        forward += product
        backward += product * (call.needs_weight_gradient + call.needs_input_gradient)
    trained = (call for call in calls if call.needs_weight_gradient)
    norms = (squared_norm_operations(*call[:3], written_out=written_out) for call in trained)
    return Operations(forward, backward, sum(norms))
