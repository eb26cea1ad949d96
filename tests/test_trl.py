"""TRL's trainers under `privatize`: the very losses of TRL, a row or a pair at a time, from TRL's own preparation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as tf
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from dpfa_hf import DPTrainerMixin, PrivacyArguments, PrivacyError, privatize
from dpfa_hf import trl as adaptation
from dpfa_hf.batch_selection import TruncatedPoissonSampler

WORDS = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", *"abcdefghijk"]
PAD, END = 0, 1
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<assistant> "
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
PROMPTS = ("a", "b c d", "c", "d a", "e", "f f f g", "g")
ANSWERS = ("b c", "a", "d e f g", "h", "i a b", "c", "j i h g f")
WORSE = ("c", "b b", "d", "e e e", "k", "c d", "a b")
N = len(PROMPTS)

Gradient = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CI", "1")  # TRL tells its makers of every trainer that is built elsewhere
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def tokenizer() -> tf.PreTrainedTokenizerBase:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    made.chat_template = CHAT
    return made


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def llama(head: str = "CausalLM", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, pad_token_id=PAD, eos_token_id=END, bos_token_id=None, **kwargs,
    )  # fmt: skip
    return getattr(tf, f"AutoModelFor{head}").from_config(config, attn_implementation="dp_flash")


def reference() -> Any:
    """What the policy of `llama` has left already."""
    model, generator = llama(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapter() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"], lora_dropout=0.0)


def texts(kind: str) -> datasets.Dataset:
    rows = zip(PROMPTS, ANSWERS, WORSE, strict=True)
    if kind == "completion":
        return datasets.Dataset.from_list([{"prompt": p + " ", "completion": a} for p, a, _ in rows])
    if kind == "text":
        return datasets.Dataset.from_list([{"text": f"{p} {a}"} for p, a, _ in rows])
    if kind == "chat":
        return datasets.Dataset.from_list(
            [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a, _ in rows]
        )
    return datasets.Dataset.from_list([{"prompt": p + " ", "chosen": a, "rejected": w} for p, a, w in rows])


def build(kind: str, folder: Path, model: Any = None, rows: Any = None, **options: Any) -> Any:
    """A trainer of TRL's that is not private yet: `kind` is what its rows are."""
    usual = {
        "output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 1,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "logging_steps": 1, "bf16": False,
        "save_strategy": "no", "per_device_train_batch_size": 3, "gradient_checkpointing": False, "max_length": 32,
    }  # fmt: skip
    parts = {n: options.pop(n) for n in ("peft_config", "eval_dataset", "ref_model", "data_collator") if n in options}
    rows = texts(kind) if rows is None else rows
    parts |= {"train_dataset": rows, "processing_class": tokenizer()}
    if kind == "reward":
        model = llama("SequenceClassification", num_labels=1) if model is None else model
        return trl.RewardTrainer(model=model, args=trl.RewardConfig(**{**usual, **options}), **parts)
    model = llama() if model is None else model
    if kind == "dpo":
        parts.setdefault("ref_model", None if "peft_config" in parts else reference())
        return trl.DPOTrainer(model=model, args=trl.DPOConfig(**{**usual, **options}), **parts)
    return trl.SFTTrainer(model=model, args=trl.SFTConfig(**{**usual, **options}), **parts)


def privacy(folder: Path, **kwargs: Any) -> PrivacyArguments:
    usual = {"target_epsilon": math.inf, "noise_multiplier": 0.0, "ledger": f"sqlite:///{folder}/ledger.db"}
    return PrivacyArguments(**{**usual, **kwargs})


def inject(trainer: Any, draws: list[list[int]]) -> None:
    plan = trainer.privacy_plan
    trainer._sampler = TruncatedPoissonSampler(
        plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
    )


def weights(model: Any) -> Gradient:
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}


def norm(gradient: Gradient) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def gap(left: Gradient, right: Gradient) -> float:
    return norm({name: left[name] - right[name] for name in right}) / norm(right)


# ---- the definitions: one text at a time, from the words themselves, in float64 -------------------------------------


def token_costs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[T]: minus the log-probability of every token after those before it; 0 for the first."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return torch.stack([logits[0, 0] * 0] + [-logits[t - 1, tokens[t]] for t in range(1, len(tokens))])


def completion_loss(model: Any, i: int) -> torch.Tensor:
    prompt = ids(PROMPTS[i])
    return token_costs(model, prompt + ids(ANSWERS[i]) + [END])[len(prompt) :].mean()


def text_loss(model: Any, i: int) -> torch.Tensor:
    return token_costs(model, ids(PROMPTS[i]) + ids(ANSWERS[i]) + [END])[1:].mean()


def chat_loss(model: Any, i: int) -> torch.Tensor:
    prompt = ids(f"<user> {PROMPTS[i]} <assistant>")
    return token_costs(model, prompt + ids(ANSWERS[i]) + [END])[len(prompt) :].mean()


def dpo_loss(model: Any, i: int) -> torch.Tensor:
    prompt = ids(PROMPTS[i])
    gains = []
    for answer in (ANSWERS[i], WORSE[i]):
        tokens = prompt + ids(answer) + [END]
        with torch.no_grad():
            before = token_costs(model.reference, tokens)[len(prompt) :].sum()
        gains.append(before - token_costs(model, tokens)[len(prompt) :].sum())
    return F.softplus(-0.1 * (gains[0] - gains[1]))


def reward_loss(model: Any, i: int) -> torch.Tensor:
    rewards = [
        model(input_ids=torch.tensor([ids(PROMPTS[i]) + ids(answer) + [END]])).logits[0, 0]
        for answer in (ANSWERS[i], WORSE[i])
    ]
    return F.softplus(rewards[1] - rewards[0])


LOSSES: dict[str, Callable[[Any, int], torch.Tensor]] = {
    "completion": completion_loss,
    "text": text_loss,
    "chat": chat_loss,
    "dpo": dpo_loss,
    "reward": reward_loss,
}


def gradients(model: Any, kind: str) -> list[Gradient]:
    """By autograd, of each unit's loss alone; float64."""
    model = copy.deepcopy(model).double().train()
    object.__setattr__(model, "reference", reference().double())
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for i in range(N):
        grads = torch.autograd.grad(LOSSES[kind](model, i), list(named.values()), allow_unused=True)
        found.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}
        )
    return found


def clipped_sum(parts: Sequence[Gradient], clipping_norm: float) -> Gradient:
    factors = [min(1.0, clipping_norm / norm(part)) for part in parts]
    return {name: sum(f * part[name] for f, part in zip(factors, parts, strict=True)) for name in parts[0]}


def regimes(parts: Sequence[Gradient]) -> tuple[float, float]:
    """By the first norm everybody is clipped, by the second nobody but the longest."""
    norms = sorted(map(norm, parts))
    return norms[0] / 3, (norms[-1] * norms[-2]) ** 0.5


# kind of rows -> what its trainer and its privacy need beside the usual
SETTINGS: dict[str, tuple[dict, dict]] = {
    "completion": ({}, {}),
    "completion, padding-free": ({"padding_free": True, "max_length": None}, {"privacy_unit": "document"}),
    "text": ({}, {}),
    "chat": ({"assistant_only_loss": True}, {}),
    "chat, padding-free": (
        {"assistant_only_loss": True, "padding_free": True, "max_length": None},
        {"privacy_unit": "document"},
    ),
    "dpo": ({}, {}),
    "reward": ({}, {}),
}


def step(name: str, folder: Path, clipping_norm: float, **options: Any) -> tuple[Any, Gradient]:
    """(the trainer after one step that drew every row, what the step took from the weights, times the batch)."""
    config, private = SETTINGS[name]
    trainer = build(name.split(",")[0], folder, **config, **options)
    before = weights(trainer.model)
    privatize(trainer, privacy(folder, per_example_max_grad_norm=clipping_norm, expected_batch_size=5, **private))
    inject(trainer, [list(range(N))])
    trainer.train()
    after = weights(trainer.model)
    return trainer, {name: 5 * (before[name] - after[name]) for name in before}


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_equals_a_float64_loop_over_the_units(name: str, tmp_path: Path) -> None:
    kind = name.split(",")[0]
    model = llama("SequenceClassification", num_labels=1) if kind == "reward" else llama()
    parts = gradients(model, kind)
    taken = {}
    for clipping_norm in regimes(parts):
        trainer, taken[clipping_norm] = step(name, tmp_path, clipping_norm)
        assert isinstance(trainer, DPTrainerMixin) and trainer.privacy_plan.clipping_norm == clipping_norm
        assert gap(taken[clipping_norm], clipped_sum(parts, clipping_norm)) < 2e-5
    tight = min(taken)
    # The mutant clips the batch's average.
    average = {n: sum(part[n] for part in parts) / N for n in parts[0]}
    assert gap(taken[tight], {n: N * tight / norm(average) * average[n] for n in average}) > 0.05
    if kind in ("completion", "chat"):  # the mutant forgets which tokens are the prompt's
        assert gap(taken[tight], clipped_sum(gradients(model, "text"), tight)) > 0.1


def test_an_adapter_is_trained_against_the_model_without_it(tmp_path: Path) -> None:
    """DPO without a reference model: the first step of a new adapter is by its B alone, for A times B is still 0."""
    trainer, taken = step("dpo", tmp_path, 1.0, peft_config=adapter())
    assert trainer.ref_model is None
    assert norm({n: g for n, g in taken.items() if "lora_B" in n}) > 0.1
    assert norm({n: g for n, g in taken.items() if "lora_A" in n}) == 0
    assert all("lora_" in name for name in taken)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("completion", {}),
        ("chat", {"assistant_only_loss": True}),
        ("dpo", {"beta": 0.6}),
        ("dpo", {"beta": 0.6, "peft_config": adapter()}),
        ("reward", {"center_rewards_coefficient": 0.3}),
    ],
)
def test_every_unit_has_the_loss_that_trl_computes_for_it_alone(kind: str, config: dict, tmp_path: Path) -> None:
    trainer = privatize(build(kind, tmp_path, **config), privacy(tmp_path))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # which is 0 at first: the policy would be its own reference
                parameter += 0.3
    dataset, collate = trainer._collated_dataset()
    rows = [dataset[i] for i in range(N)]
    with torch.no_grad():
        ours = trainer._engine.loss(trainer.model, collate(rows))
        theirs = torch.stack([trainer.compute_loss(trainer.model, trainer.data_collator([row])) for row in rows])
    assert torch.allclose(ours, theirs, rtol=1e-5) and len(set(ours.tolist())) == N


def test_a_loss_of_trl_that_is_not_ours_is_found_on_synthetic_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = privatize(build("completion", tmp_path), privacy(tmp_path))
    honest = trl.SFTTrainer.compute_loss
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", lambda *a, **k: 1.01 * honest(*a, **k))
    with pytest.raises(PrivacyError, match="another loss"):
        trainer.train()


def test_the_defaults_of_trl_train_an_adapter(tmp_path: Path) -> None:
    """bfloat16 autocast and gradient checkpointing are on unless they are switched off."""
    for kind, config in (("chat", {"assistant_only_loss": True}), ("dpo", {})):
        defaults = {"bf16": True, "gradient_checkpointing": True, "max_length": 1024, **config}
        trainer = build(kind, tmp_path, peft_config=adapter(), **defaults)
        before = weights(trainer.model)
        privatize(trainer, PrivacyArguments(8.0, 0.01, noise_multiplier=4.0, ledger=f"sqlite:///{tmp_path}/ledger.db"))
        trainer.train()
        assert trainer.privacy_spent().steps == 1 and gap(weights(trainer.model), before) > 0


# ---- the data set ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "dpo", "reward"])
def test_a_row_that_trl_drops_is_counted_and_adds_nothing(kind: str, tmp_path: Path) -> None:
    """Two neighbours: in one, the last row is too long for TRL. n, q and the plan must not tell (P5)."""
    rows = texts("dpo" if kind == "reward" else kind)
    long = {**rows[N - 1], "prompt": "a b c " * 10}
    other = datasets.concatenate_datasets([rows.select(range(N - 1)), datasets.Dataset.from_list([long])])
    trainers = [privatize(build(kind, tmp_path, rows=each, max_length=12), privacy(tmp_path)) for each in (rows, other)]
    assert [len(trainer.train_dataset) for trainer in trainers] == [N, N - 1]  # what a mutant would count
    plans = [trainer.privacy_plan for trainer in trainers]
    assert plans[0] == plans[1] and plans[0].num_units == N
    before = weights(trainers[1].model)
    inject(trainers[1], [[N - 1]])
    trainers[1].train()
    assert norm({n: w - before[n] for n, w in weights(trainers[1].model).items()}) == 0


def test_rows_that_were_selected_away_are_not_brought_back(tmp_path: Path) -> None:
    trainer = privatize(build("completion", tmp_path, rows=texts("completion").select([1, 3, 5])), privacy(tmp_path))
    assert trainer.privacy_plan.num_units == len(trainer.train_dataset) == 3


def test_pairs_tokenised_and_selected_beforehand_count_what_they_were_selected_from(tmp_path: Path) -> None:
    """Nobody can tell TRL's filter from the user's there; a larger n with rows that add nothing is the safe reading."""
    pairs = datasets.Dataset.from_list([{"chosen_ids": [5, 6], "rejected_ids": [7, 8, 1]}] * 8)
    chosen = pairs.select([0, 3, 4, 6])
    assert privatize(build("reward", tmp_path, rows=chosen), privacy(tmp_path)).privacy_plan.num_units == 8
    flat = privatize(build("reward", tmp_path, rows=chosen.flatten_indices()), privacy(tmp_path))
    assert flat.privacy_plan.num_units == 4
    uncut = privatize(build("reward", tmp_path, rows=chosen, max_length=None), privacy(tmp_path))
    assert uncut.privacy_plan.num_units == 4


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("completion", {"pad_to_multiple_of": 8}),
        ("dpo", {"pad_to_multiple_of": 8}),
        ("reward", {"pad_to_multiple_of": 8}),
        ("completion", {"truncation_mode": "keep_end", "max_length": 4, "shuffle_dataset": True}),
        ("text", {"dataloader_num_workers": 1}),
        ("dpo", {"dataloader_num_workers": 1}),
    ],
)
def test_settings_that_change_nothing_private_are_kept(kind: str, config: dict, tmp_path: Path) -> None:
    trainer = privatize(build(kind, tmp_path, **config), privacy(tmp_path))
    assert trainer.privacy_plan.num_units == N
    before = weights(trainer.model)
    inject(trainer, [[0, 1, 2]])
    trainer.train()
    assert gap(weights(trainer.model), before) > 0


def test_rows_packed_before_the_draw_are_refused(tmp_path: Path) -> None:
    stock = build("text", tmp_path, packing=True)
    with pytest.raises(PrivacyError, match="packing packs rows before they are drawn"):
        privatize(stock, privacy(tmp_path, privacy_unit="document"))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("completion", {"loss_type": "dft"}, "SFTConfig.loss_type .* 'nll'"),
        ("completion", {"activation_offloading": True}, "activation_offloading"),
        ("completion", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ("completion", {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ("completion", {"padding_free": True, "max_length": None}, "privacy_unit='document'"),
        ("completion", {"use_liger_kernel": True}, "use_liger_kernel"),
        ("dpo", {"loss_type": ["ipo"]}, "DPOConfig.loss_type .* 'sigmoid'"),
        ("dpo", {"loss_type": ["sigmoid", "sft"]}, "DPOConfig.loss_type"),
        ("dpo", {"loss_weights": [0.5]}, "loss_weights"),
        ("dpo", {"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ("dpo", {"ld_alpha": 0.5}, "ld_alpha"),
        ("dpo", {"use_weighting": True}, "use_weighting"),
        ("dpo", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ("reward", {"activation_offloading": True}, "RewardConfig.activation_offloading"),
    ],
)
def test_settings_that_private_training_cannot_honour_are_refused(
    kind: str, config: dict, message: str, tmp_path: Path
) -> None:
    offloading = config.pop("activation_offloading", False)  # which TRL itself refuses without a GPU
    stock = build(kind, tmp_path, **config)
    stock.args.activation_offloading = offloading
    with pytest.raises(PrivacyError, match=message):
        privatize(stock, privacy(tmp_path)).train()


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_pairs_are_units_of_their_own_and_no_other(kind: str, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="has pairs for units"):
        privatize(build(kind, tmp_path), privacy(tmp_path, privacy_unit="document"))


def test_a_router_that_balances_a_batch_is_refused(tmp_path: Path) -> None:
    config = tf.MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, num_local_experts=2, pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    stock = build("text", tmp_path, tf.MixtralForCausalLM(config), router_aux_loss_coef=0.1)
    with pytest.raises(PrivacyError, match="router_aux_loss_coef"):
        privatize(stock, privacy(tmp_path))


def test_a_subclass_with_a_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    class Weighted(trl.SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    stock = build("completion", tmp_path)
    stock.__class__ = Weighted
    with pytest.raises(PrivacyError, match="Weighted.compute_loss"):
        privatize(stock, privacy(tmp_path))


def test_a_trainer_of_trl_that_nobody_read_is_refused(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a ", "completion": "b", "label": bool(i % 2)} for i in range(8)])
    options = {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"}
    args = trl.KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **options)
    stock = trl.KTOTrainer(
        model=llama(), ref_model=reference(), args=args, train_dataset=rows, processing_class=tokenizer()
    )
    with pytest.raises(PrivacyError, match="KTOTrainer.compute_loss"):
        privatize(stock, privacy(tmp_path))


def test_another_version_of_trl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation.importlib.metadata, "version", lambda name: "0.29.1")
    with pytest.raises(PrivacyError, match="TRL 0.29"):
        privatize(build("completion", tmp_path), privacy(tmp_path))


def test_users_are_not_counted_in_rows_of_which_trl_drops_some(tmp_path: Path) -> None:
    asked = privacy(tmp_path, privacy_unit="user", privacy_unit_column="prompt")
    with pytest.raises(PrivacyError, match="SFTConfig.max_length .* number of users"):
        privatize(build("completion", tmp_path), asked)


def test_an_adapter_beside_its_own_copy_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), adapter())
    with pytest.raises(PrivacyError, match="second adapter"):
        privatize(build("dpo", tmp_path, model, ref_model=None), privacy(tmp_path))


# ---- what is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "dpo", "reward"])
def test_private_evaluation_leaves_no_metric_behind_for_a_later_log(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaked() -> set[str]:
        held_out = texts("dpo" if kind == "reward" else kind)
        trainer = privatize(build(kind, tmp_path, eval_dataset=held_out), privacy(tmp_path, eval_data="private"))
        assert "eval_loss" in trainer.evaluate()
        trainer.log({"note": 1.0})
        return {key for key in trainer.state.log_history[-1] if key.startswith("eval_")}

    assert leaked() == set()
    monkeypatch.setattr(adaptation, "forget", lambda trainer: None)
    assert leaked() != set()  # the mutant


def test_public_evaluation_shows_trls_metrics_and_training_shows_none(tmp_path: Path) -> None:
    trainer = build("completion", tmp_path, eval_dataset=texts("completion").select([0, 1]), eval_strategy="steps")
    privatize(trainer, privacy(tmp_path, eval_data="public"))
    trainer.train()
    shown = {key for line in trainer.state.log_history for key in line}
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= shown
    assert not {"loss", "entropy", "mean_token_accuracy", "num_tokens", "eval_num_tokens"} & shown


@pytest.mark.parametrize("kind", ["completion", "dpo", "reward"])
def test_the_report_names_the_loss_and_lies_beside_trls_card(kind: str, tmp_path: Path) -> None:
    trainer = build(kind, tmp_path, save_strategy="steps", save_steps=1)
    privatize(trainer, PrivacyArguments(8.0, 0.01, noise_multiplier=4.0, ledger=f"sqlite:///{tmp_path}/ledger.db"))
    trainer.train()
    trainer.save_model()
    assert f"TRL's {type(trainer).__name__[2:]}" in str(trainer.privacy_report())
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert (folder / "privacy.json").is_file() and "differential_privacy" in (folder / "README.md").read_text()
    assert "trl" in (tmp_path / "out" / "README.md").read_text()


# ---- a long life ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "dpo"])
def test_an_interrupted_run_goes_on_with_its_plan(kind: str, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Interrupt(tf.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise Interrupted

    def made() -> Any:
        trainer = build(kind, tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
        asked = PrivacyArguments(8.0, 0.01, noise_multiplier=4.0, ledger=f"sqlite:///{tmp_path}/ledger.db")
        return privatize(trainer, asked)

    first = made()
    first.add_callback(Interrupt)
    with pytest.raises(Interrupted):
        first.train()
    second = made()
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4 and second.privacy_spent().steps == 4
    assert second.privacy_plan == first.privacy_plan


def test_a_reference_that_follows_the_released_weights_is_let(tmp_path: Path) -> None:
    """TR-DPO: the reference is a mixture of weights that are released anyway, so it tells nothing more."""
    trainer = build("dpo", tmp_path, sync_ref_model=True, ref_model_sync_steps=1, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.ref_model.named_parameters()}
    privatize(trainer, privacy(tmp_path, sampling_probability=1.0, expected_batch_size=5))
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.ref_model.named_parameters())
