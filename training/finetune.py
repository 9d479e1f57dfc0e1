"""Fine-tunes a pretrained transformer for text classification, with or without Gumbel attention.

    accelerate launch training/finetune.py --config configs/finetune/sst2_minilm.yaml [--key value ...]

Settings: ``--help``, or the fields of FinetuneArguments. A value on the command line wins over the file. In
``output_dir`` the run leaves config.yaml (the resolved settings), checkpoints where ``checkpointing_steps`` asks for
them, choice_transfer.json if it has ``choice_steps`` and, when finished, results.json.

Runs that differ in their attention only share initialisation, data subset and data order for a seed. Dropout
masks they need not share: noise and dropout draw from the same stream. Every evaluation is done twice, with
noise off and with noise on; a model trained without noise is then evaluated with Gumbel noise. The metrics
reported as final are those of the last step; none is selected by its score.

A run that was killed goes on with ``--resume_from_checkpoint latest`` and ends, on one process, with the weights and
metrics of a run that was not. SIGTERM or SIGINT lets it finish the step, save and exit with status 75.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader

from harness.arguments import FinetuneArguments
from harness.choice_transfer import freeze_choices, transfer_choices
from harness.distillation import Distillation, check_states, load_teacher
from harness.fixed_noise import noise_of_examples, split_index
from harness.loop import TrainingRecord, loss_of_model
from harness.model_card import CardFacts
from harness.models import load_classifier, load_tokenizer
from harness.parsing import parse_arguments
from harness.processes import teller
from harness.results import write_atomically
from harness.run import exit_with_status, run_task
from harness.saved_run import describe_data
from harness.score_function import sampled_loss
from tasks.classification import check_vocabulary, evaluate, load_config, load_data, losses, make_loaders


class Classification:
    """The task: texts or pairs of texts with one label each.

    Args:
        args: the settings.
    """

    card = CardFacts(
        "text classification",
        """
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = {from_pretrained}.eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
""",
        "AutoModelForSequenceClassification",
        "text-classification",
    )

    samples_loss = True
    averages_samples = True

    def __init__(self, args: FinetuneArguments) -> None:
        self.args = args

    def load_data(self, accelerator: Accelerator) -> dict[str, Any]:
        """Tokenises; a data set is told from others by its token and label ids."""
        config = load_config(self.args)
        self.tokenizer = load_tokenizer(self.args.model_name_or_path, self.args.cache_dir)
        check_vocabulary(config, self.tokenizer, self.args.model_name_or_path)
        with accelerator.main_process_first():
            self.data = load_data(self.args, self.tokenizer, teller(accelerator))
        described = describe_data("train", self.data.train) | describe_data("validation", self.data.validation)
        described |= {"label_names": self.data.label_names}
        self.distillation = self._load_teacher(accelerator)
        return described if self.distillation is None else described | self.distillation.describe()

    def make_loaders(self, order: torch.Generator) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Padded batches."""
        return make_loaders(self.data, self.args, self.tokenizer, order)

    def make_model(self) -> Any:
        """Pretrained encoder, fresh head."""
        args, names = self.args, self.data.label_names
        pad_token_id = self.tokenizer.pad_token_id
        model = load_classifier(args.model_name_or_path, names, pad_token_id, args.cache_dir, args.disable_dropout)
        if self.distillation is not None and self.distillation.hidden > 0.0:
            check_states(model, self.distillation.teacher)
        return model

    def prepare_model(self, model: torch.nn.Module) -> None:
        """Lets scores and values learn for one key, if so configured, on training batches in an order of their own."""
        args = self.args
        self._transfer_file.unlink(missing_ok=True)  # of a run that is overwritten
        if not args.choice_steps:
            return
        order = torch.Generator().manual_seed(args.seed)
        batches, _ = make_loaders(self.data, args, self.tokenizer, order)
        model.to(PartialState().device)
        transfer = transfer_choices(model, batches, args.choice_steps, args.choice_learning_rate, args.layers)
        if PartialState().is_main_process:  # a run that is killed and goes on reports it, too
            self._transfer_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._transfer_file, json.dumps(dataclasses.asdict(transfer), indent=2))

    def freeze_parameters(self, model: torch.nn.Module) -> None:
        """Keeps queries and keys as they are, if so configured."""
        if self.args.freeze_choice:
            freeze_choices(model, self.args.layers)

    @property
    def _transfer_file(self) -> Path:
        return Path(self.args.output_dir) / "choice_transfer.json"

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Cross entropy; of the score function its own loss, and with a teacher that of the distillation."""
        args = self.args
        inputs, index = split_index(batch)
        with noise_of_examples(model, index, args.seed):
            if args.attention == "gumbel" and args.estimator == "score_function":
                return sampled_loss(losses, model, inputs, args.baseline)
            if self.distillation is not None:
                return self.distillation.loss(model, inputs)
            return loss_of_model(model, inputs)

    def _load_teacher(self, accelerator: Accelerator) -> Distillation | None:
        args = self.args
        if args.distill_from is None:
            return None
        teacher = load_teacher(args.distill_from, self.data.label_names, self.tokenizer, args.cache_dir)
        return Distillation(
            teacher,
            args.distill_weight,
            args.distill_temperature,
            args.distill_hidden,
            args.distill_spliced,
            self.tokenizer.pad_token_id,
            accelerator.autocast,
        )

    def evaluate(self, accelerator: Accelerator, model: torch.nn.Module, loader: Any) -> dict[str, float]:
        """Mean loss, accuracy and macro F1."""
        return evaluate(accelerator, model, loader)

    def save_model(self, model: Any, folder: Path) -> None:
        """Weights, attention and tokenizer."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def facts(self) -> dict[str, Any]:
        """The names of the labels, and how the scores were prepared, where it is known."""
        known: dict[str, Any] = {"label_names": self.data.label_names}
        if self.args.choice_steps and self._transfer_file.is_file():
            known["choice_transfer"] = json.loads(self._transfer_file.read_text(encoding="utf-8"))
        return known


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the settings and runs; for the exit status see :func:`harness.run.exit_with_status`."""
    description = __doc__.splitlines()[0]
    exit_with_status("finetune.py", lambda: run(parse_arguments(FinetuneArguments, argv, description)))


def run(args: FinetuneArguments) -> TrainingRecord:
    """Trains, evaluates and writes the results; raises as :func:`harness.run.run_task`."""
    return run_task(args, Classification(args))


if __name__ == "__main__":
    gc.freeze()  # the collector need not go through all that was imported, which takes a second at the end
    main()
