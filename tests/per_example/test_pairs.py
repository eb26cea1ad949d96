from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import pairs, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients

VOCABULARY, BETA, CENTRE = 53, 0.7, 0.3
LENGTHS = ((2, 4, 3), (1, 2, 6), (3, 1, 1), (2, 7, 2), (1, 3, 3))  # tokens of prompt, chosen and rejected
DPO_FAMILIES = ("llama-tied", "gpt2", "llama lora")

Pair = dict[str, torch.Tensor]
Gradient = dict[str, torch.Tensor]


def preferences() -> list[Pair]:
    generator = torch.Generator().manual_seed(5)

    def text(size: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (size,), generator=generator)

    return [{"prompt": text(a), "chosen": text(b), "rejected": text(c)} for a, b, c in LENGTHS]


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As TRL's collators do: the chosen texts, then the rejected ones, padded on the right to the longest of all."""
    texts = [torch.cat([torch.as_tensor(row["prompt"]), torch.as_tensor(row[side])])
             for side in ("chosen", "rejected") for row in rows]  # fmt: skip
    prompts = [len(row["prompt"]) for row in rows] * 2
    completions = [(torch.arange(len(text)) >= prompt).long() for text, prompt in zip(texts, prompts, strict=True)]

    def pad(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)

    return {
        "input_ids": pad(texts),
        "attention_mask": pad([torch.ones_like(text) for text in texts]),
        "completion_mask": pad(completions),
    }


by_pair = pairs.PairCollator(collate)


def causal(lab: SimpleNamespace, family: str) -> tuple[Any, Any]:
    """(policy, what to give as reference): a policy that has left its reference already."""
    model = lab.build(family.split()[0])
    if family.endswith("lora"):
        return lab.with_lora(model), None
    reference = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, reference


def reward_model(lab: SimpleNamespace, family: str) -> Any:
    if family == "bert":
        return lab.build("bert-regression")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config).double().train()


def checked(model: Any, loss: Callable, **options: Any) -> PerExampleGradients:
    engine = PerExampleGradients(model, loss, clipping_norm=1.0, **options)
    columns = {name: preflight.Column("int", (None,)) for name in ("prompt", "chosen", "rejected")}
    preflight.check(engine, preflight.synthetic_batch(model, None, columns, by_pair))
    return engine


def private_sum(engine: PerExampleGradients, rows: list[Pair], clipping_norm: float, size: int) -> Gradient:
    engine.clipping_norm = clipping_norm
    for start in range(0, len(rows), size):
        engine.accumulate(by_pair(rows[start : start + size]))
    return engine.take()


# ---- the definition: each text alone, its tokens one by one, autograd in float64 -------------------------------------


def log_probability(model: Any, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    tokens = torch.cat([prompt, completion])
    logits = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    return torch.stack([logits[t - 1, tokens[t]] for t in range(len(prompt), len(tokens))]).sum()


def dpo_by_hand(model: Any, reference: Any, row: Pair) -> torch.Tensor:
    if reference is None:
        reference = copy.deepcopy(model).unload()
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected")]
    ours = [log_probability(model, *side) for side in sides]
    with torch.no_grad():
        theirs = [log_probability(reference, *side) for side in sides]
    return torch.log1p(torch.exp(-BETA * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))))


def reward_by_hand(model: Any, row: Pair, margin: float = 0.0) -> torch.Tensor:
    chosen, rejected = (
        model(input_ids=torch.cat([row["prompt"], row[side]])[None]).logits[0, 0] for side in ("chosen", "rejected")
    )
    return torch.log1p(torch.exp(-(chosen - rejected - margin))) + CENTRE * (chosen + rejected) ** 2


def gradients_of(model: Any, losses: Sequence[torch.Tensor]) -> list[Gradient]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}
        )
    return found


def worst_error(
    lab: SimpleNamespace, engine: PerExampleGradients, rows: list[Pair], gradients: list[Gradient]
) -> float:
    """Both clipping regimes, micro-batches of 1, 2 and all."""
    return max(
        lab.relative_error(private_sum(engine, rows, norm, size), lab.clipped_sum(gradients, norm))
        for norm in lab.regimes(gradients)
        for size in (1, 2, len(rows))
    )


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DPO_FAMILIES)
def test_dpo_sums_pairs_clipped_as_one_vector(lab: SimpleNamespace, family: str) -> None:
    model, reference = causal(lab, family)
    rows = preferences()
    expected = [dpo_by_hand(model, reference, row) for row in rows]
    engine = checked(model, pairs.dpo_loss(beta=BETA, reference=reference))
    assert torch.allclose(engine.loss(model, by_pair(rows)), torch.stack(expected), rtol=1e-9)
    assert worst_error(lab, engine, rows, gradients_of(model, expected)) < 1e-9


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_reward_models_sum_pairs_clipped_as_one_vector(lab: SimpleNamespace, family: str) -> None:
    model, rows = reward_model(lab, family), preferences()
    expected = [reward_by_hand(model, row) for row in rows]
    engine = checked(model, pairs.reward_loss(center_coefficient=CENTRE))
    assert torch.allclose(engine.loss(model, by_pair(rows)), torch.stack(expected), rtol=1e-9)
    assert worst_error(lab, engine, rows, gradients_of(model, expected)) < 1e-9


def test_a_margin_is_what_its_own_pair_must_win_by(lab: SimpleNamespace) -> None:
    model, rows = reward_model(lab, "llama"), preferences()
    margins = torch.linspace(0.0, 2.0, len(rows), dtype=torch.float64)
    found = pairs.reward_loss(center_coefficient=CENTRE)(model, {**by_pair(rows), "margin": margins})
    expected = [reward_by_hand(model, row, float(m)) for row, m in zip(rows, margins, strict=True)]
    assert torch.allclose(found, torch.stack(expected), rtol=1e-9)


def test_pairs_clipped_layer_by_layer_equal_a_loop_over_layers(lab: SimpleNamespace) -> None:
    model, reference = causal(lab, "llama-tied")
    rows = preferences()
    engine = checked(model, pairs.dpo_loss(beta=BETA, reference=reference), clipping="per_layer")
    gradients = gradients_of(model, [dpo_by_hand(model, reference, row) for row in rows])
    groups = engine.clipping_groups()
    count = max(groups.values()) + 1
    expected = {name: torch.zeros_like(gradient) for name, gradient in gradients[0].items()}
    for gradient in gradients:
        for group in range(count):
            own = {name: g for name, g in gradient.items() if groups[name] == group}
            factor = min(1.0, 0.5 / count**0.5 / lab.norm(own))
            for name, g in own.items():
                expected[name] += factor * g
    assert lab.relative_error(private_sum(engine, rows, 0.5, 2), expected) < 1e-9


# ---- what a mistake would do ----------------------------------------------------------------------------------------


def test_chosen_and_rejected_clipped_one_by_one_would_be_seen(lab: SimpleNamespace) -> None:
    """The mutant, by which a pair adds up to 2 C."""
    model, reference = causal(lab, "llama-tied")
    rows = preferences()
    parts = []
    for row in rows:
        for side in ("chosen", "rejected"):
            held = {"chosen": "rejected", "rejected": "chosen"}[side]
            with torch.no_grad():
                fixed = log_probability(model, row["prompt"], row[held])
                theirs = {s: log_probability(reference, row["prompt"], row[s]) for s in ("chosen", "rejected")}
            ours = {held: fixed, side: log_probability(model, row["prompt"], row[side])}
            gap = (ours["chosen"] - theirs["chosen"]) - (ours["rejected"] - theirs["rejected"])
            parts.append(F.softplus(-BETA * gap))
    halves = gradients_of(model, parts)
    whole = gradients_of(model, [dpo_by_hand(model, reference, row) for row in rows])
    clipped = lab.regimes(whole)[0]
    assert lab.relative_error(lab.clipped_sum(halves, clipped), lab.clipped_sum(whole, clipped)) > 0.05
    # Where nobody is clipped the halves make the whole, so that nothing else is wrong with the mutant.
    loose = 100 * max(map(lab.norm, halves))
    assert lab.relative_error(lab.clipped_sum(halves, loose), lab.clipped_sum(whole, loose)) < 1e-9


def test_a_loss_that_averages_over_pairs_is_refused(lab: SimpleNamespace) -> None:
    model, reference = causal(lab, "llama-tied")
    loss = pairs.dpo_loss(beta=BETA, reference=reference)
    with pytest.raises(PrivacyError, match="not independent"):
        checked(model, lambda called, batch: loss(called, batch).mean().expand(len(batch["input_ids"])))


def test_another_completion_mask_would_be_seen(lab: SimpleNamespace) -> None:
    """The mutant leaves out each completion's first token. (One that counts the prompt, too, is no mutant: the two
    texts share it, and it cancels.)"""
    model, reference = causal(lab, "llama-tied")
    loss, batch = pairs.dpo_loss(beta=BETA, reference=reference), by_pair(preferences())
    late = batch["completion_mask"].cumsum(-1).ge(2).long()
    assert not torch.allclose(loss(model, batch), loss(model, {**batch, "completion_mask": late}), rtol=1e-3)
    whole = loss(model, {**batch, "completion_mask": batch["attention_mask"]})
    assert torch.allclose(loss(model, batch), whole, rtol=1e-9)


def test_the_reference_takes_no_gradient_and_leaves_every_flag_as_it_was(lab: SimpleNamespace) -> None:
    model, _ = causal(lab, "llama lora")
    frozen = next(name for name, p in model.named_parameters() if p.requires_grad)
    model.get_parameter(frozen).requires_grad_(False)  # a part of the adapter, frozen on purpose
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    rows = preferences()
    loss = pairs.dpo_loss(beta=BETA)(model, by_pair(rows))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.active_adapter == "default"
    expected = [dpo_by_hand(model, None, row) for row in rows]
    assert torch.allclose(loss, torch.stack(expected), rtol=1e-9)
    # The mutant compares the policy with itself, and then there is nothing to learn.
    mutant = pairs.dpo_loss(beta=BETA, reference=model)(model, by_pair(rows))
    assert torch.allclose(mutant, torch.full_like(mutant, 2.0).log())


def test_a_model_without_adapter_or_reference_is_refused(lab: SimpleNamespace) -> None:
    model, _ = causal(lab, "llama-tied")
    with pytest.raises(PrivacyError, match="reference="):
        pairs.dpo_loss(beta=BETA)(model, by_pair(preferences()))


# ---- neighbours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [True, False])
def test_a_pair_moves_the_sum_by_no_more_than_c(lab: SimpleNamespace, clipped: bool) -> None:
    model, reference = causal(lab, "llama-tied")
    engine = checked(model, pairs.dpo_loss(beta=BETA, reference=reference))
    rows = preferences()
    gradients = gradients_of(model, [dpo_by_hand(model, reference, row) for row in rows])
    norm = lab.regimes(gradients)[0 if clipped else 1]
    for i in range(len(rows)):
        without = private_sum(engine, rows[:i] + rows[i + 1 :], norm, 2)
        moved = private_sum(engine, rows, norm, 2)
        distance = lab.norm({name: moved[name] - without[name] for name in moved})
        assert distance == pytest.approx(min(norm, lab.norm(gradients[i])), rel=1e-9)


# ---- the collator ---------------------------------------------------------------------------------------------------


def test_the_collator_puts_both_texts_of_a_pair_into_one_entry() -> None:
    rows = preferences()
    batch = by_pair(rows)
    for i, row in enumerate(rows):
        for side, name in enumerate(("chosen", "rejected")):
            own = batch["attention_mask"][i, side].bool()
            assert torch.equal(batch["input_ids"][i, side][own], torch.cat([row["prompt"], row[name]]))
    assert all(torch.equal(value, collate(rows)[name]) for name, value in pairs.unpaired(batch).items())


def test_a_collator_that_does_not_return_pairs_is_refused() -> None:
    with pytest.raises(PrivacyError, match="DataCollatorForPreference"):
        pairs.PairCollator(lambda rows: {"input_ids": torch.zeros(3, 4)})(preferences()[:2])


def test_padding_that_changes_a_pair_is_found_before_the_first_step(lab: SimpleNamespace) -> None:
    """A mutant of the loss that counts padding: only a pair alone, without its neighbours' padding, can tell."""
    model = reward_model(lab, "llama")
    honest = pairs.reward_loss()

    def counts_padding(called: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return honest(called, batch) * batch["input_ids"].shape[-1]

    checked(model, honest)
    with pytest.raises(PrivacyError, match="padding"):
        checked(model, counts_padding)
