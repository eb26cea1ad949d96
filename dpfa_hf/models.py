"""Models by name, built offline for a check or a measurement, with random weights where none are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpfa_hf.errors import PrivacyError

if TYPE_CHECKING:
    from torch import nn

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}


def read_configuration(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PrivacyError(
            f"MODEL {name} has no configuration that can be read offline ({_first_line(error)}): name a directory with "
            "a config.json, or download the model first"
        ) from None


def build(name: str, configuration: Any, task: str, attention: str) -> tuple[nn.Module, str, str]:
    """(model, task, where its weights come from); the weights do not matter for coverage, so random ones will do."""
    import transformers

    from dpfa_hf.per_example.losses import task_of

    if task == "auto":
        heads = configuration.architectures or []
        model_class = next((getattr(transformers, head) for head in heads if hasattr(transformers, head)), None)
        if model_class is None:
            raise PrivacyError(f"MODEL {name} does not say which head it has; give one with --task")
        load, create = model_class.from_pretrained, model_class._from_config
    else:
        model_class = getattr(transformers, AUTO_CLASSES[task])
        load, create = model_class.from_pretrained, model_class.from_config
    try:
        try:
            model = load(name, config=configuration, local_files_only=True, attn_implementation=attention)
            weights = "loaded"
        except OSError:
            model, weights = create(configuration, attn_implementation=attention), "random (none found)"
    except PrivacyError:
        raise
    except Exception as error:  # any model's code may raise anything; it is reported, and nothing is passed over
        raise PrivacyError(
            f"MODEL {name} cannot be built ({type(error).__name__}: {_first_line(error)}): check its files, --task and "
            "--attn-implementation"
        ) from error
    if task != "auto":
        return model, task, weights
    try:
        return model, task_of(model), weights
    except PrivacyError:
        raise PrivacyError(f"MODEL {name} is a {type(model).__name__}, whose task is not known; give --task") from None


def with_lora(model: nn.Module, rank: int, task: str) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise PrivacyError("--lora needs PEFT, which is not installed: pip install 'dpfa-hf[peft]'") from None
    kinds = {
        "causal_lm": "CAUSAL_LM",
        "sequence_classification": "SEQ_CLS",
        "token_classification": "TOKEN_CLS",
        "question_answering": "QUESTION_ANS",
        "seq2seq_lm": "SEQ_2_SEQ_LM",
    }
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type=kinds.get(task)))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n", 1)[0].split()) or "no message"
