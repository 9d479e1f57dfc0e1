"""The training scripts that a study may run: their settings, and the metrics they measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from harness.arguments import FinetuneArguments, RunArguments
from tasks.language_arguments import LanguageModelArguments
from tasks.story_answering import StoryArguments
from tasks.transduction import TransductionArguments

Direction = Literal["higher", "lower"]


@dataclasses.dataclass(frozen=True)
class Script:
    """A training script.

    Attributes:
        arguments: its settings.
        metrics: what its evaluation measures, and whether higher or lower is better; the first is its main one.
    """

    arguments: type[RunArguments]
    metrics: Mapping[str, Direction]


SCRIPTS: Mapping[str, Script] = MappingProxyType(
    {
        "finetune": Script(
            FinetuneArguments,
            {
                "accuracy": "higher",
                "f1_macro": "higher",
                "loss": "lower",
                "calibration_error": "lower",
                "selective_accuracy": "higher",
            },
        ),
        "language_model": Script(
            LanguageModelArguments, {"bits_per_character": "lower", "perplexity": "lower", "loss": "lower"}
        ),
        "transduction": Script(
            TransductionArguments, {"exact_match": "higher", "edit_distance": "lower", "loss": "lower"}
        ),
        "story_qa": Script(
            StoryArguments,
            {
                "accuracy": "higher",
                "supporting_fact_accuracy": "higher",
                "all_supports_found": "higher",
                "loss": "lower",
            },
        ),
    }
)
"""By their names without ``.py``."""
