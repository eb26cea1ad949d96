from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import layers, preflight
from dpfa_hf.per_example.gradients import MAX_CANCELLATION, PerExampleGradients
from dpfa_hf.per_example.layers import Dense, LayerCall, Lookup, Outer, combined_squared_norm, register_rule
from dpfa_hf.per_example.packing import Segments
from dpfa_hf.rounding import contribution_error

BOUND = 1 + 2.0**-10
KINDS = ("outer", "lookup", "dense")


def make(kind: str, seed: int, batch: int, length: int, rows: int, columns: int) -> tuple[Any, torch.Tensor]:
    """A use of a [rows, columns] parameter and its per-example gradients, materialised in float64 by plain loops."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(batch, length, columns, generator=generator)
    full = torch.zeros(batch, rows, columns, dtype=torch.float64)
    if kind == "outer":
        left = torch.randn(batch, length, rows, generator=generator)
        for i in range(batch):
            for t in range(length):
                full[i] += left[i, t].double()[:, None] * right[i, t].double()[None, :]
        return Outer(left, right), full
    if kind == "lookup":
        index = torch.randint(0, rows, (batch, length), generator=generator)
        for i in range(batch):
            for t in range(length):
                full[i, index[i, t]] += right[i, t].double()
        return Lookup(index, right, rows), full
    dense = torch.randn(batch, rows, columns, generator=generator)
    return Dense(dense), dense.double()


def weighted_sum(uses: list, weights: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    total = torch.zeros(rows, columns)
    for use in uses:
        use.add_weighted_sum(weights, total)
    return total


SHAPES = {
    "batch": st.integers(1, 4),
    "length": st.integers(1, 7),
    "rows": st.integers(1, 9),
    "columns": st.integers(1, 9),
    "seed": st.integers(0, 1000),
}


@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), **SHAPES)
@settings(max_examples=80, deadline=None)
def test_any_combination_of_uses_agrees_with_materialised_gradients(
    kinds: list[str], batch: int, length: int, rows: int, columns: int, seed: int
) -> None:
    made = [make(kind, seed + i, batch, length + i, rows, columns) for i, kind in enumerate(kinds)]
    uses, full = [use for use, _ in made], sum(gradient for _, gradient in made)
    scale = sum(use.mass for use in uses).square()
    weights = torch.randn(batch, dtype=torch.float64)
    expected = torch.einsum("b,brc->rc", weights, full)
    for form in (uses, layers.write_out(uses), written(uses)):
        error = (combined_squared_norm(form) - full.flatten(1).square().sum(1)).abs()
        assert bool((error <= 1e-5 * scale).all())
        found = weighted_sum(form, weights, rows, columns)
        assert float((found - expected).abs().max()) <= 1e-5 * float((weights.abs() * scale.sqrt()).sum())
    for use, gradient in made:
        assert all(torch.allclose(use.example(i), gradient[i], atol=1e-12) for i in range(batch))
        assert bool((use.mass >= gradient.flatten(1).norm(dim=1) * (1 - 1e-5)).all())


@given(limit=st.sampled_from([1, 7, 30, 200]), **SHAPES)
@settings(max_examples=40, deadline=None)
def test_gram_and_tiles_agree_whatever_the_size_of_a_tile(
    limit: int, batch: int, length: int, rows: int, columns: int, seed: int
) -> None:
    use, full = make("outer", seed, batch, length, rows, columns)
    expected = full.flatten(1).square().sum(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_MAX_TEMPORARY", limit)
        for found in (layers._gram(use.left, use.right), layers._tiled(use.left, use.right), use.squared_norm()):
            assert found.dtype == torch.float64
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(use.mass.max() ** 2))


@pytest.mark.parametrize(("rows", "columns"), [(70, 2), (2, 70), (70, 5)])
def test_narrow_matrices_of_either_form_have_the_same_sum(rows: int, columns: int) -> None:
    use, full = make("outer", 0, 3, 4, rows, columns)
    weights = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    found = weighted_sum([use, use], weights, rows, columns)
    assert torch.allclose(found.double(), 2 * torch.einsum("b,brc->rc", weights, full), atol=1e-4)
    assert torch.allclose(use.squared_norm(), full.flatten(1).square().sum(1), rtol=1e-4)


@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), **SHAPES)
@settings(max_examples=40, deadline=None)
def test_examples_added_one_by_one_have_the_same_sum(
    kinds: list[str], seed: int, batch: int, length: int, rows: int, columns: int
) -> None:
    made = [make(kind, seed + i, batch, length, rows, columns) for i, kind in enumerate(kinds)]
    weights = torch.linspace(-1, 2, batch, dtype=torch.float64)
    total = torch.ones(rows, columns, dtype=torch.float64)
    layers.add_weighted_sums([use for use, _ in made], weights, total, one_by_one=True)
    expected = 1 + sum(torch.einsum("b,brc->rc", weights, full) for _, full in made)
    assert torch.allclose(total, expected, rtol=1e-13, atol=1e-13)


def largest_excess(residue: float) -> float:
    """How much longer than the norm by which it clips a tied gradient is, in rational arithmetic: a head and its
    embedding of which the sum is as small as `residue`."""
    rows, columns, length = 5, 3, 6
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, rows, (1, length), generator=generator)
    hidden = torch.randn(1, length, columns, generator=generator)
    head = Outer(-torch.nn.functional.one_hot(index, rows).float(), hidden)
    table = Lookup(index, hidden * (1 + residue), rows)
    engine = PerExampleGradients(
        nn.Linear(columns, rows, bias=False), lambda m, b: m(b).sum((1, 2)), clipping_norm=1.0, exact_sums=True
    )
    (clips,) = engine.norms({"weight": [head, table]}, 1, torch.device("cpu"))[0].tolist()
    exact = [[Fraction(0)] * columns for _ in range(rows)]
    for t, row in enumerate(index[0].tolist()):
        for column in range(columns):
            exact[row][column] += Fraction(table.grad[0, t, column].item()) - Fraction(hidden[0, t, column].item())
    return float(sum(x * x for line in exact for x in line)) ** 0.5 / clips - 1


RESIDUES = [1.0, 2.0**-7, 2.0**-9, 2.0**-12, 2.0**-20]


@pytest.mark.parametrize("residue", RESIDUES)
def test_what_clips_a_tied_gradient_is_not_below_its_norm_by_more_than_float64_allows(residue: float) -> None:
    assert largest_excess(residue) <= contribution_error()


@pytest.mark.parametrize("mutant", ["no cross term", "float32 and no cap"])
def test_mutant_norms_of_tied_gradients_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "no cross term":
        monkeypatch.setattr(layers, "_outer_lookup_product", lambda outer, lookup: -outer.squared_norm() / 2)
    else:
        product = layers._outer_lookup_product
        monkeypatch.setattr("dpfa_hf.per_example.gradients.MAX_CANCELLATION", float("inf"))
        monkeypatch.setattr(layers, "_outer_lookup_product", lambda *uses: product(*uses).float().double())
        monkeypatch.setattr(Outer, "_worst_error", lambda use, value: 0)
    assert max(largest_excess(residue) for residue in [*RESIDUES, -2.0]) > contribution_error()


def test_repeated_indices_are_added_before_squaring() -> None:
    use = Lookup(torch.tensor([[2, 2, 0]]), torch.tensor([[[1.0], [2.0], [4.0]]]), 3)
    assert use.squared_norm().item() == (1 + 2) ** 2 + 4**2
    cancelled = Lookup(torch.tensor([[1, 1]]), torch.tensor([[[1.0], [-1.0]]]), 3)
    assert cancelled.squared_norm().item() == 0


def test_examples_do_not_share_rows_of_a_lookup() -> None:
    use = Lookup(torch.tensor([[1], [1]]), torch.tensor([[[3.0]], [[4.0]]]), 2)
    assert use.squared_norm().tolist() == [9, 16]


def test_a_tied_weight_has_a_cross_term() -> None:
    """Two equal uses have twice the norm, not the root of two; without the cross term the check fails."""
    for kind in KINDS:
        use, full = make(kind, 0, 3, 4, 5, 6)
        norm = combined_squared_norm([use, use]).sqrt()
        assert torch.allclose(norm, 2 * full.flatten(1).norm(dim=1), rtol=1e-5)
        without = (use.squared_norm() + use.squared_norm()).sqrt()
        assert not torch.allclose(without, norm, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_rows_are_zero_even_where_they_are_not_finite(kind: str) -> None:
    use, full = make(kind, 0, 3, 4, 5, 6)
    getattr(use, "grads" if kind == "dense" else "right" if kind == "outer" else "grad")[1] = float("nan")
    kept = use.zero_rows(torch.tensor([True, False, True]))
    found = weighted_sum([kept], torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), 5, 6)
    assert torch.allclose(found.double(), full[0] + full[2], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Cancellation: rounding errors follow the mass, the clipping factor follows the norm


# Features in and out: of a matrix whose gradients are written out, and of one that has its norm from factors.
NARROW, WIDE = (24, 16), (240, 160)


def cancelling(residue: float, length: int = 64, features: int = 24) -> torch.Tensor:
    """One example whose tokens cancel to `residue` of their mass."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(1, length // 2, features, generator=generator)
    return torch.cat([half, half.flip(1) * (1 + residue)], 1)


def contribution(x: torch.Tensor, sign: torch.Tensor, scale: float = 1.0, out_features: int = 16) -> float:
    torch.manual_seed(0)
    features = x.shape[2]
    model = nn.Linear(features, out_features, bias=False)

    def loss(called: nn.Module, batch: Any) -> torch.Tensor:
        out = called(batch["x"])
        direction = torch.randn(out_features, generator=torch.Generator().manual_seed(1))
        return (out @ direction * batch["sign"]).sum(1) * scale

    engine = PerExampleGradients(model, loss, clipping_norm=1.0)
    check = {"x": torch.randn(3, 8, features), "sign": torch.ones(3, 8)}
    preflight.check(engine, check)
    engine.accumulate({"x": x, "sign": sign})
    return float(engine.take()["weight"].double().norm())


@pytest.mark.parametrize("residue", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 0.0])
@pytest.mark.parametrize("length", [8, 64, 512])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
def test_tokens_that_cancel_still_contribute_at_most_c(shape: tuple[int, int], residue: float, length: int) -> None:
    sign = torch.cat([torch.ones(1, length // 2), -torch.ones(1, length // 2)], 1)
    assert contribution(cancelling(residue, length, shape[0]), sign, 1e6, shape[1]) <= BOUND


def worst_contribution(shape: tuple[int, int]) -> float:
    worst = 0.0
    for residue in (1e-6, 1e-7, 3e-8, 1e-9, 0.0):
        for length in (64, 512):
            sign = torch.cat([torch.ones(1, length // 2), -torch.ones(1, length // 2)], 1)
            worst = max(worst, contribution(cancelling(residue, length, shape[0]), sign, 1e6, shape[1]))
    return worst


def without_rounding_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outer, "_worst_error", lambda self, value: torch.zeros_like(value))


def test_the_bound_fails_without_the_cancellation_cap_and_the_rounding_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either alone keeps these examples within C."""
    monkeypatch.setattr("dpfa_hf.per_example.gradients.MAX_CANCELLATION", float("inf"))
    assert worst_contribution(WIDE) <= BOUND
    without_rounding_bounds(monkeypatch)
    assert worst_contribution(WIDE) > BOUND


def test_a_gradient_that_is_written_out_needs_no_bound_because_it_is_what_is_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dpfa_hf.per_example.gradients.MAX_CANCELLATION", float("inf"))
    without_rounding_bounds(monkeypatch)
    assert worst_contribution(NARROW) <= 1 + 1e-6
    monkeypatch.setattr(Outer, "narrow", False)  # the norm of one product, and another product in the sum
    monkeypatch.setattr(Outer, "long", False)
    assert worst_contribution(NARROW) > BOUND


@pytest.mark.parametrize("packed", [False, True])
def test_a_gradient_that_is_written_out_is_the_same_gradient(packed: bool) -> None:
    use, full = make("outer", 0, 3, 4, 5, 6)
    if packed:
        segments = Segments(torch.tensor([0, 4, 8, 12]), total=12, longest=4)
        use = Outer(use.left.flatten(0, 1), use.right.flatten(0, 1), segments)
    written = use.written_out()
    assert use.narrow
    assert torch.allclose(written.grads.double(), full, rtol=1e-5, atol=1e-6)
    assert torch.equal(written.mass, use.mass)


def written(uses: list[Any]) -> list[Any]:
    """`layers.write_out` of a parameter whose matrix is wide and whose rows are long, whatever the sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outer, "narrow", False)
        patch.setattr(Outer, "long", True)
        return layers.write_out(uses)


def test_only_what_is_narrow_or_takes_a_quarter_more_memory_written_out_is_written_out() -> None:
    for length in (1, 8, 4096):
        assert Outer(torch.empty(1, length, 8), torch.empty(1, length, 4096)).narrow
        assert not Outer(torch.empty(1, length, 768), torch.empty(1, length, 768)).narrow
    for dtype, least in ((torch.float32, 308), (torch.bfloat16, 615)):
        factors = [torch.empty(3, least, 768, dtype=dtype) for _ in range(2)]
        assert Outer(*factors).long
        assert not Outer(*(factor[:, 1:] for factor in factors)).long
        one_row, total = [factor.flatten(0, 1) for factor in factors], 3 * least
        assert Outer(*one_row, Segments(torch.tensor([0, least, least + 1, total]), total, 2 * least)).long
        assert not Outer(*one_row, Segments(torch.tensor([0, 9, least, least + 1, total]), total, 2 * least)).long


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kinds", [("outer",), ("outer", "lookup"), ("lookup", "outer", "lookup")], ids="+".join)
def test_long_rows_are_written_out_in_one_gradient_with_all_its_uses(kinds: tuple[str, ...], packed: bool) -> None:
    made = [make(kind, i, 3, 4, 5, 6) for i, kind in enumerate(kinds)]
    uses, full = [use for use, _ in made], sum(gradient for _, gradient in made)
    mass = sum(use.mass for use in uses)
    if packed:
        segments = Segments(torch.tensor([0, 4, 8, 12]), total=12, longest=4)
        uses = [
            Outer(use.left.flatten(0, 1), use.right.flatten(0, 1), segments)
            if isinstance(use, Outer)
            else Lookup(use.index.flatten(), use.grad.flatten(0, 1), 5, segments)
            for use in uses
        ]
    (found,) = written(uses)
    assert torch.allclose(found.grads.double(), full, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.mass, mass, rtol=1e-6)
    own = found.grads.double().flatten(1).square().sum(1)
    assert bool((found.squared_norm() >= own).all()) and torch.allclose(found.squared_norm(), own, rtol=1e-3)


@pytest.mark.parametrize("kinds", [("outer", "outer"), ("outer", "dense"), ("lookup",), ("lookup", "lookup")], ids=str)
def test_other_uses_of_long_rows_keep_their_forms(kinds: tuple[str, ...]) -> None:
    uses = [make(kind, i, 3, 4, 5, 6)[0] for i, kind in enumerate(kinds)]
    assert written(uses) == uses
    transposed = Lookup(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, 5), 6, transposed=True)
    assert written([make("outer", 0, 3, 4, 5, 6)[0], transposed])[1] is transposed


def test_mutant_norm_taken_before_the_tied_table_is_added_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make(kind, 0, 3, 4, 5, 6) for kind in ("outer", "lookup")]
    expected = sum(full for _, full in made).flatten(1).square().sum(1)
    assert torch.allclose(written([use for use, _ in made])[0].squared_norm(), expected, rtol=1e-3)
    renew = layers.Dense.__init__

    def stale(self: Dense, grads: torch.Tensor, *rest: Any, **more: Any) -> None:
        renew(self, grads, *rest, **more)
        self.__dict__["_squares"] = kept.setdefault(grads.data_ptr(), Dense._squares.func(self))

    kept: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(layers.Dense, "__init__", stale)
    assert not torch.allclose(written([use for use, _ in made])[0].squared_norm(), expected, rtol=1e-1)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_may_lie_in_memory_in_any_order(kind: str) -> None:
    use, full = make(kind, 0, 3, 4, 5, 6)
    weights = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    for form in ([use], written([use]), layers.write_out([use])):
        total = torch.zeros(6, 5).t()
        layers.add_weighted_sums(form, weights, total)
        assert torch.allclose(total.double(), torch.einsum("b,brc->rc", weights, full), atol=1e-5)


@pytest.mark.parametrize("limit", [1, 7, 30])
def test_gradients_that_are_written_out_have_the_same_norm_and_sum_in_blocks_of_any_size(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use, full = make("dense", 0, 3, 4, 5, 6)
    monkeypatch.setattr(layers, "_MAX_TEMPORARY", limit)
    assert torch.allclose(use.squared_norm(), full.flatten(1).square().sum(1), rtol=1e-12)
    weights = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    expected = torch.einsum("b,brc->rc", weights, full)
    assert torch.allclose(weighted_sum([use], weights, 5, 6).double(), expected, atol=1e-5)


def largest_shortfall(length: int, rows: int, columns: int) -> float:
    """By how much a squared norm of cancelling tokens falls below the exact one, relative to the squared mass."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(24, length // 2, width, generator=generator) for width in (rows, columns))
    use = Outer(torch.cat([left, -left.flip(1) * 1.001], 1), torch.cat([right, right.flip(1)], 1))
    exact = torch.stack([use.example(i).square().sum() for i in range(24)])
    return float(((exact - use.squared_norm()) / use.mass.square()).max())


@pytest.mark.parametrize("shape", [(8, 40, 50), (300, 700, 600), (64, 8, 9)], ids=["gram", "chunks", "tiles"])
def test_float32_norms_are_never_too_small_and_the_check_notices_a_bound_left_out(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_shortfall(*shape) <= 0
    without_rounding_bounds(monkeypatch)
    assert largest_shortfall(*shape) > 1e-14


def test_the_bound_of_a_gram_form_holds_against_rational_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_ALWAYS_TILES", 0)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(4, 5, 7, generator=generator) * 10.0 ** torch.arange(-3, 4) for _ in range(2))
    left[:, 3:], right[:, 3:] = -left[:, 1:3], right[:, 1:3]
    value = layers._gram(left, right)
    error = Outer(left, right)._worst_error(value)
    for i in range(4):
        a, b = ([[Fraction(x) for x in row] for row in side[i].tolist()] for side in (left, right))
        exact = sum((sum(a[t][r] * b[t][c] for t in range(5))) ** 2 for r in range(7) for c in range(7))
        assert abs(Fraction(value[i].item()) - exact) <= Fraction(error[i].item())
        assert error[i] <= 1e-5 * Outer(left, right).mass[i] ** 2


def shift_by_neighbours(rows: int, columns: int, *, tied: bool = False) -> float:
    """How much rows of 40 tokens change when a neighbour's length pads them to 400, relative to their squared norms."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 40, width, generator=generator) for width in (rows, columns))
    index = torch.randint(0, rows, (3, 40), generator=generator)
    found = []
    for longer in (0, 360):
        # Inputs at padding are whatever the model made of them; gradients there are zero.
        padding = (0, 0, 0, longer)
        uses = [Outer(nn.functional.pad(left, padding), nn.functional.pad(right, padding, value=0.7))]
        table = Lookup(nn.functional.pad(index, (0, longer)), nn.functional.pad(right, padding), rows)
        found.append(combined_squared_norm(layers.write_out([*uses, table] if tied else uses)))
    return float(((found[1] - found[0]) / found[0]).abs().max())


@pytest.mark.parametrize(
    "shape",
    [(300, 300), (1200, 1100), (16, 300), (3000, 60)],
    ids=["gram, then written out", "gram, then tiles", "narrow", "narrow, tied in two forms"],
)
def test_what_clips_a_row_does_not_depend_on_how_long_its_neighbours_are(shape: tuple[int, int]) -> None:
    assert shift_by_neighbours(*shape) <= 2e-6
    assert shift_by_neighbours(*shape, tied=True) <= 2e-6


def test_mutant_bound_that_follows_the_form_or_the_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many neighbours would be shortened by so much when one long row arrives."""
    honest = Outer._worst_error
    monkeypatch.setattr(
        Outer,
        "_worst_error",
        lambda self, value: honest(self, value) * layers._by_gram(self.left.shape[1], 300, 300),
    )
    assert shift_by_neighbours(300, 300) > 1e-4
    monkeypatch.setattr(Outer, "_worst_error", lambda self, value: 2e-6 * self.left.shape[1] * value.sqrt() * self.mass)
    assert shift_by_neighbours(300, 300) > 1e-4


def test_mutant_long_rows_without_the_bound_of_short_ones_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each neighbour would be stretched, by as much, when the long row leaves."""
    honest = layers.write_out

    def without(uses: list[Any]) -> list[Any]:
        return [replace(use, margin=None) if isinstance(use, Dense) else use for use in honest(uses)]

    monkeypatch.setattr(layers, "write_out", without)
    assert shift_by_neighbours(300, 300) > 1e-4
    assert shift_by_neighbours(3000, 60, tied=True) > 1e-4


def test_gradients_too_small_for_float32_products_keep_their_norm() -> None:
    for scale in (1e-15, 1e-25):
        left, right = torch.full((2, 4, 30), 1e15), torch.full((2, 4, 30), scale)
        exact = Outer(left.double(), right.double()).squared_norm()
        assert bool((Outer(left, right).squared_norm() >= exact * (1 - 1e-12)).all())


def test_ordinary_rows_are_far_from_the_cap() -> None:
    assert MAX_CANCELLATION >= 64
    assert contribution(torch.randn(1, 64, 24), torch.ones(1, 64), scale=1e6) == pytest.approx(1, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Rules, each against autograd through the engine: preflight compares norms and sums example by example


def squares(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch["x"])
    weight = torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view(out.shape[1:])
    return (out.square() * weight + out).flatten(1).sum(1)


def clipped_by_loop(model: nn.Module, x: torch.Tensor, clipping_norm: float) -> torch.Tensor:
    total: Any = 0
    for i in range(len(x)):
        model.zero_grad()
        squares(model, {"x": x[i : i + 1]}).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        total = total + gradient * min(1.0, clipping_norm / float(gradient.norm().clamp_min(1e-300)))
    model.zero_grad()
    return total


def assert_exact(model: nn.Module, x: torch.Tensor) -> None:
    model = model.double()
    engine = PerExampleGradients(model, squares, clipping_norm=1.0)
    preflight.check(engine, {"x": x[:3]})
    for clipping_norm in (1e-2, 1e4):
        engine.clipping_norm = clipping_norm
        engine.accumulate({"x": x})
        found = torch.cat([value.flatten() for value in engine.take().values()])
        expected = clipped_by_loop(model, x, clipping_norm)
        assert float((found - expected).norm() / expected.norm()) < 1e-6


class PositionEmbedding(nn.Embedding):
    """Computes its own indices, as OPT's and BART's do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.arange(x.shape[1]).expand(x.shape[:2]) + 2)


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it reads, as Gemma's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 4.5


IDS = torch.tensor([[1, 2, 2, 0, 3], [4, 4, 4, 4, 4], [0, 0, 1, 5, 6], [6, 5, 1, 1, 0]])


def tokens(table: nn.Module, features: int = 4) -> nn.Module:
    return nn.Sequential(table, nn.Linear(features, 3))


@pytest.mark.parametrize(
    "table",
    [
        nn.Embedding(7, 4),
        nn.Embedding(7, 4, padding_idx=0),
        ScaledEmbedding(7, 4),
        ScaledEmbedding(7, 4, padding_idx=1),
        PositionEmbedding(9, 4),
    ],
    ids=["plain", "padding", "scaled", "scaled-padding", "positions"],
)
def test_embeddings_equal_a_loop_of_autograd(table: nn.Module) -> None:
    assert_exact(tokens(table), IDS)


class Permute(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (4, 6, 5)),
        (nn.Linear(5, 3, bias=False), (4, 5)),
        (nn.Linear(5, 3), (4, 2, 3, 5)),
        (nn.LayerNorm(5), (4, 6, 5)),
        (nn.LayerNorm((6, 5)), (4, 6, 5)),
        (nn.LayerNorm(5, bias=False), (4, 6, 5)),
        (nn.RMSNorm(5), (4, 6, 5)),
        (nn.Conv2d(2, 3, 2, stride=2), (4, 2, 6, 6)),
        (nn.Conv2d(2, 3, 3, padding=1, dilation=2), (4, 2, 6, 6)),
        (nn.Conv1d(5, 3, 3, padding=1, stride=2), (4, 5, 8)),
        (nn.Conv1d(5, 3, 1, bias=False), (4, 5, 8)),
    ],
    ids=str,
)
def test_layers_equal_a_loop_of_autograd(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_exact(layer, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_half_frozen_layers_equal_a_loop_of_autograd(frozen: str) -> None:
    for layer in (nn.Linear(5, 3), nn.LayerNorm(5)):
        getattr(layer, frozen).requires_grad_(False)
        assert_exact(layer, torch.randn(4, 6, 5, dtype=torch.float64))


class Twice(nn.Module):
    """One layer called twice, and its weight tied to a second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.first(x).tanh()))


def test_a_layer_called_twice_and_tied_equals_a_loop_of_autograd() -> None:
    torch.manual_seed(0)
    assert_exact(Twice(), torch.randn(4, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 1, groups=2),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    ],
    ids=["groups", "same", "circular"],
)
def test_unusual_convolutions_are_refused(layer: nn.Module) -> None:
    with pytest.raises(PrivacyError, match="convolution"):
        assert_exact(layer, torch.randn(4, 2, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_embeddings_that_look_at_the_batch_are_refused(options: dict) -> None:
    with pytest.raises(PrivacyError):
        assert_exact(tokens(nn.Embedding(7, 4, **options)), IDS)


# ---------------------------------------------------------------------------------------------------------------------
# A user's rule


class Bilinear(nn.Module):
    """y = x W (W times two): a layer that no built-in rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * (x @ self.kernel)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    registry = dict(layers._RULES)
    monkeypatch.setattr(layers, "_RULES", registry)
    yield registry


def test_a_registered_rule_works_end_to_end(rules: dict) -> None:
    with pytest.raises(PrivacyError, match=r"Bilinear.*register_rule"):
        assert_exact(nn.Sequential(Bilinear()), torch.randn(4, 6, 5, dtype=torch.float64))

    @register_rule(Bilinear)
    def bilinear(call: LayerCall) -> dict[str, Outer]:
        return {"kernel": Outer(2 * call.rows(call.inputs[0]), call.grad_rows)}

    assert_exact(nn.Sequential(Bilinear()), torch.randn(4, 6, 5, dtype=torch.float64))


def wrong_scale(call: LayerCall) -> dict:
    return {"kernel": Outer(call.rows(call.inputs[0]), call.grad_rows)}


def wrong_positions(call: LayerCall) -> dict:
    return {"kernel": Outer(2 * call.rows(call.inputs[0])[:, :1], call.grad_rows[:, :1])}


def wrong_example(call: LayerCall) -> dict:
    return {"kernel": Outer(2 * call.rows(call.inputs[0]).flip(0), call.grad_rows)}


def wrong_name(call: LayerCall) -> dict:
    return {"weight": Outer(2 * call.rows(call.inputs[0]), call.grad_rows)}


def wrong_shape(call: LayerCall) -> dict:
    return {"kernel": Outer(call.grad_rows, 2 * call.rows(call.inputs[0]))}


@pytest.mark.parametrize("rule", [wrong_scale, wrong_positions, wrong_example, wrong_name, wrong_shape])
def test_a_wrong_rule_is_refused_before_the_first_step(rules: dict, rule: Any) -> None:
    register_rule(Bilinear)(rule)
    engine = PerExampleGradients(nn.Sequential(Bilinear()), squares, clipping_norm=1.0)
    with pytest.raises(PrivacyError) as caught:
        preflight.check(engine, {"x": torch.randn(3, 6, 5)})
    assert "\n" not in str(caught.value)
