"""One process of several that train together: `python processes_worker.py FOLDER SCENARIO,...`, with RANK and the like.

What it has seen goes to FOLDER/rank<r>.pt. `tests/test_processes.py` starts it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import nn

from dpfa_hf import DPTrainer, PrivacyArguments
from dpfa_hf.batch_selection import TruncatedPoissonSampler
from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example.gradients import PerExampleGradients

SIGMA, C, EXPECTED, UNITS = 0.35, 0.5, 16, 48
# Slices of unequal size, an empty draw, one row (so that all ranks but one have nothing), one for each of four ranks.
DRAWS = [list(range(21)), [], [3], [7, 1, 30, 2]]


def model(seed: int = 1) -> nn.Module:
    """119,680 parameters; the largest tensor is embedding and head."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=896, n_embd=64, n_layer=1, n_head=2, n_positions=64, n_inner=512, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
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


def build(folder: Path, *, noise: bool = True, patience: int = 60, steps: int = 4, **changed: Any) -> DPTrainer:
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
        private_loss_weight=0.0,
        ledger=f"sqlite:///{folder / 'ledger.db'}",
        **changed.pop("privacy", {}),
    )
    # Every process begins with weights of its own, as with adapters that nobody has seeded.
    own = int(os.environ.get("RANK", 0))
    return DPTrainer(
        model=model(own + 1),
        args=transformers.TrainingArguments(**(args | several | changed)),
        train_dataset=rows(),
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


def record(trainer: DPTrainer) -> dict[str, list]:
    """Of every step: this rank's rows, its clipped sum by an engine of the test's own, and the weights before."""
    seen: dict[str, list] = {"indices": [], "clipped": [], "weights": [], "released": []}
    private_step = trainer.training_step

    def training_step(model: nn.Module, inputs: tuple, num_items_in_batch: Any = None) -> torch.Tensor:
        engine = PerExampleGradients(model, trainer._engine.loss, clipping_norm=C)
        engine.layouts = trainer._engine.layouts
        for batch in inputs[1]:
            engine.accumulate(batch)
        seen["indices"].append(np.array(inputs[0]))
        seen["clipped"].append({name: total.double() for name, total in engine.take().items()})
        seen["weights"].append(copies(model))
        loss = private_step(model, inputs, num_items_in_batch)
        seen["released"].append({name: p.grad.double().clone() for name, p in model.named_parameters()})
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign, assignment]
    return seen


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


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


def without_the_last(folder: Path, leave: Callable[[], Any]) -> dict[str, Any]:
    trainer = build(folder, patience=5)
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
        first_half,
        second_half,
        one_fails,
        one_is_refused,
        one_has_a_shard,
        one_skips,
        one_dies,
        one_hangs,
    )
}


def chained(names: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names.split(","):
        yield name, SCENARIOS[name](folder / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    into = Path(sys.argv[1])
    found = dict(chained(sys.argv[2], into))
    torch.save(found, into / f"rank{os.environ['RANK']}.pt")
    if dist.is_initialized() and not {"one_skips", "one_dies", "one_hangs"} & found.keys():
        dist.destroy_process_group()
    os._exit(0)  # what a lost process has left behind would keep this one
