"""Rules for PEFT's adapters, and whose their parameters are.

Plain LoRA is made of layers that have rules of their own. Most other adapters keep their parameters in dictionaries
beside the layer that they change, and use them in its forward alone: there the adapted layer as a whole is
differentiated, one example after another. That costs a forward and a backward pass through the layer, and an example's
own gradient of the adapter, which is small; and it is exact whatever the adapter does, as long as it draws no random
numbers. Embeddings have cheaper rules. PEFT is never imported: its classes are known by their names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example.layers import (
    Dense,
    LayerCall,
    Lookup,
    Outer,
    PerExampleGradient,
    compute_dtype,
    find_rule,
    register_rule,
)
from dpfa_hf.per_example.shards import whole

_WHOLE = (
    "beft.layer.Linear",
    "boft.layer.Linear",
    "boft.layer.Conv2d",
    "c3a.layer.C3ALinear",
    "deft.layer.DeftLinear",
    "delora.layer.DeloraLinear",
    "fourierft.layer.FourierFTLinear",
    "frod.layer.Linear",
    "glora.layer.GloraLinear",
    "gralora.layer.Linear",
    "hira.layer.Linear",
    "hira.layer._ConvNd",
    "hra.layer.HRALinear",
    "hra.layer.HRAConv2d",
    "ia3.bnb.Linear4bit",
    "ia3.bnb.Linear8bitLt",
    "ia3.layer.Linear",
    "ia3.layer.Conv2d",
    "lily.layer.Linear",
    "loha.layer.LoHaLayer",
    "lokr.layer.LoKrLayer",
    "lora.bnb.Linear4bit",
    "lora.bnb.Linear8bitLt",
    "lora.layer.Linear",
    "lora.layer._ConvNd",
    "miss.layer.MissLinear",
    "oft.layer.Linear",
    "oft.layer.Conv2d",
    "peanut.layer.Linear",
    "psoft.layer.Linear",
    "randlora.layer.Linear",
    "road.layer.Linear",
    "shira.layer.Linear",
    "supertuning.layer.Linear",
    "tinylora.layer.Linear",
    "unilora.layer.Linear",
    "vblora.layer.Linear",
    "vera.bnb.Linear4bit",
    "vera.bnb.Linear8bitLt",
    "vera.layer.Linear",
    "waveft.layer.WaveFTLinear",
)


def is_whole(module: nn.Module) -> bool:
    """Whether a layer is differentiated with all that is in it. LoRA's is only under a variant, such as DoRA."""
    return find_rule(module) is adapted_layer and bool(getattr(module, "lora_variant", True))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that a layer's rule answers for, tied ones too, by their names within the layer: its
    own, those in its dictionaries and lists of parameters, which have no forward, and all of a layer taken whole."""
    named = dict(module.named_parameters(recurse=is_whole(module), remove_duplicate=False))
    for name, child in module.named_children():
        if isinstance(child, nn.ParameterDict | nn.ParameterList):
            named |= {f"{name}.{key}": parameter for key, parameter in child.named_parameters(recurse=False)}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def is_embedding(module: Any) -> bool:
    """Whether a layer reads a table by indices."""
    table = module.get_base_layer() if find_rule(module) is trainable_tokens else module
    return isinstance(table, nn.Embedding)


def trained_tokens(model: nn.Module) -> list[int]:
    """The tokens of which alone a table's rows are trained: synthetic rows must hold some, or else show nothing."""
    found: set[int] = set()
    layer: Any
    for layer in model.modules():
        if find_rule(layer) is trainable_tokens and trainable(layer):
            found.update(*layer.token_indices.values())
    return sorted(found)


@register_rule(*(f"peft.tuners.{path}" for path in _WHOLE))
def adapted_layer(call: LayerCall) -> dict[str, PerExampleGradient]:
    """A layer with its adapter: its own forward again, example by example, in float32 or better.

    Raises:
        PrivacyError: if the forward draws random numbers, which would not be those of the first time (P13), or if a
            parameter is sharded.
    """
    module, dtype = call.module, compute_dtype(call.output_grad)
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise PrivacyError(
            f"{call.name}: this adapter's rule needs the layer's weights in one piece, and FSDP2 has spread them; use "
            "LoRA"
        )
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    # Quantised weights stay as they are: what is known of them beside their numbers would be lost.
    plain = {name: tensor for name, tensor in tensors.items() if type(tensor) in (torch.Tensor, nn.Parameter)}
    state = {name: _converted(tensor.detach(), dtype) for name, tensor in plain.items()}
    own = {name: state[name].requires_grad_() for name in trainable(module)}
    inputs = [_converted(call.examples(x), dtype) if isinstance(x, torch.Tensor) else x for x in call.inputs]
    grad = call.examples(call.output_grad, is_grad=True).to(dtype)
    grads = {name: grad.new_zeros(call.batch_size, *tensor.shape) for name, tensor in own.items()}
    # LoHa and LoKr draw a number even where nothing is dropped.
    rates = [rate for name in ("module_dropout", "rank_dropout") for rate in getattr(module, name, {}).values()]
    if any(rates):
        raise _draws(call)
    draws = _random_state(grad.device)
    for i in range(call.batch_size):
        row = tuple(x[i : i + 1] if isinstance(x, torch.Tensor) else x for x in inputs)
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            output = functional_call(module, state, row, dict(call.kwargs))
            found = torch.autograd.grad(output, list(own.values()), grad[i : i + 1], allow_unused=True)
        for name, gradient in zip(own, found, strict=True):
            if gradient is not None:
                grads[name][i] = gradient
    if not torch.equal(draws, _random_state(grad.device)) and not rates:
        raise _draws(call)
    return {name: Dense(gradients) for name, gradients in grads.items()}


def _converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _draws(call: LayerCall) -> PrivacyError:
    return PrivacyError(
        f"{call.name} ({type(call.module).__name__}) draws random numbers in its forward, which its norm rule would "
        "have to draw again; set the adapter's dropout to 0"
    )


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@register_rule("peft.tuners.lora.layer.Embedding")
def _lora_embedding(call: LayerCall) -> dict[str, PerExampleGradient]:
    """The table's LoRA: its A is a table of which columns are read, its B a matrix applied to them."""
    module: Any = call.module
    out: dict[str, PerExampleGradient] = {}
    index, dtype = _tokens(call), compute_dtype(call.output_grad)
    grad = call.grad_tokens.to(dtype)
    for name in trainable(module):
        which, _, adapter = name.partition(".")
        if module.lora_variant or which not in ("lora_embedding_A", "lora_embedding_B"):
            raise PrivacyError(
                f"{call.name}: of LoRA on embeddings the plain form alone has a norm rule; take the embedding out of "
                "target_modules"
            )
        scaled = grad * module.scaling[adapter] * _embed_scale(module)
        if which == "lora_embedding_B":
            table = whole(module.lora_embedding_A[adapter].detach()).to(dtype).t()
            out[name] = Outer(scaled, table[index], call.packing)
        else:
            read = _without_padding(module, index, scaled @ whole(module.lora_embedding_B[adapter].detach()).to(dtype))
            out[name] = Lookup(index, read, module.get_base_layer().num_embeddings, call.packing, transposed=True)
    return out


@register_rule("peft.tuners.trainable_tokens.layer.TrainableTokensLayer")
def trainable_tokens(call: LayerCall) -> dict[str, PerExampleGradient]:
    """Some rows of a table, where it is read and where a tied head multiplies by it."""
    module: Any = call.module
    base = module.get_base_layer()
    out: dict[str, PerExampleGradient] = {}
    for name in trainable(module):
        which, _, adapter = name.partition(".")
        if which != "trainable_tokens_delta":
            raise PrivacyError(f"{call.name}.{name} is trained beside some of its own rows; freeze it")
        rows = torch.tensor(module.token_indices[adapter], device=call.output_grad.device)
        if len(rows.unique()) < len(rows):
            raise PrivacyError(f"{call.name}: a token is listed twice among those to be trained; list each once")
        if isinstance(base, nn.Linear):
            left = call.grad_tokens.index_select(-1, rows)
            out[name] = Outer(left, call.tokens(call.inputs[0]), call.packing)
            continue
        index = _tokens(call)
        slot = torch.full((base.num_embeddings,), -1, device=rows.device)
        slot = slot.index_copy(0, rows, torch.arange(len(rows), device=rows.device))[index]
        grad = _without_padding(module, index, call.grad_tokens * _embed_scale(module))
        grad = grad.masked_fill((slot < 0)[..., None], 0)
        out[name] = Lookup(slot.clamp_min(0), grad, len(rows), call.packing)
    return out


def _tokens(call: LayerCall) -> torch.Tensor:
    """The indices that an embedding was called with, as `Lookup` takes them."""
    index = call.inputs[0]
    return call.examples(index).reshape(call.batch_size, -1) if call.packing is None else index.flatten()


def _without_padding(module: Any, index: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    padding = module.get_base_layer().padding_idx
    return grad if padding is None else grad.masked_fill((index == padding)[..., None], 0)


def _embed_scale(module: Any) -> torch.Tensor | float:
    """By what Gemma and its like multiply what they read."""
    scale = module._get_embed_scale()
    return 1.0 if scale is None else scale.detach()


@contextlib.contextmanager
def prompts_by_example(model: Any) -> Iterator[None]:
    """Soft prompts computed for every example, for the length of a forward pass: PEFT computes them once and repeats
    the outcome, after which their gradient is the sum over the batch."""
    configs = getattr(model, "peft_config", None) or {}
    if not any(config.peft_type in ("PROMPT_TUNING", "P_TUNING") for config in configs.values()):
        yield
        return

    def get_prompt(batch_size: int, *args: object, **kwargs: object) -> torch.Tensor:
        encoder, tokens = model.prompt_encoder[model.active_adapter], model.prompt_tokens[model.active_adapter]
        return encoder(tokens.expand(batch_size, -1).to(encoder.embedding.weight.device))

    model.get_prompt = get_prompt
    try:
        yield
    finally:
        del model.get_prompt
