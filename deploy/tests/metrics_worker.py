"""A real private training for the tests of its metrics, in processes of its own: metrics_worker.py OPTIONS-AS-JSON.

Prints one line of JSON about the run when it is over, and stays until its stdin ends, so that its metrics can be read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import transformers as tf
from torch.utils.data import Dataset

from dpfa_hf import DPTrainer, PrivacyArguments, PrometheusCallback

ROWS, STEPS = 60, 30


class Rows(Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        # A training of some seconds, so that it is scraped in its midst.
        time.sleep(0.005)
        return {"input_ids": [index % 7 + 1] * 5, "attention_mask": [1] * 5, "labels": index % 2}


def trainer_for(
    folder: str, callbacks: list[Any], *, steps: int = STEPS, arguments: dict[str, Any], privacy: dict[str, Any]
) -> DPTrainer:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)
    usual = {
        "output_dir": f"{folder}/out", "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": steps,
        "logging_steps": 1, "per_device_train_batch_size": 6, "save_strategy": "no",
    }  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        usual["ddp_backend"] = "gloo"
    asked = {"target_epsilon": 4.0, "target_delta": 1e-3, "ledger": f"sqlite:///{folder}/ledger.db"}
    return DPTrainer(
        model=tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash"),
        args=tf.TrainingArguments(**{**usual, **arguments}),
        train_dataset=Rows(),
        privacy_args=PrivacyArguments(**{**asked, **privacy}),
        callbacks=callbacks,
    )


def main() -> None:
    options = json.loads(sys.argv[1])
    callbacks = [PrometheusCallback(**options["metrics"])] if "metrics" in options else []
    trainer = trainer_for(
        options["folder"], callbacks, steps=options.get("steps", STEPS), arguments=options.get("arguments", {}),
        privacy=options.get("privacy", {}),
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        report = trainer.privacy_report()
        kept = {"run": report["run"], "plan": report["plan"], "logs": trainer.state.log_history}
        print("DONE " + json.dumps(kept), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
