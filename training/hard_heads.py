"""Tells what the hard choices of a fine-tuned classifier are worth, from the folder of its run.

    python training/hard_heads.py runs/recipe_0 [--max_eval_samples 200]

The folder is the ``output_dir`` of a run of finetune.py with ``save_model: true``. On the data that the run was
evaluated on, without noise: the accuracy with 0, 1, ... all layers hard, from the top and from the bottom; with the
heads fixed to the first token, their own, or one drawn once; and for every head how far its choice depends on the
text. Everything goes to hard_heads.json in the folder, means over the heads of each layer to the terminal. A model
that trained with its own attention is made hard for this.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, PretrainedConfig

import gumbel_attention as ga
from harness.arguments import FinetuneArguments
from harness.errors import UsageError
from harness.fixed_keys import KINDS, fix_keys
from harness.hard_heads import MEASURES, choices_of, dependence, hardness_curves
from harness.models import load_tokenizer
from harness.parsing import from_mapping, read_yaml
from harness.results import CONFIG_FILE, environment, write_atomically
from harness.run import exit_with_status
from tasks.classification import evaluate, load_data, make_loaders

REPORT = "hard_heads.json"


def measure(run: Path, max_eval_samples: int | None = None) -> dict[str, Any]:
    """The report on a run's saved model.

    Args:
        run: its output folder.
        max_eval_samples: evaluates on a subset; None is what the run did.

    Raises:
        UsageError: the folder has no such model, or its data are not to be had.
    """
    args = from_mapping(FinetuneArguments, read_yaml(run / CONFIG_FILE), f"in {run / CONFIG_FILE}")
    if max_eval_samples is not None:
        args = dataclasses.replace(args, max_eval_samples=max_eval_samples)
    model, patch = _load(run)
    tokenizer = load_tokenizer(args.model_name_or_path, args.cache_dir)
    data = load_data(args, tokenizer)
    accelerator = Accelerator()
    model, loader = accelerator.prepare(model, make_loaders(data, args, tokenizer, torch.Generator())[1])

    def accuracy() -> float:
        found = evaluate(accelerator, model, loader)["accuracy"]
        model.eval()
        return found

    curves = hardness_curves(patch, accuracy)
    with patch.noise(False), patch.hard(True):
        depends = dependence(choices_of(model.eval(), loader))
    patch.remove()
    controls = {}
    for kind in KINDS:
        fix_keys(model, kind)
        controls[kind] = accuracy()
    return {
        "sentences": len(data.validation),
        "accuracy_by_hard_layers": curves,
        "accuracy_with_fixed_keys": controls,
        "dependence": {name: value.tolist() for name, value in depends.items()},
        "config": args.to_dict(),
        **environment(accelerator.device, 1),
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: the accuracies, and the measures of each layer, the mean over its heads."""
    curves, controls = report["accuracy_by_hard_layers"], report["accuracy_with_fixed_keys"]
    places = range(len(curves["top_down"]))
    lines = [f"| hard layers | {' | '.join(map(str, places))} |", f"|---|{'---|' * len(places)}"]
    for name, values in curves.items():
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(f'{value:.4f}' for value in values)} |")
    lines += [
        "",
        "Heads fixed after training: " + ", ".join(f"{name} {value:.4f}" for name, value in controls.items()),
    ]
    lines += ["", f"| layer | {' | '.join(MEASURES)} |", f"|---|{'---|' * len(MEASURES)}"]
    means = {name: torch.tensor(report["dependence"][name]).mean(1).tolist() for name in MEASURES}
    for layer in range(len(means["bits"])):
        lines.append(f"| {layer} | {' | '.join(f'{means[name][layer]:.3f}' for name in MEASURES)} |")
    return "\n".join(lines)


def _load(run: Path) -> tuple[Any, Any]:
    """The saved model with a patch whose choice is to be made hard or soft."""
    folder = run / "model"
    try:
        carries = "gumbel_attention" in PretrainedConfig.get_config_dict(folder)[0]
        if carries:
            model = ga.from_pretrained(AutoModelForSequenceClassification, folder)
            return model, ga.patch_of(model)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(folder)!r}: no model that a run with save_model: true has written: {error}") from error
    return model, ga.patch_model(model, ga.GumbelAttentionConfig(noise="none"))


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output_dir of a run with save_model: true")
    parser.add_argument("--max_eval_samples", type=int, help="evaluate on a subset of this size")
    args = parser.parse_args(argv)

    def report() -> None:
        found = measure(args.run, args.max_eval_samples)
        write_atomically(args.run / REPORT, json.dumps(found, indent=1) + "\n")
        print(table(found))

    exit_with_status("hard_heads.py", report)


if __name__ == "__main__":
    main()
