"""Tells what the hard choices of fine-tuned classifiers are worth, from the folders of their runs.

    python training/hard_heads.py runs/recipe_0 [MORE ...] [--output results/recipe] [--max_eval_samples 200]

A folder is the ``output_dir`` of a run of finetune.py with ``save_model: true``. On the data that the run was
evaluated on, without noise: the accuracy with 0, 1, ... all layers hard, from the top and from the bottom; with the
heads fixed to the first token, their own, or one drawn once; and for every head how far its choice depends on the
text. Everything goes to hard_heads.json in the folder, means over the heads of each layer to the terminal. A model
that trained with its own attention is made hard for this. A folder without a model, but with a hard_heads.json, counts
with what that says.

With ``--output`` a summary over arms and seeds goes to that folder: hard_heads.json, hard_heads.md and
hard_layers.png. Runs in folders ARM-seedN or ARM-seedN-HASH, as ablate.py names those that ``--keep_work`` leaves in
work/ of a study, are seed N of that arm; any other folder is an arm of its own, with the seed of its settings. All
must be evaluated on the same data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, PretrainedConfig

import gumbel_attention as ga
from harness.arguments import FinetuneArguments
from harness.errors import UsageError
from harness.fixed_keys import KINDS, fix_keys
from harness.hard_heads import MEASURES, choices_of, dependence, hardness_curves, layer_means
from harness.models import load_tokenizer
from harness.parsing import from_mapping, read_yaml
from harness.results import CONFIG_FILE, environment, write_atomically
from harness.run import exit_with_status
from study.hard_layers import JSON_FILE, TABLE_FILE, Measured, Run, check_runs, make_folder, portable, write_summary
from tasks.classification import evaluate, load_data, make_loaders


def read_run(folder: Path, max_eval_samples: int | None = None) -> Run:
    """A run and its settings.

    Args:
        folder: its output_dir.
        max_eval_samples: evaluates on a subset; None is what the run did.

    Raises:
        UsageError: the folder has no settings, or neither a model nor what was measured of one on these data.
    """
    if _measured_before(folder):
        args = from_mapping(FinetuneArguments, _report_of(folder)["config"], f"in {folder / JSON_FILE}")
        if max_eval_samples not in (None, args.max_eval_samples):
            raise UsageError(
                f"{str(folder / JSON_FILE)!r} was measured with max_eval_samples {args.max_eval_samples}, and the "
                f"model is gone: it cannot be measured with {max_eval_samples}."
            )
        return Run(folder, args)
    args = from_mapping(FinetuneArguments, read_yaml(folder / CONFIG_FILE), f"in {folder / CONFIG_FILE}")
    if max_eval_samples is not None:
        args = dataclasses.replace(args, max_eval_samples=max_eval_samples)
    _is_patched(folder)
    return Run(folder, args)


def measure(run: Run) -> dict[str, Any]:
    """The report on a run's saved model.

    Raises:
        UsageError: its folder has no such model, or its data are not to be had.
    """
    args = run.args
    model, patch = _load(run.folder)
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
    means = layer_means(report["dependence"])
    for layer in range(len(means["bits"])):
        lines.append(f"| {layer} | {' | '.join(f'{means[name][layer]:.3f}' for name in MEASURES)} |")
    return "\n".join(lines)


def _measured_before(folder: Path) -> bool:
    """Whether there is a report, but no model to measure again."""
    return (folder / JSON_FILE).is_file() and not (folder / "model").is_dir()


def _report_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{str(folder / JSON_FILE)!r} is no report of hard_heads.py: {error}") from error
    if not isinstance(found, dict) or "config" not in found:
        raise UsageError(f"{str(folder / JSON_FILE)!r} is no report of hard_heads.py on one run: it has no config.")
    return found


def _is_patched(run: Path) -> bool:
    """Whether the saved model says how it is patched."""
    with _needs_model(run):
        if not (run / "model").is_dir():  # else transformers may take the path for a name on the hub
            raise FileNotFoundError("no such folder")
        return "gumbel_attention" in PretrainedConfig.get_config_dict(run / "model")[0]


def _load(run: Path) -> tuple[Any, Any]:
    """The saved model with a patch whose choice is to be made hard or soft."""
    patched = _is_patched(run)
    with _needs_model(run):
        if patched:
            model = ga.from_pretrained(AutoModelForSequenceClassification, run / "model")
            return model, ga.patch_of(model)
        model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    return model, ga.patch_model(model, ga.GumbelAttentionConfig(noise="none"))


@contextmanager
def _needs_model(run: Path) -> Iterator[None]:
    """Within this context a model that cannot be read is the user's mistake."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{str(run / 'model')!r}: no model that a run with save_model: true has written: {error}"
        ) from error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run with save_model: true")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write a summary over the runs there")
    parser.add_argument("--max_eval_samples", type=int, help="evaluate on a subset of this size")
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> None:
    """Measures all runs, writes and prints.

    Raises:
        UsageError: a run cannot be measured, or the runs make no summary.
    """
    runs = [read_run(folder, args.max_eval_samples) for folder in args.runs]
    if args.output is not None:
        check_runs(runs)
        make_folder(args.output, runs)
    measured = []
    for run in runs:
        if _measured_before(run.folder):
            found = _report_of(run.folder)
        else:
            found = measure(run)
            write_atomically(run.folder / JSON_FILE, json.dumps(found, indent=1) + "\n")
        print(table(found) if len(runs) == 1 else f"{run.name}\n\n{table(found)}\n", flush=True)
        measured.append(Measured(run, found))
    if args.output is not None:
        write_summary(measured, args.output, portable_command(args))
        print(f"\nSummary: {args.output / TABLE_FILE}, numbers and plot beside it")


def portable_command(args: argparse.Namespace) -> str:
    """The command that repeats this call, without absolute folders."""
    words = ["python", "training/hard_heads.py", *(portable(path.as_posix()) for path in args.runs)]
    if args.output is not None:
        words += ["--output", portable(args.output.as_posix())]
    if args.max_eval_samples is not None:
        words += ["--max_eval_samples", str(args.max_eval_samples)]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, writes and prints."""
    args = parse_args(argv)
    exit_with_status("hard_heads.py", lambda: report(args))


if __name__ == "__main__":
    main()
