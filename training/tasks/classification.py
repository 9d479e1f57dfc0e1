"""Text classification: data with labels in, batches and metrics out."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from sklearn.metrics import accuracy_score, f1_score
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import AutoConfig, DataCollatorWithPadding

from harness.arguments import FinetuneArguments
from harness.calibration import expected_calibration_error, selective_accuracy
from harness.errors import UsageError
from harness.fixed_noise import INDEX
from harness.models import resolve_model_path
from tasks.length_grouping import LengthGroupedSampler
from tasks.overlap import rows_outside

_CUT = "cut"
_MOST_NAMED = 10
_COUNT_FROM_PADDING = frozenset(
    (
        *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"),
        *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    )
)
"""Model types whose first position has the number after the padding token's: their tables have rows never used."""
_LOADERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """Tokenised splits and the labels of the training data, in the order of their ids."""

    train: Dataset
    validation: Dataset
    label_names: list[str]


def load_data(
    args: FinetuneArguments, tokenizer: Any, tell: Callable[[str], object] = lambda line: None
) -> ClassificationData:
    """Loads, labels, subsets and tokenises the data of a run; tells how many texts are cut.

    Label ids come from the whole training split, before any subset is taken.

    Args:
        args: the settings.
        tokenizer: of the model.
        tell: prints a line.

    Raises:
        UsageError: a file, column or label is not usable; the message names it.
    """
    train = _load_split(args, "train_file", args.train_split)
    validation = _load_split(args, "validation_file", args.validation_split)
    train_name = args.train_file or f"{args.dataset_name}, split {args.train_split}"
    validation_name = args.validation_file or f"{args.dataset_name}, split {args.validation_split}"
    columns = [name for name in (args.text_column, args.text_pair_column, args.label_column) if name is not None]
    for split_data, name in ((train, train_name), (validation, validation_name)):
        if not len(split_data):
            raise UsageError(f"{name} is empty: expected at least one row.")
        _check_columns(split_data, columns, name)
        _check_texts(split_data, columns[:-1], name)

    train_labels = _labels(train, args.label_column, train_name)
    validation_labels = _labels(validation, args.label_column, validation_name)
    names = sorted(set(train_labels), key=_numbers_first)
    if len(names) < 2:
        raise UsageError(f"{train_name} has one label only ({names[0]!r} in every row); there is nothing to learn.")
    _check_known(validation_labels, names, validation_name)
    if args.drop_train_overlap:
        evaluated = _subset(validation, args.max_eval_samples, args.data_seed)[args.text_column]
        kept = rows_outside(map(str, train[args.text_column]), map(str, evaluated))
        if not kept:
            raise UsageError(f"drop_train_overlap leaves nothing of {train_name}: all is part of {validation_name}.")
        tell(f"{train_name}: {len(train) - len(kept)} of {len(train)} texts are part of an evaluation text: left out")
        train, train_labels = train.select(kept), [train_labels[row] for row in kept]
    encoded = _encode(train, train_labels, names, args, tokenizer, args.max_train_samples, train_name, tell)
    if args.holdout_percentage is None:
        evaluated = _encode(
            validation, validation_labels, names, args, tokenizer, args.max_eval_samples, validation_name, tell
        )
    else:
        encoded, evaluated = _hold_out(encoded, args, train_name)
    if args.fixed_noise:
        encoded = encoded.add_column(INDEX, list(range(len(encoded))))
    return ClassificationData(train=encoded, validation=evaluated, label_names=names)


def _hold_out(data: Dataset, args: FinetuneArguments, name: str) -> tuple[Dataset, Dataset]:
    """The training rows that stay, and those held out, the same for every seed of a run."""
    held = len(data) * (args.holdout_percentage or 0) // 100
    if not 0 < held < len(data):
        raise UsageError(
            f"holdout_percentage={args.holdout_percentage} of the {len(data)} rows of {name} is {held}: there must be "
            "rows on both sides."
        )
    shuffled = data.shuffle(seed=args.data_seed + 1)
    return shuffled.select(range(held, len(data))), shuffled.select(range(held))


def load_config(args: FinetuneArguments) -> Any:
    """The configuration of the text part of the model, before data and weights are loaded.

    Raises:
        UsageError: there is none, or max_length is more than it allows.
    """
    name = args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(resolve_model_path(name), cache_dir=args.cache_dir).get_text_config()
    except (OSError, ValueError) as error:
        raise UsageError(f"model_name_or_path {name!r} cannot be loaded: {error}") from error
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0:
        if config.model_type in _COUNT_FROM_PADDING:
            limit -= config.pad_token_id + 1
        if args.max_length > limit:
            raise UsageError(
                f"max_length {args.max_length} is more than the {limit} positions of the model {name!r}: "
                f"lower it to at most {limit}."
            )
    return config


def check_vocabulary(config: Any, tokenizer: Any, name: str) -> None:
    """Raises UsageError if the tokenizer has more tokens than the model.

    Args:
        config: of the model.
        tokenizer: that is to go with it.
        name: of both, for the message.
    """
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int) and len(tokenizer) > size:
        raise UsageError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, the model only {size} (vocab_size): they do not "
            "belong together."
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
    size = args.per_device_train_batch_size
    sampler: Sampler[int] = RandomSampler(data.train, generator=generator)
    if args.train_sampling_strategy == "group_by_length":
        sampler = LengthGroupedSampler(_lengths(data.train), size, generator)
    train = DataLoader(data.train, batch_size=size, sampler=sampler, generator=generator, collate_fn=collate)
    lengths = _lengths(data.validation)
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    evaluation = DataLoader(
        data.validation.select(by_length),
        batch_size=args.per_device_eval_batch_size,
        collate_fn=collate,
    )
    return train, evaluation


def _lengths(data: Dataset) -> list[int]:
    return [len(tokens) for tokens in data["input_ids"]]


def losses(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Cross entropy of each example, (B,)."""
    return _losses(model(**batch).logits, batch["labels"])


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Loss, accuracy, macro F1, calibration and accuracy on the most confident 80 %; leaves the model in train().

    Over all examples of all processes.
    """
    columns: list[torch.Tensor] = []
    model.eval()
    with torch.no_grad():
        for batch in loader:
            logits = model(**batch).logits
            loss = _losses(logits, batch["labels"])
            confidence, guess = logits.float().softmax(-1).max(-1)
            rows = torch.stack([loss, confidence, guess.float(), batch["labels"].float()], 1)
            columns.append(accelerator.gather_for_metrics(rows).double().cpu())
    model.train()
    losses, confidence, guess, truth = torch.cat(columns).unbind(1)
    guess, truth = guess.long(), truth.long()
    return {
        "loss": losses.mean().item(),
        "accuracy": float(accuracy_score(truth, guess)),
        "f1_macro": float(f1_score(truth, guess, average="macro")),
        "calibration_error": expected_calibration_error(confidence, guess == truth),
        "selective_accuracy": selective_accuracy(confidence, guess == truth),
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
        what = "a folder, expected a file" if Path(path).is_dir() else "no such file"
        raise UsageError(f"{argument} {path!r}: {what} (relative paths start at {Path.cwd()}).")
    try:
        _check_readable(Path(path))
        options = _table_options(Path(path)) if kind == "csv" else {}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{argument} {path!r} cannot be read as {kind}: {reason}.") from error
    try:
        data = load_dataset(kind, data_files={"train": path}, cache_dir=cache_dir, **options)
    except (DatasetGenerationError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise UsageError(f"{argument} {path!r} is empty: expected at least one row.") from error
        raise UsageError(f"{argument} {path!r} cannot be read as {kind}: {error.__cause__ or error}") from error
    return data["train"]


def _check_readable(path: Path) -> None:
    """Raises OSError or UsageError for what datasets say less clearly."""
    with path.open("rb") as file:
        if not file.read(1):
            raise UsageError(f"{str(path)!r} is empty: expected at least one row.")


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
            if _missing(text):
                raise UsageError(f"{name}: no text in column {column!r} of row {row}.")


def _labels(data: Dataset, column: str, name: str) -> list[str]:
    """The label of every row by name; numbers count as names, so that "1" in a csv is 1 in a json file."""
    feature = data.features[column]
    labels = []
    for row, value in enumerate(data[column], start=1):
        if _missing(value) or value == "" or (isinstance(feature, ClassLabel) and value < 0):
            raise UsageError(f"{name}: no label in column {column!r} of row {row}.")
        if not isinstance(value, (str, int)):
            raise UsageError(
                f"{name}: label {value!r} in row {row} has type {type(value).__name__}; "
                "expected a string or an integer."
            )
        labels.append(feature.int2str(value) if isinstance(feature, ClassLabel) else str(value))
    return labels


def _missing(value: Any) -> bool:
    """Whether it is None or not a number, as an empty cell of a table of numbers is read."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _numbers_first(label: str) -> tuple[bool, int, str]:
    """Sort key: integers by value, then other labels by name."""
    number = int(label) if re.fullmatch(r"-?\d+", label) else None
    return (number is None, number or 0, label)


def _check_known(labels: list[str], known: list[str], name: str) -> None:
    """Raises UsageError, with the first row of each, if there are labels that the training data lack."""
    first = {}
    for row, label in enumerate(labels, start=1):
        if label not in known:
            first.setdefault(label, row)
    if first:
        rows = ", ".join(f"label {label!r} in row {row}" for label, row in list(first.items())[:_MOST_NAMED])
        more = f" and {len(first) - _MOST_NAMED} more labels" if len(first) > _MOST_NAMED else ""
        verb = "is" if len(first) == 1 else "are"
        raise UsageError(f"{name}: {rows}{more} {verb} not among the training labels {known}.")


def _subset(data: Dataset, limit: int | None, seed: int) -> Dataset:
    """The data, or a random part of them that has ``limit`` rows."""
    if limit is None or limit >= len(data):
        return data
    return data.shuffle(seed=seed).select(range(limit))


def _encode(
    data: Dataset, labels: list[str], names: list[str], args: FinetuneArguments, tokenizer: Any, limit: int | None,
    name: str, tell: Callable[[str], object],
) -> Dataset:  # fmt: skip
    """Tokens and label ids; of more than ``limit`` rows the same random ones whatever the run's seed."""
    ids = {label: index for index, label in enumerate(names)}
    columns = [args.text_column] + ([args.text_pair_column] if args.text_pair_column else [])
    data = data.select_columns(columns).add_column("labels", [ids[label] for label in labels])
    data = _subset(data, limit, args.data_seed)

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        texts = [[str(text) for text in batch[column]] for column in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=args.max_length)
        full = [row for row, tokens in enumerate(encoded["input_ids"]) if len(tokens) >= args.max_length]
        longer = [False] * len(encoded["input_ids"])
        if full:
            whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False)["input_ids"]
            for row, tokens in zip(full, whole, strict=True):
                longer[row] = len(tokens) > args.max_length
        return {**encoded, _CUT: longer}

    encoded = data.map(tokenize, batched=True, remove_columns=columns, desc="tokenise")
    cut = sum(encoded[_CUT])
    if cut:
        share = f"{100 * cut / len(encoded):.2g}"
        tell(f"{name}: {cut} of {len(encoded)} texts ({share} %) are longer than {args.max_length} tokens and are cut")
    return encoded.remove_columns(_CUT)
