"""Shards of one process; what several do with theirs is in `tests/test_processes.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import preflight
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.per_example.losses import per_example_loss
from dpfa_hf.per_example.shards import Shards, whole

BATCH = {
    "input_ids": torch.tensor([[5, 7, 9, 11, 2], [3, 3, 8, 0, 0], [1, 2, 3, 4, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
    "labels": torch.tensor([[5, 7, 9, 11, 2], [3, 3, 8, -100, -100], [1, 2, 3, 4, -100]]),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def llama(
    *,
    tied: bool = True,
    norm: bool = False,
    head: bool = False,
    cut: bool = True,
    adapter: peft.PeftConfig | None = None,
    **policy: Any,
) -> nn.Module:
    """Two blocks; cut block by block, its last norm and its head by themselves if asked. Adapters are random."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    base: Any = transformers.LlamaForCausalLM(config)
    model = base if adapter is None else peft.get_peft_model(base, adapter)
    if adapter is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape) * parameter.requires_grad
    if cut:
        mesh = init_device_mesh("cpu", (1,))
        parts = [*base.model.layers, *[base.model.norm] * norm, *[base.lm_head] * head, model]
        for part in parts:
            fully_shard(part, mesh=mesh, **policy)
    return model


def clipped(model: nn.Module, *, half: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    engine = PerExampleGradients(model, per_example_loss(model, "causal_lm"), clipping_norm=0.3, **options)
    preflight.check(engine, BATCH, autocast=half)
    engine.accumulate(BATCH)
    return engine.take()


@pytest.mark.parametrize("options", [{}, {"tied": False, "norm": True, "head": True}], ids=["tied", "layers apart"])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_a_cut_model_gives_the_clipped_sums_of_a_whole_one(clipping: str, options: dict[str, bool]) -> None:
    found, wanted = (clipped(llama(cut=cut, **options), clipping=clipping) for cut in (True, False))
    assert found.keys() == wanted.keys()
    for name, total in wanted.items():
        assert torch.allclose(found[name], total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoraConfig(r=2, target_modules="all-linear"),
        peft.LoraConfig(r=2, target_modules=["embed_tokens"]),
        peft.TrainableTokensConfig(token_indices=[3, 5, 7], target_modules=["embed_tokens"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["LoRA", "LoRA on embeddings", "trainable tokens", "prompt tuning"],
)
def test_adapters_are_cut_with_their_frozen_base(adapter: peft.PeftConfig) -> None:
    found, wanted = clipped(llama(adapter=adapter)), clipped(llama(adapter=adapter, cut=False))
    assert found.keys() == wanted.keys() and all(total.any() for total in wanted.values())
    assert all(torch.allclose(found[name], total, rtol=1e-4, atol=1e-6) for name, total in wanted.items())


def test_an_adapter_that_needs_its_layer_in_one_piece_is_refused() -> None:
    config = peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
    with pytest.raises(PrivacyError, match="in one piece, and FSDP2 has spread them"):
        clipped(llama(adapter=config))


def test_checkpointed_activations_change_nothing() -> None:
    model: Any = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found, wanted = clipped(model), clipped(llama(cut=False))
    assert all(torch.allclose(found[name], total, rtol=1e-4, atol=1e-6) for name, total in wanted.items())


def test_weights_gathered_in_bf16_give_sums_in_float32() -> None:
    half = llama(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found, wanted = clipped(half, half=True), clipped(llama(cut=False))
    off = torch.stack([(found[name] - total).norm() for name, total in wanted.items()]).norm()
    assert {total.dtype for total in found.values()} == {torch.float32}
    assert 0 < float(off) < 0.02 * float(torch.stack([total.norm() for total in wanted.values()]).norm())


def test_rows_that_do_not_count_add_exactly_zero() -> None:
    model = llama()
    engine = PerExampleGradients(model, per_example_loss(model, "causal_lm"), clipping_norm=0.3)
    preflight.check(engine, BATCH)
    engine.accumulate(BATCH, counted=False)
    assert all(not total.any() for total in engine.take().values())
    engine.accumulate(BATCH)
    assert any(total.any() for total in engine.take().values()), "the mutant, rows that count, would have been seen"


def test_tied_weights_that_are_gathered_apart_are_refused() -> None:
    with pytest.raises(PrivacyError, match="shared with a parameter already managed"):  # FSDP2's own words
        clipped(llama(head=True))
    tied_later: Any = llama(tied=False)
    tied_later.lm_head.weight = tied_later.model.embed_tokens.weight
    with pytest.raises(PrivacyError, match="lm_head.weight is tied to another layer's weight"):
        clipped(tied_later)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: spread_without_fsdp(), "spread by something else than FSDP2"),
        (lambda: cut_twice(), "a mesh of several dimensions"),
    ],
)
def test_what_fsdp2_has_not_spread_over_all_processes_is_refused(build: Callable[[], nn.Module], reason: str) -> None:
    model = build()
    with pytest.raises(PrivacyError, match=reason):
        Shards.of(model, dict(model.named_parameters()))


def cut_twice() -> nn.Module:
    return fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards")))


def spread_without_fsdp() -> nn.Module:
    linear, mesh = nn.Linear(4, 4), init_device_mesh("cpu", (1,))
    linear.weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh))
    return linear


def test_exact_sums_are_refused() -> None:
    with pytest.raises(PrivacyError, match="floating_point='hardened'"):
        PerExampleGradients(llama(), lambda model, batch: batch, clipping_norm=1.0, exact_sums=True)


def test_a_model_in_one_piece_has_no_shards_and_its_tensors_are_whole() -> None:
    model = llama(cut=False)
    assert Shards.of(model, dict(model.named_parameters())) is None
    weight = next(model.parameters())
    assert whole(weight) is weight
    cut = next(llama().parameters())
    assert isinstance(cut, DTensor) and torch.equal(whole(cut), weight)
