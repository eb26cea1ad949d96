"""Differentially private fine-tuning with the Hugging Face tools.

Importing this package registers the attention implementation "dp_flash" (and its alias "dpfa").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpfa_hf import attention
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError

if TYPE_CHECKING:
    from dpfa_hf.budget import PrivacySpent
    from dpfa_hf.callbacks import PrivacyBudgetCallback
    from dpfa_hf.loop import PrivateLoop
    from dpfa_hf.metrics import PrometheusCallback
    from dpfa_hf.per_example.layers import register_rule
    from dpfa_hf.plan import PrivacyPlan
    from dpfa_hf.trainer import DPTrainer, DPTrainerMixin, privatize

__version__ = "0.1.0"

# What needs Trainer, dp_accounting or SQLAlchemy is imported when it is first asked for.
_LAZY = {
    "DPTrainer": "trainer",
    "DPTrainerMixin": "trainer",
    "privatize": "trainer",
    "PrivacyBudgetCallback": "callbacks",
    "PrivacySpent": "budget",
    "PrivacyPlan": "plan",
    "PrivateLoop": "loop",
    "PrometheusCallback": "metrics",
    "register_rule": "per_example.layers",
}

__all__ = [
    "DPTrainer",
    "DPTrainerMixin",
    "PrivacyArguments",
    "PrivacyBudgetCallback",
    "PrivacyError",
    "PrivacyPlan",
    "PrivacySpent",
    "PrivateLoop",
    "PrometheusCallback",
    "privatize",
    "register_rule",
]

attention.register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
