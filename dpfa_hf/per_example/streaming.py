"""Clipping groups that are added and dropped one by one, while the backward pass is still under way.

A *tap* is an identity on a layer's output. Its backward is handed the output's gradient; the layer's inputs it has
saved as autograd saves them, so that they live exactly as long as autograd's own: non-reentrant gradient checkpointing
drops them with the block's other activations, and computes them again under the same dropout masks (P13).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example.layers import PerExampleGradient

Uses = dict[str, list[PerExampleGradient]]


def changed_in_place(name: str) -> PrivacyError:
    """The refusal of a layer whose input is no longer what it has read."""
    return PrivacyError(
        f"{name}: its input was changed in place after the layer had read it; the layer's gradient cannot be found. "
        "Write the operation out of place or freeze the layer"
    )


class Stream:
    """One forward and backward pass whose clipping groups are handed over as soon as they are complete.

    Args:
        groups: parameter name -> clipping group.
        groups_of: layer name -> groups of the layer's trainable parameters.
        uses: per-example gradients of one call of a layer, by parameter name, from (layer name, positional arguments,
            keyword arguments, gradient of the output). Called inside the backward pass, with no guarantee about the
            thread, the grad mode or autocast.
        add: called with a group and the per-example gradients of its parameters, likewise.

    Guarantee:
        Every tapped call of a layer that the losses depend on is in what `add` receives, once, and each group is
        received at most once: all uses of a tied parameter meet in one norm (P12).
    """

    def __init__(
        self,
        groups: Mapping[str, int],
        groups_of: Mapping[str, set[int]],
        uses: Callable[[str, tuple, dict[str, Any], torch.Tensor], Uses],
        add: Callable[[int, Uses], None],
    ) -> None:
        self._groups, self._groups_of = groups, groups_of
        self._uses, self._add = uses, add
        self._anchor = torch.zeros((), requires_grad=True)
        self._awaited: Counter[int] = Counter()
        self._held: dict[int, Uses] = {}
        self._in_forward = True

    def tap(self, layer: str, args: tuple, kwargs: Mapping[str, Any], output: torch.Tensor) -> torch.Tensor:
        """The layer's output, to be used in its place.

        Called again when checkpointing computes a block a second time: what is saved then must be what was saved the
        first time, but the second graph is never differentiated, so nothing more is awaited.
        """
        if self._in_forward:
            self._awaited.update(self._groups_of[layer])
        values, names = (*args, *kwargs.values()), list(kwargs)
        tensors = [value.detach() for value in values if isinstance(value, torch.Tensor)]
        others = [None if isinstance(value, torch.Tensor) else (value,) for value in values]

        def receive(saved: tuple[torch.Tensor, ...], grad: torch.Tensor) -> None:
            remaining = iter(saved)
            inputs = [next(remaining) if other is None else other[0] for other in others]
            positional = len(inputs) - len(names)
            keywords = dict(zip(names, inputs[positional:], strict=True))
            self._receive(layer, tuple(inputs[:positional]), keywords, grad)

        return _Tap.apply(output, self._anchor, layer, receive, tensors)

    def backward(self, losses: torch.Tensor) -> None:
        """Drives the backward pass; every group is complete when it returns."""
        self._in_forward = False
        if losses.requires_grad:
            # Autograd visits only what leads to the anchor, which is every tap and no parameter.
            torch.autograd.grad(losses.sum(), [self._anchor], allow_unused=True)
        for group in list(self._held):  # a call on which no loss depends never arrives
            self._add(group, self._held.pop(group))

    def _receive(self, layer: str, args: tuple, kwargs: dict[str, Any], grad: torch.Tensor) -> None:
        own = self._groups_of[layer]
        if any(not self._awaited[group] for group in own):
            raise PrivacyError(f"{layer}: its gradient arrived after its clipping group was complete; freeze the layer")
        self._awaited.subtract(own)
        for name, parts in self._uses(layer, args, kwargs, grad).items():
            self._held.setdefault(self._groups[name], {}).setdefault(name, []).extend(parts)
        for group in own:
            if not self._awaited[group]:
                self._add(group, self._held.pop(group))


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        anchor: torch.Tensor,
        layer: str,
        receive: Callable[[tuple[torch.Tensor, ...], torch.Tensor], None],
        tensors: list[torch.Tensor],
    ) -> torch.Tensor:
        ctx.layer, ctx.receive, ctx.versions = layer, receive, [tensor._version for tensor in tensors]
        ctx.save_for_backward(*tensors)
        # Unlike a view, autograd lets the model change it in place; the counter of versions is still the output's.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace operation" in str(error):
                raise changed_in_place(ctx.layer) from error
            raise
        # Under checkpointing autograd makes no such check; what is computed again has the same history of changes.
        if [tensor._version for tensor in saved] != ctx.versions:
            raise changed_in_place(ctx.layer)
        ctx.receive(saved, grads[0])
        return grads[0], None, None, None, None
