"""The settings of causal language modelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from harness.arguments import RunArguments, check_setting, setting
from harness.errors import UsageError

CHARACTERS = "characters"


@dataclasses.dataclass(frozen=True)
class LanguageModelArguments(RunArguments):
    """Settings of ``language_model.py``; the batch sizes count blocks."""

    model_name_or_path: str | None = setting(None, "hub name or folder of a pretrained causal language model")
    model_config: Mapping | str | None = setting(
        None, "in place of it, a model from scratch: a mapping such as {model_type: gpt2, n_layer: 4}, or its file"
    )
    tokenizer_name: str | None = setting(
        None, "hub name or folder; 'characters': one token for each character of the training text; null: the model's"
    )

    train_file: str | None = setting(None, ".txt, .csv, .tsv, .json, .jsonl or .parquet file to train on")
    validation_file: str | None = setting(None, "the file to evaluate on")
    validation_split_percentage: int | None = setting(
        None, "evaluate on the last so many percent of the training data, in place of a file or split of their own"
    )
    holdout_percentage: int | None = setting(
        None,
        "evaluate on the last so many percent of what is left to train on, not trained on then, in place of the "
        "validation data",
    )
    dataset_name: str | None = setting(None, "data set on the hub, in place of the files")
    dataset_config_name: str | None = setting(None, "configuration of the hub data set")
    train_split: str = setting("train", "training split of the hub data set")
    validation_split: str = setting("validation", "evaluation split of the hub data set")
    text_column: str = setting("text", "column with the documents, in all but .txt files")
    sample_by: Literal["document", "paragraph", "line"] = setting(
        "document", "what a document is in a .txt file: all of it, what blank lines divide, or a line"
    )
    max_train_samples: int | None = setting(None, "train on the first so many documents; null is all")
    max_eval_samples: int | None = setting(None, "evaluate on the first so many documents; null is all")
    block_size: int | None = setting(None, "tokens per block; null is the model's limit, at most 1024")
    streaming: bool = setting(
        False, "tokenise while training, for corpora larger than the disk; needs max_train_steps"
    )
    output_dir: str = setting("runs/language_model", "where config.yaml, checkpoints and results.json go")
    shuffle_buffer: int = setting(1000, "blocks among which a stream draws the next; 1 keeps their order")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_train_samples", "max_eval_samples", "shuffle_buffer"):
            check_setting(self, name, "> 0", lambda value: value > 0)
        check_setting(self, "block_size", ">= 2", lambda value: value >= 2)
        check_setting(self, "validation_split_percentage", "in 1..99", lambda value: 0 < value < 100)
        check_setting(self, "holdout_percentage", "from 1 to 99", lambda value: 0 < value < 100)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise UsageError("give one of model_name_or_path (pretrained) and model_config (from scratch).")
        if self.model_config is not None and self.tokenizer_name is None:
            raise UsageError(
                f"model_config needs tokenizer_name: a hub name, a folder, or {CHARACTERS!r} for the characters of "
                "the training text."
            )
        self._check_data()
        if self.streaming:
            self._check_streaming()

    def _check_data(self) -> None:
        if (self.dataset_name is None) == (self.train_file is None):
            raise UsageError("no data, or two: give one of train_file and dataset_name.")
        if self.dataset_name is not None and self.validation_file is not None:
            raise UsageError("dataset_name excludes validation_file: its validation_split is evaluated on.")
        if self.validation_file is not None and self.validation_split_percentage is not None:
            raise UsageError("validation_file and validation_split_percentage exclude each other.")
        evaluated = (self.validation_file, self.validation_split_percentage, self.holdout_percentage)
        if self.train_file is not None and evaluated == (None, None, None):
            raise UsageError(
                "nothing to evaluate on: give validation_file, validation_split_percentage or holdout_percentage."
            )

    def _check_streaming(self) -> None:
        if self.max_train_steps is None:
            raise UsageError("streaming needs max_train_steps: the length of a stream is not known.")
        if self.validation_split_percentage is not None:
            raise UsageError(
                "streaming excludes validation_split_percentage, the length of a stream is not known: "
                "give validation_file, or a hub data set with a validation_split."
            )
        if self.holdout_percentage is not None:
            raise UsageError(
                "streaming excludes holdout_percentage, the length of a stream is not known: name other data to "
                "evaluate on."
            )
        if self.tokenizer_name == CHARACTERS:
            raise UsageError(
                f"streaming excludes tokenizer_name {CHARACTERS!r}, which reads the whole training text first: "
                "name the folder of a tokenizer that was saved."
            )
        if (self.train_file or "").lower().endswith(".txt") and self.sample_by == "document":
            raise UsageError(
                "streaming holds a document at a time in memory, and sample_by 'document' makes one of the whole "
                "file: choose 'paragraph' or 'line'."
            )
