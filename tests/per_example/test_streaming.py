from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dpfa_hf.accumulation import Accumulation
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import layers, losses, preflight, streaming
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.processes import Processes

BOUND = 1 + 2.0**-10
C = 0.5
Sums = dict[str, torch.Tensor]


def engine_of(model: Any, **options: Any) -> PerExampleGradients:
    """An engine that clips layer by layer and has passed the checks, as the trainer makes it."""
    task = losses.task_of(model)
    engine = PerExampleGradients(
        model, losses.per_example_loss(model, task), clipping_norm=C, clipping="per_layer", **options
    )
    dtype = next(model.parameters()).dtype
    batch = preflight.synthetic_batch(model, task, {})
    preflight.check(engine, {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    return engine


@pytest.fixture
def taps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the layers that were tapped, so that no test compares a path with itself."""
    tapped: list[str] = []
    tap = streaming.Stream.tap

    def noted(self: Any, layer: str, *rest: Any) -> torch.Tensor:
        tapped.append(layer)
        return tap(self, layer, *rest)

    monkeypatch.setattr(streaming.Stream, "tap", noted)
    return tapped


def streamed(engine: PerExampleGradients, batch: Any, seed: int = 5) -> Sums:
    torch.manual_seed(seed)
    engine.accumulate(batch)
    return engine.take()


def unstreamed(engine: PerExampleGradients, batch: Any, seed: int = 5) -> Sums:
    engine._may_stream = lambda batch: False  # type: ignore[method-assign]
    try:
        return streamed(engine, batch, seed)
    finally:
        del engine._may_stream


def clipped_by_group(lab: SimpleNamespace, engine: PerExampleGradients, gradients: list[Sums]) -> Sums:
    """The sum of what a loop of autograd found, each group of each row clipped to its share."""
    groups = engine.clipping_groups()
    share = engine.clipping_norm / len(set(groups.values())) ** 0.5
    total: Sums = {}
    for group in set(groups.values()):
        parts = [{name: g[name] for name in groups if groups[name] == group} for g in gradients]
        total |= {name: value for part in parts for name, value in part.items()}
        total |= lab.clipped_sum(parts, share)
    return {name: total[name] for name in groups}


def gradients_of_one_pass(engine: PerExampleGradients, batch: Any, seed: int = 5) -> list[Sums]:
    """Of every row, by autograd, from one forward pass and so from the same dropout masks."""
    names = list(engine.clipping_groups())
    parameters = [engine.model.get_parameter(name) for name in names]
    torch.manual_seed(seed)
    found = []
    for loss in engine.loss(engine.model, batch):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(names, parameters, grads, strict=True)
        found.append({n: torch.zeros_like(p) if g is None else g.detach() for n, p, g in pairs})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Exactness

FAMILIES = ("bert", "bert-mlm", "albert", "gpt2", "llama-tied", "gemma2", "opt", "t5", "bart", "whisper", "vit")


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_sum_equals_the_unstreamed_one_and_a_loop_of_autograd(
    lab: SimpleNamespace, taps: list[str], family: str, adapter: str
) -> None:
    model = lab.build(family)
    if adapter == "lora":
        model = lab.with_lora(model)
    engine, rows = engine_of(model), lab.rows_of(family, model)
    batch = lab.collate(model, rows)
    found = streamed(engine, batch)
    assert set(taps) >= {layer for layer in engine._layers if not layer.endswith("shared")}
    assert lab.relative_error(found, clipped_by_group(lab, engine, lab.row_gradients(model, rows))) < 1e-5
    taps.clear()
    assert lab.relative_error(unstreamed(engine, batch), found) < 1e-12
    assert not taps


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "bart"])
def test_streamed_sums_are_exact_under_checkpointing_and_dropout(
    lab: SimpleNamespace, taps: list[str], family: str
) -> None:
    model = lab.build(family, dropout=0.3)
    engine = engine_of(model)
    batch = lab.collate(model, lab.rows_of(family, model))
    expected = clipped_by_group(lab, engine, gradients_of_one_pass(engine, batch))
    assert lab.relative_error(streamed(engine, batch), expected) < 1e-5
    once = len(taps)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    taps.clear()
    assert lab.relative_error(streamed(engine, batch), expected) < 1e-5
    assert len(taps) > once, "nothing was computed again"
    # The mutant: what is computed again draws masks of its own.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    assert lab.relative_error(streamed(engine, batch), expected) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama-tied"])
def test_autocast_streams_what_it_does_not_stream(lab: SimpleNamespace, family: str, checkpointing: bool) -> None:
    model = lab.build(family, dtype=torch.float32, dropout=0.3)
    engine = engine_of(model)
    batch = lab.collate(model, lab.rows_of(family, model))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = streamed(engine, batch), unstreamed(engine, batch)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert lab.relative_error(found, {name: value.double() for name, value in expected.items()}) < 1e-6


def test_dp_flash_streams_what_it_does_not_stream(lab: SimpleNamespace, taps: list[str]) -> None:
    model = lab.build("llama-tied")
    model.set_attn_implementation("dpfa")
    engine = engine_of(model)
    batch = lab.collate(model, lab.rows_of("llama-tied", model))
    assert lab.relative_error(streamed(engine, batch), unstreamed(engine, batch)) < 1e-12 and taps


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rules_compute_exactly_and_the_model_again_as_it_did(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """float32 products in float32 without autocast for norms and sums; what is computed again is as it was (P13)."""
    states: dict[str, set[tuple]] = {"model": set(), "rule": set()}

    def note(who: str) -> None:
        autocast, precision = torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()
        states[who].add((autocast, precision, who == "model" or torch.is_grad_enabled()))

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[1].register_forward_hook(lambda *_: note("model"))
    model.forward = lambda x: (  # type: ignore[method-assign]
        checkpoint(nn.Sequential(*model), x, use_reentrant=False) if checkpointing else nn.Sequential(*model)(x)
    )
    engine = small(model)
    states["model"].clear()
    find_rule = layers.find_rule

    def noted(module: nn.Module) -> Any:
        note("rule")
        return find_rule(module)

    monkeypatch.setattr(layers, "find_rule", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            engine.accumulate({"x": torch.randn(2, 4, 3)})
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert states == {"model": {(True, "medium", True)}, "rule": {(False, "highest", False)}}


class Recorder:
    name = ".recorder"

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def add(self, losses: torch.Tensor, norms: torch.Tensor, clipping_norm: float) -> None:
        self.seen.append((losses, norms.clone(), clipping_norm))

    def take(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(1)

    def discard(self) -> None:
        pass


def test_statistics_are_given_the_norms_of_all_groups(lab: SimpleNamespace) -> None:
    model, recorder = lab.build("llama-tied"), Recorder()
    engine = engine_of(model, statistics=recorder)
    batch = lab.collate(model, lab.rows_of("llama-tied", model))
    streamed(engine, batch), unstreamed(engine, batch)
    (losses, norms, clipping_norm), (expected_losses, expected, _) = recorder.seen
    assert norms.shape == (len(set(engine.clipping_groups().values())), len(losses)) and clipping_norm == C
    assert torch.equal(losses, expected_losses) and torch.allclose(norms, expected, rtol=1e-12)
    assert bool((norms > 0).all())


# ---------------------------------------------------------------------------------------------------------------------
# Mutants: the comparisons above must notice each planted bug


def each_use_by_itself(self: Any, layer: str, args: tuple, kwargs: Mapping, grad: torch.Tensor) -> None:
    for name, parts in self._uses(layer, args, kwargs, grad).items():
        self._add(self._groups[name], {name: parts})


@pytest.mark.parametrize("family", ["gpt2", "albert"])
def test_mutant_each_use_of_a_weight_is_clipped_by_itself(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = lab.build(family)
    engine, rows = engine_of(model), lab.rows_of(family, model)
    groups = engine.clipping_groups()
    share = C / len(set(groups.values())) ** 0.5

    def largest_share() -> float:
        """What the one row that is there adds to any group, in shares."""
        found = streamed(engine, batch)
        parts = ({name: found[name] for name in groups if groups[name] == g} for g in set(groups.values()))
        return max(lab.norm(part) for part in parts) / share

    absent = {**rows[1], "labels": torch.full_like(rows[1]["labels"], -100)} if rows[1]["labels"].dim() else rows[0]
    batch = lab.collate(model, [rows[0], absent])
    alone = 1 if absent is not rows[0] else 2
    assert largest_share() <= alone * BOUND
    monkeypatch.setattr(streaming.Stream, "_receive", each_use_by_itself)
    assert largest_share() > 1.2 * alone


class Twice(nn.Module):
    """Calls a layer twice and drops what one of the calls gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).tanh()
        self.second(x)
        return self.second(hidden)


def squares(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def small(model: nn.Module, loss: Callable = squares, **options: Any) -> PerExampleGradients:
    engine = PerExampleGradients(model, loss, **{"clipping_norm": C, "clipping": "per_layer", **options})
    preflight.check(engine, {"x": torch.randn(3, 4, 3, dtype=next(model.parameters()).dtype)})
    return engine


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_a_call_that_no_loss_depends_on_does_not_keep_its_group_back(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, taps: list[str]
) -> None:
    engine = small(Twice().double())
    batch = {"x": torch.randn(3, 4, 3, dtype=torch.float64)}
    expected = clipped_by_group(lab, engine, gradients_of_one_pass(engine, batch))
    assert lab.relative_error(streamed(engine, batch), expected) < 1e-6
    assert taps.count("second") == 2

    def without_the_rest(self: Any, losses: torch.Tensor) -> None:
        torch.autograd.grad(losses.sum(), [self._anchor], allow_unused=True)

    monkeypatch.setattr(streaming.Stream, "backward", without_the_rest)
    assert lab.relative_error(streamed(engine, batch), expected) > 1e-2


def test_losses_without_a_gradient_add_zero() -> None:
    engine = small(nn.Linear(3, 3))
    engine.loss = lambda model, batch: squares(model, batch).detach()
    assert not any(bool(value.any()) for value in streamed(engine, {"x": torch.randn(2, 4, 3)}).values())


def test_a_gradient_that_arrives_after_its_group_is_refused() -> None:
    stream = streaming.Stream({"w": 0}, {"layer": {0}}, lambda *call: {"w": []}, lambda group, uses: None)
    first = stream.tap("layer", (), {}, torch.ones(2, requires_grad=True) * 1)
    stream.backward(first)
    late = stream.tap("layer", (), {}, torch.ones(2, requires_grad=True) * 1)
    with pytest.raises(PrivacyError, match="layer: its gradient arrived after"):
        stream.backward(late)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Watched(nn.Module):
    """Blocks of which the inputs, and the gradients of the outputs, are watched from outside the engine."""

    def __init__(self, depth: int = 6, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
        self.checkpointing = checkpointing
        self.inputs: dict[int, StorageWeakRef] = {}
        self.gradients: dict[int, StorageWeakRef] = {}
        self.alive: dict[int, set[tuple[str, int]]] = {}

    def block(self, k: int, x: torch.Tensor) -> torch.Tensor:
        hidden = x.sin()
        if not torch.is_grad_enabled() or k not in self.inputs:
            self.inputs[k] = StorageWeakRef(hidden.untyped_storage())
        return self.blocks[k](hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.clear(), self.gradients.clear(), self.alive.clear()
        for k in range(len(self.blocks)):
            x = checkpoint(self.block, k, x, use_reentrant=False) if self.checkpointing else self.block(k, x)
            x = x * 1  # a tensor of the block's own, whatever a hook has made of the layer's output
            if x.requires_grad:
                x.register_hook(lambda grad, k=k: self.note(k, grad))
        return x

    def note(self, k: int, grad: torch.Tensor) -> None:
        self.gradients[k] = StorageWeakRef(grad.untyped_storage())
        self.alive[k] = self.living()

    def living(self) -> set[tuple[str, int]]:
        both = (("input", self.inputs), ("gradient", self.gradients))
        return {(kind, k) for kind, refs in both for k, ref in refs.items() if not ref.expired()}


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Memory must be given back without the help of the cyclic collector."""
    gc.disable()
    yield
    gc.enable()


def above(model: Watched, k: int) -> set[tuple[str, int]]:
    """What lives of the blocks two and more above block k, when its output's gradient is there."""
    return {(kind, j) for kind, j in model.alive[k] if j > k + 1}


def test_each_layers_input_and_gradient_are_dropped_during_the_backward_pass(no_gc: None) -> None:
    model = Watched()
    engine, batch = small(model), {"x": torch.randn(2, 4, 3)}
    streamed(engine, batch)
    assert model.alive.keys() == set(range(6)) and all(("input", k) in model.alive[k] for k in range(6))
    assert not any(above(model, k) for k in range(6))
    unstreamed(engine, batch)
    assert above(model, 0) >= {("input", k) for k in range(2, 6)}, "the mutant keeps all, and should have been seen"


def test_a_pass_leaves_nothing_behind(no_gc: None) -> None:
    model = Watched()
    engine = small(model)
    streamed(engine, {"x": torch.randn(2, 4, 3)})
    assert not model.living() and engine._stream is None


def test_checkpointing_keeps_its_saving(no_gc: None) -> None:
    """Between forward and backward no input inside a block is alive, and later only one block's at a time is."""
    model = Watched(checkpointing=True)
    between: list[set[tuple[str, int]]] = []

    def loss(called: nn.Module, batch: Any) -> torch.Tensor:
        found = squares(called, batch)
        between.append(model.living())
        return found

    engine, batch = small(model, loss), {"x": torch.randn(2, 4, 3)}
    streamed(engine, batch)
    assert between[-1] == set() and not any(above(model, k) for k in range(6))
    unstreamed(engine, batch)
    assert between[-1] == {("input", k) for k in range(6)}, "the mutant keeps all, and should have been seen"


def test_autograd_computes_no_weight_gradient(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.build("bert")
    engine = engine_of(model)
    batch = lab.collate(model, lab.rows_of("bert", model))
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    monkeypatch.setattr(engine, "_uses", lambda calls: {name: [] for name in engine.clipping_groups()})
    monkeypatch.setattr(engine, "norms", lambda uses, size, device: torch.zeros(99, size, dtype=torch.float64))
    monkeypatch.setattr(engine, "_add", lambda uses, norms: None)
    with lab.Products() as seen:
        engine.accumulate(batch)
    assert len(seen.shapes) > 20 and not weights & set(seen.shapes)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile rows and models


class Backward(torch.autograd.Function):
    """The identity; its gradient is multiplied by a factor for each row, and a negative one raises."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        if bool((ctx.factor < 0).any()):
            raise RuntimeError("a bad row")
        return grads[0] * ctx.factor[:, None, None], None


class Hostile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(3, 3), nn.Linear(3, 3), torch.ones(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.factor if len(self.factor) else torch.ones(len(x))
        return self.second(Backward.apply(self.first(x), factor.to(x.dtype)).tanh())


def hostile_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    model.factor = batch.get("factor", torch.ones(0))  # type: ignore[assignment]
    return squares(model, batch) * batch.get("scale", torch.ones(()))


def with_factor(x: torch.Tensor, factor: float, scale: float = 1.0) -> dict[str, torch.Tensor]:
    ones = torch.ones(len(x) - 1)
    return {
        "x": x,
        "factor": torch.cat([ones, torch.tensor([factor])]),
        "scale": torch.cat([ones, torch.tensor([scale])]),
    }


@pytest.mark.parametrize("way", [streamed, unstreamed])
@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_adds_zero_to_its_group_and_not_to_others(way: Callable, factor: float) -> None:
    engine, x = small(Hostile(), hostile_loss), torch.randn(3, 4, 3)
    usual, without = way(engine, with_factor(x, 1.0)), way(engine, with_factor(x, 1.0, 0.0))
    found = way(engine, with_factor(x, factor))
    assert all(torch.equal(found[name], (without if "first" in name else usual)[name]) for name in found)
    assert not torch.equal(usual["second.weight"], without["second.weight"])


@pytest.mark.parametrize("way", [streamed, unstreamed])
@pytest.mark.parametrize("scale", [float("inf"), float("nan"), -float("inf")])
def test_a_loss_that_is_not_finite_adds_zero_to_every_group(way: Callable, scale: float) -> None:
    engine, x = small(Hostile(), hostile_loss), torch.randn(3, 4, 3)
    without, found = way(engine, with_factor(x, 1.0, 0.0)), way(engine, with_factor(x, 1.0, scale))
    assert all(torch.equal(found[name], without[name]) for name in found)
    assert all(bool(value.any()) for value in without.values())


def test_mutant_infinity_times_zero_spoils_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, x = small(Hostile(), hostile_loss), torch.randn(3, 4, 3)
    for kind in ("Outer", "Dense"):
        monkeypatch.setattr(f"dpfa_hf.per_example.layers.{kind}.zero_rows", lambda part, keep: part)
    assert bool(streamed(engine, with_factor(x, float("inf")))["first.weight"].isnan().any())


def test_an_interrupted_pass_is_never_handed_out_and_leaves_the_model_untouched() -> None:
    engine, x = small(Hostile(), hostile_loss), torch.randn(3, 4, 3)
    expected = streamed(engine, {"x": x})
    with pytest.raises(RuntimeError, match="a bad row"):
        engine.accumulate(with_factor(x, -1.0))
    assert bool(engine._sums["second.weight"].any()), "nothing was interrupted"
    assert all(not module._forward_hooks for module in engine.model.modules())
    for call in (engine.take, lambda: engine.accumulate({"x": x})):
        with pytest.raises(PrivacyError, match="interrupted"):
            call()
    engine.discard()
    found = streamed(engine, {"x": x})
    assert all(torch.equal(found[name], expected[name]) for name in found)


def restarted(engine: PerExampleGradients, x: torch.Tensor, factors: list[float]) -> Sums:
    """What the trainer makes of one micro-batch of rows."""
    rows = [{"x": x[i : i + 1], "factor": torch.tensor(factors[i : i + 1])} for i in range(len(x))]

    class Rows:
        def __getitem__(self, indices: np.ndarray) -> list[dict]:
            return [{name: torch.cat([rows[i][name] for i in indices]) for name in rows[0]}]

    batches: Any = Rows()
    accumulate = Accumulation(
        engine, batches, prepare=dict, autocast=contextlib.nullcontext, processes=Processes(), filler={}
    )
    everyone = np.arange(len(x))
    accumulate(everyone, batches[everyone])
    return engine.take()


def effect_of_a_row_that_raises() -> float:
    """How far the sum of three rows moves, in C, when the third raises after the first of its two layers was added."""
    engine, x = small(Hostile().double(), hostile_loss), torch.randn(3, 4, 3, dtype=torch.float64)
    without, found = restarted(engine, x[:2], [1.0, 1.0]), restarted(engine, x, [1.0, 1.0, -1.0])
    moved = {name: float((found[name] - without[name]).norm()) for name in found}
    assert all(moved[name] <= 1e-6 for name in moved if "first" in name), "it raises before that layer"
    return math.hypot(*moved.values()) / engine.clipping_norm


def test_a_row_that_raises_in_the_backward_pass_adds_at_most_its_share_and_leaves_its_neighbours_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of two groups was complete."""
    assert 1e-2 < effect_of_a_row_that_raises() <= math.sqrt(0.5) * BOUND
    # Kept from the micro-batch that was given up, every row would count twice.
    monkeypatch.setattr(PerExampleGradients, "discard", lambda engine: setattr(engine, "_adding", False))
    assert effect_of_a_row_that_raises() > math.sqrt(0.5) * BOUND


class InPlace(nn.Module):
    """Changes a layer's output in place, which is fine, and an input, which is not."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.checkpointing, self.changes_input = checkpointing, False

    def block(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).tanh()
        out = self.second(hidden)
        if self.changes_input:
            hidden.detach().mul_(2)
        out += 1
        out.relu_()
        return self.third(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointing else self.block(x)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_may_be_changed_in_place_and_inputs_are_refused_by_name(
    lab: SimpleNamespace, checkpointing: bool
) -> None:
    engine = small(InPlace(checkpointing).double())
    batch = {"x": torch.randn(3, 4, 3, dtype=torch.float64)}
    expected = clipped_by_group(lab, engine, gradients_of_one_pass(engine, batch))
    assert lab.relative_error(streamed(engine, batch), expected) < 1e-6
    engine.model.changes_input = True  # type: ignore[assignment]
    with pytest.raises(PrivacyError, match="second: its input was changed in place"):
        engine.accumulate(batch)


def test_neither_packed_rows_nor_exact_sums_nor_other_kinds_of_clipping_are_streamed(taps: list[str]) -> None:
    engine = small(nn.Linear(3, 3))
    boundaries = torch.tensor([0, 2, 4], dtype=torch.int32)
    packed = {"cu_seq_lens_q": boundaries, "position_ids": torch.tensor([[0, 1, 0, 1]]), "max_length_q": 2}
    assert not engine._may_stream(packed)
    for clipping in ("flat", "automatic"):
        small(nn.Linear(3, 3), clipping=clipping).accumulate({"x": torch.randn(2, 4, 3)})
    engine.exact_sums = True
    engine.accumulate({"x": torch.randn(2, 4, 3)})
    assert not taps
    engine.exact_sums = False
    engine.accumulate({"x": torch.randn(1, 4, 3)})
    assert taps
