"""Trains a small encoder-decoder to inflect words, its cross attention soft or hard, with or without Gumbel noise.

    python training/transduction.py --config configs/finetune/sigmorphon_medium.yaml [--key value ...]

Settings: ``--help``, or the fields of TransductionArguments; what a run leaves behind, and how it goes on, is as in
finetune.py. Only the cross attention is patched unless ``layers`` says otherwise. Forms are decoded greedily; exact
match and edit distance are those of whole strings, with noise off and on. The saved model is read again by

    model = gumbel_attention.from_pretrained(AutoModelForSeq2SeqLM, "runs/transduction/model")
    symbols = Symbols.load("runs/transduction/model")
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
from tasks.transduction import (
    IGNORED,
    TransductionArguments,
    compute_loss,
    evaluate,
    load_data,
    make_loaders,
    make_model,
)


class Transduction:
    """The task: strings with tags to strings.

    Args:
        args: the settings.
    """

    card = CardFacts(
        "string transduction",
        """
from tasks.transduction import Symbols  # in training/ of gumbel_attention
from transformers import AutoModelForSeq2SeqLM

model = {from_pretrained}.eval()
symbols = Symbols.load(folder)
""",
        "AutoModelForSeq2SeqLM",
    )

    averages_samples = False

    def __init__(self, args: TransductionArguments) -> None:
        self.args = args

    def load_data(self, accelerator: Accelerator) -> dict[str, Any]:
        """Reads both files; data are told from others by their examples."""
        self.data = load_data(self.args, teller(accelerator))
        return describe_data("train", self.data.train) | describe_data("validation", self.data.validation)

    def make_loaders(self, order: torch.Generator) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Padded batches."""
        return make_loaders(self.data, self.args, order)

    def make_model(self) -> Any:
        """An encoder-decoder with random weights."""
        return make_model(self.data.symbols, self.args)

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Cross entropy per symbol, with label smoothing."""
        return compute_loss(model, batch, self.args.label_smoothing)

    def weight(self, batch: Any) -> torch.Tensor:
        """The symbols that the loss is a mean over."""
        return (batch["labels"] != IGNORED).sum()

    def evaluate(self, accelerator: Accelerator, model: torch.nn.Module, loader: Any) -> dict[str, float]:
        """Loss, exact match and edit distance."""
        return evaluate(accelerator, model, loader, self.data)

    def save_model(self, model: Any, folder: Path) -> None:
        """Weights, attention and vocabulary."""
        model.save_pretrained(folder)
        self.data.symbols.save(folder)

    def facts(self) -> dict[str, Any]:
        """The size of the vocabulary."""
        symbols = self.data.symbols
        return {"num_characters": len(symbols.characters), "num_tags": len(symbols.tags)}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the settings and runs; for the exit status see :func:`harness.run.exit_with_status`."""
    description = __doc__.splitlines()[0]
    exit_with_status("transduction.py", lambda: run(parse_arguments(TransductionArguments, argv, description)))


def run(args: TransductionArguments) -> TrainingRecord:
    """Trains, evaluates and writes the results; raises as :func:`harness.run.run_task`."""
    return run_task(args, Transduction(args))


if __name__ == "__main__":
    gc.freeze()  # the collector need not go through all that was imported, which takes a second at the end
    main()
