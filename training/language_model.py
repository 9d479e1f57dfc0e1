"""Trains a causal language model, from a pretrained one or from scratch, with or without Gumbel attention.

    accelerate launch training/language_model.py --config configs/finetune/tinyshakespeare.yaml [--key value ...]

Settings: ``--help``, or the fields of LanguageModelArguments. A value on the command line wins over the file. The
documents are tokenised once, which is cached, packed into blocks of ``block_size`` tokens and read from mapped files;
with ``streaming`` they are tokenised while the model trains. Every evaluation is done twice, with noise off and with
noise on, and reports nats per token (loss), perplexity and bits per character.

Checkpoints, signals, the exit status and what is left in ``output_dir`` are as in finetune.py. A stream that goes on
is read again from its beginning, without training, up to where the run was.

Of a stream each of several processes trains on a share of its own: on whole files where their number is a multiple of
that of the processes, else each of n processes on every n-th document. Who comes to the end of its share begins it
anew, so that nobody waits for longer shares; the documents of shorter ones come more often. Such a run goes on with as
many processes as it began with.
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
from harness.run import exit_with_status, run_task
from tasks import language_modelling
from tasks.causal_models import CausalModel
from tasks.language_arguments import CHARACTERS, LanguageModelArguments
from tasks.text_corpus import character_tokenizer, load_documents


class LanguageModelling:
    """The task: predict each token of a text from those before it.

    Args:
        args: the settings.
    """

    card = CardFacts(
        "language modelling",
        """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = {from_pretrained}.eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
""",
        "AutoModelForCausalLM",
        "text-generation",
    )

    averages_samples = True

    def __init__(self, args: LanguageModelArguments) -> None:
        self.args = args

    def load_data(self, accelerator: Accelerator) -> dict[str, Any]:
        """Reads and tokenises, after a look at what the model allows."""
        args = self.args
        self.causal = CausalModel(args)
        with accelerator.main_process_first():
            train, validation = load_documents(args)
            self.tokenizer = (
                character_tokenizer(train) if args.tokenizer_name == CHARACTERS else self.causal.load_tokenizer()
            )
            self.data = language_modelling.load_data(
                args, train, validation, self.tokenizer, self.causal.block_size, accelerator
            )
        self.causal.fit(self.tokenizer)
        return self.data.identity() | {"vocabulary": len(self.tokenizer)}

    def make_loaders(self, order: torch.Generator) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Blocks of equal length."""
        padding = language_modelling.separator_of(self.tokenizer)
        return language_modelling.make_loaders(self.data, self.args, self.causal.block_size, padding, order)

    def make_model(self) -> Any:
        """Pretrained, or with random weights."""
        model = self.causal.make()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        return model

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Nats per token."""
        return language_modelling.compute_loss(model, batch)

    def evaluate(self, accelerator: Accelerator, model: torch.nn.Module, loader: Any) -> dict[str, float]:
        """Loss, perplexity and bits per character."""
        return language_modelling.evaluate(accelerator, model, loader, self.data.characters)

    def save_model(self, model: Any, folder: Path) -> None:
        """Weights, attention and tokenizer."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def facts(self) -> dict[str, Any]:
        """The sizes of data and model."""
        known = {"block_size": self.causal.block_size, "vocabulary": len(self.tokenizer)}
        return {"data": self.data.facts() | known, "parameters": self.parameters}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the settings and runs; for the exit status see :func:`harness.run.exit_with_status`."""
    description = __doc__.splitlines()[0]
    exit_with_status("language_model.py", lambda: run(parse_arguments(LanguageModelArguments, argv, description)))


def run(args: LanguageModelArguments) -> TrainingRecord:
    """Trains, evaluates and writes the results; raises as :func:`harness.run.run_task`."""
    return run_task(args, LanguageModelling(args))


if __name__ == "__main__":
    gc.freeze()  # the collector need not go through all that was imported, which takes a second at the end
    main()
