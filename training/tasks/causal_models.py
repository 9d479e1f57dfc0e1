"""Causal language models of the hub's code: pretrained, or with random weights from a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.errors import UsageError
from harness.models import check_checkpoint
from harness.parsing import read_yaml
from tasks.language_arguments import LanguageModelArguments

_LONGEST_DEFAULT = 1024
_ROUNDING = 1e-5  # relative; what a future token does to an encoder of small random weights is far more


class CausalModel:
    """The model of a run, known by its configuration before it is made.

    Args:
        args: the settings.

    Attributes:
        config: of the model.
        block_size: tokens per block.

    Raises:
        UsageError: the configuration cannot be used, or block_size is more than it allows.
    """

    def __init__(self, args: LanguageModelArguments) -> None:
        self._args = args
        self._given = {} if args.model_config is None else _read_config(args.model_config)
        self.config = _make_config(self._given) if self._given else _pretrained_config(args)
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.block_size = args.block_size or min(limit or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
        if limit is not None and self.block_size > limit:
            raise UsageError(
                f"block_size {self.block_size} is more than the {limit} positions (max_position_embeddings) of the "
                f"model: lower it{', or raise them in model_config' if self._given else ''}."
            )

    def load_tokenizer(self) -> Any:
        """The tokenizer named in the settings, or the pretrained model's.

        Raises:
            UsageError: it cannot be loaded.
        """
        name = self._args.tokenizer_name or self._args.model_name_or_path
        try:
            return AutoTokenizer.from_pretrained(name, cache_dir=self._args.cache_dir)
        except (OSError, ValueError) as error:
            raise UsageError(f"no tokenizer in {name!r}: {error}") from error

    def fit(self, tokenizer: Any) -> None:
        """Gives a model from scratch the tokenizer's size and special tokens.

        Raises:
            UsageError: the model has too few tokens for it.
        """
        text_config, size = self.config.get_text_config(), len(tokenizer)
        if self._given and "vocab_size" not in self._given:
            text_config.vocab_size = size
        if text_config.vocab_size < size:
            raise UsageError(
                f"the tokenizer has {size} tokens, the model only {text_config.vocab_size} (vocab_size): "
                "they do not belong together."
            )
        if self._given:  # no padding token: the separator may serve as one, and would not be trained in its place
            ids = {
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": None,
            }
            for name in ids.keys() - self._given.keys():
                setattr(text_config, name, ids[name])

    def make(self) -> Any:
        """The model in float32.

        Raises:
            UsageError: it cannot be made or loaded, or is not causal.
        """
        try:
            model = AutoModelForCausalLM.from_config(self.config) if self._given else self._load()
        except (OSError, ValueError, TypeError) as error:
            what = "model_config" if self._given else f"model_name_or_path {self._args.model_name_or_path!r}"
            raise UsageError(f"{what}: no causal language model can be made of it: {error}") from error
        model = model.float()
        _check_causal(model, self.config.get_text_config().vocab_size)
        return model

    def _load(self) -> Any:
        model, info = AutoModelForCausalLM.from_pretrained(
            self._args.model_name_or_path,
            config=self.config,
            cache_dir=self._args.cache_dir,
            dtype=torch.float32,
            output_loading_info=True,
        )
        check_checkpoint(model, info, str(self._args.model_name_or_path))
        return model


def _read_config(given: Mapping[str, Any] | str) -> dict[str, Any]:
    if isinstance(given, str):
        path = Path(given)
        if path.suffix.lower() == ".json":
            try:
                given = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, json.JSONDecodeError) as error:
                raise UsageError(f"model_config {str(path)!r} cannot be read: {error}") from error
        else:
            given = read_yaml(path)
    if not isinstance(given, Mapping) or given.get("model_type") not in CONFIG_MAPPING:
        raise UsageError(
            "model_config: expected a mapping with the key model_type, such as gpt2 or llama, and the settings of "
            f"that model, got {given!r}."
        )
    return dict(given)


def _make_config(given: dict[str, Any]) -> Any:
    """The configuration of a known model type; a setting that this type lacks is refused."""
    settings = {name: value for name, value in given.items() if name != "model_type"}
    try:
        default = AutoConfig.for_model(given["model_type"])
        unknown = [name for name in settings if not hasattr(default, name)]
        if unknown:
            raise UsageError(
                f"model_config: {given['model_type']} has no setting {unknown[0]!r}; it has "
                f"{', '.join(sorted(name for name in default.to_dict() if not name.startswith('_')))}."
            )
        return AutoConfig.for_model(given["model_type"], **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model_config: {error}") from error


def _pretrained_config(args: LanguageModelArguments) -> Any:
    try:
        return AutoConfig.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise UsageError(f"model_name_or_path {args.model_name_or_path!r} cannot be loaded: {error}") from error


def _check_causal(model: Any, vocabulary: int) -> None:
    """Raises UsageError if a prediction depends on the token it is of, as in an encoder without a causal mask."""
    tokens = torch.arange(6).remainder(vocabulary).unsqueeze(0)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    training = model.training
    model.eval()
    with torch.no_grad():
        before, after = (model(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (tokens, other))
    model.train(training)
    if (before - after).abs().max() > _ROUNDING * before.abs().max():
        raise UsageError(
            f"{type(model).__name__} is not causal: it sees the token it is to predict. Choose a causal model, or "
            "set is_decoder in model_config."
        )
