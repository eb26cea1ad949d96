"""Transformers' own common model tests, with the attention that Transformers takes and with "dp_flash" in its place.

They come from the source distribution of the installed Transformers, which `make test` downloads and unpacks; nothing
of it is copied here. It holds the mixins alone, so the tiny models that they try are declared here, and two mixins
which `test_modeling_common` imports and which the distribution lacks are replaced by empty classes.

With DPFA_RESULTS=folder every family writes its outcomes to `folder/transformers_common_<family>.json`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers.testing_utils import torch_device

from dpfa_hf import attention
from dpfa_hf.errors import PrivacyError

attention.register()
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")

SOURCES = pathlib.Path(os.environ.get("TRANSFORMERS_SDIST", pathlib.Path(sys.prefix) / "transformers-sdist"))
PACKAGE = "transformers_sdist_tests"
NOT_IN_THE_DISTRIBUTION = {
    "exporters": ("test_export", "ExportTesterMixin"),
    "generation": ("test_utils", "GenerationTesterMixin"),
}

# Every upstream test that calls an attention function other than eager on a CPU. Left out: those about files, weights,
# devices and the name "sdpa".
SELECTED = (
    "test_all_tensors_are_parameter_or_buffer",
    "test_batching_equivalence",
    "test_can_capture_specific_layers_hidden_states",
    "test_capture_outputs_decorator",
    "test_causal_lm_loss_honors_shift_labels",
    "test_determinism",
    "test_eager_matches_*",
    "test_enable_input_require_grads_with_gradient_checkpointing",
    "test_encoder_decoder_loss_no_double_shift",
    "test_feed_forward_chunking",
    "test_flash_inference_equivalence_*",
    "test_hidden_states_output",
    "test_inputs_embeds*",
    "test_model_forward_default_config_values",
    "test_model_outputs_equivalence",
    "test_model_rope_scaling_from_config_*",
    "test_output_router_logits_from_config",
    "test_problem_types",
    "test_resize_embeddings_untied",
    "test_resize_tokens_embeddings",
    "test_save_load",
    "test_training*",
)
# They choose among the kernels of `scaled_dot_product_attention`, of which a CPU has one.
REPEATED = "*_sdpa_kernels"

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    # With upstream's 0.02 every attention is nearly a plain average, and most of the mutants below would pass.
    "initializer_range": 0.1,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
TWO_KINDS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """A tiny configuration and the models to build from it."""

    prefix: str  # of the names of its classes
    options: dict[str, Any]
    heads: tuple[str, ...] = ("Model", "ForCausalLM")
    inputs: tuple[str, ...] = ("",)  # prefixes of the names of token inputs; none for pixels
    settings: dict[str, Any] = field(default_factory=dict)  # of the upstream mixin

    @property
    def classes(self) -> tuple[type[PreTrainedModel], ...]:
        return tuple(getattr(transformers, self.prefix + head) for head in self.heads)


SEQ2SEQ = {
    "heads": ("Model", "ForConditionalGeneration"),
    "inputs": ("", "decoder_"),
    "settings": {"is_encoder_decoder": True},
}
FAMILIES = {
    "llama": Family("Llama", DECODER, heads=("Model", "ForCausalLM", "ForSequenceClassification")),
    "mistral": Family("Mistral", DECODER | {"sliding_window": 3}),
    "qwen3": Family("Qwen3", DECODER | TWO_KINDS | {"use_sliding_window": True}),
    "gemma2": Family("Gemma2", DECODER | TWO_KINDS | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gpt_oss": Family(
        "GptOss",
        DECODER | TWO_KINDS | {"num_local_experts": 2, "num_experts_per_tok": 2},
        settings={"test_all_params_have_gradient": False},
    ),
    "gpt2": Family("GPT2", ENCODER, heads=("Model", "LMHeadModel")),
    "bert": Family("Bert", ENCODER, heads=("Model", "ForSequenceClassification")),
    "modernbert": Family(
        "ModernBert",
        ENCODER
        | {"local_attention": 4, "layer_types": TWO_KINDS["layer_types"], "cls_token_id": 1, "sep_token_id": 2}
        | {"initializer_range": 0.3},
        heads=("Model", "ForSequenceClassification"),
    ),
    "t5": Family(
        "T5",
        TOKENS
        | {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
        | {"decoder_start_token_id": 0},
        **SEQ2SEQ,
    ),
    "bart": Family(
        "Bart",
        TOKENS
        | {f"{part}_layers": 2 for part in ("encoder", "decoder")}
        | {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        | {f"{part}_ffn_dim": 40 for part in ("encoder", "decoder")}
        | {"d_model": 32, "init_std": 0.1, "max_position_embeddings": 64}
        | {"forced_eos_token_id": None, "decoder_start_token_id": 2},
        **SEQ2SEQ,
    ),
    "vit": Family(
        "ViT",
        {name: ENCODER[name] for name in ENCODER if name not in (*TOKENS, "max_position_embeddings")}
        | {"image_size": 8, "patch_size": 4},
        heads=("Model", "ForImageClassification"),
        inputs=(),
        settings={"test_resize_embeddings": False},
    ),
}


class ModelTester:
    """What the upstream mixin asks of the tester of a family."""

    is_training = True
    batch_size = 3
    seq_length = 7

    def __init__(self, family: Family) -> None:
        self.family = family
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        if not family.inputs:
            self.mask_length = (config.image_size // config.patch_size) ** 2
            self.num_masks = self.mask_length // 2
            self.seq_length = self.mask_length + 1

    def get_config(self) -> transformers.PreTrainedConfig:
        return self.family.classes[0].config_class(**self.family.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.PreTrainedConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        if not self.family.inputs:
            size = (self.batch_size, 3, config.image_size, config.image_size)
            return config, {"pixel_values": torch.rand(size, device=torch_device)}
        size = (self.batch_size, self.seq_length)
        lengths = self.seq_length - torch.tensor([[0], [1], [3]])
        inputs = {}
        for prefix in self.family.inputs:
            inputs[f"{prefix}input_ids"] = torch.randint(3, config.vocab_size, size, device=torch_device)
            inputs[f"{prefix}attention_mask"] = (torch.arange(self.seq_length) < lengths).long().to(torch_device)
        return config, inputs


class Outcomes(unittest.TestResult):
    """What became of every upstream test, and why: passed, skipped, failed, or refused on purpose by dp_flash."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, str] = {}
        self.reason: dict[str, str] = {}

    def _note(self, test: Any, outcome: str, reason: str = "") -> None:
        name = test._testMethodName
        if self.of.get(name) != "failed":
            self.of[name], self.reason[name] = outcome, reason

    def addSuccess(self, test: Any) -> None:
        self._note(test, "passed")

    def addSkip(self, test: Any, reason: str) -> None:
        # A part of a test that is skipped skips no more than that part.
        self._note(getattr(test, "test_case", test), "skipped", reason)

    def addError(self, test: Any, err: Any) -> None:
        no_weights = isinstance(err[1], PrivacyError) and "keeps no attention weights" in str(err[1])
        self._note(test, "refused" if no_weights else "failed", self._exc_info_to_string(err, test))

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.addError(test, err)


@pytest.fixture(autouse=True)
def no_progress_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def upstream_mixin() -> type:
    """`ModelTesterMixin` of the source distribution."""
    about, version = SOURCES / "PKG-INFO", transformers.__version__
    if not about.exists() or f"Version: {version}" not in about.read_text(encoding="utf-8").splitlines():
        pytest.fail(
            f"{SOURCES} is not the source distribution of transformers {version}: run `make test`, which fetches it, "
            f"or set TRANSFORMERS_SDIST"
        )
    if PACKAGE not in sys.modules:
        package = sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
        package.__path__ = [str(SOURCES / "tests")]
        for folder, (module, name) in NOT_IN_THE_DISTRIBUTION.items():
            if importlib.util.find_spec(f"{PACKAGE}.{folder}") is None:
                sys.modules[f"{PACKAGE}.{folder}"] = types.ModuleType(folder)
                sys.modules[f"{PACKAGE}.{folder}.{module}"] = stub = types.ModuleType(module)
                setattr(stub, name, type(name, (), {}))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin


def upstream_case(family: Family) -> type[unittest.TestCase]:
    """The upstream tests of a family.

    Upstream's comparison of flash attention with eager, under padding on either side, runs on GPUs alone; its body
    takes the name of any attention, so it is called here.
    """

    class Case(upstream_mixin(), unittest.TestCase):
        all_model_classes = family.classes

        def setUp(self) -> None:
            self.model_tester = ModelTester(family)

        def test_flash_inference_equivalence_left(self) -> None:
            self.flash_attn_inference_equivalence(attn_implementation="sdpa", padding_side="left")

        def test_flash_inference_equivalence_right(self) -> None:
            self.flash_attn_inference_equivalence(attn_implementation="sdpa", padding_side="right")

    for name, value in family.settings.items():
        setattr(Case, name, value)
    return Case


def run(family: Family, patterns: tuple[str, ...] = SELECTED) -> Outcomes:
    case = upstream_case(family)
    names = [
        name
        for name in unittest.defaultTestLoader.getTestCaseNames(case)
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and not fnmatch.fnmatch(name, REPEATED)
    ]
    outcomes = Outcomes()
    unittest.TestSuite(case(name) for name in names).run(outcomes)
    return outcomes


@contextlib.contextmanager
def in_place_of_sdpa(family: Family, function: Callable[..., Any]) -> Iterator[None]:
    """A model of this family that asks for "sdpa", or for nothing, gets "dp_flash" by name, computed by `function`.

    Models that SDPA cannot serve, for their softcap or sinks, take eager attention by default, and upstream skips some
    tests of theirs. dp_flash can serve them: they run.
    """
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def check_another(self: PreTrainedModel, requested: str | None, *args: Any, **kwargs: Any) -> str:
        return check(self, "dp_flash" if requested in (None, "sdpa") else requested, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(PreTrainedModel, check.__name__, check_another))
        stack.enter_context(mock.patch.dict(AttentionInterface._global_mapping, {"dp_flash": function}))
        for model_class in family.classes:
            stack.enter_context(mock.patch.object(model_class, "_supports_sdpa", True))
        yield


def worse(stock: Outcomes, ours: Outcomes) -> dict[str, str]:
    """The upstream tests that do worse with dp_flash, and why.

    Where a test fails with the stock attention nothing is learned. A refusal to return attention weights is dp_flash's
    word against SDPA's, which logs a warning and returns none.
    """
    return {
        name: f"{stock.of[name]} -> {outcome}: {ours.reason[name]}"
        for name, outcome in ours.of.items()
        if outcome not in ("passed", "refused", stock.of[name]) and stock.of[name] != "failed"
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_dp_flash_fails_no_upstream_test_that_the_stock_attention_passes(name: str) -> None:
    family, calls = FAMILIES[name], 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return attention.dp_flash_attention(*args, **kwargs)

    stock = run(family)
    with in_place_of_sdpa(family, counted):
        ours = run(family)
    if folder := os.environ.get("DPFA_RESULTS"):
        outcomes = {test: {"stock": stock.of[test], "dp_flash": outcome} for test, outcome in ours.of.items()}
        results = {"family": name, "transformers": transformers.__version__, "calls": calls, "outcomes": outcomes}
        pathlib.Path(folder, f"transformers_common_{name}.json").write_text(json.dumps(results, indent=1) + "\n")

    found = worse(stock, ours)
    assert not found, "\n".join(f"{test} {why}" for test, why in found.items())
    assert calls > 0
    matches_eager = [outcome for test, outcome in ours.of.items() if test.startswith("test_eager_matches_sdpa")]
    assert matches_eager.count("passed") >= 12, "three dtypes, padding on either side, with and without a mask"


def without(**forgotten: Any) -> Callable[..., Any]:
    """dp_flash with an argument replaced by another; `attention_mask=None` leaves the module's own causality."""

    def mutant(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        call = kwargs | {"attention_mask": attention_mask} | forgotten
        if call["attention_mask"] is None and call.get("is_causal") is None:
            call["is_causal"] = getattr(module, "is_causal", False)
        return attention.dp_flash_attention(module, query, key, value, **call)

    return mutant


MUTANTS = {
    "padding": ({"attention_mask": None}, ["llama", "mistral", "qwen3", "gemma2", "gpt2", "bert", "modernbert"]),
    "window": ({"attention_mask": None, "sliding_window": None}, ["mistral", "qwen3", "gemma2", "gpt_oss"]),
    "causality": ({"attention_mask": None, "is_causal": False}, ["llama", "gpt2", "t5", "bart"]),
    "scaling": ({"scaling": 1.0}, ["llama", "bert", "bart", "vit"]),
    "softcap": ({"softcap": None}, ["gemma2"]),
    "sinks": ({"s_aux": None}, ["gpt_oss"]),
    "position bias": ({"position_bias": None}, ["t5"]),
}


@pytest.mark.parametrize(
    ("forgotten", "name"), [(forgotten, name) for forgotten, (_, names) in MUTANTS.items() for name in names]
)
def test_upstream_tests_catch_an_attention_that_forgets(forgotten: str, name: str) -> None:
    with in_place_of_sdpa(FAMILIES[name], without(**MUTANTS[forgotten][0])):
        outcomes = run(FAMILIES[name], ("test_eager_matches_sdpa_inference_*fp32_pad_left*", "test_flash_*_left"))
    assert "failed" in outcomes.of.values()


def test_without_the_source_distribution_the_message_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", tmp_path)
    with pytest.raises(pytest.fail.Exception, match="run `make test`"):
        upstream_mixin()
    (tmp_path / "PKG-INFO").write_text("Version: 4.0.0\n")
    with pytest.raises(pytest.fail.Exception, match="is not the source distribution"):
        upstream_mixin()
