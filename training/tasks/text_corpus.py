"""Documents for a language model from text files, tables and hub data sets; a tokenizer of single characters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetGenerationError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.errors import UsageError
from tasks.language_arguments import LanguageModelArguments

_LOADERS = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_END_OF_TEXT, _UNKNOWN = "<|endoftext|>", "<|unknown|>"


@dataclasses.dataclass(frozen=True)
class Documents:
    """Rows with one document each.

    Attributes:
        rows: a data set in mapped memory, or a stream.
        column: the column with the text.
        name: of the split, for messages.
        part: of each document: it is cut after a percentage of its characters and the first or the last part taken,
            which the next pair cuts in turn; all of it if there is none.
    """

    rows: Dataset | IterableDataset
    column: str
    name: str
    part: tuple[tuple[int, Literal["first", "last"]], ...] = ()

    def cut(self, text: str | None) -> str:
        """The part of a document that belongs to the split; a missing one is empty.

        Raises:
            UsageError: the column holds something else than text.
        """
        if text is None:
            return ""
        if not isinstance(text, str):
            raise UsageError(f"{self.name}: column {self.column!r} holds {type(text).__name__}, expected text.")
        for percentage, which in self.part:
            middle = len(text) * percentage // 100
            text = text[:middle] if which == "first" else text[middle:]
        return text


def load_documents(args: LanguageModelArguments) -> tuple[Documents, Documents]:
    """The documents to train and to evaluate on.

    What ``holdout_percentage`` holds out is the end of the documents that would be trained on without it: of what
    ``validation_split_percentage`` and ``max_train_samples`` leave. A validation file or split is not loaded then.

    Raises:
        UsageError: a file, split or column cannot be used; the message names it.
    """
    train_name = args.train_file or f"{args.dataset_name}, split {args.train_split}"
    train = Documents(
        _rows(args, args.train_file, "train_file", args.train_split, args.streaming), _column(args), train_name
    )
    _check_column(train)
    validation = None
    if args.validation_split_percentage is not None:
        train, validation = _split(train, args.validation_split_percentage, "last")
    train = _first(train, args.max_train_samples)
    if args.holdout_percentage is not None:
        train, validation = _split(train, args.holdout_percentage, "held-out")
    elif validation is None:
        name = args.validation_file or f"{args.dataset_name}, split {args.validation_split}"
        rows = _rows(args, args.validation_file, "validation_file", args.validation_split, False)
        validation = Documents(rows, _column(args, args.validation_file), name)
        _check_column(validation)
    return train, _first(validation, args.max_eval_samples)


def share_of_stream(documents: Documents, process: int, processes: int, whole_files: bool) -> Documents:
    """The documents of a stream that one of several processes reads; each is read by one of them.

    Args:
        documents: the stream.
        process: number of the process, from 0.
        processes: how many there are.
        whole_files: a process reads files of its own, where their number is a multiple of that of the processes;
            else it reads through all of them and takes every ``processes``-th document.
    """
    strategy: Literal["auto", "examples"] = "auto" if whole_files else "examples"
    return dataclasses.replace(documents, rows=split_dataset_by_node(documents.rows, process, processes, strategy))


def character_tokenizer(documents: Documents) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the characters of the documents, in the order of their code points.

    Any other character is one unknown token. Decoding gives the text back.
    """
    characters: set[str] = set()
    for row in documents.rows:
        characters.update(documents.cut(row[documents.column]))
    vocabulary = {token: index for index, token in enumerate([_END_OF_TEXT, _UNKNOWN, *sorted(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_END_OF_TEXT,
        eos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def _column(args: LanguageModelArguments, path: str | None = None) -> str:
    path = path or args.train_file
    return "text" if path is not None and path.lower().endswith(".txt") else args.text_column


def _rows(
    args: LanguageModelArguments, path: str | None, argument: str, split: str, streaming: bool
) -> Dataset | IterableDataset:
    if path is not None:
        return _load_file(path, argument, args, streaming)
    try:
        return load_dataset(
            args.dataset_name, args.dataset_config_name, split=split, cache_dir=args.cache_dir, streaming=streaming
        )
    except (ValueError, OSError) as error:
        raise UsageError(f"dataset_name {args.dataset_name!r}, split {split!r} cannot be loaded: {error}") from error


def _load_file(path: str, argument: str, args: LanguageModelArguments, streaming: bool) -> Dataset | IterableDataset:
    suffix = Path(path).suffix.lower()
    kind = _LOADERS.get(suffix)
    if kind is None:
        raise UsageError(f"{argument} {path!r}: expected a file ending in {', '.join(_LOADERS)}.")
    _check_file(Path(path), argument)
    options: dict[str, Any] = {}
    if kind == "text":
        options["sample_by"] = args.sample_by
    elif kind == "csv":
        options |= {"sep": "\t" if suffix == ".tsv" else ",", "keep_default_na": False}
    try:
        return load_dataset(
            kind, data_files={"train": path}, split="train", cache_dir=args.cache_dir, streaming=streaming, **options
        )
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise UsageError(f"{argument} {path!r} cannot be read as {kind}: {reason}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise UsageError(f"{argument} {path!r} is empty: expected at least one document.") from error


def _check_file(path: Path, argument: str) -> None:
    if not path.is_file():
        raise UsageError(f"{argument} {str(path)!r}: no such file (relative paths start at the working directory).")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise UsageError(f"{argument} {str(path)!r} cannot be read: {error.strerror}.") from error
    if not first:
        raise UsageError(f"{argument} {str(path)!r} is empty: expected at least one document.")


def _check_column(documents: Documents) -> None:
    names = documents.rows.column_names
    if names is None:  # of a stream not known before its first row
        names = list(next(iter(documents.rows), {documents.column: None}))
    if documents.column not in names:
        raise UsageError(
            f"{documents.name} has no column {documents.column!r}; its columns are {names}. Set text_column."
        )


def _split(documents: Documents, percentage: int, what: str) -> tuple[Documents, Documents]:
    """The first documents and the last ``percentage`` of them; a single one is cut at that share of its characters.

    The name of the last begins with that of all and says ``what`` they are.
    """
    name, count = f"{documents.name}, {what} {percentage} %", len(documents.rows)
    if count < 2:  # none is refused later, where it has no text
        first = dataclasses.replace(documents, part=(*documents.part, (100 - percentage, "first")))
        last = dataclasses.replace(documents, part=(*documents.part, (100 - percentage, "last")), name=name)
        return first, last
    middle = min(max(1, count * (100 - percentage) // 100), count - 1)
    train = dataclasses.replace(documents, rows=documents.rows.select(range(middle)))
    return train, dataclasses.replace(documents, rows=documents.rows.select(range(middle, count)), name=name)


def _first(documents: Documents, count: int | None) -> Documents:
    if count is None:
        return documents
    rows = documents.rows
    taken = rows.take(count) if isinstance(rows, IterableDataset) else rows.select(range(min(count, len(rows))))
    return dataclasses.replace(documents, rows=taken)
