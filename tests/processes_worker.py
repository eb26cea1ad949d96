"""Processes that train together: `python processes_worker.py FOLDER SCENARIO,... COUNT SURVIVORS`.

Without COUNT and SURVIVORS, and with RANK and the like, it is one of them. What a process has seen goes to
FOLDER/rank<r>.pt. `tests/test_processes.py` starts it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import peft
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dpfa_hf import DPTrainer, PrivacyArguments, PrivateLoop, privatize
from dpfa_hf.batch_selection import TruncatedPoissonSampler
from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example import preflight
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.per_example.losses import base_model, per_example_loss

SIGMA, C, EXPECTED, UNITS = 0.35, 0.5, 16, 48
# Slices of unequal size, an empty draw, one row (so that all ranks but one have nothing), one for each of four ranks.
DRAWS = [list(range(21)), [], [3], [7, 1, 30, 2]]


def model(seed: int = 1, *, tied: bool = True) -> nn.Module:
    """119,551 parameters; the largest tensor is embedding and head, and some cannot be cut into equal parts."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=896, n_embd=64, n_layer=1, n_head=2, n_positions=64, n_inner=511, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def rows() -> list[dict]:
    """Rows of 3 to 9 tokens."""
    lengths = [3 + i % 7 for i in range(UNITS)]
    return [{"input_ids": [i + 1] * n, "attention_mask": [1] * n, "labels": [i + 2] * n} for i, n in enumerate(lengths)]


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in batch])
        for name, filler in filled.items()
    }


def key_source() -> Callable[[int], bytes]:
    """Bytes that are the same for all numbers of processes, and others at every step."""
    calls = iter(range(1000))
    return lambda size: hashlib.shake_256(str(next(calls)).encode()).digest(size)


def with_lora(plain: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], init_lora_weights=False)
    return peft.get_peft_model(plain, config)


def spread(whole: nn.Module) -> nn.Module:
    """By FSDP2, over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in whole.get_submodule(
        "base_model.model.transformer.h" if hasattr(whole, "peft_config") else "transformer.h"
    ).children():
        fully_shard(block, mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def build(
    folder: Path, *, noise: bool = True, patience: int = 60, steps: int = 4, cut: bool = False, **changed: Any
) -> DPTrainer:
    folder.mkdir(parents=True, exist_ok=True)
    several = {"ddp_backend": "gloo"} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    args = {
        "output_dir": str(folder / "out"), "use_cpu": True, "max_steps": steps, "learning_rate": 1.0, "optim": "sgd",
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 3, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "ddp_timeout": patience, "logging_strategy": "no", "remove_unused_columns": False,
    }  # fmt: skip
    privacy = PrivacyArguments(
        target_epsilon=float("inf"),  # which takes no time to plan, and changes nothing else
        target_delta=1e-4,
        noise_multiplier=SIGMA if noise else 0.0,
        per_example_max_grad_norm=C,
        expected_batch_size=changed.pop("expected_batch_size", EXPECTED),
        ledger=os.environ.get("DRILL_LEDGER", f"sqlite:///{folder / 'ledger.db'}"),
        **({"private_loss_weight": 0.0} | changed.pop("privacy", {})),
    )
    # Every process begins with weights of its own, as with adapters that nobody has seeded.
    own = int(os.environ.get("RANK", 0))
    dataset = changed.pop("dataset", None) or rows()
    lora, loaded = changed.pop("lora", False), changed.pop("loaded", None)
    training_args = transformers.TrainingArguments(**(args | several | changed))
    if cut and not dist.is_initialized():
        dist.init_process_group("gloo")
    plain = model(1 if cut else own + 1)  # a model that is cut has no second copy to begin with
    built = with_lora(plain) if lora else plain
    return DPTrainer(
        model=loaded or (spread(built) if cut else built),
        args=training_args,
        train_dataset=dataset,
        data_collator=collate,
        privacy_args=privacy,
    )


def inject(trainer: DPTrainer, *, noise: bool) -> None:
    """Draws, and where there is noise its key, that are known beforehand."""
    plan = trainer.privacy_plan
    draws = [np.array(draw, dtype=np.int64) for draw in DRAWS]
    trainer._sampler = TruncatedPoissonSampler(
        plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
    )
    if noise:
        trainer._step.noise = GaussianNoise(plan.noise_standard_deviation, _key_source=key_source())


def replica(whole: nn.Module) -> nn.Module:
    """The same model in one piece; a copy, if it was in one piece before."""
    tied = base_model(whole).config.tie_word_embeddings
    built = with_lora(model()) if hasattr(whole, "peft_config") else model(tied=tied)
    built.load_state_dict({name: in_one_piece(each) for name, each in whole.state_dict().items()})
    return built


def in_one_piece(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def record(trainer: DPTrainer) -> dict[str, list]:
    """Of every step: this rank's rows, its clipped sum by an engine of the test's own, and the weights before."""
    seen: dict[str, list] = {"indices": [], "clipped": [], "weights": [], "released": []}
    private_step = trainer.training_step

    def training_step(model: nn.Module, inputs: tuple, num_items_in_batch: Any = None) -> torch.Tensor:
        single = replica(model).train()
        engine = PerExampleGradients(single, trainer._engine.loss, clipping_norm=C)
        engine.layouts = trainer._engine.layouts
        for batch in inputs[1]:
            engine.accumulate(batch)
        seen["indices"].append(np.array(inputs[0]))
        seen["clipped"].append({name: total.double() for name, total in engine.take().items()})
        seen["weights"].append(copies(model))
        loss = private_step(model, inputs, num_items_in_batch)
        released = {name: in_one_piece(p.grad).double() for name, p in model.named_parameters() if p.requires_grad}
        seen["released"].append(released)
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign, assignment]
    return seen


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: in_one_piece(p.detach()).double().clone() for name, p in trained.items()}


def run(trainer: DPTrainer, **kwargs: Any) -> dict[str, Any]:
    seen: dict[str, Any] = record(trainer)
    trainer.train(**kwargs)
    seen["weights"].append(copies(trainer.model))
    seen["steps"] = trainer.privacy_spent().steps
    seen["logs"] = trainer.state.log_history
    return seen


# ---- scenarios ------------------------------------------------------------------------------------------------------


def known(folder: Path) -> dict[str, Any]:
    """The same draws in any number of processes: without noise, with noise of a known key, and with both released."""
    found = {}
    for noise in (False, True):
        trainer = build(folder / str(noise), noise=noise)
        inject(trainer, noise=noise)
        found["noise" if noise else "exact"] = run(trainer)
    return found


def private(folder: Path) -> dict[str, Any]:
    """Draws and noise from the operating system."""
    return run(build(folder, steps=8, dataloader_num_workers=1))


def noise_everywhere(trainer: DPTrainer) -> None:
    sum_to_first = trainer._processes.sum_to_first

    def noisy(sums: dict[str, torch.Tensor]) -> None:
        if not trainer._processes.is_first:
            trainer._step.noise.add_noise(sums)
        sum_to_first(sums)

    trainer._processes.sum_to_first = noisy  # type: ignore[method-assign]


def one_seed_for_all_ranks(trainer: DPTrainer) -> None:
    """Every rank adds its part of the variance, and all of them the same numbers."""
    count, sum_to_first = trainer._processes.count, trainer._processes.sum_to_first
    part = GaussianNoise(trainer._step.noise.standard_deviation / count**0.5, _key_source=key_source())

    def noisy(sums: dict[str, torch.Tensor]) -> None:
        part.add_noise(sums)
        sum_to_first(sums)

    trainer._processes.sum_to_first = noisy  # type: ignore[method-assign]
    trainer._step.noise.add_noise = lambda sums: sums  # type: ignore[method-assign]


def averaged_gradients(trainer: DPTrainer) -> None:
    sum_to_first = trainer._processes.sum_to_first

    def averaged(sums: dict[str, torch.Tensor]) -> None:
        sum_to_first(sums)
        for each in sums.values():
            each.div_(trainer._processes.count)

    trainer._processes.sum_to_first = averaged  # type: ignore[method-assign]


def draws_of_its_own(trainer: DPTrainer) -> None:
    trainer._processes.own_slice = lambda draw: next(iter(trainer._sampler))  # type: ignore[method-assign]


def noise_after_the_copy(trainer: DPTrainer) -> None:
    """Every rank takes the sum, and noises it by itself."""
    copy_from_first = trainer._processes.copy_from_first

    def copied(sums: dict[str, torch.Tensor]) -> None:
        copy_from_first(sums)
        if not trainer._processes.is_first:
            trainer._step.noise.add_noise(sums)

    trainer._processes.copy_from_first = copied  # type: ignore[method-assign]


def weights_of_its_own(trainer: DPTrainer) -> None:
    trainer._processes.copy_model_from_first = lambda model: None  # type: ignore[method-assign]


MUTANTS = (
    noise_everywhere,
    one_seed_for_all_ranks,
    averaged_gradients,
    draws_of_its_own,
    noise_after_the_copy,
    weights_of_its_own,
)


def mutants(folder: Path) -> dict[str, Any]:
    found = {}
    for mutate in MUTANTS:
        trainer = build(folder / mutate.__name__)
        mutate(trainer)
        found[mutate.__name__] = run(trainer)
    return found


def one_fails(folder: Path) -> dict[str, Any]:
    """What all processes say when the first one's ledger does not take the second step, and nobody's noise is drawn."""
    trainer = build(folder)
    drawn: list[int] = []
    add_noise = trainer._step.noise.add_noise
    trainer._step.noise.add_noise = lambda sums: drawn.append(1) or add_noise(sums)  # type: ignore[method-assign, func-returns-value]
    if trainer._ledger is not None:
        charge_step = trainer._ledger.charge_step

        def charge(run: str, step: int) -> int:
            if step == 2:
                raise OSError("disk full")
            return charge_step(run, step)

        trainer._ledger.charge_step = charge  # type: ignore[method-assign]
    return {"error": error_of(trainer.train), "drawn": len(drawn)}


def one_is_refused(folder: Path) -> dict[str, Any]:
    """What all processes say when the check on synthetic rows fails in the last one alone."""
    trainer = build(folder)
    if trainer._processes.rank == trainer._processes.count - 1:
        trainer._engine.loss = lambda model, batch: model(**batch).loss.expand(len(batch["input_ids"]))
    return {"error": error_of(trainer.train)}


def one_has_a_shard(folder: Path) -> dict[str, Any]:
    """What all processes say when the last one was given half of the data set."""
    global UNITS
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    UNITS = UNITS // 2 if last else UNITS
    return {"error": error_of(lambda: build(folder))}


def one_has_another_order(folder: Path) -> dict[str, Any]:
    """What all processes say when each has shuffled the data set by itself; and that random rows are not compared."""
    own = rows() if int(os.environ["RANK"]) == 0 else rows()[::-1]
    found = {"error": error_of(lambda: build(folder, dataset=own))}

    class Augmented(list):
        def __getitem__(self, index: Any) -> Any:
            row = super().__getitem__(index)
            return {**row, "labels": [int.from_bytes(os.urandom(1)) for _ in row["labels"]]}

    return found | {"random": error_of(lambda: build(folder / "random", dataset=Augmented(rows())))}


def one_dies(folder: Path) -> dict[str, Any]:
    """The last process dies in the second step, before the sum is taken."""
    return without_the_last(folder, lambda: os._exit(9))


def one_hangs(folder: Path) -> dict[str, Any]:
    return without_the_last(folder, lambda: time.sleep(1000))


def one_skips(folder: Path) -> dict[str, Any]:
    """A planted bug: a rank that has no row takes no part in the step."""
    trainer = build(folder, patience=5)
    inject(trainer, noise=False)
    private_step = trainer.training_step

    def skipping(model: nn.Module, inputs: tuple, num_items_in_batch: Any = None) -> torch.Tensor:
        return private_step(model, inputs) if inputs[1] else torch.zeros(())

    trainer.training_step = skipping  # type: ignore[method-assign, assignment]
    return {"error": error_of(trainer.train)}


def without_the_last(folder: Path, leave: Callable[[], Any], **changed: Any) -> dict[str, Any]:
    trainer = build(folder, patience=5, **changed)
    accumulate, steps = trainer._accumulate, iter(range(100))

    def leaving(*args: Any) -> torch.Tensor:
        if next(steps) == 1 and trainer._processes.rank == trainer._processes.count - 1:
            leave()
        return accumulate(*args)

    trainer._accumulate = leaving  # type: ignore[method-assign]
    drawn: list[int] = []
    add_noise = trainer._step.noise.add_noise
    trainer._step.noise.add_noise = lambda sums: drawn.append(1) or add_noise(sums)  # type: ignore[method-assign, func-returns-value]
    return {"error": error_of(trainer.train), "drawn": len(drawn)}


class StopAfterTwo(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= 2
        return control


def first_half(folder: Path) -> dict[str, Any]:
    """Two steps of four, in two processes; the expected batch is what their number makes it."""
    trainer = build(folder.parent, expected_batch_size=None, save_strategy="steps", save_steps=1, learning_rate=1e-3)
    trainer.add_callback(StopAfterTwo)
    return run(trainer) | {"plan": trainer.privacy_plan}


def second_half(folder: Path) -> dict[str, Any]:
    """The rest of `first_half`, in as many processes as there are now."""
    trainer = build(folder.parent, expected_batch_size=None, save_strategy="steps", save_steps=1, learning_rate=1e-3)
    return run(trainer, resume_from_checkpoint=True) | {"plan": trainer.privacy_plan}


def long(folder: Path) -> dict[str, Any]:
    """A job that goes on from wherever it was left, until its budget is used up."""
    (folder.parent / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    trainer = build(folder, steps=80, save_strategy="steps", save_steps=2, learning_rate=1e-3, save_total_limit=3)
    whole = list((folder / "out").glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=True if whole else None)
    return {"steps": trainer.privacy_spent().steps}


OBSERVED: dict[str, Any] = {
    "noise": False, "logging_strategy": "steps", "logging_steps": 1, "privacy": {"log_private_metrics": True},
}  # fmt: skip


def observed(folder: Path) -> dict[str, Any]:
    """What is logged and written where the operator lets the loss be seen."""
    trainer = build(folder, **OBSERVED, save_strategy="steps", save_steps=4)
    inject(trainer, noise=False)
    found = run(trainer)
    trainer.save_model()
    return found | {"error": error_of(trainer.privacy_report)}


def of_trl(folder: Path) -> dict[str, Any]:
    """Weights after two steps of TRL's trainers, without noise, by what their rows are."""
    spec = importlib.util.spec_from_file_location("rows_for_trl", Path(__file__).with_name("test_trl.py"))
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    several = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    found = {}
    for kind in ("completion", "dpo", "reward"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        trainer = made.build(kind, folder / kind, max_steps=2, **several)
        privatize(trainer, made.privacy(folder / kind, expected_batch_size=4))
        made.inject(trainer, [np.array([0, 4, 2, 5, 6]), np.array([3])])
        trainer.train()
        found[kind] = copies(trainer.model)
    return found


def loops(folder: Path) -> dict[str, Any]:
    """Weights after the draws in a `PrivateLoop`, without noise, of a model in one piece and, in several processes, of
    one that is cut; and what a wrapped one is told."""
    found: dict[str, Any] = {}
    several = dist.is_initialized()
    for cut in (False, True) if several else (False,):
        built = spread(model()) if cut else model()
        loop = loop_of(folder / str(cut), built)
        plan = loop.plan
        draws = [np.array(draw, dtype=np.int64) for draw in DRAWS]
        loop._sampler = TruncatedPoissonSampler(
            plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
        )
        optimizer = torch.optim.SGD(built.parameters(), lr=1.0)
        for _ in loop:
            optimizer.step()
        loop.save_report(folder / str(cut))
        found["cut" if cut else "whole"] = copies(built)
    if several:
        wrapped = nn.parallel.DistributedDataParallel(model())
        found["error"] = error_of(lambda: loop_of(folder / "wrapped", wrapped))
    return found


def loop_of(folder: Path, built: nn.Module) -> PrivateLoop:
    folder.mkdir(parents=True, exist_ok=True)
    privacy = PrivacyArguments(
        target_epsilon=float("inf"), target_delta=1e-4, noise_multiplier=0.0, per_example_max_grad_norm=C,
        expected_batch_size=EXPECTED, private_loss_weight=0.0, ledger=f"sqlite:///{folder / 'ledger.db'}",
    )  # fmt: skip
    rows_of_it = datasets.Dataset.from_list(rows())
    return PrivateLoop(built, rows_of_it, privacy, collate=collate, micro_batch_size=3, max_steps=len(DRAWS))


# ---- a model that is cut into shards ---------------------------------------------------------------------------------


def cut_known(folder: Path) -> dict[str, Any]:
    trainer = build(folder, noise=False, cut=True)
    inject(trainer, noise=False)
    return run(trainer)


def cut_lora(folder: Path) -> dict[str, Any]:
    """Adapters on a frozen base that is cut as well."""
    trainer = build(folder, noise=False, cut=True, lora=True)
    inject(trainer, noise=False)
    base = {name: type(p).__name__ for name, p in trainer.model.named_parameters() if not p.requires_grad}
    return run(trainer) | {"base": set(base.values())}


def cut_engines(folder: Path) -> dict[str, Any]:
    """Relative errors of clipped sums of all ranks' rows, by an engine whose model is cut, by way of clipping."""
    count, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    for clipping in ("flat", "automatic", "per_layer"):
        sums = []
        for cut in (True, False):
            built = spread(model()) if cut else model()
            loss = per_example_loss(built, "causal_lm")
            engine = PerExampleGradients(built, loss, clipping_norm=0.1, clipping=clipping)
            preflight.check(engine, collate(rows()[:3]))
            for owner in range(rank, rank + 1) if cut else range(count):
                engine.accumulate(collate(rows()[4 * owner + 3 : 4 * owner + 7]))
            sums.append(engine.take())
            if cut:
                shards = engine.shards
                assert shards is not None
                sums[0] = {name: shards.spread(name, each).full_tensor() for name, each in sums[0].items()}
        off = torch.stack([(sums[0][name] - sums[1][name]).norm() for name in sums[1]]).norm()
        found[clipping] = float(off / torch.stack([each.norm() for each in sums[1].values()]).norm())
    return found


def cut_when_loaded(folder: Path) -> dict[str, Any]:
    """As Transformers cuts a model by itself: tied weights, which it takes apart, and others, with the private loss."""
    config = transformers.distributed.DistributedConfig(fsdp_size=dist.get_world_size())
    trainers = []
    for tied in (True, False):
        base = folder / f"tied {tied}"
        if dist.get_rank() == 0:
            model(tied=tied).save_pretrained(base)
        dist.barrier()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(base, distributed_config=config)
        trainers.append(build(base, noise=False, cut=True, loaded=loaded, privacy={"private_loss_weight": 0.08}))
    apart, whole = trainers
    error = error_of(apart.train)
    inject(whole, noise=False)
    found = run(whole) | {"error": error}
    whole.save_model(str(folder / "whole"))
    return found


def cut_private(folder: Path) -> dict[str, Any]:
    return run(build(folder, steps=8, cut=True))


def noise_in_parts(trainer: DPTrainer) -> None:
    sd = trainer._step.noise.standard_deviation
    trainer._step.noise = GaussianNoise(sd / trainer._processes.count**0.5)


def noise_of_the_first(trainer: DPTrainer) -> None:
    if not trainer._processes.is_first:
        trainer._step.noise.add_noise = lambda sums: sums  # type: ignore[method-assign]


def one_key_for_all_shards(trainer: DPTrainer) -> None:
    trainer._step.noise = GaussianNoise(trainer._step.noise.standard_deviation, _key_source=key_source())


def averaged_shards(trainer: DPTrainer) -> None:
    """As FSDP2's own reduction does."""
    shards = trainer._engine.shards
    assert shards is not None
    own_rows = shards.own_rows
    shards.own_rows = lambda name, total: own_rows(name, total) / trainer._processes.count  # type: ignore[method-assign]


def filler_that_counts(trainer: DPTrainer) -> None:
    accumulate = trainer._engine.accumulate
    trainer._engine.accumulate = lambda batch, counted=True: accumulate(batch)  # type: ignore[method-assign, misc]
    inject(trainer, noise=False)  # draws that one process alone has rows of


CUT_MUTANTS = (noise_in_parts, noise_of_the_first, one_key_for_all_shards, averaged_shards, filler_that_counts)


def cut_mutants(folder: Path) -> dict[str, Any]:
    found = {}
    for mutate in CUT_MUTANTS:
        trainer = build(folder / mutate.__name__, cut=True, noise=mutate is not filler_that_counts)
        mutate(trainer)
        found[mutate.__name__] = run(trainer)
    return found


def cut_skips(folder: Path) -> dict[str, Any]:
    """A planted bug: a process computes its own micro-batches and no more."""
    trainer = build(folder, cut=True, patience=5)
    inject(trainer, noise=False)
    trainer._processes.largest = lambda value: value  # type: ignore[method-assign]
    return {"error": error_of(trainer.train)}


def cut_dies(folder: Path) -> dict[str, Any]:
    return without_the_last(folder, lambda: os._exit(9), cut=True)


CUT_SAVED: dict[str, Any] = {
    "noise": False, "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip


def cut_first_half(folder: Path) -> dict[str, Any]:
    """Two steps of four, without noise, with Adam's state in the checkpoint."""
    trainer = build(folder.parent, cut=True, **CUT_SAVED)
    inject(trainer, noise=False)
    trainer.add_callback(StopAfterTwo)
    found = run(trainer)
    trainer.save_model(str(folder.parent / "whole"))
    return found | {"optimizer": optimizer_state(trainer)}


class Look(transformers.TrainerCallback):
    def __init__(self, trainer: DPTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "optimizer"):
            self.optimizer = optimizer_state(self.trainer)


def second_half_in_one_piece(folder: Path) -> dict[str, Any]:
    """The rest of `cut_first_half`, in one process whose model is not cut."""
    trainer = build(folder.parent, **CUT_SAVED)
    inject(trainer, noise=False)
    look = Look(trainer)
    trainer.add_callback(look)
    return run(trainer, resume_from_checkpoint=True) | {"optimizer": look.optimizer}


def optimizer_state(trainer: DPTrainer) -> dict[str, torch.Tensor]:
    """First moments, by parameter, in one piece."""
    state = trainer.optimizer.state
    return {name: in_one_piece(state[p]["exp_avg"]).clone() for name, p in trainer.model.named_parameters()}


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["x"]).sum(-1)


def cut_refused(folder: Path) -> dict[str, Any]:
    """What cannot be trained, and why."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicas", "shards"))
    cut = {
        "replicas": fully_shard(nn.Linear(4, 6), mesh=mesh),
        "columns": fully_shard(nn.Linear(4, 6), mesh=mesh["shards"], shard_placement_fn=lambda p: Shard(p.dim() - 1)),
        "parallel": parallelize_module(nn.Sequential(nn.Linear(4, 6)), mesh["shards"], {"0": ColwiseParallel()}),
    }
    found = {name: error_of(lambda m=m: PerExampleGradients(m, losses, clipping_norm=C)) for name, m in cut.items()}
    hardened = {"floating_point": "hardened"}
    found["hardened"] = error_of(lambda: build(folder, cut=True, per_device_train_batch_size=1, privacy=hardened))
    return found


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    each.__name__: each
    for each in (
        known,
        private,
        mutants,
        long,
        observed,
        of_trl,
        loops,
        first_half,
        second_half,
        one_fails,
        one_is_refused,
        one_has_a_shard,
        one_has_another_order,
        one_skips,
        one_dies,
        one_hangs,
        cut_known,
        cut_engines,
        cut_when_loaded,
        cut_lora,
        cut_private,
        cut_mutants,
        cut_refused,
        cut_skips,
        cut_dies,
        cut_first_half,
    )
}


LEFT_ALONE = {"one_skips", "one_dies", "one_hangs", "cut_skips", "cut_dies"}


def chained(names: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names.split(","):
        yield name, SCENARIOS[name](folder / name)


def main(names: str, into: Path) -> NoReturn:
    """One rank, as RANK and the like say."""
    torch.set_num_threads(1)
    found = dict(chained(names, into))
    torch.save(found, into / f"rank{os.environ['RANK']}.pt")
    if dist.is_initialized() and not LEFT_ALONE & found.keys():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # what a lost process has left behind would keep this one


def fork(names: str, into: Path, count: int, survivors: int) -> None:
    """`count` ranks that share what this process has imported; those after `survivors` are not waited for."""
    ranks = []
    for rank in range(count):
        if child := os.fork():
            ranks.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        log = os.open(into / f"log{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            main(names, into)
        finally:
            traceback.print_exc()
            os._exit(1)
    codes = [os.waitpid(rank, 0)[1] for rank in ranks[:survivors]]
    for rank in ranks[survivors:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    os._exit(int(any(codes)))


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(sys.argv[2], Path(sys.argv[1]))
    fork(sys.argv[2], Path(sys.argv[1]), *map(int, sys.argv[3:]))
