"""Trains a small model to answer questions about stories by choosing their supporting facts with Gumbel attention.

    python training/story_qa.py --config configs/finetune/babi_qa1.yaml [--key value ...]

Settings: ``--help``, or the fields of StoryArguments; what a run leaves behind, and how it goes on, is as in
finetune.py. Without files it generates its stories. Only answers are trained on: which facts support them is
asked in evaluation alone, with noise off and on. The saved model is read again by

    model, vocabulary = tasks.story_answering.load_model("runs/story_qa/model")
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from harness.loop import TrainingRecord
from harness.model_card import CardFacts
from harness.parsing import parse_arguments
from harness.processes import teller
from harness.run import exit_with_status, run_task
from harness.saved_run import describe_data
from tasks.story_answering import (
    StoryArguments,
    compute_loss,
    describe,
    evaluate,
    load_data,
    make_loaders,
    make_model,
    save_model,
)


class StoryQuestions:
    """The task: stories and questions to answers of one word.

    Args:
        args: the settings.
    """

    card = CardFacts(
        "questions about stories",
        """
from tasks.story_answering import load_model  # in training/ of gumbel_attention

model, vocabulary = load_model(folder)
""",
    )

    averages_samples = True

    def __init__(self, args: StoryArguments) -> None:
        self.args = args

    def load_data(self, accelerator: Accelerator) -> dict[str, Any]:
        """Reads or generates the stories; data are told from others by the words of their stories."""
        self.data = load_data(self.args, teller(accelerator))
        described = [describe_data(name, describe(getattr(self.data, name))) for name in ("train", "validation")]
        return {**described[0], **described[1], "answers": self.data.vocabulary.answers}

    def make_loaders(self, order: torch.Generator) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Padded batches."""
        return make_loaders(self.data, self.args, order)

    def make_model(self) -> Any:
        """The story model with random weights, its attention as the run's settings say."""
        return make_model(self.data, self.args)

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Cross entropy of the answers."""
        return compute_loss(model, batch)

    def evaluate(self, accelerator: Accelerator, model: torch.nn.Module, loader: Any) -> dict[str, float | str]:
        """Loss, accuracy, and how often the choices are supporting facts."""
        return evaluate(accelerator, model, loader)

    def save_model(self, model: Any, folder: Path) -> None:
        """Weights, attention and vocabulary."""
        save_model(model, self.data, self.args, folder)

    def facts(self) -> dict[str, Any]:
        """Hops, answers, and the supporting-fact accuracy of a blind choice."""
        validation = self.data.validation
        chance = (validation.supports.sum(1) / validation.fact_mask.sum(1)).mean().item()
        return {
            "hops": self.args.hops or self.data.supports,
            "answers": self.data.vocabulary.answers,
            "supporting_fact_accuracy_of_chance": chance,
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the settings and runs; for the exit status see :func:`harness.run.exit_with_status`."""
    description = __doc__.splitlines()[0]
    exit_with_status("story_qa.py", lambda: run(parse_arguments(StoryArguments, argv, description)))


def run(args: StoryArguments) -> TrainingRecord:
    """Trains, evaluates and writes the results; raises as :func:`harness.run.run_task`."""
    return run_task(args, StoryQuestions(args))


if __name__ == "__main__":
    gc.freeze()  # the collector need not go through all that was imported, which takes a second at the end
    main()
