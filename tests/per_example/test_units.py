"""Users of several rows: their mean losses, and gradients that are clipped once for all of a user's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import layers, losses, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.per_example.packing import Segments
from dpfa_hf.per_example.units import ROWS_PER_UNIT, Units

FAMILIES = (
    "bert", "bert-multi-label", "bert-regression", "bert-mlm", "roberta", "distilbert-qa", "modernbert", "albert",
    "electra", "gpt2", "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "vaultgemma", "phi3",
    "olmo2", "smollm3", "opt", "gpt-neox", "t5", "bart", "whisper", "vit",
)  # fmt: skip
LENGTHS = (6, 4, 9, 3, 7, 5, 8, 4)
# Rows of each user: unequal ones, and equal ones, which take another path.
UNEQUAL, EQUAL = (3, 1, 2, 2), (2, 2, 2, 2)
SLACK = 1 + 2.0**-10
Rows = list[dict[str, torch.Tensor]]


def engine_of(model: Any, **options: Any) -> PerExampleGradients:
    """An engine that has passed the checks, as the trainer makes it."""
    task = losses.task_of(model)
    engine = PerExampleGradients(model, losses.per_example_loss(model, task), clipping_norm=1.0, **options)
    dtype = next(model.parameters()).dtype
    batch = preflight.synthetic_batch(model, task, {})
    preflight.check(engine, {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    return engine


def by_user(rows: Rows, counts: Sequence[int]) -> list[Rows]:
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [rows[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def batch_of(lab: SimpleNamespace, model: Any, users: list[Rows]) -> dict[str, Any]:
    batch = lab.collate(model, [row for rows in users for row in rows])
    return {**batch, ROWS_PER_UNIT: tuple(map(len, users))}


def user_gradients(lab: SimpleNamespace, model: Any, users: list[Rows]) -> list[dict[str, torch.Tensor]]:
    """The definition: of each user the mean of its rows' gradients, each row alone, by autograd."""
    found = []
    for rows in users:
        each = lab.row_gradients(model, rows)
        found.append({name: sum(g[name] for g in each) / len(rows) for name in each[0]})
    return found


def private_sum(
    lab: SimpleNamespace, engine: PerExampleGradients, users: list[Rows], clipping_norm: float, size: int
) -> dict[str, torch.Tensor]:
    """In micro-batches of `size` users."""
    engine.clipping_norm = clipping_norm
    for start in range(0, len(users), size):
        engine.accumulate(batch_of(lab, engine.model, users[start : start + size]))
    return engine.take()


def worst_error(lab: SimpleNamespace, engine: PerExampleGradients, users: list[Rows]) -> float:
    """Against the loop of autograd: two clipping regimes, micro-batches of 1, 3 and all users."""
    gradients = user_gradients(lab, engine.model, users)
    return max(
        lab.relative_error(
            private_sum(lab, engine, users, clipping_norm, size), lab.clipped_sum(gradients, clipping_norm)
        )
        for clipping_norm in lab.regimes(gradients)
        for size in (1, 3, len(users))
    )


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_clipped_sum_over_users_equals_a_loop_of_autograd(
    lab: SimpleNamespace, family: str, counts: Sequence[int]
) -> None:
    model = lab.build(family)
    users = by_user(lab.rows_of(family, model, LENGTHS), counts)
    assert worst_error(lab, engine_of(model), users) < 1e-5


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "opt"])
def test_users_are_exact_where_matrices_are_wide(
    lab: SimpleNamespace, family: str, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers.Outer, "narrow", False)
    monkeypatch.setattr(layers.Outer, "long", long)
    model = lab.build(family)
    assert worst_error(lab, engine_of(model), by_user(lab.rows_of(family, model, LENGTHS), UNEQUAL)) < 1e-5


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "bart"])
def test_users_are_exact_with_lora(lab: SimpleNamespace, family: str) -> None:
    model = lab.with_lora(lab.build(family))
    assert worst_error(lab, engine_of(model), by_user(lab.rows_of(family, model, LENGTHS), UNEQUAL)) < 1e-5


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "vit"])
def test_float32_users_agree_to_1e_4(lab: SimpleNamespace, family: str) -> None:
    reference = lab.build(family)
    users = by_user(lab.rows_of(family, reference, LENGTHS), UNEQUAL)
    gradients = user_gradients(lab, reference, users)
    engine = engine_of(lab.build(family, dtype=torch.float32))
    narrow = [[{k: v.float() if v.is_floating_point() else v for k, v in row.items()} for row in u] for u in users]
    for clipping_norm in lab.regimes(gradients):
        found = private_sum(lab, engine, narrow, clipping_norm, 3)
        assert lab.relative_error(found, lab.clipped_sum(gradients, clipping_norm)) < 1e-4


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "vit"])
def test_users_clipped_layer_by_layer_equal_a_loop_of_autograd(lab: SimpleNamespace, family: str) -> None:
    model = lab.build(family)
    users = by_user(lab.rows_of(family, model, LENGTHS), UNEQUAL)
    engine = engine_of(model, clipping="per_layer")
    gradients, groups = user_gradients(lab, model, users), engine.clipping_groups()
    norm = lab.norm(gradients[0])
    expected: dict[str, torch.Tensor] = {}
    for group in set(groups.values()):
        parts = [{name: g[name] for name in groups if groups[name] == group} for g in gradients]
        expected |= lab.clipped_sum(parts, norm / len(set(groups.values())) ** 0.5)
    expected = {name: expected[name] for name in groups}
    for size in (1, 3):
        assert lab.relative_error(private_sum(lab, engine, users, norm, size), expected) < 1e-5


def test_automatic_clipping_scales_users_to_c(lab: SimpleNamespace) -> None:
    model = lab.build("bert")
    users = by_user(lab.rows_of("bert", model, LENGTHS), UNEQUAL)
    engine = engine_of(model, clipping="automatic")
    expected = None
    for gradient in user_gradients(lab, model, users):
        scaled = {name: g * 0.5 / (lab.norm(gradient) + 0.01) for name, g in gradient.items()}
        expected = scaled if expected is None else {name: expected[name] + g for name, g in scaled.items()}
    assert lab.relative_error(private_sum(lab, engine, users, 0.5, 4), expected) < 1e-5


def test_a_user_of_a_thousand_rows_beside_users_of_one(lab: SimpleNamespace) -> None:
    model = lab.build("bert")
    rows = lab.rows_of("bert", model, (2, 3) * 501)
    users = [rows[:1000], rows[1000:1001], rows[1001:]]
    gradients = user_gradients(lab, model, users)
    engine = engine_of(model)
    for clipping_norm in lab.regimes(gradients):
        found = private_sum(lab, engine, users, clipping_norm, 3)
        assert lab.relative_error(found, lab.clipped_sum(gradients, clipping_norm)) < 1e-5
    assert lab.norm(private_sum(lab, engine, users[:1], 1e-3, 1)) <= 1e-3 * SLACK


def test_a_users_loss_is_the_mean_of_its_rows(lab: SimpleNamespace) -> None:
    model = lab.build("bert")
    users = by_user(lab.rows_of("bert", model, LENGTHS), UNEQUAL)
    engine = engine_of(model)
    found = engine.accumulate(batch_of(lab, model, users))
    alone = [engine.accumulate(lab.collate(model, rows)).mean() for rows in users]
    assert torch.allclose(found, torch.stack(alone), rtol=1e-9)


# ---- a user depends on its own rows alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_takes_its_user_out_and_nobody_else(lab: SimpleNamespace, value: float) -> None:
    model = lab.build("bert")
    users = by_user(lab.rows_of("bert", model, LENGTHS), UNEQUAL)
    engine = engine_of(model)
    others = private_sum(lab, engine, users[1:], 0.1, 4)
    own = engine.loss
    engine.loss = lambda model, batch: own(model, batch) * torch.where(torch.arange(8) == 1, value, 1.0)
    found = private_sum(lab, engine, users, 0.1, 4)
    assert lab.relative_error(found, others) < 1e-9


def test_no_layer_sees_a_row_that_is_not_a_users(lab: SimpleNamespace) -> None:
    """Nothing is filled up, so that no filler's loss or gradient can be anything."""
    model = lab.build("bert")
    engine, sizes = engine_of(model), []
    handle = model.classifier.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    engine.accumulate(batch_of(lab, model, by_user(lab.rows_of("bert", model, LENGTHS), UNEQUAL)))
    handle.remove()
    assert sizes == [len(LENGTHS)]


def test_masses_and_segments_are_those_of_the_users_rows_together() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 3, width, generator=generator) for width in (5, 6))
    outer, lookup = layers.Outer(left, right), layers.Lookup(torch.arange(12).view(4, 3), left, 20)
    dense = layers.sum_positions(left)
    for rows in ((1, 3), (2, 2)):
        units = Units(rows)
        for gradient in (outer, lookup, dense):
            found = units.gathered(gradient)
            parts = gradient.mass.split(list(rows))
            assert torch.allclose(found.mass, torch.stack([part.sum() for part in parts]), rtol=1e-6)
            total = torch.stack([gradient.example(i) for i in range(4)]).split(list(rows))
            expected = torch.stack([part.sum(0).square().sum() for part in total])
            assert torch.allclose(found.squared_norm(), expected, rtol=1e-4)
    assert Units((1, 3)).gathered(outer).segments.lengths == [3, 9]
    assert Units((2, 2)).gathered(outer).left.shape == (2, 6, 5)


def test_rows_that_cancel_within_a_user_are_clipped_by_what_rounding_may_hide() -> None:
    """Two rows of opposite gradients: the norm is 0, the mass is not, and what is left is rounding."""
    model = nn.Linear(300, 300)
    engine = PerExampleGradients(model, lambda m, batch: (m(batch["x"]) * batch["y"]).sum((1, 2)), clipping_norm=1.0)
    engine.layouts = {"": layers.BATCHED}
    x = torch.randn(1, 64, 300)
    engine.accumulate({"x": torch.cat([x, x]), "y": torch.stack([x, -x])[:, 0] * 1e6, ROWS_PER_UNIT: (2,)})
    assert float(torch.cat([s.flatten() for s in engine.take().values()]).norm()) < 0.1


def test_users_packed_into_one_row_are_refused(lab: SimpleNamespace) -> None:
    from dpfa_hf.per_example import packing

    model = lab.build("llama")
    ids = torch.arange(3, 9)[None]
    packed = packing._with_boundaries({"input_ids": ids, "labels": ids}, [2, 4])
    engine = engine_of(model)
    with pytest.raises(PrivacyError, match="use one that pads") as raised:
        engine.accumulate({**packed, ROWS_PER_UNIT: (1, 1)})
    assert "\n" not in str(raised.value)


# ---- mutants --------------------------------------------------------------------------------------------------------


def rows_as_units(batch: Any) -> None:
    return None


def mean_over_the_micro_batch(self: Units, losses: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.sum() for part in losses.split(self.rows)]) / len(losses)


def sums_not_means(self: Units, losses: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.sum() for part in losses.split(self.rows)])


def users_of_equal_size(self: Units, tensor: torch.Tensor) -> tuple[torch.Tensor, Segments | None]:
    count, tokens = len(self.rows), tensor.flatten(0, 1)
    return tokens.unflatten(0, (count, len(tokens) // count)), None


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("of", rows_as_units),
        ("mean", mean_over_the_micro_batch),
        ("mean", sums_not_means),
        ("_tokens", users_of_equal_size),
    ],
)
def test_planted_bugs_are_caught(lab: SimpleNamespace, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.build("bert")
    engine = engine_of(model)
    users = by_user(lab.rows_of("bert", model, LENGTHS), UNEQUAL)
    monkeypatch.setattr(Units, name, mutant)
    assert worst_error(lab, engine, users) > 1e-2


def test_mutant_a_user_split_over_micro_batches_is_caught(lab: SimpleNamespace) -> None:
    model = lab.build("bert")
    engine, users = engine_of(model), by_user(lab.rows_of("bert", model, LENGTHS), UNEQUAL)
    split = [part for rows in users for part in (rows[:1], rows[1:]) if part]
    gradients = user_gradients(lab, model, users)
    clipping_norm, _ = lab.regimes(gradients)
    found = private_sum(lab, engine, split, clipping_norm, 1)
    assert lab.relative_error(found, lab.clipped_sum(gradients, clipping_norm)) > 1e-2
    alone = private_sum(lab, engine, split[:2], clipping_norm, 1)
    assert lab.norm(alone) > 1.01 * clipping_norm, "the mutant stays within C, so the test tries nothing"
