"""Fine-tunes a pretrained transformer for text classification, with or without Gumbel attention.

    accelerate launch training/finetune.py --config configs/finetune/sst2_minilm.yaml [--key value ...]

Settings: ``--help``, or the fields of FinetuneArguments. A value on the command line wins over the file. In
``output_dir`` the run leaves config.yaml (the resolved settings) and, when finished, results.json.

Runs that differ in their attention only share initialisation, data subset and data order for a seed. Dropout
masks they need not share: noise and dropout draw from the same stream. Every evaluation is done twice, with
noise off and with noise on; a model trained without noise is then evaluated with Gumbel noise. The metrics
reported as final are those of the last step; none is selected by its score.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed

from harness.arguments import FinetuneArguments
from harness.attention import attention_config, control_attention
from harness.errors import UsageError
from harness.loop import TrainingLoop, TrainingRecord, make_optimizer, total_steps
from harness.models import enable_checkpointing, load_classifier, load_tokenizer
from harness.parsing import parse_arguments
from harness.results import (
    RESULTS_FILE,
    environment,
    peak_memory_bytes,
    read_results,
    write_config,
    write_results,
)
from tasks.classification import evaluate, load_data, make_loaders


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the settings and runs; a mistake in them ends the script with a message and exit status 2."""
    try:
        run(parse_arguments(FinetuneArguments, argv, description=__doc__.splitlines()[0]))
    except UsageError as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: FinetuneArguments) -> TrainingRecord:
    """Trains, evaluates and writes the results.

    Raises:
        UsageError: a setting, the data or the checkpoint is not usable.
    """
    started = datetime.now(UTC)
    config = attention_config(args)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    folder = Path(args.output_dir)
    prepare_output(folder, args, accelerator)

    tokenizer = load_tokenizer(args.model_name_or_path, args.cache_dir)
    with accelerator.main_process_first():
        data = load_data(args, tokenizer)
    order = torch.Generator().manual_seed(args.seed)
    train_loader, eval_loader = accelerator.prepare(*make_loaders(data, args, tokenizer, order))

    set_seed(args.seed)  # every arm of a study starts from the same head
    model = load_classifier(args.model_name_or_path, data.label_names, tokenizer.pad_token_id, args.cache_dir)
    attention = control_attention(model, args, config, total_steps(args, len(train_loader)))
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    optimizer = make_optimizer(model, args, undecayed=attention.learned_parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(args.seed, device_specific=True)  # every process draws its own noise

    loop = TrainingLoop(accelerator, args, model, optimizer, train_loader, eval_loader, attention, evaluate)
    record = loop.run()
    if accelerator.is_main_process:
        if args.save_model:
            accelerator.unwrap_model(model).save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
        write_results(folder, summarize(args, record, accelerator, started, data.label_names))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return record


def prepare_output(folder: Path, args: FinetuneArguments, accelerator: Accelerator) -> None:
    """Refuses or clears a finished run in ``folder``, then writes config.yaml; progress bars on one process only.

    Raises:
        UsageError: the folder holds a finished run and ``overwrite_output_dir`` is false.
    """
    if read_results(folder) is not None and not args.overwrite_output_dir:
        raise UsageError(
            f"output_dir {args.output_dir!r} holds a finished run: choose another, or pass --overwrite_output_dir."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        write_config(folder, args.to_dict())
    else:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    accelerator.wait_for_everyone()


def summarize(
    args: FinetuneArguments,
    record: TrainingRecord,
    accelerator: Accelerator,
    started: datetime,
    label_names: list[str],
) -> dict[str, Any]:
    """The content of results.json, without its status."""
    return {
        "started": started.isoformat(timespec="seconds"),
        "config": args.to_dict(),
        "label_names": label_names,
        "final": record.final,
        "series": {"train": record.train, "evaluation": record.evaluation},
        "steps": record.steps,
        "train_seconds": record.train_seconds,
        "eval_seconds": record.eval_seconds,
        "steps_per_second": record.steps / record.train_seconds,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        **environment(accelerator.device, accelerator.num_processes),
    }


if __name__ == "__main__":
    main()
