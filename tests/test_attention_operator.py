"""The Triton attention as an operator: its contract, `torch.compile`, and whole models on the interpreter."""

from __future__ import annotations

import copy
import os
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from dpfa_hf._kernel import Pattern, attention, dispatch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test` in a process of its own"),
]

SMALL: dict[str, Any] = dict(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
)  # fmt: skip
DECODER = SMALL | dict(num_key_value_heads=1, head_dim=16)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(**DECODER, sliding_window=5, attn_logit_softcapping=2.0),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **DECODER, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    ),
    "bert": lambda: transformers.BertConfig(**SMALL, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SMALL, local_attention=6, global_attn_every_n_layers=2, layer_types=["sliding_attention", "full_attention"]
    ),
}
ENCODERS = ("bert", "modernbert")
LENGTH = 13


def arguments(*, sinks: bool = False, dropout: bool = False, masked: bool = False) -> list[Any]:
    torch.manual_seed(0)
    query = torch.randn(2, 2, 7, 16, requires_grad=True)
    key, value = (torch.randn(2, 1, 7, 16, requires_grad=True) for _ in range(2))
    return [
        query, key, value, torch.tensor([[True] * 7, [True] * 5 + [False] * 2]) if masked else None, None, None,
        torch.randn(2, 2, requires_grad=True) if sinks else None, torch.tensor([7]) if dropout else None,
        0.25, True, None, None, 0.5 if dropout else 0.0,
    ]  # fmt: skip


@pytest.mark.parametrize("given", [{}, {"sinks": True}, {"dropout": True}, {"masked": True}])
def test_operator_keeps_the_contract_of_pytorch(given: dict[str, bool]) -> None:
    torch.library.opcheck(torch.ops.dpfa_hf.attention_forward.default, tuple(arguments(**given)))


@pytest.mark.parametrize("given", [{}, {"sinks": True, "masked": True}])
def test_operator_equals_the_kernel_package_alone(given: dict[str, bool]) -> None:
    from dpfa_hf._kernel.flash import flash_attention as alone

    from dpfa_hf.attention_operator import flash_attention as operator

    results = []
    for flash in (alone, operator):
        *tensors, scale, is_causal, window, softcap, dropout = arguments(**given)
        output, lse = flash(*tensors, Pattern(scale, is_causal, window, softcap, dropout))
        inputs = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        finite = torch.where(torch.isfinite(lse), lse, 0.0)
        results.append([output, lse, *torch.autograd.grad(output.square().sum() + finite.sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Prefers Triton wherever it can compute a call, and counts who computed."""
    counter: Counter[str] = Counter()

    def prefer_triton(call: dispatch.Call) -> str:
        backend = "triton" if dispatch._triton(call) else "reference"
        counter[backend] += 1
        return backend

    monkeypatch.setattr(dispatch, "choose", prefer_triton)
    return counter


def model_pair(family: str) -> tuple[Any, Any]:
    cls = AutoModelForSequenceClassification if family in ENCODERS else AutoModelForCausalLM
    models = []
    for name in ("dp_flash", "eager"):
        torch.manual_seed(0)
        models.append(cls.from_config(copy.deepcopy(CONFIGS[family]()), attn_implementation=name))
    models[1].load_state_dict(models[0].state_dict())
    return models[0].eval(), models[1].eval()


def results(model: Any, inputs: dict[str, Any], rows: Tensor | None) -> list[Tensor]:
    """Logits, at real tokens only, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(**inputs).logits
    if rows is not None and logits.ndim == 3:
        logits = logits[rows.bool()]
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def batch(family: str, form: str) -> tuple[dict[str, Any], Tensor | None]:
    torch.manual_seed(1)
    tokens = torch.randint(3, 32, (2, LENGTH))
    if form == "plain":
        return {"input_ids": tokens}, None
    if form == "packed":
        positions = torch.tensor([[*range(4), *range(6), *range(LENGTH - 10)]])
        return {"input_ids": tokens[:1], "position_ids": positions, "use_cache": False}, None
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -4:] = 0
    return {"input_ids": tokens, "attention_mask": mask if form == "right" else mask.flip(1)}, (
        mask if form == "right" else mask.flip(1)
    )


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", "plain"), ("llama", "right"), ("llama", "left"), ("llama", "packed"),
        ("mistral", "right"), ("mistral", "packed"), ("gemma2", "left"), ("gemma2", "packed"),
        ("gpt_oss", "right"), ("bert", "right"), ("modernbert", "right"), ("modernbert", "plain"),
    ],
)  # fmt: skip
def test_model_on_the_kernels_equals_eager(family: str, form: str, calls: Counter[str]) -> None:
    ours, eager = model_pair(family)
    inputs, rows = batch(family, form)
    for mine, theirs in zip(results(ours, inputs, rows), results(eager, inputs, rows), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    # No layer of these fell back to the reference: no mask had to be written out.
    assert calls["triton"] >= 2 and not calls["reference"]


def test_mutant_packing_that_reaches_the_kernels_without_segments_differs(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpfa_hf import attention as front

    def without_segments(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **{name: value for name, value in kwargs.items() if not name.startswith("segments")})

    monkeypatch.setattr(front, "exact_attention", without_segments)
    ours, eager = model_pair("llama")
    inputs, rows = batch("llama", "packed")
    assert not torch.allclose(results(ours, inputs, rows)[0], results(eager, inputs, rows)[0], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
@pytest.mark.parametrize("form", ["plain", "right"])
def test_compiles_without_a_graph_break(family: str, form: str, calls: Counter[str]) -> None:
    ours, _ = model_pair(family)
    inputs, rows = batch(family, form)
    if family != "bert":
        inputs["use_cache"] = False
    expected = results(ours, inputs, rows)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(results(compiled, inputs, rows), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not calls["reference"]


def test_mask_functions_say_what_they_are_made_from() -> None:
    from transformers import masking_utils as masks

    from dpfa_hf.attention import _packed_sequences

    numbers, positions = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 0]])
    window = masks.sliding_window_causal_mask_function(2)
    plain = masks.packed_sequence_compatibility_function(masks.causal_mask_function, positions, numbers)
    windowed = masks.packed_sequence_compatibility_function(window, positions, numbers)
    assert _packed_sequences(plain, None) is numbers and _packed_sequences(windowed, 2) is numbers
    mixed = masks.packed_sequence_compatibility_function(
        masks.or_masks(masks.causal_mask_function, masks.bidirectional_mask_function), positions, numbers
    )
    for other, local_size in ((plain, 2), (windowed, None), (windowed, 3), (window, 2), (mixed, None)):
        assert _packed_sequences(other, local_size) is None
