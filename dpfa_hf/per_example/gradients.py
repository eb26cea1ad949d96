"""Clipped sums of per-example gradients from one backward pass.

Forward hooks keep every trainable layer's input and a handle on its output; one `torch.autograd.grad` of the summed
per-example losses yields the outputs' gradients and no weight gradients; norms and clipped sums then follow from
(input, output gradient) by the rules of `layers.py` ("book-keeping": Bu et al. 2022, arXiv:2210.00038). Norm and
contribution come from the same forward pass, so from the same dropout masks (P13). Clipped layer by layer, a layer is
done with as soon as its gradient arrives, and dropped (`streaming.py`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import adapters, layers, packing
from dpfa_hf.per_example.layers import LayerCall, PerExampleGradient
from dpfa_hf.per_example.shards import Shards
from dpfa_hf.per_example.streaming import Stream, Uses, changed_in_place
from dpfa_hf.per_example.units import ROWS_PER_UNIT, Units
from dpfa_hf.rounding import MAX_CANCELLATION, MAX_TERMS

AUTOMATIC_CLIPPING_STABILITY = 0.01

Batch = Mapping[str, Any]
PerExampleLoss = Callable[[nn.Module, Batch], torch.Tensor]


class Statistics(Protocol):
    """Coordinates of a unit's clipped vector beside its gradient; see `dpfa_hf.statistics`."""

    name: str

    def add(self, losses: torch.Tensor, norms: torch.Tensor, clipping_norm: float) -> None:
        """Adds the examples' coordinates, from losses [B] and the norms that clip, [groups, B]."""

    def take(self, device: torch.device) -> torch.Tensor:
        """The sums since the last `take`; the next begin at zero."""

    def discard(self) -> None:
        """Throws away the sums since the last `take`."""


@dataclass
class _Capture:
    name: str
    inputs: tuple
    kwargs: dict
    versions: list[tuple[torch.Tensor, int]]
    output: GradientEdge


class PerExampleGradients:
    """Turns micro-batches into clipped sums, one backward pass each.

    Args:
        model: any module of which every trainable parameter belongs to a layer with a rule (`layers.register_rule`).
        loss: maps (model, batch) to the losses of the examples, [B], each depending on its own example alone (P10).
        clipping_norm: C, the most that one example may add to the sum, in l2 norm.
        clipping: "flat" (min(1, C / norm)), "automatic" (C / (norm + 0.01); arXiv:2206.07136) or "per_layer" (each of L
            groups clipped to C / sqrt(L)).
        statistics: coordinates that are summed with the gradients, row for row, and taken with them.
        exact_sums: take norms and sums in float64, each example's product by itself, so that `dpfa_hf.rounding` bounds
            the worst case. An example of more than `MAX_TERMS` positions then adds zero.

    Raises:
        PrivacyError: naming the module, if a trainable parameter is covered by no rule; naming the parameter, if it is
            too large for the bounds of `exact_sums`.

    Guarantee:
        Adding, removing or replacing one example by nothing changes the sum over any set of calls of `accumulate`
        between two `take`s by at most C (1 + slack) in l2 norm over the whole trainable vector, where slack is
        `plan.sensitivity_slack` (rounding; P14, P15), provided that `preflight.check` passed for this model and loss.
        An example whose loss is not finite adds exactly zero, and in each clipping group, so does one whose gradient in
        that group is not finite; only "per_layer" has more groups than one. With `exact_sums` and one example in every
        micro-batch, in a model of 32 bits or fewer whose forward and backward pass give the same bits for the same
        example and weights, the same holds of the very numbers that `take` returns, with slack =
        `rounding.contribution_error()` + 2 `rounding.summation_error(1.0, examples=...)`: a theorem, where the other is
        measured.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerExampleLoss,
        *,
        clipping_norm: float,
        clipping: str = "flat",
        statistics: Statistics | None = None,
        exact_sums: bool = False,
    ) -> None:
        if clipping not in ("flat", "automatic", "per_layer"):
            raise PrivacyError(f"clipping={clipping!r} is unknown; use 'flat', 'automatic' or 'per_layer'")
        self.model, self.loss = model, loss
        self.clipping_norm, self.clipping = clipping_norm, clipping
        self.statistics, self.exact_sums = statistics, exact_sums
        self.layouts: dict[str, str] = {}
        self.parameters = {id(p): (name, p) for name, p in model.named_parameters() if p.requires_grad}
        self._named: dict[str, nn.Parameter] = dict(self.parameters.values())
        if not self.parameters:
            raise PrivacyError("model has no trainable parameter; set requires_grad on some, or add an adapter")
        if exact_sums:
            _refuse_large(self._named.items())
        self.shards = Shards.of(model, self._named)
        if self.shards is not None and exact_sums:
            raise PrivacyError(
                "floating_point='hardened' bounds sums that one process takes, and this model's are spread by FSDP2; "
                "use floating_point='snapped', or a model in one piece"
            )
        self._layers = covered_layers(model)
        # By layer, its trainable parameters: own name -> name in the model. FSDP2 puts others there while they compute.
        self._own = {
            layer: {own: self.parameters[id(p)][0] for own, p in adapters.trainable(module).items()}
            for layer, module in self._layers.items()
        }
        self._gathered: dict[str, torch.Tensor] = {}
        self._groups = self.clipping_groups()
        self._stream: Stream | None = None
        self._in_rule = False  # a rule may call its layer, at which the hooks must not look
        self._sums: dict[str, torch.Tensor] = {}
        self._captures: list[_Capture] | None = None
        self._batch_size = 0
        self._segments: packing.Segments | None = None
        self._units: Units | None = None
        self._infer_layouts = False
        self._adding = False

    # ---- the two calls of a training step -------------------------------------------------------------------------

    def accumulate(self, batch: Batch, *, counted: bool = True) -> torch.Tensor:
        """Add the clipped gradients of one micro-batch to the sum; returns its losses, [B], which are private.

        The batch holds one example in each row, or documents packed into one row in the form of `packing`. If a packed
        document is not finite, all are computed again, each in a row of its own: an attention weight of zero times a
        neighbour's infinity is no number.

        With `units.ROWS_PER_UNIT` it holds all rows of each of U units, whose losses are averaged. A unit then takes
        the place of an example, here and in all that is said of examples above; the losses are [U].

        Raises whatever the model raises. Nothing has been added to the sum then, or, of a packed row that was computed
        again, what came before. But "per_layer" adds groups during the backward pass, whose exceptions leave, of a row
        alone, the groups that were complete, each within its share of C; of several rows, a sum that `take` refuses:
        `discard` it and begin again, row by row.

        Of a model that is spread over processes (`shards`), all call together, each with rows of its own, and get the
        sum over all of them of the parameters' rows that are theirs. One that has no rows left passes any, with
        `counted` False: they are computed and add exactly zero.
        """
        if not self.layouts:
            raise PrivacyError("the model was not checked on synthetic rows; call preflight.check(engine, ...) first")
        if self._may_stream(batch):
            return self._accumulate_by_group(batch)
        with self.attached(), torch.enable_grad():
            losses, calls = self.backward(batch)
        with exact_matmul():
            uses = self._uses(calls)
            norms = self._norms_or_infinity(uses, torch.isfinite(losses) & counted)
        if self._entangled(norms):
            return torch.cat([self.accumulate(document) for document in packing.split(batch)])
        with exact_matmul():
            self._refuse_interrupted()
            self._adding = True
            if self.statistics is not None and counted:
                self.statistics.add(losses.detach(), norms, self.clipping_norm)
            self._add(uses, norms)
            self._adding = False
        return losses.detach()

    def _may_stream(self, batch: Batch) -> bool:
        """Whether groups may be added before it is known that the rest of the backward pass succeeds.

        Not for packed rows, which may have to be taken apart. But for a row alone, though a part of it stays if the
        rest raises: held whole, it could need more memory than the micro-batch that it is tried again from.
        """
        return (
            self.clipping == "per_layer"
            and not self.exact_sums
            and self.shards is None  # whose processes add the same parameters in the same order
            and not packing.is_packed(batch)
        )

    def _accumulate_by_group(self, batch: Batch) -> torch.Tensor:
        """As `accumulate`, but each clipping group is added as soon as the backward pass has its last gradient."""
        self._refuse_interrupted()
        groups_of = {layer: {self._groups[name] for name in own.values()} for layer, own in self._own.items()}

        def uses(layer: str, args: tuple, kwargs: dict[str, Any], grad: torch.Tensor) -> Uses:
            self._in_rule = True
            try:
                with exact_matmul():
                    return self._uses([self._call(layer, args, kwargs, grad)])
            finally:
                self._in_rule = False

        def add(group: int, uses: Uses) -> None:
            with exact_matmul():
                found = self._norms_or_infinity(uses, finite)
                norms[group] = found[group]
                self._adding = True
                self._add(uses, found)
                self._adding = several

        self._stream = Stream(self._groups, groups_of, uses, add)
        with self.attached(), torch.enable_grad():
            losses = self._losses(batch)
            finite = torch.isfinite(losses)
            norms = self._norms_or_infinity({}, finite)
            self._adding = several = len(losses) > 1  # of a row alone, what it has added is its own, and no more than C
            self._stream.backward(losses)
        with exact_matmul():
            if self.statistics is not None:
                self.statistics.add(losses.detach(), norms, self.clipping_norm)
        self._adding = False
        return losses.detach()

    def _entangled(self, norms: torch.Tensor) -> bool:
        """Whether a document that is not finite shares its row with others, whose norms it may have spoilt."""
        return self._segments is not None and norms.shape[1] > 1 and not bool(torch.isfinite(norms).all())

    def take(self) -> dict[str, torch.Tensor]:
        """The sums since the last `take`, by parameter name, float32 or float64; the engine starts again at zero.

        Those of the statistics come last, under their own name.

        Raises:
            PrivacyError: if an addition was interrupted, for then other examples' shares may be missing.
        """
        self._refuse_interrupted()
        for name, parameter in self._named.items():
            if name not in self._sums:
                self._sums[name] = self._zeros(name, parameter)
        sums, self._sums = self._sums, {}
        taken = {name: sums[name] for name in self._named}
        if self.statistics is not None:
            taken[self.statistics.name] = self.statistics.take(next(iter(taken.values())).device)
        return taken

    def discard(self) -> None:
        """Throw away the sums since the last `take`, whole or interrupted."""
        self._sums, self._adding = {}, False
        if self.statistics is not None:
            self.statistics.discard()

    def _refuse_interrupted(self) -> None:
        if self._adding:
            raise PrivacyError(
                "an earlier micro-batch was interrupted while it was being added, so this step's sum is incomplete; "
                "stop, and resume from the last checkpoint"
            )

    # ---- capture ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the covered layers, for the length of one forward and backward pass."""
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True) for name, module in self._layers.items()
        ]
        if self.shards is not None:
            handles += [module.register_forward_pre_hook(self._see(name)) for name, module in self._layers.items()]
        try:
            with adapters.prompts_by_example(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._captures = self._stream = None

    def backward(
        self, batch: Batch, *, infer_layouts: bool = False, retain_graph: bool = False
    ) -> tuple[torch.Tensor, list[LayerCall]]:
        """Losses [B], or [U] of units, and the layer calls with their output gradients; inside `attached`."""
        captures: list[_Capture] = []
        self._captures = captures
        losses = self._losses(batch, infer_layouts)
        self._captures = None
        grads: tuple = ()
        if captures and losses.requires_grad:
            edges = [capture.output for capture in captures]
            grads = torch.autograd.grad(losses.sum(), edges, allow_unused=True, retain_graph=retain_graph)
        calls = []
        for capture, grad in zip(captures, grads, strict=False):
            if grad is None:
                continue
            if any(tensor._version != version for tensor, version in capture.versions):
                raise changed_in_place(capture.name)
            calls.append(self._call(capture.name, capture.inputs, capture.kwargs, grad))
        return losses, calls

    def _losses(self, batch: Batch, infer_layouts: bool = False) -> torch.Tensor:
        """[B], or [U] of units, of a forward pass inside `attached`."""
        self._batch_size, self._segments = batch_size(batch), packing.Segments.of(batch)
        self._units = Units.of(batch)
        if self._units is not None and self._segments is not None:
            raise PrivacyError("data_collator packs the rows of users into one; use one that pads instead")
        self._infer_layouts = infer_layouts
        if infer_layouts:
            self._gathered.clear()
        losses = self.loss(self.model, {name: value for name, value in batch.items() if name != ROWS_PER_UNIT})
        if losses.shape != (self._batch_size,):
            raise PrivacyError(
                f"the per-example loss has shape {tuple(losses.shape)}, not ({self._batch_size},): return one loss per "
                "example (per_example_loss_fn)"
            )
        return losses if self._units is None else self._units.mean(losses)

    def _call(self, name: str, inputs: tuple, kwargs: dict[str, Any], grad: torch.Tensor) -> LayerCall:
        layout = self.layouts.get(name, layers.BATCHED)
        return LayerCall(self._layers[name], inputs, kwargs, grad, self._batch_size, layout, name, self._segments)

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
            if self._in_rule or not self._batch_size or not torch.is_grad_enabled() or not output.requires_grad:
                return None
            replaced = None
            if self._layout(name, output) == layers.SHARED:
                unbatched = output if output.shape[0] == 1 and output.dim() > 2 else output[None]
                output = replaced = unbatched.expand(self._batch_size, *unbatched.shape[1:])
            if self._stream is not None:
                return self._stream.tap(name, args, kwargs, output)
            if self._captures is not None:
                detach = _Detach()
                inputs, keywords = tuple(map(detach, args)), {k: detach(v) for k, v in kwargs.items()}
                self._captures.append(_Capture(name, inputs, keywords, detach.versions, get_gradient_edge(output)))
            return replaced

        return hook

    def _see(self, name: str) -> Callable:
        def see(module: nn.Module, args: tuple) -> None:
            for own, parameter in adapters.trainable(module).items() if self._infer_layouts else ():
                if self._gathered.setdefault(self._own[name][own], parameter) is not parameter:
                    raise PrivacyError(
                        f"{name}.{own} is tied to another layer's weight, but FSDP2 gathers the two apart, so that "
                        "they are two weights in training; call fully_shard once for the module that has both, after "
                        "they are tied, and on neither of them alone (distributed_config does otherwise)"
                    )

        return see

    def _layout(self, name: str, output: torch.Tensor) -> str:
        """How the output's first dimension relates to the examples: found on synthetic rows, then enforced."""
        first, size = output.shape[0], self._batch_size
        if self._infer_layouts:
            if self._segments is not None:
                found = self._packed_layout(name, output, self._segments.total)
            elif first == size:
                found = layers.BATCHED
            elif first == 1 or first % size:
                found = layers.SHARED
            else:
                found = layers.FLATTENED
            if self.layouts.setdefault(name, found) != found:
                raise PrivacyError(f"{name} is called with and without the examples in its first dimension; freeze it")
            return found
        layout = self.layouts.get(name)
        if self._segments is not None:
            fits = {layers.PACKED[axis]: True for axis in _token_dimensions(output, self._segments.total)}
        else:
            fits = {layers.BATCHED: first == size, layers.FLATTENED: first % size == 0, layers.SHARED: True}
        if layout is None or not fits.get(layout, False):
            raise PrivacyError(
                f"{name} returned {tuple(output.shape)} for {size} examples, unlike what it did on synthetic rows "
                f"({layout or 'not called'}); freeze it, or pass rows of one form only"
            )
        return layout

    def _packed_layout(self, name: str, output: torch.Tensor, total: int) -> str:
        dimensions = _token_dimensions(output, total)
        if not dimensions:
            raise PrivacyError(
                f"{name} returned {tuple(output.shape)} for a packed row of {total} tokens: what it gives is shared by "
                "the documents or pooled over them; freeze it, or use a data_collator that pads instead of packing"
            )
        return layers.PACKED[dimensions[0]]

    # ---- norms and sums ---------------------------------------------------------------------------------------------

    def _uses(self, calls: list[LayerCall]) -> Uses:
        """By parameter name, the per-example gradients of every use of it; tied weights meet here."""
        uses: Uses = {}
        while calls:
            call = calls.pop()
            rule = layers.find_rule(call.module)
            assert rule is not None
            gradients = rule(call)
            for own_name, name in self._own[call.name].items():
                found = gradients[own_name]
                found = found if self._units is None else self._units.gathered(found)
                uses.setdefault(name, []).append(found)
        if self.exact_sums:  # which are in float64 from here on
            return uses
        for name in uses:  # one by one, so that what a gradient was made of goes when it has come
            uses[name] = layers.write_out(uses[name])
        return uses

    def clipping_groups(self) -> dict[str, int]:
        """Parameter name -> clipping group. "per_layer": one group for each module that owns trainable parameters; a
        tied parameter is in the first one's. Otherwise one group."""
        groups: dict[str, int] = {}
        for name in self._named:
            groups[name] = 0
        if self.clipping == "per_layer":
            owners = {name: name.rpartition(".")[0] for name in groups}
            number = {owner: i for i, owner in enumerate(dict.fromkeys(owners.values()))}
            groups = {name: number[owner] for name, owner in owners.items()}
        return groups

    def norms(self, uses: Mapping[str, list[PerExampleGradient]], size: int, device: torch.device) -> torch.Tensor:
        """[groups, B] float64: what each example is clipped by in each group, its norm or, if larger, mass / 256."""
        groups = self._groups
        shape = (max(groups.values()) + 1, size)
        squared = torch.zeros(shape, dtype=torch.float64, device=device)
        mass_squared = torch.zeros(shape, dtype=torch.float64, device=device)
        for name, parts in uses.items():
            if self.exact_sums:
                if sum(part.positions for part in parts) > MAX_TERMS:
                    squared[groups[name]] = math.inf
                parts = [part.double() for part in parts]
            squared[groups[name]] += layers.combined_squared_norm(parts)
            mass = sum((part.mass for part in parts[1:]), parts[0].mass)
            mass_squared[groups[name]] += mass.square()
        return torch.maximum(squared.sqrt(), mass_squared.sqrt() / MAX_CANCELLATION)

    def _norms_or_infinity(self, uses: Uses, finite: torch.Tensor) -> torch.Tensor:
        """`norms`, infinite where a loss is not `finite` ([B] bool): it adds zero, whatever its gradient."""
        return self.norms(uses, len(finite), finite.device).masked_fill_(~finite, math.inf)

    def coefficients(self, norms: torch.Tensor) -> torch.Tensor:
        """[groups, B] float64: what each example is multiplied by in each group; 0 where its norm there is not finite,
        or so large that float32 cannot hold the coefficient (P15).

        Each group's share of C is C / sqrt(groups), so that the whole is within C (P12).
        """
        share = self.clipping_norm / len(norms) ** 0.5
        if self.clipping == "automatic":
            scale = share / (norms + AUTOMATIC_CLIPPING_STABILITY)
        else:
            scale = share / norms.clamp_min(share)
        # Below float32's smallest normal number a coefficient would be rounded by far more than the slack, upwards too.
        usable = torch.isfinite(norms) & (scale >= torch.finfo(torch.float32).tiny)
        return torch.where(usable, scale, 0.0)

    def _add(self, uses: Uses, norms: torch.Tensor) -> None:
        groups = self._groups
        weights = self.coefficients(norms)
        keep = torch.isfinite(norms)
        all_finite = bool(keep.all())
        # The processes of a spread model add the same parameters in the same order, whatever each has of them.
        for name in list(uses if self.shards is None else self._named):
            parts, parameter = uses.pop(name, []), self._named[name]
            spread = self.shards is not None and name in self.shards
            if not parts and not spread:
                continue
            if name not in self._sums:
                self._sums[name] = self._zeros(name, parameter)
            if not all_finite:
                parts = [part.zero_rows(keep[groups[name]]) for part in parts]
            total = self._sums[name]
            if spread:
                total = torch.zeros(parameter.shape, dtype=total.dtype, device=total.device)
            layers.add_weighted_sums(parts, weights[groups[name]], total, one_by_one=self.exact_sums)
            if spread:
                assert self.shards is not None
                self._sums[name] += self.shards.own_rows(name, total)

    def _zeros(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        dtype = torch.float64 if self.exact_sums else layers.compute_dtype(parameter)
        if self.shards is not None and name in self.shards:
            return self.shards.zeros(name, dtype)
        return torch.zeros_like(parameter, dtype=dtype)

    def gathered_parameters(self) -> list[torch.Tensor]:
        """The trainable parameters as the last synthetic forward pass has used them; those of FSDP2 in one piece."""
        return [self._gathered.get(name, parameter) for name, parameter in self._named.items()]


class _Detach:
    """Detaches tensors and remembers their version counters, to notice a later change in place."""

    def __init__(self) -> None:
        self.versions: list[tuple[torch.Tensor, int]] = []

    def __call__(self, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = value.detach()
        self.versions.append((tensor, tensor._version))
        return tensor


def covered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module for every module that answers for a trainable parameter (`adapters.trainable`).

    Raises:
        PrivacyError: naming the first module without a rule, and the way out.
    """
    found: dict[str, nn.Module] = {}
    uncovered: list[tuple[str, nn.Module, dict[str, nn.Parameter]]] = []
    covered: set[int] = set()
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        own = adapters.trainable(module)
        if not own or module in inside:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(f"{name} is a {type(module).__name__}: it mixes the examples of a batch; use LayerNorm")
        if name.endswith("relative_attention_bias"):
            raise PrivacyError(
                f"{name} (T5's learned position bias) is shared by all examples in a form that no norm rule covers; "
                "freeze it with requires_grad_(False)"
            )
        if layers.find_rule(module) is None:
            uncovered.append((name, module, own))
        else:
            found[name] = module
            covered.update(map(id, own.values()))
            if adapters.is_whole(module):
                inside.update(module.modules())
    for name, module, own in uncovered:
        missing = [n for n, p in own.items() if id(p) not in covered]
        if missing:
            raise PrivacyError(
                f"no norm rule covers {name or 'the model itself'} ({type(module).__name__}; trainable: "
                f"{', '.join(missing)}); freeze it with requires_grad_(False) or add one with dpfa_hf.register_rule"
            )
    return found


def _refuse_large(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in parameters:
        rows = len(parameter) if parameter.dim() else 1
        if max(rows, parameter.numel() // max(rows, 1)) > MAX_TERMS:
            raise PrivacyError(
                f"{name} has shape {tuple(parameter.shape)}, more than the {MAX_TERMS} rows or columns for which "
                "exact_sums are bounded; freeze it or use floating_point='snapped'"
            )


def _token_dimensions(output: torch.Tensor, total: int) -> list[int]:
    """Which dimensions of a layer's output may be the tokens of a packed row; the last one holds features."""
    sizes = output.shape[:-1][: len(layers.PACKED)]
    return [axis for axis, size in enumerate(sizes) if size == total and (axis == 0 or sizes[0] == 1)]


def batch_size(batch: Batch) -> int:
    """The number of examples in a collated micro-batch: the documents of a packed row, or the first dimension that all
    tensors share."""
    segments = packing.Segments.of(batch)
    if segments is not None:
        return segments.count
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, torch.Tensor) and value.dim() > 0}
    if len(sizes) != 1:
        raise PrivacyError(
            f"the data collator returned tensors with first dimensions {sorted(sizes)}; every one must hold one entry "
            "per example"
        )
    return sizes.pop()


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """float32 products in float32: no TF32, no bfloat16 passes, no autocast (P14)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
