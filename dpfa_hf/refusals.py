"""What is refused before the first step, and why: every setting, part and adapter under which epsilon would be untrue.

Each refusal is one line that names what cannot stand and the way out. Layers and losses are tried on synthetic rows by
`per_example.preflight`; TRL's own settings are in `trl`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback

from dpfa_hf import trl
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import losses, packing, preflight
from dpfa_hf.per_example.gradients import Batch, PerExampleGradients, PerExampleLoss

# Of an order of its own, hardly a row is where it is in another process.
_COMPARED_ROWS = 32

NO_SEARCH = (
    "hyperparameter_search picks the best of many private runs and would report one run's epsilon; each trial is a "
    "run: loop over DPTrainer, and the ledger adds them up"
)


def checked_privacy_arguments(privacy_args: object) -> PrivacyArguments:
    if not isinstance(privacy_args, PrivacyArguments):
        raise PrivacyError(
            f"privacy_args must be a dpfa_hf.PrivacyArguments, not {type(privacy_args).__name__}; for example "
            "PrivacyArguments(target_epsilon=3.0, target_delta=1e-5)"
        )
    return privacy_args


def refuse_arguments(args: TrainingArguments, privacy_args: PrivacyArguments) -> None:
    """Every TrainingArguments setting under which epsilon would be untrue, with its reason and way out."""

    def is_set(name: str) -> bool:
        return bool(getattr(args, name, None))

    def text(name: str) -> str:
        value = getattr(args, name, "")
        return str(getattr(value, "value", value))

    hardened = privacy_args.floating_point == "hardened"
    public = privacy_args.eval_data == "public"
    accelerator = getattr(args, "accelerator_config", None)
    steered = "; private data must not steer training: pass eval_data='public' if it is public, or drop it"
    checks = {
        "per_device_train_batch_size": (
            hardened and args.per_device_train_batch_size != 1,
            f"is {args.per_device_train_batch_size}, and rows that share a micro-batch round each other's numbers; set "
            "it to 1 (expected_batch_size is the batch), or floating_point='snapped'",
        ),
        "use_cpu": (
            hardened and args.device.type != "cpu",
            f"is off, and floating_point='hardened' is for the CPU alone, not {args.device.type}; set it to True, or "
            "floating_point='snapped'",
        ),
        "auto_find_batch_size": (
            is_set("auto_find_batch_size"),
            "repeats steps depending on the data; set per_device_train_batch_size to what fits",
        ),
        "fp16": (is_set("fp16"), "skips steps depending on the data (GradScaler); use bf16"),
        "fp16_full_eval": (is_set("fp16_full_eval"), "moves the model in half precision; use bf16_full_eval"),
        "n_gpu": (args.n_gpu > 1, "is DataParallel, which splits the batch; set CUDA_VISIBLE_DEVICES to one device"),
        "save_on_each_node": (
            is_set("save_on_each_node"),
            "needs the ledger on every node, and the first process alone has it open; set it to False and output_dir "
            "to a folder that all nodes share",
        ),
        "label_smoothing_factor": (
            is_set("label_smoothing_factor"),
            "changes a loss that is not used; pass per_example_loss_fn",
        ),
        "neftune_noise_alpha": (
            is_set("neftune_noise_alpha"),
            "scales its noise by the batch's padded length; set it to None",
        ),
        "use_liger_kernel": (is_set("use_liger_kernel"), "fuses layers whose gradients are needed; set it to False"),
        "torch_compile": (is_set("torch_compile"), "hides the layers whose gradients are needed; set it to False"),
        "deepspeed": (is_set("deepspeed"), "reduces gradients before they can be clipped; leave it out"),
        "fsdp": (
            is_set("fsdp"),
            "spreads the model after its layers were checked; leave it out, and call torch.distributed.fsdp."
            "fully_shard on the model before you build the trainer (docs/processes.md)",
        ),
        "parallelism_config": (is_set("parallelism_config"), "is not supported yet; leave it out"),
        "optim": (
            any(word in text("optim") for word in ("lomo", "layerwise")),
            "updates weights inside the backward pass, before clipping and noise; choose another, such as adamw_torch",
        ),
        "train_sampling_strategy": (
            text("train_sampling_strategy") not in ("", "random"),
            "is not Poisson sampling; leave it at 'random' and batches are drawn by dpfa_hf",
        ),
        "group_by_length": (is_set("group_by_length"), "is not Poisson sampling; set it to False"),
        "packing": (
            is_set("packing"),
            "packs rows before they are drawn, so that a person's text shares its protection with others'; set it to "
            "False, and padding_free=True with privacy_unit='document' packs them after the draw",
        ),
        "dataloader_drop_last": (is_set("dataloader_drop_last"), "drops units from the draw; set it to False"),
        "accelerator_config.split_batches": (
            bool(getattr(accelerator, "split_batches", False)),
            "changes the draw; set it to False",
        ),
        "accelerator_config.dispatch_batches": (
            bool(getattr(accelerator, "dispatch_batches", False)),
            "changes the draw; set it to None",
        ),
        "accelerator_config.gradient_accumulation_kwargs": (
            bool(_without_num_steps(getattr(accelerator, "gradient_accumulation_kwargs", None))),
            "changes the accumulation; set it to None",
        ),
        "include_num_input_tokens_seen": (
            text("include_num_input_tokens_seen") not in ("", "no", "False"),
            "counts private tokens; set it to 'no'",
        ),
        "skip_memory_metrics": (
            getattr(args, "skip_memory_metrics", True) is False,
            "as False records memory that follows the private batch; set it to True",
        ),
        "debug": (
            "underflow_overflow" in str(args.debug),
            "as underflow_overflow prints private activations; leave it empty",
        ),
        "lr_scheduler_type": (
            text("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"),
            "follows a private metric; use a fixed schedule such as linear or cosine",
        ),
        "load_best_model_at_end": (is_set("load_best_model_at_end") and not public, "chooses by a metric" + steered),
        "save_strategy": (text("save_strategy") == "best" and not public, "as 'best' chooses by a metric" + steered),
        "eval_strategy": (
            (text("eval_strategy") not in ("", "no") or is_set("eval_on_start")) and not public,
            "evaluates during training, and the metrics are logged and saved; say whose data they are with "
            "PrivacyArguments(eval_data='public'), or evaluate after training with eval_data='private'",
        ),
        "gradient_checkpointing_kwargs": (
            any(
                (getattr(args, name, None) or {}).get("use_reentrant", False)
                for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
            ),
            "with use_reentrant=True computes gradients twice with other dropout; set use_reentrant to False",
        ),
    }
    for name, (refused, why) in checks.items():
        if refused:
            raise PrivacyError(f"TrainingArguments.{name} {why}")
    if is_set("push_to_hub") and _ledger_inside(privacy_args, args.output_dir or "."):
        raise PrivacyError(
            "push_to_hub would upload the ledger, which lies inside output_dir; put the ledger elsewhere (ledger=...)"
        )


def _without_num_steps(kwargs: Mapping | None) -> dict:
    return {name: value for name, value in (kwargs or {}).items() if (name, value) != ("num_steps", 1)}


def _ledger_inside(privacy_args: PrivacyArguments, folder: str) -> bool:
    url = privacy_args.ledger or os.environ.get("DPFA_LEDGER", "")
    if not url.startswith("sqlite"):
        return False
    path = os.path.realpath(url.partition("///")[2])
    return os.path.commonpath([path, os.path.realpath(folder)]) == os.path.realpath(folder)


def refuse_trainer(
    trainer: Any, privacy_args: PrivacyArguments, loss_fn: PerExampleLoss | None, *, private: type
) -> None:
    """Everything about the Trainer's parts that would make epsilon untrue."""
    refuse_dataset(trainer.train_dataset)
    packing.refuse_packed_columns(
        preflight.declared_columns(trainer.train_dataset), documents=privacy_args.privacy_unit == "document"
    )
    if trainer.model_init is not None:
        raise PrivacyError("model_init would replace the model whose layers were checked; pass model=")
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise PrivacyError(
            "compute_loss_func averages over the batch; pass per_example_loss_fn, which returns one loss per example"
        )
    for method in ("training_step", "get_batch_samples", "get_train_dataloader"):
        owner = next(cls for cls in type(trainer).__mro__ if method in vars(cls))
        if owner is not private:
            raise PrivacyError(f"{owner.__name__}.{method} would replace the private one; remove it")
    bases = [cls for cls in type(trainer).__mro__ if cls is not private]
    for method in ("compute_loss", "training_step"):
        owner = next(cls for cls in bases if method in vars(cls))
        if owner not in (Trainer, trl.class_of(trainer)) and loss_fn is None:
            raise PrivacyError(
                f"{owner.__name__}.{method} is not used in private training and would be lost in silence; pass "
                "per_example_loss_fn, which returns one loss per example"
            )
    engine = trainer.accelerator.distributed_type.value
    if engine not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise PrivacyError(
            f"accelerate is set up for {engine}, which shards or reduces gradients before they can be clipped; launch "
            "with torchrun, or with an accelerate configuration of plain multi-GPU or multi-CPU, and spread a model "
            "that fits on no GPU with torch.distributed.fsdp.fully_shard (docs/processes.md)"
        )
    refuse_parallel(trainer.model)
    if getattr(trainer.model, "is_parallelizable", False) and getattr(trainer.model, "model_parallel", False):
        raise PrivacyError("a model spread over several devices is not supported yet; put it on one device")
    for callback in trainer.callback_handler.callbacks:
        refuse_callback(type(callback), privacy_args)
    refuse_adapter(trainer.model)
    if privacy_args.floating_point == "hardened":
        _refuse_wide(trainer.model)


def refuse_dataset(dataset: Any) -> None:
    if dataset is None:
        raise PrivacyError("train_dataset is missing; pass it, since a private run must know its data set")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise PrivacyError(
            "train_dataset is an IterableDataset: Poisson sampling needs to draw any row by its index; pass a "
            "map-style data set (datasets.Dataset, or a torch Dataset with __len__ and __getitem__)"
        )
    if len(dataset) == 0:
        raise PrivacyError("train_dataset is empty; pass one with rows")


def sample_of(dataset: Any) -> tuple[int, dict[int, str]]:
    """(number of rows, digests of some of them by index), with which other processes compare theirs."""
    indices = {0, len(dataset) - 1, *(secrets.randbelow(len(dataset)) for _ in range(_COMPARED_ROWS))}
    return len(dataset), {index: digest for index in sorted(indices) if (digest := _digest(dataset, index))}


def refuse_other_rows(dataset: Any, sample: tuple[int, dict[int, str]]) -> None:
    """A process with a shard, or with the rows in an order of its own: a draw is over the whole data set, and its
    indices are everybody's, so that a unit with two indices would be drawn twice (P8).

    Args:
        dataset: this process's.
        sample: `sample_of` the first one's.
    """
    rows, digests = sample
    if len(dataset) != rows:
        raise PrivacyError(
            f"train_dataset has {len(dataset)} rows in this process and {rows} in the first; give every process the "
            "whole data set, of which each takes its share of a draw"
        )
    if any(_digest(dataset, index) not in (digest, "") for index, digest in digests.items()):
        raise PrivacyError(
            "train_dataset has other rows, or the same in another order, in this process than in the first; give every "
            "process the same (a shuffle needs a seed)"
        )


def _digest(dataset: Any, index: int) -> str:
    """Of a row as it is read; "" if it cannot be read, or reads otherwise the second time (random augmentation)."""
    try:
        first, second = (json.dumps(dataset[index], default=_plain, sort_keys=True) for _ in range(2))
    except Exception:  # any row may raise anything (P23)
        return ""
    return hashlib.sha256(first.encode()).hexdigest() if first == second else ""


def _plain(value: Any) -> Any:
    """Tensors and arrays by their numbers, images by their bytes."""
    return value.tolist() if hasattr(value, "tolist") else value.tobytes().hex()


def refuse_parallel(model: nn.Module) -> None:
    """Models loaded so that processes compute parts of each other's examples, of which no check in one process knows:
    experts that take tokens from other processes' rows, tensors and stages that several share (P11)."""
    config = getattr(getattr(losses.base_model(model), "config", None), "distributed_config", None)
    for name in ("tp_size", "ep_size", "pp_size", "dp_replicate_size"):
        size = getattr(config, name, None) or 1
        if size > 1:
            raise PrivacyError(
                f"DistributedConfig.{name}={size} lets processes compute parts of each other's examples, or hold the "
                "same weights twice; load the model with fsdp_size alone"
            )


def refuse_packing(engine: PerExampleGradients, batch: Batch) -> None:
    """Of documents that share a row, one that is not finite is computed again by itself, out of step with others."""
    if engine.shards is not None and packing.is_packed(batch):
        raise PrivacyError(
            "data_collator packs documents, and processes that share a model spread by FSDP2 cannot compute one of "
            "them again by itself: use a data_collator that pads"
        )


def refuse_callback(kind: type[TrainerCallback], privacy_args: PrivacyArguments) -> None:
    if issubclass(kind, EarlyStoppingCallback) and privacy_args.eval_data != "public":
        raise PrivacyError(
            "EarlyStoppingCallback stops by a metric; evaluation on private data must not steer training: pass "
            "eval_data='public' if it is public, or drop the callback"
        )


def refuse_adapter(model: nn.Module) -> None:
    """PEFT configurations for which per-example gradients are not exact, or that read private data (P23).

    What is let through is what `benchmarks/adapters.py` holds against autograd; a kind or an option of LoRA that is not
    known here is refused. So is a quantised base whose examples are not rounded one by one.
    """
    _refuse_quantised(model)
    if type(model).__name__ == "PeftMixedModel":
        raise PrivacyError("PeftMixedModel mixes kinds of adapters, which is not held against autograd; use PeftModel")
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in _EXACT_ADAPTERS:
            why = _INEXACT_ADAPTERS.get(kind, "is not known here, so that its gradients are not known to be exact")
            raise PrivacyError(f"adapter {name!r} is {kind}, which {why}: use LoraConfig")
        for option, (refused, why) in _adapter_options(config, kind).items():
            if refused:
                raise PrivacyError(f"{type(config).__name__}.{option} {why}")
        if kind == "LORA":
            _refuse_lora_options(config)


_EXACT_ADAPTERS = (
    "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "PEANUT", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT",
    "P_TUNING", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "WAVEFT",
)  # fmt: skip
_INEXACT_ADAPTERS = {
    "ADALORA": "adds a penalty of its own to the loss and prunes by gradients",
    "ADAMSS": "chooses what it trains by gradients",
    "ADAPTION_PROMPT": "trains vectors inside attention, for which there is no norm rule",
    "CARTRIDGE": "begins with the keys and values of a text and has no norm rule",
    "CPT": "weighs the loss by itself and projects its prompt after every step",
    "LILY": "routes by an average over the whole batch, so that one example changes another",
    "MULTITASK_PROMPT_TUNING": "needs task_ids beside the rows, which are not handed on",
    "OSF": "changes gradients by hooks, which private gradients do not pass",
    "POLY": "needs task_ids beside the rows, which are not handed on",
    "PVERA": "draws random numbers in its forward, which no norm rule could draw again",
    "SHADOW": "runs a second model beside the first, with a loss of its own",
    "XLORA": "runs the model twice, the first time to weigh adapters by what it says of a row",
}
_DATA_FREE = ("true", "false", "gaussian", "loftq", "mica", "olora", "orthogonal", "pissa")
# Anything else that is set is refused.
_LORA_OPTIONS = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
)  # fmt: skip


def _refuse_quantised(model: nn.Module) -> None:
    """Frozen weights of 8 or 4 bits are constants like others, but what rounds activations may mix examples (P11)."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "state", None), "threshold", 0) and type(module).__name__ == "Linear8bitLt":
            raise PrivacyError(
                f"{name}: with llm_int8_threshold={module.state.threshold} an outlier in one row changes how its "  # type: ignore[union-attr]
                "neighbours are rounded; load the model with BitsAndBytesConfig(llm_int8_threshold=0.0)"
            )
    config = getattr(getattr(losses.base_model(model), "config", None), "quantization_config", None)
    if config is None:
        return
    given = config if isinstance(config, Mapping) else vars(config)
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method")))
    kind = type(given.get("quant_type")).__name__
    if method == "torchao" and not kind.endswith("WeightOnlyConfig"):
        raise PrivacyError(
            f"TorchAoConfig.quant_type={kind} rounds activations too, so that a row's loss changes with the "
            "rows beside it; use Int8WeightOnlyConfig or another that rounds weights alone"
        )
    if method not in ("bitsandbytes", "torchao"):
        raise PrivacyError(
            f"a base quantised by {method} has not been held against autograd; use bitsandbytes, or torchao's configs "
            "that round weights alone"
        )


def _adapter_options(config: Any, kind: str) -> dict[str, tuple[bool, str]]:
    """Option -> whether it is refused, and why."""
    encoder = str(getattr(config, "encoder_reparameterization_type", "MLP")).rpartition(".")[2]
    return {
        "encoder_reparameterization_type": (encoder != "MLP", f"is {encoder}, which has no norm rule; use 'MLP'"),
        "coft": (bool(getattr(config, "coft", False)), "changes weights in the forward pass; set it to False"),
        "mask_type": (
            getattr(config, "mask_type", "random") != "random",
            "may choose weights by private data before step 1; use 'random'",
        ),
    }


def _refuse_lora_options(config: Any) -> None:
    initial = str(config.init_lora_weights).lower()
    if initial in ("eva", "corda", "lora_ga"):
        raise PrivacyError(
            f"LoraConfig.init_lora_weights={config.init_lora_weights!r} computes the adapter from data before step 1; "
            "use True, 'gaussian' or 'pissa'"
        )
    if initial.partition("_niter_")[0] not in _DATA_FREE:
        raise PrivacyError(
            f"LoraConfig.init_lora_weights={config.init_lora_weights!r} is not known here and may read data before "
            "step 1; use True, 'gaussian' or 'pissa'"
        )
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name not in _LORA_OPTIONS and value and value != option.default:
            raise PrivacyError(f"LoraConfig.{option.name} has no exact per-example gradient; leave it out")


def _refuse_wide(model: nn.Module) -> None:
    """What `dpfa_hf.rounding` does not cover."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu" or tensor.dtype in (torch.float64, torch.complex128):
            raise PrivacyError(
                f"{name} is {tensor.dtype} on {tensor.device.type}, and floating_point='hardened' is proven for 32 "
                "bits or fewer on the CPU; convert the model with .float().cpu(), or use floating_point='snapped'"
            )


def refuse_reentrant(module: nn.Module) -> None:
    function = getattr(module, "_gradient_checkpointing_func", None)
    keywords = getattr(function, "keywords", None)
    if getattr(module, "gradient_checkpointing", False) and (keywords or {}).get("use_reentrant", False):
        raise PrivacyError(
            "reentrant gradient checkpointing computes gradients twice with other dropout; enable it with "
            "use_reentrant=False"
        )
