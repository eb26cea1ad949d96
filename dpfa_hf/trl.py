"""TRL's SFTTrainer, DPOTrainer and RewardTrainer: which of their settings hold in private training, and their losses.

TRL is never imported here: its trainers exist only where it has been loaded.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import pairs
from dpfa_hf.per_example.gradients import PerExampleLoss

# Classes whose compute_loss was read, and whose loss is compared with ours on synthetic rows before every run.
_CLASSES = {
    ("trl.trainer.sft_trainer", "SFTTrainer"),
    ("trl.trainer.dpo_trainer", "DPOTrainer"),
    ("trl.trainer.reward_trainer", "RewardTrainer"),
}
_VERSIONS = SpecifierSet(">=1.16,<2")


@dataclass(frozen=True)
class Adaptation:
    """How a trainer of TRL is trained privately.

    Attributes:
        describe: its loss, for the report.
        loss: the loss of a preference pair; None for the loss of the model's task.
    """

    describe: str
    loss: PerExampleLoss | None = None

    def collator(self, collate: Callable) -> Callable:
        """The trainer's data collator, giving one entry per privacy unit."""
        return collate if self.loss is None else pairs.PairCollator(collate)


def class_of(trainer: object) -> type | None:
    """The class of TRL that a trainer is, or derives from; None for any other."""
    for cls in type(trainer).__mro__:
        if (cls.__module__, cls.__qualname__) in _CLASSES:
            return cls
    return None


def adapt(trainer: Any, privacy_args: PrivacyArguments) -> Adaptation | None:
    """How to train a trainer of TRL; None for any other trainer.

    Raises:
        PrivacyError: naming the setting of its configuration that private training cannot honour.
    """
    cls = class_of(trainer)
    if cls is None:
        return None
    refuse(trainer, privacy_args)
    if cls.__name__ == "SFTTrainer":
        return Adaptation("task: causal_lm, TRL's SFTTrainer")
    if cls.__name__ == "DPOTrainer":
        loss = pairs.dpo_loss(beta=trainer.beta, reference=trainer.ref_model)
        return Adaptation(f"pair: TRL's DPOTrainer, sigmoid, beta {trainer.beta:g}", loss)
    centre = trainer.args.center_rewards_coefficient
    return Adaptation("pair: TRL's RewardTrainer, Bradley-Terry", pairs.reward_loss(center_coefficient=centre))


def refuse(trainer: Any, privacy_args: PrivacyArguments) -> None:
    """Raise for every setting of TRL's own that would change the loss, or read rows, behind private training's back.

    Raises:
        PrivacyError: naming the setting and the way out.
    """
    args = trainer.args
    version = importlib.metadata.version("trl")
    if version not in _VERSIONS:
        raise PrivacyError(f"TRL {version} was never tried; install trl{_VERSIONS}, or pass per_example_loss_fn")
    name = class_of(trainer).__name__  # type: ignore[union-attr]
    dpo = name == "DPOTrainer"
    usual_loss: tuple = (["sigmoid"], "sigmoid") if dpo else ("nll",)
    own_loss = "is a loss that private training does not know; "
    checks = {
        "loss_type": (
            getattr(args, "loss_type", usual_loss[0]) not in usual_loss,
            f"{own_loss}set it to {usual_loss[-1]!r}, or pass per_example_loss_fn",
        ),
        "loss_weights": (
            getattr(args, "loss_weights", None) not in (None, [1.0]),
            f"{own_loss}leave it out",
        ),
        "f_divergence_type": (
            getattr(args, "f_divergence_type", "reverse_kl") != "reverse_kl",
            f"{own_loss}set it to 'reverse_kl'",
        ),
        "ld_alpha": (getattr(args, "ld_alpha", None) is not None, f"{own_loss}leave it out"),
        "use_weighting": (bool(getattr(args, "use_weighting", False)), f"{own_loss}set it to False"),
        "router_aux_loss_coef": (
            bool(getattr(trainer, "aux_loss_enabled", False)),
            "adds a loss over all tokens of a batch; set it to 0.0",
        ),
        "precompute_ref_log_probs": (
            bool(getattr(args, "precompute_ref_log_probs", False)),
            "reads every row before the first draw, in batches whose padding they share; set it to False",
        ),
        "activation_offloading": (
            bool(getattr(args, "activation_offloading", False)),
            "is not used in private training; set it to False",
        ),
        "max_length": (
            privacy_args.privacy_unit == "user" and getattr(args, "max_length", None) is not None,
            "drops rows, so that the number of users would depend on them; set it to None and shorten texts yourself",
        ),
    }
    for setting, (refused, why) in checks.items():
        if refused:
            raise PrivacyError(f"{type(args).__name__}.{setting} {why}")
    if name != "SFTTrainer" and privacy_args.privacy_unit != "example":
        raise PrivacyError(
            f"{name} has pairs for units, and privacy_unit={privacy_args.privacy_unit!r} is not known of them; use "
            "privacy_unit='example'"
        )
    if getattr(trainer, "_is_vision_dataset", False):
        raise PrivacyError(f"train_dataset has images, which {name} prepares in its collator; only text is supported")
    if "ref" in (getattr(trainer.model, "peft_config", None) or {}):
        raise PrivacyError(
            f"{name} made a second adapter, 'ref', of a model that had one already; pass the model without an adapter, "
            "and peft_config="
        )


def num_rows(trainer: Any) -> int:
    """n, the rows that the trainer was given (P5).

    TRL takes out rows that are too long, or that have no label left once they are cut: how many follows from what they
    hold. They stay in the Arrow table behind the data set, are counted here, and add nothing when they are drawn.
    """
    rows = trainer.train_dataset
    if class_of(trainer) is None or trainer.args.max_length is None:
        return len(rows)
    return max(len(rows), rows.data.num_rows)


def loss_alone(trainer: Any) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    """The loss that the trainer itself computes for a batch of one, for comparison on synthetic rows."""

    def loss(batch: Mapping[str, Any]) -> torch.Tensor:
        try:
            return trainer.compute_loss(trainer.model, pairs.unpaired(batch))
        finally:
            forget(trainer)

    return loss


def forget(trainer: Any) -> None:
    """Clears the metrics that TRL collects until the next log, which came from private rows."""
    if class_of(trainer) is not None:
        for metrics in trainer._metrics.values():
            metrics.clear()


def withhold(trainer: Any) -> None:
    """As `forget`, for the metrics of training; and a count of tokens that nobody counts is not shown as 0 (P23)."""
    if class_of(trainer) is not None:
        trainer._metrics["train"].clear()
        trainer._metrics["eval"].pop("num_tokens", None)
