"""What must be true of a model and its loss, tried on synthetic rows before the first step (P11, P12, P23).

No private row is read: rows are invented from the data set's declared columns and the model's configuration.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import adapters, layers, packing
from dpfa_hf.per_example.gradients import Batch, PerExampleGradients, PerExampleLoss, batch_size, exact_matmul
from dpfa_hf.per_example.losses import IGNORE_INDEX, base_model

# Three rows whose longest length is prime and no multiple of three, so that no two dimensions can be confused.
ROW_LENGTHS = (11, 13, 7)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
# Losses agree better than gradients, and a router's auxiliary loss is only a few parts in 10,000.
_LOSS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Column:
    """A column as a data set declares it: `kind` "int", "float", "bool" or "string"; `shape` with None where free."""

    kind: str
    shape: tuple[int | None, ...] = ()


def declared_columns(dataset: object) -> dict[str, Column]:
    """Column names, kinds and shapes: from `datasets.Features`, or, for other data sets, from the form of row 0.

    Names, kinds and numbers of dimensions are taken to be public (stated in the report); values are not read into
    anything. Returns {} if the data set declares nothing and its first row cannot be read: no abort may depend on a
    row's content.
    """
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        return {name: _from_feature(feature) for name, feature in features.items()}
    try:
        row = dataset[0]  # type: ignore[index]
        return {name: _from_value(value) for name, value in row.items()}
    except Exception:  # whatever a private row raises must not be seen (P23)
        return {}


def _from_feature(feature: object) -> Column:
    shape: list[int | None] = []
    if hasattr(feature, "shape") and hasattr(feature, "dtype"):
        return Column(_kind(str(feature.dtype)), tuple(feature.shape))
    while True:
        if isinstance(feature, list):
            shape.append(None)
            feature = feature[0]
        elif hasattr(feature, "feature"):
            length = getattr(feature, "length", -1)
            shape.append(length if length and length > 0 else None)
            feature = feature.feature
        else:
            return Column(_kind(str(getattr(feature, "dtype", "string"))), tuple(shape))


def _from_value(value: object) -> Column:
    shape: list[int | None] = []
    if isinstance(value, str | bytes):
        return Column("string")
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return Column(_kind(str(value.dtype)), tuple(None for _ in value.shape))
    while isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value):
        shape.append(None)
        value = value[0]
    if isinstance(value, bool):
        return Column("bool", tuple(shape))
    return Column("int" if isinstance(value, int) else "float" if isinstance(value, float) else "string", tuple(shape))


def _kind(dtype: str) -> str:
    for kind in ("bool", "float", "int"):
        if kind in dtype:
            return kind
    return "string"


def synthetic_rows(
    model: nn.Module, task: str | None, columns: Mapping[str, Column], lengths: Sequence[int] = ROW_LENGTHS
) -> list[dict]:
    """Invented rows with the given columns, one for each of `lengths`, as lists and numbers for a data collator."""
    config = getattr(base_model(model), "config", None)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict] = [
        {name: _value(name, column, length, config, task, generator) for name, column in columns.items()}
        for length in lengths
    ]
    tokens = adapters.trained_tokens(model)
    for row in rows if tokens and columns.get("input_ids") == Column("int", (None,)) else ():
        every_other = row["input_ids"][1::2]
        row["input_ids"][1::2] = [tokens[token % len(tokens)] for token in every_other]
    return rows


def _value(
    name: str, column: Column, length: int, config: object, task: str | None, generator: torch.Generator
) -> object:
    if column.kind == "string":
        return "synthetic text " * length
    shape = _concrete_shape(name, column, length, config)
    if column.kind == "bool":
        return torch.ones(shape).bool().tolist()
    if column.kind == "float":
        return torch.randn(shape, generator=generator).tolist()
    if name.endswith("mask"):
        return torch.ones(shape).long().tolist()
    if name == "position_ids":
        return torch.arange(shape[0]).tolist()
    high = _number_of_values(name, length, config, task, bool(column.shape))
    return torch.randint(0, max(high, 1), shape, generator=generator).tolist()


def _concrete_shape(name: str, column: Column, length: int, config: object) -> tuple[int, ...]:
    if name in ("pixel_values", "input_features") and (known := _media_shape(name, config)):
        return known
    if name in ("labels", "label") and column.kind == "float" and column.shape:
        return (getattr(config, "num_labels", 2),)
    return tuple(length if size is None else size for size in column.shape)


def _media_shape(name: str, config: object) -> tuple[int, ...] | None:
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return (getattr(config, "num_channels", 3), height, width)
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        return (config.num_mel_bins, 2 * getattr(config, "max_source_positions", 1500))
    return None


def _number_of_values(name: str, length: int, config: object, task: str | None, is_sequence: bool) -> int:
    """How many values an integer column takes, from its name and the model's configuration."""
    if name in ("start_positions", "end_positions"):
        return length
    if name in ("labels", "label") and task in ("sequence_classification", "token_classification"):
        return getattr(config, "num_labels", 2)
    if name == "token_type_ids":
        return getattr(config, "type_vocab_size", 1) or 1
    if is_sequence and (name in ("labels", "label") or name.endswith("ids")):
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        return min(getattr(text, "vocab_size", 2), getattr(config, "vocab_size", None) or 2**31)
    return 2


def default_columns(model: nn.Module, task: str) -> dict[str, Column]:
    """The columns that a model's task needs, when no data set declares any."""
    main = getattr(base_model(model), "main_input_name", "input_ids")
    if main == "input_ids":
        columns = {"input_ids": Column("int", (None,)), "attention_mask": Column("int", (None,))}
    else:
        columns = {main: Column("float", (None,))}
    if task == "question_answering":
        return {**columns, "start_positions": Column("int"), "end_positions": Column("int")}
    if task == "sequence_classification":
        config = base_model(model).config
        many = getattr(config, "problem_type", None) == "multi_label_classification"
        floats = config.num_labels == 1 or getattr(config, "problem_type", None) == "regression"
        return {**columns, "labels": Column("float", (None,)) if many else Column("float" if floats else "int")}
    return {**columns, "labels": Column("int", (None,))}


def pad_rows(model: nn.Module, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
    """A plain collator for `synthetic_rows`: right padding with the model's pad token, labels with -100."""
    pad = getattr(getattr(base_model(model), "config", None), "pad_token_id", None) or 0
    batch = {}
    for name in rows[0]:
        tensors = [torch.tensor(row[name]) for row in rows]
        if tensors[0].dim() == 1:
            is_target = name == "labels" and not tensors[0].is_floating_point()
            value = IGNORE_INDEX if is_target else pad * name.endswith("ids")
            batch[name] = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
        else:
            batch[name] = torch.stack(tensors)
    return batch


def synthetic_batch(
    model: nn.Module,
    task: str | None,
    columns: Mapping[str, Column],
    collate: Callable[[list[dict]], Batch] | None = None,
    *,
    documents: bool = False,
) -> dict[str, Any]:
    """Three synthetic rows as the trainer's own collator would hand them over.

    Args:
        model: whose configuration says which values are possible.
        task: one of `losses.TASKS`, or None if only the columns tell.
        columns: what a row holds.
        collate: the trainer's data collator; by default rows are padded on the right.
        documents: whether the collator may pack the rows into one; the batch is then in the form of `packing`.

    Raises:
        PrivacyError: if the collator cannot collate rows of unequal and of equal length, packs them without
            `documents`, or lets one row change another.
    """
    if not columns:
        if task is None:
            raise PrivacyError(
                "train_dataset declares no columns and per_example_loss_fn hides the task; pass a datasets.Dataset, "
                "whose features say what a row holds"
            )
        columns = default_columns(model, task)
        collate = None
    failure: Exception | None = None
    for lengths in (ROW_LENGTHS, (max(ROW_LENGTHS),) * len(ROW_LENGTHS)):
        rows = synthetic_rows(model, task, columns, lengths)
        try:
            batch = dict(collate(rows)) if collate is not None else pad_rows(model, rows)
        except Exception as error:  # any collator, any error: it is reported below
            failure = error
            continue
        packed = packing.looks_packed(batch, len(rows))
        if packed and documents:
            batch = packing.normalise(batch, len(rows))
        elif packed or batch_size(batch) != len(rows):
            raise PrivacyError(
                f"data_collator turned {len(rows)} rows into {1 if packed else batch_size(batch)}: packing or pairing "
                "collators hide where one example ends; use one that returns one entry per row, such as "
                "DataCollatorWithPadding, or, for a padding-free one, privacy_unit='document'"
            )
        if collate is not None:
            _check_collator(collate, rows, columns, packed)
        if packed:
            return packing.join([_with_some_label(document, task) for document in packing.split(batch)])
        return _with_some_label(batch, task)
    raise PrivacyError(
        f"data_collator failed on synthetic rows with the columns {sorted(columns)} ({type(failure).__name__}: "
        f"{str(failure).splitlines()[0] if str(failure) else 'no message'}); every row of the data would be dropped"
    )


def _check_collator(
    collate: Callable[[list[dict]], Batch], rows: list[dict], columns: Mapping[str, Column], packed: bool
) -> None:
    """Refuses a collator that mixes rows (mixup, batch statistics): replacing row 0 must leave the others alone.

    A collator that answers differently to the same rows under the same seeds cannot be tried so.
    """
    other = [{name: _another(rows[0][name], columns[name]) for name in rows[0]}, *rows[1:]]
    first, again, changed = (_entries(_seeded_call(collate, each), packed, len(rows)) for each in (rows, rows, other))
    if _equal(first, again) and not _equal(first[1:], changed[1:]):
        raise PrivacyError(
            "data_collator lets one row change another (such as mixup or normalisation over the batch); use one that "
            "treats rows separately"
        )


def _entries(collated: Batch, packed: bool, size: int) -> list[dict[str, torch.Tensor]]:
    """What a collator made of each row."""
    if packed:
        documents = packing.split(packing.normalise(collated, size))
        return [{k: v for k, v in document.items() if isinstance(v, torch.Tensor)} for document in documents]
    return [{name: value[i] for name, value in collated.items()} for i in range(size)]


def _equal(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a)


def _another(value: object, column: Column) -> object:
    """The same form with another sum: text in reverse, the last entry all along, other numbers."""
    if isinstance(value, list | str):
        return value[::-1] if isinstance(value, str) else value[-1:] * len(value)
    return int(not value) if column.kind == "int" else -value  # type: ignore[operator]


def _seeded_call(collate: Callable[[list[dict]], Batch], rows: list[dict]) -> dict[str, torch.Tensor]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            return dict(collate([dict(row) for row in rows]))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _with_some_label(batch: dict, task: str | None) -> dict:
    """Gives a label to token-level rows that the collator's random masking left without one."""
    if task in ("masked_lm", "token_classification", "causal_lm", "seq2seq_lm") and "labels" in batch:
        labels = batch["labels"].clone()
        empty = (labels[:, 1:] == IGNORE_INDEX).all(1)
        labels[empty, 1] = 1
        batch["labels"] = labels
    return batch


# ---- the checks -----------------------------------------------------------------------------------------------------


def check(
    engine: PerExampleGradients,
    batch: Batch,
    *,
    forward: nn.Module | None = None,
    compare_with_model_loss: bool = False,
    trainer_loss: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None,
    autocast: bool = False,
) -> None:
    """Everything that must hold before the first step, on synthetic rows, in training mode.

    Args:
        engine: the per-example gradients to be used.
        batch: synthetic rows, collated, on the model's device.
        forward: the model as it will be called (prepared by Accelerate); by default the engine's model.
        compare_with_model_loss: whether each row's loss must equal the model's own loss for that row alone.
        trainer_loss: what a trainer that computes its loss by itself gives for a row alone, [1, ...] -> a scalar; each
            row's loss must equal it.
        autocast: whether the model computes in half precision, which loosens the tolerances.

    Raises:
        PrivacyError: naming what failed: an example that depends on another one (P11), a loss that is not the model's
            (P10), or per-example gradients that differ from autograd's (P12).
    """
    model = engine.model
    called = forward if forward is not None else model
    _refuse_skipped_layers(getattr(base_model(model), "config", None))
    _refuse_growing_positions(getattr(base_model(model), "config", None))
    if packing.is_packed(batch):
        packing.refuse_leaking_model(getattr(base_model(model), "config", None))
    training, device = model.training, next(model.parameters()).device
    devices = [device.index or 0] if device.type == "cuda" else []
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=devices):
            tolerance = _HALF_TOLERANCE if autocast else _tolerance(engine, _TOLERANCE)
            loss_tolerance = _HALF_TOLERANCE if autocast else _tolerance(engine, _LOSS_TOLERANCE)
            _check_isolation(engine.loss, called, model, batch, loss_tolerance)
            model.eval()
            _check_rows_alone(engine.loss, called, batch, loss_tolerance)
            if compare_with_model_loss:
                _check_model_loss(engine.loss, called, model, batch, loss_tolerance)
            if trainer_loss is not None:
                _check_trainer_loss(engine.loss, called, trainer_loss, batch, loss_tolerance)
            model.train()
            _check_gradients(engine, batch, tolerance)
            if engine.exact_sums:
                _check_same_bits(engine, batch)
        _check_buffers(model, buffers)
    except PrivacyError:
        raise
    except Exception as error:
        raise PrivacyError(
            f"{type(base_model(model)).__name__} failed on synthetic rows with the columns {sorted(batch)} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); make its forward "
            "accept what the data collator returns"
        ) from error
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)


def _refuse_skipped_layers(config: object) -> None:
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0):
            raise PrivacyError(
                f"config.{name}={getattr(config, name)} skips layers at random, so that they cannot all be checked "
                "before step 1; set it to 0"
            )


def _refuse_growing_positions(config: Any) -> None:
    """Rotary frequencies that Transformers picks for a whole batch, by its longest row: synthetic rows are too short to
    show it."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(text, name, None)
        for each in (given, *given.values()) if isinstance(given, Mapping) else ():
            kind = each.get("rope_type", each.get("type")) if isinstance(each, Mapping) else None
            if kind in ("dynamic", "longrope"):
                raise PrivacyError(
                    f"config.{name} has rope_type={kind!r}, which changes every row of a batch when one is long; set "
                    "it to 'default', or to 'linear' or 'yarn' with the factor that fits the longest row"
                )


def _check_buffers(model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            raise PrivacyError(
                f"the forward pass changes the buffer {name}, which is saved with the weights and carries data past "
                "the noise; switch off what updates it (such as running statistics)"
            )


def _tolerance(engine: PerExampleGradients, table: Mapping[torch.dtype, float]) -> float:
    return max(table.get(p.dtype, _HALF_TOLERANCE) for p in engine.model.parameters() if p.is_floating_point())


@contextlib.contextmanager
def _differentiable_embeddings(model: nn.Module, size: int, packed: bool) -> Iterator[list[torch.Tensor]]:
    """Cuts the graph at every embedding that is looked up per entry and collects its outputs as leaves.

    There are `size` entries, examples in the first dimension or tokens of a packed row in the first or second.
    """
    leaves: list[torch.Tensor] = []

    def cut(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        per_entry = output.shape[0] == size or (packed and output.shape[:2] == (1, size))
        if not torch.is_grad_enabled() or not per_entry:
            return None
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf

    handles = [m.register_forward_hook(cut) for m in model.modules() if adapters.is_embedding(m)]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _check_isolation(loss: PerExampleLoss, called: nn.Module, model: nn.Module, batch: Batch, tolerance: float) -> None:
    size, segments = batch_size(batch), packing.Segments.of(batch)
    # The example that each entry of a leaf belongs to: rows, or the tokens of a packed row.
    owner = torch.arange(size) if segments is None else segments.owner
    inputs = {k: v.detach().clone().requires_grad_() if _is_differentiable(k, v) else v for k, v in batch.items()}
    advice = (
        "the examples of a batch are not independent (BatchNorm, a mixture-of-experts capacity or auxiliary loss, "
        "in-batch negatives, or a per_example_loss_fn that averages): remove it, or use another model"
    )
    if segments is not None:
        advice = (
            "the documents of a packed row are not independent (attention that does not look for packing, or what "
            "makes the rows of a batch depend on each other): load the model with attn_implementation='dp_flash', or "
            "use a data_collator that pads"
        )
    with torch.enable_grad(), _differentiable_embeddings(model, len(owner), segments is not None) as leaves:
        torch.manual_seed(0)
        losses = loss(called, inputs)
        leaves = leaves + [v for k, v in inputs.items() if _is_differentiable(k, v)]
        if not leaves:
            raise PrivacyError("no input of the model is differentiable, so its examples' isolation cannot be checked")
        if losses.shape != (size,):
            raise PrivacyError(
                f"the per-example loss has shape {tuple(losses.shape)}, not ({size},): return one loss per example "
                "(per_example_loss_fn)"
            )
        if not losses.requires_grad:
            raise PrivacyError("the per-example loss has no gradient; do not detach it in per_example_loss_fn")
        for i in range(size):
            grads = torch.autograd.grad(losses[i], leaves, retain_graph=True, allow_unused=True)
            for grad in grads:
                if grad is None:
                    continue
                entries = grad if len(grad) == len(owner) else grad[0]
                if not bool((entries[owner.to(grad.device) != i] == 0).all()):
                    raise PrivacyError(f"the loss of one example has a gradient with respect to another's: {advice}")
    _check_perturbation(loss, called, batch, tolerance, advice)


def _is_differentiable(name: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not name.startswith("label")


def _check_perturbation(loss: PerExampleLoss, called: nn.Module, batch: Batch, tolerance: float, advice: str) -> None:
    """What gradients cannot see (top-k routing, counts): replacing row 0 must leave the other rows' losses alone."""
    if packing.is_packed(batch):
        documents = packing.split(batch)
        changed = packing.join([_reversed(documents[0]), *documents[1:]])
    else:
        changed = {k: v.clone() for k, v in batch.items()}
        for value in changed.values():
            if value.dim() > 0 and len(value) > 1:
                value[0] = value[1].flip(0) if value.dim() > 1 else value[1]
    with torch.no_grad():
        torch.manual_seed(0)
        before = loss(called, batch)
        torch.manual_seed(0)
        after = loss(called, changed)
    if not torch.allclose(before[1:], after[1:], rtol=tolerance, atol=tolerance):
        raise PrivacyError(f"replacing one example changes the loss of another: {advice}")


def _reversed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A packed document with its tokens and labels, but not its positions, in reverse."""
    return {
        name: value.flip(1) if isinstance(value, torch.Tensor) and value.dim() > 1 and name != "position_ids" else value
        for name, value in document.items()
    }


def _row_alone(batch: Batch, i: int) -> dict[str, torch.Tensor]:
    """Row i as a batch of its own, without the padding that its neighbours caused; a document, unpacked."""
    if packing.is_packed(batch):
        return packing.alone(batch, i)
    row = {name: value[i : i + 1] for name, value in batch.items()}
    mask = row.get("attention_mask")
    if mask is not None and mask.dim() == 3 and row["input_ids"].shape == mask.shape:  # the two texts of a pair
        longest = int(mask.sum(-1).max())
        return {k: v[..., :longest] if v.shape == mask.shape else v for k, v in row.items()}
    if mask is None or mask.dim() != 2:
        return row
    own = mask[0].bool()
    return {k: v[:, own] if v.dim() > 1 and v.shape[1] == len(own) else v for k, v in row.items()}


def _check_rows_alone(loss: PerExampleLoss, called: nn.Module, batch: Batch, tolerance: float) -> None:
    """A row alone and unpadded has the loss that it has beside others: padding is up to its longest neighbour (P10)."""
    if packing.is_packed(batch):
        _check_documents_alone(loss, called, batch, tolerance)
        return
    with torch.no_grad():
        together = loss(called, batch)
        alone = torch.cat([loss(called, _row_alone(batch, i)) for i in range(len(together))])
    if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance):
        raise PrivacyError(
            "a row's loss changes with the rows beside it or with the padding that they cause: pad on the right "
            "(processing_class.padding_side), return attention_mask and position_ids from the data collator, or mask "
            "the padding in per_example_loss_fn"
        )


def _check_documents_alone(loss: PerExampleLoss, called: nn.Module, batch: Batch, tolerance: float) -> None:
    """A document has the same loss alone in a row, and beside a neighbour of any length."""
    documents = packing.split(batch)
    with torch.no_grad():
        together = loss(called, batch)
        alone = torch.cat([loss(called, document) for document in documents])
        beside = [loss(called, packing.join([other, *documents[1:]]))[1:] for other in documents[1:]]
    expected = torch.cat([together, *[together[1:]] * len(beside)])
    if not torch.allclose(torch.cat([alone, *beside]), expected, rtol=tolerance, atol=tolerance):
        raise PrivacyError(
            "a packed document's loss changes with the documents beside it or with their lengths: load the model with "
            "attn_implementation='dp_flash', or use a data_collator that pads"
        )


def _check_model_loss(
    loss: PerExampleLoss, called: nn.Module, model: nn.Module, batch: Batch, tolerance: float
) -> None:
    with torch.no_grad():
        ours = loss(called, batch)
        for i in range(len(ours)):
            own = called(**_row_alone(batch, i))
            theirs = own["loss"] if isinstance(own, dict) and "loss" in own else None
            if theirs is None or not torch.allclose(ours[i].double(), theirs.double(), rtol=tolerance, atol=tolerance):
                raise PrivacyError(
                    f"{type(base_model(model)).__name__} computes a loss of its own "
                    f"({'none' if theirs is None else format(theirs.item(), '.5g')} where the task's is "
                    f"{ours[i].item():.5g}): pass per_example_loss_fn, switch off its extra terms (such as "
                    "output_router_logits), or, if rows are packed, let the data collator count positions as the model "
                    "does (position_ids_start)"
                )


def _check_trainer_loss(
    loss: PerExampleLoss,
    called: nn.Module,
    trainer_loss: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    batch: Batch,
    tolerance: float,
) -> None:
    with torch.no_grad():
        ours = loss(called, batch)
        theirs = torch.stack([trainer_loss(_row_alone(batch, i)).double() for i in range(len(ours))])
    if not torch.allclose(ours.double(), theirs, rtol=tolerance, atol=tolerance):
        raise PrivacyError(
            f"the trainer computes another loss of a row alone ({theirs[0].item():.5g}) than private training does "
            f"({ours[0].item():.5g}); pass per_example_loss_fn, or leave the trainer's own loss settings at their "
            "defaults"
        )


def _check_gradients(engine: PerExampleGradients, batch: Batch, tolerance: float) -> None:
    """Norms and weighted sums by the rules against autograd, example by example, on one and the same graph."""
    names = [name for name, _ in engine.parameters.values()]
    with engine.attached(), torch.enable_grad():
        losses, calls = engine.backward(batch, infer_layouts=True, retain_graph=True)
        parameters = engine.gathered_parameters()
        reference = [torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True) for each in losses]
    for call in calls:
        call.layout = engine.layouts[call.name]
    with exact_matmul():  # as in training: under autocast the rules' own products would be taken in half precision
        uses = engine._uses(calls)
        weights = torch.tensor([1.0, -0.5, 2.0], device=losses.device)[: len(losses)]
        reference_norm = _reference_norms(reference)
        if not bool((reference_norm > 0).any()):
            raise PrivacyError(
                "no gradient reaches any trainable parameter on synthetic rows; check the labels and loss"
            )
        scale = float(reference_norm.max())
        squared = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
        for position, name in enumerate(names):
            expected = torch.zeros(parameters[position].shape, dtype=torch.float64, device=losses.device)
            for weight, grads in zip(weights, reference, strict=True):
                if grads[position] is not None:
                    expected += weight.double() * grads[position].double()
            found = torch.zeros_like(expected)
            if name in uses:
                squared += layers.combined_squared_norm(uses[name])
                layers.add_weighted_sums(uses[name], weights, found, one_by_one=engine.exact_sums)
            if float((found - expected).norm()) > tolerance * max(float(expected.norm()), scale):
                raise PrivacyError(
                    f"the per-example gradients of {name} differ from autograd's on synthetic rows: the parameter is "
                    "used outside its layer's forward, or the layer's rule does not fit it; freeze it with "
                    "requires_grad_(False) or register a rule"
                )
        if not torch.allclose(squared.sqrt(), reference_norm, rtol=tolerance, atol=tolerance * scale):
            raise PrivacyError(
                "per-example gradient norms differ from autograd's on synthetic rows: a shared or tied parameter is "
                "used in a way that no rule covers; freeze it with requires_grad_(False)"
            )


def _check_same_bits(engine: PerExampleGradients, batch: Batch) -> None:
    """A row alone adds the same bits whatever was computed before it, longer or shorter (P18)."""

    def contribution(row: Batch) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        engine.accumulate(row)
        return engine.take()

    packed = packing.is_packed(batch)
    rows = packing.split(batch) if packed else [_row_alone(batch, i) for i in range(batch_size(batch))]
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        before = contribution(row)
        contribution(other)
        after = contribution(row)
        if not all(torch.equal(before[name], after[name]) for name in before):
            raise PrivacyError(
                "the same row gives other bits after another row was computed, so exact_sums prove nothing: switch off "
                "what the model remembers between calls, or use floating_point='snapped'"
            )


def _reference_norms(reference: Sequence[Sequence[torch.Tensor | None]]) -> torch.Tensor:
    """[B] float64 norms of autograd's gradients, one list of parameters' gradients an example."""
    squares = [torch.stack([g.double().square().sum() for g in grads if g is not None]).sum() for grads in reference]
    return torch.stack(squares).sqrt()
