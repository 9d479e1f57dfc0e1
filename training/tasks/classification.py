"""Text classification: data with labels in, batches and metrics out."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from sklearn.metrics import accuracy_score, f1_score
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from harness.arguments import FinetuneArguments
from harness.errors import UsageError

_LOADERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """Tokenised splits and the labels of the training data, in the order of their ids."""

    train: Dataset
    validation: Dataset
    label_names: list[str]


def load_data(args: FinetuneArguments, tokenizer: Any) -> ClassificationData:
    """Loads, labels, subsets and tokenises the data of a run.

    Label ids come from the whole training split, before any subset is taken.

    Raises:
        UsageError: a file, column or label is not usable; the message names it.
    """
    train = _load_split(args, "train_file", args.train_split)
    validation = _load_split(args, "validation_file", args.validation_split)
    train_name = args.train_file or f"{args.dataset_name}, split {args.train_split}"
    validation_name = args.validation_file or f"{args.dataset_name}, split {args.validation_split}"
    columns = [name for name in (args.text_column, args.text_pair_column, args.label_column) if name is not None]
    for split_data, name in ((train, train_name), (validation, validation_name)):
        _check_columns(split_data, columns, name)
        _check_texts(split_data, columns[:-1], name)

    train_labels = _labels(train, args.label_column, train_name)
    validation_labels = _labels(validation, args.label_column, validation_name)
    names = sorted(set(train_labels), key=_numbers_first)
    if len(names) < 2:
        raise UsageError(f"{train_name} has one label only ({names[0]!r} in every row); there is nothing to learn.")
    _check_known(validation_labels, names, validation_name)
    return ClassificationData(
        train=_encode(train, train_labels, names, args, tokenizer, args.max_train_samples),
        validation=_encode(validation, validation_labels, names, args, tokenizer, args.max_eval_samples),
        label_names=names,
    )


def make_loaders(
    data: ClassificationData, args: FinetuneArguments, tokenizer: Any, generator: torch.Generator
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and evaluation batches, padded to their longest text; evaluation goes from short to long texts.

    Args:
        data: the tokenised splits.
        args: batch sizes.
        tokenizer: knows how to pad.
        generator: draws the order of the training data and nothing else, so that noise and dropout
            do not change it.
    """
    collate = DataCollatorWithPadding(tokenizer)
    train = DataLoader(
        data.train,
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        generator=generator,
        collate_fn=collate,
    )
    lengths = [len(tokens) for tokens in data.validation["input_ids"]]
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    evaluation = DataLoader(
        data.validation.select(by_length),
        batch_size=args.per_device_eval_batch_size,
        collate_fn=collate,
    )
    return train, evaluation


def losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Cross entropy of each example, (B,)."""
    return _losses(model(**batch).logits, batch["labels"])


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Mean loss, accuracy and macro F1 over all examples of all processes; leaves the model in train()."""
    per_example: list[torch.Tensor] = []
    predictions: list[torch.Tensor] = []
    references: list[torch.Tensor] = []
    model.eval()
    with torch.no_grad():
        for batch in loader:
            logits = model(**batch).logits
            loss = _losses(logits, batch["labels"])
            gathered = accelerator.gather_for_metrics((loss, logits.argmax(-1), batch["labels"]))
            for store, values in zip((per_example, predictions, references), gathered, strict=True):
                store.append(values.cpu())
    model.train()
    truth, guess = torch.cat(references).numpy(), torch.cat(predictions).numpy()
    return {
        "loss": torch.cat(per_example).mean().item(),
        "accuracy": float(accuracy_score(truth, guess)),
        "f1_macro": float(f1_score(truth, guess, average="macro")),
    }


def _load_split(args: FinetuneArguments, argument: str, split: str) -> Dataset:
    path = getattr(args, argument)
    if path is not None:
        return _load_file(path, argument, args.cache_dir)
    try:
        return load_dataset(args.dataset_name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
    except (ValueError, OSError) as error:
        raise UsageError(f"dataset_name {args.dataset_name!r}, split {split!r} cannot be loaded: {error}") from error


def _load_file(path: str, argument: str, cache_dir: str | None) -> Dataset:
    """One file as a data set; the columns of csv and tsv files stay strings."""
    kind = _LOADERS.get(Path(path).suffix.lower())
    if kind is None:
        raise UsageError(f"{argument} {path!r}: expected a file ending in {', '.join(_LOADERS)}.")
    if not Path(path).is_file():
        raise UsageError(f"{argument} {path!r}: no such file (relative paths start at {Path.cwd()}).")
    options = _table_options(Path(path)) if kind == "csv" else {}
    try:
        data = load_dataset(kind, data_files={"train": path}, cache_dir=cache_dir, **options)
    except DatasetGenerationError as error:
        raise UsageError(f"{argument} {path!r} cannot be read as {kind}: {error.__cause__ or error}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise UsageError(f"{argument} {path!r} is empty: expected at least one row.") from error
    return data["train"]


def _table_options(path: Path) -> dict[str, Any]:
    """Reader options for a csv or tsv file: quotes in a tsv are text, "null" and "NA" are words."""
    tabs = path.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"sep": ","}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
        header = next(reader, [])
    if not header:
        raise UsageError(f"{str(path)!r} is empty: expected a header line and at least one row.")
    strings = Features({column: Value("string") for column in header})
    return {**options, "keep_default_na": False, "features": strings}


def _check_columns(data: Dataset, columns: list[str], name: str) -> None:
    for column in columns:
        if column not in data.column_names:
            raise UsageError(
                f"{name} has no column {column!r}; its columns are {data.column_names}. "
                "Set text_column, text_pair_column and label_column."
            )


def _check_texts(data: Dataset, columns: list[str], name: str) -> None:
    for column in columns:
        for row, text in enumerate(data[column], start=1):
            if text is None:
                raise UsageError(f"{name}: no text in column {column!r} of row {row}.")


def _labels(data: Dataset, column: str, name: str) -> list[str]:
    """The label of every row by name; numbers count as names, so that "1" in a csv is 1 in a json file."""
    feature = data.features[column]
    labels = []
    for row, value in enumerate(data[column], start=1):
        if value is None or value == "" or (isinstance(feature, ClassLabel) and value < 0):
            raise UsageError(f"{name}: no label in column {column!r} of row {row}.")
        if not isinstance(value, (str, int)):
            raise UsageError(
                f"{name}: label {value!r} in row {row} has type {type(value).__name__}; "
                "expected a string or an integer."
            )
        labels.append(feature.int2str(value) if isinstance(feature, ClassLabel) else str(value))
    return labels


def _numbers_first(label: str) -> tuple[bool, int, str]:
    """Sort key: integers by value, then other labels by name."""
    number = int(label) if re.fullmatch(r"-?\d+", label) else None
    return (number is None, number or 0, label)


def _check_known(labels: list[str], known: list[str], name: str) -> None:
    for row, label in enumerate(labels, start=1):
        if label not in known:
            raise UsageError(f"{name}: label {label!r} in row {row} is not among the training labels {known}.")


def _encode(
    data: Dataset, labels: list[str], names: list[str], args: FinetuneArguments, tokenizer: Any, limit: int | None
) -> Dataset:
    """Tokens and label ids; of more than ``limit`` rows the same random ones whatever the run's seed."""
    ids = {label: index for index, label in enumerate(names)}
    columns = [args.text_column] + ([args.text_pair_column] if args.text_pair_column else [])
    data = data.select_columns(columns).add_column("labels", [ids[label] for label in labels])
    if limit is not None and limit < len(data):
        data = data.shuffle(seed=args.data_seed).select(range(limit))

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        texts = [[str(text) for text in batch[column]] for column in columns]
        return tokenizer(*texts, truncation=True, max_length=args.max_length)

    return data.map(tokenize, batched=True, remove_columns=columns, desc="tokenise")
