"""The engine on the norm kernels, in Triton's interpreter: as exact as without them, and never below the true norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpfa_hf._kernel import norms as kernel_norms
from dpfa_hf._kernel import outer_squared_norm
from torch import nn

from dpfa_hf.per_example import layers
from dpfa_hf.per_example.layers import Lookup, Outer, combined_squared_norm
from dpfa_hf.per_example.packing import Segments
from dpfa_hf.per_example.units import Units

pytestmark = pytest.mark.interpreter

SEGMENTS = Segments(torch.tensor([0, 5, 6, 17]), 17, 11)
# What the worst-case bounds of float32 add to a squared norm of these sizes.
LOOSENESS = 2e-3


def uses(packed: bool, tied: bool) -> list[Any]:
    torch.manual_seed(0)
    shape = (17,) if packed else (3, 9)
    segments = SEGMENTS if packed else None
    outer = Outer(torch.randn(*shape, 20), torch.randn(*shape, 24), segments)
    lookup = Lookup(torch.randint(20, shape), torch.randn(*shape, 24), 20, segments)
    return [outer, lookup] if tied else [outer]


def exact(parts: list[Any]) -> torch.Tensor:
    """[B] float64: the squared norms, from gradients written out."""
    return torch.stack([sum(part.example(i) for part in parts).square().sum() for i in range(3)])


def excess(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest relative distance of squared norms from the true ones."""
    relative = (found - expected) / expected
    return float(relative.min()), float(relative.max())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_norms_on_the_kernels_are_never_too_small_and_hardly_too_large(packed: bool, tied: bool) -> None:
    parts = uses(packed, tied)
    assert all(kernel_norms.fused(part.right if isinstance(part, Outer) else part.grad) for part in parts)
    least, most = excess(combined_squared_norm(parts), exact(parts))
    assert least >= -1e-12 and most <= LOOSENESS


@pytest.mark.parametrize("rows", [(1, 3, 2), (2, 2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_users_norms_on_the_kernels_are_never_too_small_and_hardly_too_large(tied: bool, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    outer = Outer(torch.randn(6, 9, 20), torch.randn(6, 9, 24))
    lookup = Lookup(torch.randint(20, (6, 9)), torch.randn(6, 9, 24), 20)
    by_row = [outer, lookup] if tied else [outer]
    units = Units(rows)
    parts = [units.gathered(each) for each in by_row]
    assert all(kernel_norms.fused(part.right if isinstance(part, Outer) else part.grad) for part in parts)
    each = torch.stack([sum(part.example(i) for part in by_row) for i in range(6)])
    expected = torch.stack([own.sum(0).square().sum() for own in each.split(list(rows))])
    least, most = excess(combined_squared_norm(parts), expected)
    assert least >= -1e-12 and most <= LOOSENESS


@pytest.mark.parametrize("packed", [False, True])
def test_the_mass_on_the_kernels_is_that_of_pytorch(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_kernels = [part.mass for part in uses(packed, tied=True)]
    monkeypatch.setattr(layers, "fused", lambda *tensors: False)
    for found, part in zip(on_kernels, uses(packed, tied=True), strict=True):
        torch.testing.assert_close(found, part.mass, rtol=1e-6, atol=0)


def shift_by_neighbours() -> float:
    """How much rows of 20 tokens change when a neighbour's length pads them to 240, relative to their squared norms."""
    torch.manual_seed(0)
    left, right = torch.randn(2, 20, 256), torch.randn(2, 20, 256)
    call = {"dtype": left.dtype, "device": left.device}
    assert [kernel_norms.choose_form(length, 256, 256, **call) for length in (20, 240)] == ["gram", "tile"]
    # Inputs at padding are whatever the model made of them; gradients there are zero.
    padded = Outer(nn.functional.pad(left, (0, 0, 0, 220)), nn.functional.pad(right, (0, 0, 0, 220), value=0.7))
    alone = Outer(left, right).squared_norm()
    return float(((padded.squared_norm() - alone) / alone).abs().max())


def test_what_clips_a_row_does_not_depend_on_how_long_its_neighbours_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shift_by_neighbours() <= 2e-6
    monkeypatch.setattr(kernel_norms, "_LONGEST", 0)  # the mutant: a bound that follows the batch's length
    assert shift_by_neighbours() > 1e-5


def test_mutant_without_the_cross_term_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def untied(outer: Outer, lookup: Lookup) -> torch.Tensor:
        return outer.squared_norm() + lookup.squared_norm()

    parts = uses(packed=False, tied=True)
    monkeypatch.setattr(layers, "_tied_squared_norm", untied)
    least, most = excess(combined_squared_norm(parts), exact(parts))
    assert least < -1e-12 or most > LOOSENESS


def test_cancelling_tokens_need_the_error_and_a_mutant_without_it_is_caught() -> None:
    """Of tokens that cancel float32 leaves nothing certain: only the error keeps the norm from being too small."""
    with_error, without = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        left, right = torch.randn(1, 16, 20), torch.randn(1, 16, 24)
        left[:, 1::2], right[:, 1::2] = -left[:, ::2], right[:, ::2] * (1 + 1e-6)
        expected = (left[0].double().t() @ right[0].double()).square().sum()[None]
        with_error.append(excess(combined_squared_norm([Outer(left, right)]), expected)[0])
        without.append(excess(outer_squared_norm(left, right, form="gram").value, expected)[0])
    assert min(with_error) >= -1e-12 > min(without)


@pytest.mark.parametrize("packed", [False, True])
def test_sums_over_positions_on_the_kernels_equal_autograd(packed: bool) -> None:
    torch.manual_seed(0)
    module = nn.LayerNorm(24)
    nn.init.normal_(module.weight)
    shape = (1, 17, 24) if packed else (3, 9, 24)
    x, grad = torch.randn(shape), torch.randn(shape)
    call = layers.LayerCall(
        module, (x,), {}, grad, 3, layers.PACKED[1] if packed else layers.BATCHED, segments=SEGMENTS if packed else None
    )
    found = layers._layer_norm(call)
    for i in range(3):
        x_i, grad_i = (t[0, slice(*SEGMENTS.boundaries[i : i + 2].tolist())] if packed else t[i] for t in (x, grad))
        expected = torch.autograd.grad(module(x_i), [module.weight, module.bias], grad_i)
        torch.testing.assert_close(found["weight"].example(i), expected[0].double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["bias"].example(i), expected[1].double(), rtol=1e-5, atol=1e-5)
