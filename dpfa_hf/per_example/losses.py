"""Per-example losses by task.

The model is called without labels and each example's loss is computed from its own logits (P10): the loss that
Transformers computes is an average over the batch, in which every example's gradient depends on its neighbours.
Token-level losses are averaged over the example's own tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example.packing import Segments

IGNORE_INDEX = -100
TASKS = (
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "seq2seq_lm",
)
# Tasks whose loss is a mean over tokens, so that documents packed into one row can be told apart in it.
PACKABLE_TASKS = ("causal_lm", "masked_lm", "token_classification")
LABELS = {"question_answering": ("start_positions", "end_positions")}


def base_model(model: Any) -> Any:
    """The Transformers model inside an adapter wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _prompt_length(model: Any) -> int:
    """Soft tokens that PEFT puts before a row's own, and of which a language model has logits too."""
    config = (getattr(model, "peft_config", None) or {}).get(getattr(model, "active_adapter", None))
    kind = getattr(config, "peft_type", None)
    return config.num_virtual_tokens if kind in ("PROMPT_TUNING", "P_TUNING") else 0  # type: ignore[union-attr]


def task_of(model: nn.Module) -> str:
    """The task of a Transformers model, from the auto-class that lists its class.

    Raises:
        PrivacyError: if no task is known for it; the way out is per_example_loss_fn.
    """
    from transformers.models.auto import modeling_auto as auto

    tables = {
        "sequence_classification": (
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        ),
        "token_classification": (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,),
        "question_answering": (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,),
        "seq2seq_lm": (
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        ),
        "causal_lm": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,),
        "masked_lm": (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,),
    }
    names = [cls.__name__ for cls in type(base_model(model)).__mro__]
    for name in names:
        for task, mappings in tables.items():
            if any(name in _flat(mapping.values()) for mapping in mappings):
                return task
    raise PrivacyError(
        f"no per-example loss is known for {names[0]}; pass per_example_loss_fn=f where f(model, batch) returns one "
        "loss per example"
    )


def _flat(values: object) -> set[str]:
    flat: set[str] = set()
    for value in values:  # type: ignore[attr-defined]
        flat.update((value,) if isinstance(value, str) else value)
    return flat


def per_example_loss(model: nn.Module, task: str) -> Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]:
    """The loss function of a task: (model, collated batch with labels) -> [B] float32 (float64 for float64 models).

    Of documents packed into one row (see `packing`) each has the loss that it has alone.

    Raises:
        PrivacyError: the batch is packed and the task pools a row.

    Guarantee:
        Entry i depends on example i of the batch and on the weights alone, if the model's forward treats examples
        separately (which `preflight.check` tests). An example with a label outside the model's range has loss 0 and no
        gradient; it neither raises nor touches its neighbours (P23).
    """
    config = base_model(model).config
    prompt = _prompt_length(model)
    takes_use_cache = "use_cache" in inspect.signature(base_model(model).forward).parameters

    def loss(called: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        names = LABELS.get(task, ("labels",))
        missing = [name for name in names if name not in batch]
        if missing:
            raise PrivacyError(
                f"the batch has no {missing[0]!r}; name the label column so, or pass per_example_loss_fn"
            )
        labels = [batch[name] for name in names]
        inputs = {k: v for k, v in batch.items() if k not in names}
        segments = Segments.of(batch)
        if segments is not None:
            if task not in PACKABLE_TASKS:
                raise PrivacyError(
                    f"{task} has one output for a whole row, so documents cannot be packed into one; use a data "
                    "collator that pads, such as DataCollatorWithPadding"
                )
            # With a cache Transformers does not look for packing, and the documents would attend to each other.
            output = called(**inputs, **({"use_cache": False} if takes_use_cache else {}))
            return _document_mean(as_float(output.logits), labels[0], segments, predicts_next=task == "causal_lm")
        if task == "seq2seq_lm" and "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
            vocabulary = config.get_text_config(decoder=True).vocab_size
            inputs["decoder_input_ids"] = _shift_right(base_model(model), _in_range(labels[0], vocabulary))
        output = called(**inputs)
        if task == "question_answering":
            return _question_answering(output, labels, inputs.get("attention_mask"))
        logits = as_float(output.logits)
        if task == "sequence_classification":
            return _classification(logits, labels[0], config)
        if task == "causal_lm":
            targets = next_token_labels(F.pad(labels[0], (prompt, 0), value=IGNORE_INDEX))
            mask = inputs.get("attention_mask")
            if mask is not None and mask.shape == labels[0].shape:
                # With left padding the first token would be predicted from padding, but only beside longer neighbours.
                targets = targets.masked_fill(F.pad(mask, (prompt, 0), value=1) == 0, IGNORE_INDEX)
            return _token_mean(logits, targets)
        return _token_mean(logits, labels[0])

    return loss


def as_float(logits: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where it is that already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _shift_right(model: Any, labels: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise PrivacyError(
            "model.config lacks decoder_start_token_id or pad_token_id; set them, or pass decoder_input_ids"
        )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORE_INDEX, pad)


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, T] moved one to the left: it is they that move, not the logits, which would have to be copied."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token; logits [B, T, V], labels [B, T] -> [B, T]; 0 where there is no label, and all along
    an example with an impossible one."""
    labels = _in_range(labels, logits.shape[-1])
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view(labels.shape)


def _token_mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of `token_losses` over an example's labelled tokens, [B]; 0 if none."""
    return token_losses(logits, labels).sum(1) / (labels != IGNORE_INDEX).sum(1).clamp_min(1)


def _document_mean(
    logits: torch.Tensor, labels: torch.Tensor, segments: Segments, *, predicts_next: bool
) -> torch.Tensor:
    """`_token_mean` of the n documents of a packed row; logits [1, T, V], labels [1, T] -> [n].

    Labels are laid out by document before they are shifted, so that no document's last token predicts its neighbour's
    first.
    """
    targets = segments.unpack(labels[0], IGNORE_INDEX)
    if predicts_next:
        targets = next_token_labels(targets)
    targets = _in_range(targets, logits.shape[-1])
    losses = F.cross_entropy(logits[0], segments.pack(targets), ignore_index=IGNORE_INDEX, reduction="none")
    return segments.unpack(losses, 0).sum(1) / (targets != IGNORE_INDEX).sum(1).clamp_min(1)


def _in_range(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels with every label of an example that holds an impossible one set to be ignored."""
    valid = (labels == IGNORE_INDEX) | ((labels >= 0) & (labels < classes))
    return labels.masked_fill(~valid.flatten(1).all(1).view(-1, *[1] * (labels.dim() - 1)), IGNORE_INDEX)


def _classification(logits: torch.Tensor, labels: torch.Tensor, config: object) -> torch.Tensor:
    """Single label, many labels or regression, told apart as Transformers does; logits [B, K] -> [B]."""
    num_labels, problem = config.num_labels, getattr(config, "problem_type", None)  # type: ignore[attr-defined]
    if problem is None:
        if num_labels == 1:
            problem = "regression"
        else:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem == "regression":
        return F.mse_loss(logits.flatten(1), labels.view(len(labels), -1).to(logits.dtype), reduction="none").mean(1)
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)
    labels = _in_range(labels.view(-1, 1), num_labels).squeeze(1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


def _question_answering(output: object, positions: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of the start's and the end's cross-entropy over the row's own tokens; a position beyond them is no answer.

    Padding is left out of the softmax, which upstream leaves in: with it, a row's loss would depend on the length of
    its neighbours (P10). For a row alone the two are the same.
    """
    losses = []
    for logits, position in zip((output.start_logits, output.end_logits), positions, strict=True):  # type: ignore[attr-defined]
        logits = as_float(logits)
        own = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.bool()
        inside = position.view(-1).clamp(0, logits.shape[1] - 1)
        is_answer = (position.view(-1) < logits.shape[1]) & own.gather(1, inside[:, None]).squeeze(1)
        logits = logits.masked_fill(~own, torch.finfo(logits.dtype).min)
        target = inside.masked_fill(~is_answer, IGNORE_INDEX)
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none"))
    return (losses[0] + losses[1]) / 2
