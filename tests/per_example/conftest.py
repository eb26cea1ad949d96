"""Tiny models of every family, rows for them, and the loop of autograd that the engine is held against.

Nothing here imports dpfa_hf: what is compared with it must not share its code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

VOCABULARY = 53
LENGTHS = (6, 4, 9, 3, 7)
_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_TEXT = {**_SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TEXT, **_SPECIAL, "num_key_value_heads": 2}
_HEADS = {**_DECODER, "head_dim": 4}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}

_AUDIO = {
    "num_labels": 3,
    "classifier_proj_size": 8,
    "conv_dim": (8, 8),
    "conv_kernel": (3, 2),
    "conv_stride": (2, 1),
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 3,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
}

# name -> (head, configuration class, its arguments)
FAMILIES: dict[str, tuple[str, str, dict]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**_TEXT, "num_labels": 3}),
    "bert-multi-label": (
        "BertForSequenceClassification",
        "BertConfig",
        {**_TEXT, "num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "bert-regression": ("BertForSequenceClassification", "BertConfig", {**_TEXT, "num_labels": 1}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _TEXT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _TEXT),
    "distilbert-qa": (
        "DistilBertForQuestionAnswering",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 24,
            "max_position_embeddings": 32,
        },
    ),
    "modernbert": (
        "ModernBertForTokenClassification",
        "ModernBertConfig",
        {
            **_TEXT,
            **_SPECIAL,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
            "num_labels": 3,
        },
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 8}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_TEXT, "embedding_size": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _HEADS),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_HEADS, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_HEADS, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _HEADS),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _HEADS),
    "vaultgemma": ("VaultGemmaForCausalLM", "VaultGemmaConfig", _HEADS),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "ffn_dim": 24,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 8,
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_TEXT, **_SPECIAL}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_SEQ2SEQ, "max_position_embeddings": 32}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQ2SEQ,
            **_SPECIAL,
            "num_mel_bins": 4,
            "max_source_positions": 5,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_SIZE, "image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
    "deit": (
        "DeiTForImageClassification",
        "DeiTConfig",
        {**_SIZE, "image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
    "beit": (
        "BeitForImageClassification",
        "BeitConfig",
        {**_SIZE, "image_size": 8, "patch_size": 4, "num_labels": 3, "out_indices": [0], "drop_path_rate": 0.0},
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 8,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "num_labels": 3,
            "drop_path_rate": 0.0,
        },
    ),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", {**_SIZE, **_AUDIO}),
    "hubert": ("HubertForSequenceClassification", "HubertConfig", {**_SIZE, **_AUDIO}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {**_TEXT, "type_vocab_size": 0}),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", _TEXT),
    "xlm-roberta": ("XLMRobertaForTokenClassification", "XLMRobertaConfig", {**_TEXT, "num_labels": 3}),
    "layoutlm": ("LayoutLMForSequenceClassification", "LayoutLMConfig", _TEXT),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "rotary_dim": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4, **_SPECIAL},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_DECODER, "ffn_hidden_size": 24, "alibi": False}),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEADS),
    "cohere": ("CohereForCausalLM", "CohereConfig", _DECODER),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _DECODER),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _DECODER),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _DECODER),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", _HEADS),
    "llama-cls": ("LlamaForSequenceClassification", "LlamaConfig", {**_HEADS, "num_labels": 3}),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", {**_SEQ2SEQ, "max_position_embeddings": 32}),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {**_SEQ2SEQ, "max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 0},
    ),
    "mt5": (
        "MT5ForConditionalGeneration",
        "MT5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**_HEADS, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_HEADS, "num_local_experts": 2}),
}


def build(family: str, *, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Any:
    """A model in training mode whose every parameter is random, so that no gradient vanishes by an initial zero."""
    head, configuration, arguments = FAMILIES[family]
    config = getattr(transformers, configuration)(**arguments)
    for name, value in vars(config).items():
        if "drop" in name and "layerdrop" not in name and isinstance(value, float):
            setattr(config, name, dropout)
    torch.manual_seed(0)
    model = getattr(transformers, head)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if hasattr(model, "freeze_feature_encoder"):
        # Or else it asks for a gradient of its input, which fails where that has one already.
        model.freeze_feature_encoder()
    if family in ("t5", "mt5"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("relative_attention_bias.weight"))
    return model.to(dtype).train()


def with_lora(model: Any, **options: Any) -> Any:
    """The model with adapters on all linear layers; the B matrices, zero at first, are random."""
    from peft import LoraConfig, get_peft_model

    dtype = next(model.parameters()).dtype
    model = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": "all-linear", **options})).to(dtype).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def rows_of(family: str, model: Any, lengths: Sequence[int] = LENGTHS) -> list[dict[str, torch.Tensor]]:
    """Unpadded rows of unequal length, with labels."""
    generator = torch.Generator().manual_seed(3)
    head, config = FAMILIES[family][0], model.config
    dtype = next(model.parameters()).dtype

    def integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows = []
    for length in lengths:
        if model.main_input_name == "pixel_values":
            row: dict[str, torch.Tensor] = {"pixel_values": torch.randn(3, 8, 8, generator=generator).to(dtype)}
        elif model.main_input_name == "input_values":
            row = {"input_values": torch.randn(40, generator=generator).to(dtype)}
        elif family == "whisper":
            row = {"input_features": torch.randn(4, 10, generator=generator).to(dtype)}
        else:
            ids = integers(VOCABULARY, length, low=3)
            row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "QuestionAnswering" in head:
            row |= {"start_positions": integers(length, 1)[0]}
            row |= {"end_positions": integers(length, 1)[0]}
        elif config.num_labels == 1:
            row["labels"] = torch.randn((), generator=generator).to(dtype)
        elif config.problem_type == "multi_label_classification":
            row["labels"] = integers(2, config.num_labels).to(dtype)
        elif "TokenClassification" in head:
            row["labels"] = integers(config.num_labels, length)
        elif "Classification" in head:
            row["labels"] = integers(config.num_labels, 1)[0]
        elif "CausalLM" in head or "LMHead" in head:
            row["labels"] = row["input_ids"].clone()
        else:
            row["labels"] = integers(VOCABULARY, length if "MaskedLM" in head else length // 2 + 1, low=3)
        if "labels" in row and row["labels"].dim() and row["labels"].dtype == torch.long and length > 3:
            row["labels"][1] = -100
        rows.append(row)
    return rows


def collate(model: Any, rows: Sequence[Mapping[str, torch.Tensor]], *, left: bool = False) -> dict[str, torch.Tensor]:
    """Rows padded to the longest."""
    batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if first.dim() == 1:
            padding = {"labels": -100, "attention_mask": 0}.get(name, model.config.pad_token_id or 0)
            batch[name] = nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=padding, padding_side="left" if left else "right"
            )
        else:
            batch[name] = torch.stack(values)
    return batch


def row_gradients(model: Any, rows: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """For each row alone, unpadded: the gradient of the model's own loss by autograd, float64, by parameter name."""
    gradients = []
    for row in rows:
        model.zero_grad(set_to_none=True)
        model(**{name: value[None] for name, value in row.items()}).loss.backward()
        gradients.append(
            {
                name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )
    model.zero_grad(set_to_none=True)
    return gradients


def norm(gradient: Mapping[str, torch.Tensor]) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt())


def clipped_sum(gradients: Sequence[Mapping[str, torch.Tensor]], clipping_norm: float) -> dict[str, torch.Tensor]:
    total = {name: torch.zeros_like(g) for name, g in gradients[0].items()}
    for gradient in gradients:
        factor = min(1.0, clipping_norm / max(norm(gradient), 1e-300))
        for name in total:
            total[name] += factor * gradient[name]
    return total


def relative_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """|found - expected| / |expected| over the whole trainable vector."""
    assert list(found) == list(expected)
    return norm({name: found[name].double() - expected[name] for name in expected}) / norm(expected)


def regimes(gradients: Sequence[Mapping[str, torch.Tensor]]) -> tuple[float, float]:
    """Two clipping norms: one by which everybody is clipped, and one by which nobody but one is."""
    norms = sorted(norm(gradient) for gradient in gradients)
    assert norms[-1] > 1.0005 * norms[-2], norms
    return norms[0] / 10, (norms[-1] * norms[-2]) ** 0.5


class Products(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The functions of this file: test modules cannot import it."""
    functions: tuple[Callable, ...] = (
        build,
        with_lora,
        rows_of,
        collate,
        row_gradients,
        norm,
        clipped_sum,
        relative_error,
        regimes,
        Products,
    )
    return SimpleNamespace(**{function.__name__: function for function in functions})
