"""One rule per layer type: what a layer's inputs and output gradients say about its per-example gradients.

A rule turns one call of a layer, after the backward pass, into the per-example gradients of that layer's own
parameters, in factored form. It never decides about norms or clipping: `Outer`, `Lookup` and `Dense` know how to take
their norm and their weighted sum, and `combined_squared_norm` knows what happens when several layers, or several calls
of one layer, share a parameter (the cross term of rule P12).

Add a layer type with one function::

    @register_rule(MyLinear)
    def my_linear(call):
        return {"weight": Outer(call.grad_rows, call.rows(call.inputs[0]))}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example.packing import Segments

# Elements of the largest temporary that a norm may need: 16 MB in float32, whatever the layer's or batch's size.
_MAX_TEMPORARY = 2**22


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32: norms and sums are never taken in half precision (P14)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass
class Outer:
    """Per-example gradients of a matrix as sums of outer products: gradient_i = left_i^T right_i.

    Args:
        left: [B, T, rows], float of any precision.
        right: [B, T, columns], float of any precision.
    """

    left: torch.Tensor
    right: torch.Tensor

    @cached_property
    def mass(self) -> torch.Tensor:
        """[B] float64, sum over t of |left_t| |right_t|: what rounding errors of the sum are proportional to."""
        dtype = compute_dtype(self.left)
        row = torch.linalg.vector_norm(self.left, dim=2, dtype=dtype)
        column = torch.linalg.vector_norm(self.right, dim=2, dtype=dtype)
        return (row * column).sum(1, dtype=torch.float64)

    def squared_norm(self) -> torch.Tensor:
        """[B] float64: through the T x T Gram matrices or through tiles of the gradient, whichever costs less."""
        length, rows, columns = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        if 2 * length * (rows + columns) < rows * columns:
            return self.gram_squared_norm()
        return self._tiled_squared_norm()

    def gram_squared_norm(self) -> torch.Tensor:
        """[B] float64. In float64 throughout, because the Gram form cancels: in float32 it could fall below zero."""
        batch, length, _ = self.left.shape
        out = self.left.new_empty(batch, dtype=torch.float64)
        step = max(1, _MAX_TEMPORARY // max(length * max(length, self.left.shape[2], self.right.shape[2]), 1))
        for start in range(0, batch, step):
            left, right = self.left[start : start + step].double(), self.right[start : start + step].double()
            gram = torch.bmm(left, left.transpose(1, 2)).mul_(torch.bmm(right, right.transpose(1, 2)))
            out[start : start + step] = gram.sum((1, 2)).clamp_min_(0)
        return out

    def _tiled_squared_norm(self) -> torch.Tensor:
        batch, _, rows = self.left.shape
        columns, dtype = self.right.shape[2], compute_dtype(self.left)
        out = self.left.new_zeros(batch, dtype=torch.float64)
        examples = max(1, _MAX_TEMPORARY // max(rows * columns, 1))
        tile = rows if examples > 1 else max(1, min(rows, _MAX_TEMPORARY // max(columns, 1)))
        for start in range(0, batch, examples):
            left = self.left[start : start + examples].to(dtype).transpose(1, 2)
            right = self.right[start : start + examples].to(dtype)
            for row in range(0, rows, tile):
                gradient = torch.bmm(left[:, row : row + tile], right)
                out[start : start + examples] += gradient.square_().sum((1, 2), dtype=torch.float64)
        return out

    def add_weighted_sum(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """out += sum_i weights_i gradient_i; weights [B], out [rows, columns] float32 or float64."""
        left, right = self.left.to(out.dtype), self.right.to(out.dtype)
        scale = weights.to(out.dtype)[:, None, None]
        if left.shape[2] < right.shape[2]:
            left = left * scale
        else:
            right = right * scale
        out.addmm_(left.flatten(0, 1).t(), right.flatten(0, 1))

    def zero_rows(self, keep: torch.Tensor) -> Outer:
        """The same with examples outside `keep` ([B] bool) set to zero, so that 0 * inf cannot make NaN (P15)."""
        drop = ~keep[:, None, None]
        return Outer(self.left.masked_fill(drop, 0), self.right.masked_fill(drop, 0))

    def example(self, i: int) -> torch.Tensor:
        """[rows, columns] float64, the gradient of example i."""
        return self.left[i].double().t() @ self.right[i].double()


@dataclass
class Lookup:
    """Per-example gradients of a table of which rows were read: gradient_i[v] = sum of grad_t over t with index_t = v.

    Args:
        index: [B, T] int64.
        grad: [B, T, columns], float of any precision.
        num_rows: rows of the table.
    """

    index: torch.Tensor
    grad: torch.Tensor
    num_rows: int

    @cached_property
    def mass(self) -> torch.Tensor:
        """[B] float64, sum over t of |grad_t|."""
        return torch.linalg.vector_norm(self.grad, dim=2, dtype=compute_dtype(self.grad)).sum(1, dtype=torch.float64)

    def squared_norm(self) -> torch.Tensor:
        """[B] float64; repeated indices of an example are added up before squaring."""
        batch, length, columns = self.grad.shape
        example = torch.arange(batch, device=self.index.device)[:, None]
        key, slot = torch.unique(example * self.num_rows + self.index, return_inverse=True)
        summed = torch.zeros(len(key), columns, dtype=torch.float64, device=self.grad.device)
        summed.index_add_(0, slot.flatten(), self.grad.reshape(batch * length, columns).double())
        out = torch.zeros(batch, dtype=torch.float64, device=self.grad.device)
        return out.index_add_(0, key // self.num_rows, summed.square_().sum(1))

    def add_weighted_sum(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """out[index] += weights_i grad; weights [B], out [num_rows, columns]."""
        grad = self.grad.to(out.dtype) * weights.to(out.dtype)[:, None, None]
        out.index_add_(0, self.index.flatten(), grad.flatten(0, 1))

    def zero_rows(self, keep: torch.Tensor) -> Lookup:
        return Lookup(self.index, self.grad.masked_fill(~keep[:, None, None], 0), self.num_rows)

    def example(self, i: int) -> torch.Tensor:
        out = torch.zeros(self.num_rows, self.grad.shape[2], dtype=torch.float64, device=self.grad.device)
        return out.index_add_(0, self.index[i], self.grad[i].double())


@dataclass
class Dense:
    """Per-example gradients written out, for parameters so small (biases, norms) that this costs nothing.

    Args:
        grads: [B, *parameter shape]. Rules sum over positions in float64, so that no cancellation is lost.
    """

    grads: torch.Tensor

    @property
    def mass(self) -> torch.Tensor:
        """[B] float64. The sum over positions was exact to float64, so its mass is its norm."""
        return self.squared_norm().sqrt()

    def squared_norm(self) -> torch.Tensor:
        return self.grads.double().flatten(1).square().sum(1)

    def add_weighted_sum(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        grads = self.grads.flatten(1).double()
        out.add_((weights.double() @ grads).view(out.shape).to(out.dtype))

    def zero_rows(self, keep: torch.Tensor) -> Dense:
        return Dense(self.grads.flatten(1).masked_fill(~keep[:, None], 0).view_as(self.grads))

    def example(self, i: int) -> torch.Tensor:
        return self.grads[i].double()


PerExampleGradient = Outer | Lookup | Dense


def combined_squared_norm(uses: Sequence[PerExampleGradient]) -> torch.Tensor:
    """[B] float64, the squared norm of the *sum* of a parameter's per-example gradients over all its uses.

    Guarantee:
        A tied weight, or a layer called twice, is counted with the cross term: |a + b|^2, never |a|^2 + |b|^2 (P12).
    """
    uses = merge_uses(uses)
    if len(uses) == 1:
        return uses[0].squared_norm()
    outer = [use for use in uses if isinstance(use, Outer)]
    lookup = [use for use in uses if isinstance(use, Lookup)]
    if len(outer) == len(lookup) == 1 and len(uses) == 2:
        cross = _outer_lookup_product(outer[0], lookup[0])
        return (outer[0].gram_squared_norm() + lookup[0].squared_norm() + 2 * cross).clamp_min_(0)
    examples = range(uses[0].mass.shape[0])
    return torch.stack([sum((use.example(i) for use in uses[1:]), uses[0].example(i)).square().sum() for i in examples])


def merge_uses(uses: Sequence[PerExampleGradient]) -> list[PerExampleGradient]:
    """Uses of one kind become one use over the concatenated positions: the gradients add up, exactly."""
    outer = [use for use in uses if isinstance(use, Outer)]
    lookup = [use for use in uses if isinstance(use, Lookup)]
    dense = [use for use in uses if isinstance(use, Dense)]
    merged: list[PerExampleGradient] = []
    if outer:
        single = len(outer) == 1
        left = outer[0].left if single else torch.cat([use.left for use in outer], 1)
        merged.append(outer[0] if single else Outer(left, torch.cat([use.right for use in outer], 1)))
    if lookup:
        index = torch.cat([use.index for use in lookup], 1)
        merged.append(Lookup(index, torch.cat([use.grad for use in lookup], 1), lookup[0].num_rows))
    if dense:
        merged.append(dense[0] if len(dense) == 1 else Dense(sum((use.grads for use in dense[1:]), dense[0].grads)))
    return merged


def _outer_lookup_product(outer: Outer, lookup: Lookup) -> torch.Tensor:
    """[B] float64, the inner product of the two gradients: a tied language-model head against its embedding."""
    batch, length, _ = outer.left.shape
    out = outer.left.new_empty(batch, dtype=torch.float64)
    for i in range(batch):
        inner = outer.right[i].double() @ lookup.grad[i].double().t()
        out[i] = (inner * outer.left[i].index_select(1, lookup.index[i]).double()).sum()
    return out


# How a layer's output relates to the examples; found once, before step 1, then enforced.
BATCHED, FLATTENED, SHARED = "batched", "flattened", "shared"
# In a packed row the tokens of all examples lie along one dimension: [T, ...], [1, T, ...] or [1, heads, T, ...].
PACKED = tuple(f"packed along dimension {axis}" for axis in range(3))


@dataclass
class LayerCall:
    """One call of a layer during a forward pass, with the gradient that came back to its output.

    Attributes:
        module: the layer.
        inputs: its positional arguments, detached.
        kwargs: its keyword arguments, detached.
        output_grad: gradient of the summed losses with respect to its output; the shape of the output.
        batch_size: B, the number of examples in the micro-batch.
        layout: "batched" ([B, ...]), "flattened" ([B * T, ...], examples one after another) or "shared" (one value for
            all examples, such as position embeddings; the engine has expanded the output to [B, ...]) or one of
            `PACKED`.
        segments: where the examples lie, if they are packed into one row.
    """

    module: nn.Module
    inputs: tuple
    kwargs: Mapping
    output_grad: torch.Tensor
    batch_size: int
    layout: str = BATCHED
    name: str = field(default="", repr=False)
    segments: Segments | None = field(default=None, repr=False)

    def examples(self, tensor: torch.Tensor, *, is_grad: bool = False) -> torch.Tensor:
        """The tensor with the examples in its first dimension, [B, ...]; a view, an expansion or a copy, never a sum.

        Packed examples come out as long as the longest, with zeros behind the others' gradients and, elsewhere, their
        own last token over again: finite wherever the example is, and multiplied by those zeros.
        """
        if self.segments is not None:
            axis = PACKED.index(self.layout)
            tokens = tensor[0].movedim(axis - 1, 0) if axis else tensor
            return self.segments.unpack(tokens, 0 if is_grad or tensor is self.output_grad else None)
        if self.layout == SHARED and not is_grad:
            tensor = tensor if tensor.shape[0] == 1 and tensor.dim() == self.output_grad.dim() else tensor[None]
            return tensor.expand(self.batch_size, *tensor.shape[1:])
        if self.layout == FLATTENED:
            return tensor.reshape(self.batch_size, -1, *tensor.shape[1:])
        return tensor

    def rows(self, tensor: torch.Tensor, *, is_grad: bool = False) -> torch.Tensor:
        """The tensor as [B, T, features]; all positions between the examples and the features become T."""
        tensor = self.examples(tensor, is_grad=is_grad)
        return tensor.reshape(self.batch_size, -1, tensor.shape[-1])

    @property
    def grad_rows(self) -> torch.Tensor:
        """The output's gradient as [B, T, features]."""
        return self.rows(self.output_grad, is_grad=True)


Rule = Callable[[LayerCall], dict[str, PerExampleGradient]]
_RULES: dict[Callable, Rule] = {}


def register_rule(*layer_types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register the rule of a layer type, as a decorator.

    The rule is chosen by the layer's own ``forward``: a subclass that changes it does not inherit the rule. It takes a
    `LayerCall` and returns, for each of the layer's own trainable parameters by name, an `Outer`, `Lookup` or `Dense`.
    It may assume nothing: before the first step every rule is held against autograd on synthetic rows.
    """

    def decorate(rule: Rule) -> Rule:
        for layer_type in layer_types:
            _RULES[layer_type.forward] = rule
        return rule

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for a layer, or None: the layer's trainable parameters must then be refused."""
    rule = _RULES.get(type(module).forward)
    if rule is not None:
        return rule
    if isinstance(module, nn.Embedding):
        return _embedding_subclass
    name = type(module).__name__
    small = all(p.dim() == 1 for p in module.parameters(recurse=False)) and not list(module.children())
    if small and name.endswith("Norm") and not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _elementwise_norm
    if name == "Conv1D" and hasattr(module, "nf"):
        return _gpt2_conv1d
    if name in ("ViTEmbeddings", "DeiTEmbeddings"):
        return _vision_embeddings
    return None


def rule_name(rule: Rule) -> str:
    """What `dpfa check` prints for a rule."""
    return rule.__name__.strip("_").replace("_", " ")


def _bias(grad_rows: torch.Tensor) -> Dense:
    return Dense(grad_rows.sum(1, dtype=torch.float64))


@register_rule(nn.Linear)
def _linear(call: LayerCall) -> dict[str, PerExampleGradient]:
    grad = call.grad_rows
    out: dict[str, PerExampleGradient] = {"weight": Outer(grad, call.rows(call.inputs[0]))}
    if call.module.bias is not None:
        out["bias"] = _bias(grad)
    return out


def _gpt2_conv1d(call: LayerCall) -> dict[str, PerExampleGradient]:
    grad = call.grad_rows
    return {"weight": Outer(call.rows(call.inputs[0]), grad), "bias": _bias(grad)}


@register_rule(nn.Embedding)
def _embedding(call: LayerCall) -> dict[str, PerExampleGradient]:
    module = call.module
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise PrivacyError(
            f"{call.name}: nn.Embedding with max_norm, scale_grad_by_freq or sparse=True has gradients that depend on "
            "other examples; build it without that option"
        )
    grad = call.grad_rows
    index = call.examples(call.inputs[0] if call.inputs else call.kwargs["input"])
    index = index.reshape(call.batch_size, -1)
    if module.padding_idx is not None:
        grad = grad.masked_fill((index == module.padding_idx)[..., None], 0)
    return {"weight": Lookup(index, grad, module.num_embeddings)}


def _embedding_subclass(call: LayerCall) -> dict[str, PerExampleGradient]:
    """Embeddings that compute their own indices or scale their output (BART, OPT, Whisper, Gemma).

    Which row was read, and by what it was multiplied, is asked of the layer itself: its forward is linear in the
    table, so a table whose row v holds (v, 1) answers (scale * index, scale).
    """
    module = call.module
    assert isinstance(module, nn.Embedding)
    weight = module.weight
    probe = torch.stack([torch.arange(len(weight)), torch.ones(len(weight))], 1).to(weight.device, torch.float64)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        answer = functional_call(module, {"weight": probe}, call.inputs, dict(call.kwargs))
    answer = call.rows(answer)
    scale = answer[..., 1]
    index = (answer[..., 0] / scale).round().long()
    grad = call.grad_rows
    if module.padding_idx is not None:
        grad = grad.masked_fill((index == module.padding_idx)[..., None], 0)
    return {"weight": Lookup(index, grad * scale[..., None].to(grad.dtype), module.num_embeddings)}


def _elementwise_norm(call: LayerCall) -> dict[str, PerExampleGradient]:
    """LayerNorm and every variant of RMSNorm: the layer's own forward, differentiated example by example.

    Exact for whatever the variant does with its vectors (Gemma multiplies by 1 + weight), because nothing is assumed
    about it but that it treats examples separately, which the isolation check shows.
    """
    module = call.module
    parameters = {k: p.detach() for k, p in module.named_parameters(recurse=False) if p.requires_grad}
    frozen = {k: p.detach() for k, p in module.named_parameters(recurse=False) if not p.requires_grad}
    frozen.update(module.named_buffers(recurse=False))
    dtype = compute_dtype(call.output_grad)
    parameters = {k: p.to(dtype) for k, p in parameters.items()}
    x = call.examples(call.inputs[0]).to(dtype)
    grad = call.examples(call.output_grad, is_grad=True).to(dtype)

    def one_example(x_i: torch.Tensor, grad_i: torch.Tensor) -> dict[str, torch.Tensor]:
        def forward(p: dict[str, torch.Tensor]) -> torch.Tensor:
            return functional_call(module, {**frozen, **p}, (x_i[None],))[0].to(dtype)

        return vjp(forward, parameters)[1](grad_i)[0]

    with torch.autocast(x.device.type, enabled=False):
        grads = vmap(one_example)(x, grad)
    return {name: Dense(grad) for name, grad in grads.items()}


@register_rule(nn.LayerNorm)
def _layer_norm(call: LayerCall) -> dict[str, PerExampleGradient]:
    module = call.module
    assert isinstance(module, nn.LayerNorm)
    dtype = compute_dtype(call.output_grad)
    if len(module.normalized_shape) != 1:
        return _elementwise_norm(call)
    grad = call.grad_rows.to(dtype)
    out: dict[str, PerExampleGradient] = {}
    if module.weight.requires_grad:
        x = nn.functional.layer_norm(call.rows(call.inputs[0]).to(dtype), module.normalized_shape, eps=module.eps)
        out["weight"] = Dense(x.mul_(grad).sum(1, dtype=torch.float64))
    if module.bias is not None:
        out["bias"] = _bias(grad)
    return out


@register_rule(nn.Conv1d, nn.Conv2d)
def _convolution(call: LayerCall) -> dict[str, PerExampleGradient]:
    """Patch embeddings and audio stems: a convolution is a linear layer over unfolded patches."""
    module = call.module
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise PrivacyError(
            f"{call.name}: a convolution with groups, string padding or padding_mode={module.padding_mode!r} has no "
            "norm rule; freeze it or register one with dpfa_hf.register_rule"
        )
    x, grad = call.examples(call.inputs[0]), call.examples(call.output_grad, is_grad=True)
    kernel, dilation, padding, stride = module.kernel_size, module.dilation, module.padding, module.stride
    if isinstance(module, nn.Conv1d):
        x = x[:, :, None]
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        padding = (0, *padding)
    patches = nn.functional.unfold(x.to(compute_dtype(x)), kernel, dilation, padding, stride).transpose(1, 2)
    grad_rows = grad.flatten(2).transpose(1, 2)
    out: dict[str, PerExampleGradient] = {"weight": Outer(grad_rows, patches)}
    if module.bias is not None:
        out["bias"] = _bias(grad_rows)
    return out


def _vision_embeddings(call: LayerCall) -> dict[str, PerExampleGradient]:
    """ViT's and DeiT's own vectors: the class (and distillation) token and the positions, added to every image."""
    module = call.module
    if getattr(module, "mask_token", None) is not None and module.mask_token.requires_grad:
        raise PrivacyError(f"{call.name}.mask_token has no norm rule; freeze it (requires_grad_(False))")
    dropout = getattr(module, "dropout", None)
    if isinstance(dropout, nn.Dropout) and dropout.p > 0:
        raise PrivacyError(
            f"{call.name}: hidden_dropout_prob > 0 hides the gradient of cls_token and position_embeddings; set it to "
            "0 in the model's config or freeze the two parameters"
        )
    grad = call.examples(call.output_grad, is_grad=True).double()
    out: dict[str, PerExampleGradient] = {"position_embeddings": Dense(grad[:, None])}
    for position, name in enumerate(n for n in ("cls_token", "distillation_token") if hasattr(module, n)):
        out[name] = Dense(grad[:, None, position : position + 1])
    return out
