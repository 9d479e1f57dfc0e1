"""String transduction: lemmas with tags in, inflected forms out; batches, a small encoder-decoder, metrics.

A file has a line ``lemma<TAB>form<TAB>tags`` for each example, the tags separated by ``;``, as in the shared task on
inflection of CoNLL-SIGMORPHON 2017 (Cotterell et al. 2017, arXiv:1706.09031).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from harness.arguments import RunArguments, check_setting, setting
from harness.errors import UsageError

PADDING, BEGIN, END, UNKNOWN = range(4)
VOCABULARY_FILE = "vocabulary.json"
IGNORED = -100
"""Label of a position that the loss passes over."""
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class TransductionArguments(RunArguments):
    """Settings of ``transduction.py``."""

    model_name_or_path: str = setting("scratch", "'scratch': the model is always built from the sizes below")
    train_file: str = setting("", "file with lines lemma<TAB>form<TAB>tags to train on")
    validation_file: str = setting("", "the file to evaluate on")
    max_source_length: int = setting(64, "characters and tags of a lemma; what is longer is cut")
    max_target_length: int = setting(64, "characters of a form; what is longer is cut in training and counts as wrong")
    width: int = setting(64, "of the hidden states; the feed-forward layers are four times as wide")
    num_layers: int = setting(1, "layers of the encoder, and of the decoder")
    num_heads: int = setting(4, "attention heads in each layer")
    dropout: float = setting(0.1, "of hidden states")
    label_smoothing: float = setting(0.0, "in training")
    output_dir: str = setting("runs/transduction", "where config.yaml, checkpoints and results.json go")
    layers: tuple[int | str, ...] | None = setting(("cross",), "attention layers to patch; null is all")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_source_length", "max_target_length", "width", "num_layers", "num_heads"):
            check_setting(self, name, "> 0", lambda value: value > 0)
        for name in ("dropout", "label_smoothing"):
            check_setting(self, name, "in [0, 1)", lambda value: 0 <= value < 1)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if not (self.train_file and self.validation_file):
            raise UsageError("no data: give both train_file and validation_file.")
        if self.model_name_or_path != "scratch":
            raise UsageError(
                f"model_name_or_path must be 'scratch', got {self.model_name_or_path!r}: the characters of the data "
                "are the vocabulary, so there is no pretrained model to load."
            )
        if self.width % self.num_heads:
            raise UsageError(f"num_heads={self.num_heads} must divide width={self.width}.")


@dataclasses.dataclass(frozen=True)
class Inflection:
    """One example.

    Attributes:
        lemma: the string that goes in.
        form: the string that has to come out.
        tags: what form is asked for.
    """

    lemma: str
    form: str
    tags: tuple[str, ...]


def read_inflections(path: str | Path, argument: str = "file") -> list[Inflection]:
    """Reads a file.

    Args:
        path: of the file.
        argument: the setting it comes from, for messages.

    Raises:
        UsageError: it is missing, unreadable or empty, or a line is malformed.
    """
    name = f"{argument} {str(path)!r}"
    if not Path(path).is_file():
        raise UsageError(f"{name}: no such file (relative paths start at {Path.cwd()}).")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be read as UTF-8 text: {error}.") from error
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UsageError(f"{name} is empty: expected lines lemma<TAB>form<TAB>tags.")
    return [_parse_line(line.rstrip("\r"), f"{name}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse_line(line: str, where: str) -> Inflection:
    fields = line.split("\t")
    if len(fields) != 3 or not all(field.strip() for field in fields):
        raise UsageError(f"{where}: expected lemma<TAB>form<TAB>tags, none of them empty, got {line!r}.")
    tags = tuple(fields[2].split(";"))
    if not all(tags):
        raise UsageError(f"{where}: expected tags separated by single ';', got {fields[2]!r}.")
    return Inflection(fields[0], fields[1], tags)


class Symbols:
    """Numbers for characters and tags: 0 pads, 1 begins, 2 ends, 3 is any unknown one.

    Args:
        characters: the known characters, in the order of their numbers.
        tags: the known tags, which are numbered after the characters.
    """

    def __init__(self, characters: Sequence[str], tags: Sequence[str]) -> None:
        self.characters, self.tags = list(characters), list(tags)
        self._character = {character: index for index, character in enumerate(self.characters, UNKNOWN + 1)}
        self._tag = {tag: index for index, tag in enumerate(self.tags, UNKNOWN + 1 + len(self.characters))}

    @classmethod
    def of(cls, examples: Iterable[Inflection]) -> Symbols:
        """Those that occur in the examples, sorted."""
        characters: set[str] = set()
        tags: set[str] = set()
        for example in examples:
            characters |= set(example.lemma) | set(example.form)
            tags |= set(example.tags)
        return cls(sorted(characters), sorted(tags))

    def __len__(self) -> int:
        return UNKNOWN + 1 + len(self.characters) + len(self.tags)

    def encode_source(self, example: Inflection) -> list[int]:
        """The lemma's characters, the end symbol, the tags: what stays in place in the form stays in position."""
        lemma = self.encode(example.lemma)
        return [*lemma, END, *(self._tag.get(tag, UNKNOWN) for tag in example.tags)]

    def encode(self, text: str) -> list[int]:
        """The numbers of a string's characters."""
        return [self._character.get(character, UNKNOWN) for character in text]

    def decode(self, numbers: Iterable[int]) -> str:
        """The string up to the end symbol; whatever is no character becomes U+FFFD, which no form contains."""
        characters = []
        for number in numbers:
            if number == END:
                break
            index = number - UNKNOWN - 1
            known = 0 <= index < len(self.characters)
            characters.append(self.characters[index] if known else _UNREADABLE)
        return "".join(characters)

    def save(self, folder: Path) -> None:
        """Writes vocabulary.json."""
        content = {"characters": self.characters, "tags": self.tags}
        (folder / VOCABULARY_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Symbols:
        """Reads what :meth:`save` wrote."""
        return cls(**json.loads((Path(folder) / VOCABULARY_FILE).read_text("utf-8")))


@dataclasses.dataclass(frozen=True)
class TransductionData:
    """The examples of both files and the symbols of the training file."""

    train: list[Inflection]
    validation: list[Inflection]
    symbols: Symbols


def load_data(args: TransductionArguments, tell: Callable[[str], object]) -> TransductionData:
    """Reads and checks the files; tells how many examples are cut and how many symbols are unknown.

    Raises:
        UsageError: a file is not usable.
    """
    train = read_inflections(args.train_file, "train_file")
    validation = read_inflections(args.validation_file, "validation_file")
    symbols = Symbols.of(train)
    for name, examples in (("train_file", train), ("validation_file", validation)):
        sources = sum(len(symbols.encode_source(each)) > args.max_source_length for each in examples)
        targets = sum(len(each.form) + 1 > args.max_target_length for each in examples)
        if sources:
            tell(f"{name}: {sources} of {len(examples)} inputs are cut to max_source_length={args.max_source_length}")
        if targets:
            tell(f"{name}: {targets} of {len(examples)} forms are cut to max_target_length={args.max_target_length}")
    unknown = sum(
        UNKNOWN in symbols.encode_source(each) or UNKNOWN in symbols.encode(each.form) for each in validation
    )
    if unknown:
        tell(f"validation_file: {unknown} of {len(validation)} examples have symbols that train_file lacks")
    return TransductionData(train, validation, symbols)


class Collator:
    """Makes batches: rows of (index, example) to padded tensors.

    Args:
        symbols: numbers of the symbols.
        args: the lengths.
    """

    def __init__(self, symbols: Symbols, args: TransductionArguments) -> None:
        self.symbols, self.args = symbols, args

    def __call__(self, rows: Sequence[tuple[int, Inflection]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (B, S), ``labels`` (B, T) with -100 as padding, ``index`` (B,)."""
        sources = [self.symbols.encode_source(each)[: self.args.max_source_length] for _, each in rows]
        targets = [[*self.symbols.encode(each.form), END][: self.args.max_target_length] for _, each in rows]
        input_ids = _pad(sources, PADDING)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != PADDING).long(),
            "labels": _pad(targets, IGNORED),
            "index": torch.tensor([index for index, _ in rows]),
        }


def make_loaders(
    data: TransductionData, args: TransductionArguments, order: torch.Generator
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training batches in random order, evaluation batches from short to long inputs."""
    collate = Collator(data.symbols, args)
    rows = list(enumerate(data.validation))
    rows.sort(key=lambda row: len(row[1].lemma))
    train: DataLoader[Any] = DataLoader(
        list(enumerate(data.train)),  # type: ignore[arg-type]  # a list is a data set
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        generator=order,
        collate_fn=collate,
    )
    evaluation: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]  # a list is a data set
        batch_size=args.per_device_eval_batch_size,
        collate_fn=collate,
    )
    return train, evaluation


def make_model(symbols: Symbols, args: TransductionArguments) -> MarianMTModel:
    """A small transformer (Vaswani et al. 2017, arXiv:1706.03762) with random weights, in Marian's form.

    Its positions are sinusoids: with as few words as these data have, learned ones hardly learn to copy.
    """
    config = MarianConfig(
        vocab_size=len(symbols),
        d_model=args.width,
        encoder_layers=args.num_layers,
        decoder_layers=args.num_layers,
        encoder_attention_heads=args.num_heads,
        decoder_attention_heads=args.num_heads,
        encoder_ffn_dim=4 * args.width,
        decoder_ffn_dim=4 * args.width,
        max_position_embeddings=max(args.max_source_length, args.max_target_length) + 2,
        activation_function="relu",
        dropout=args.dropout,
        activation_dropout=args.dropout,
        attention_dropout=0.0,
        scale_embedding=True,
        init_std=args.width**-0.5,
        pad_token_id=PADDING,
        bos_token_id=BEGIN,
        eos_token_id=END,
        decoder_start_token_id=BEGIN,
        forced_eos_token_id=None,
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_target_length,
        do_sample=False,
        num_beams=1,
        pad_token_id=PADDING,
        bos_token_id=BEGIN,
        eos_token_id=END,
        decoder_start_token_id=BEGIN,
    )
    return model


def compute_loss(model: torch.nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy over the symbols of all forms of a batch."""
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten(), label_smoothing=label_smoothing, ignore_index=IGNORED
    )


def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, loader: Iterable[Any], data: TransductionData
) -> dict[str, float]:
    """Loss per symbol, exact match and mean edit distance of greedy decoding; leaves the model in train().

    The prediction is compared with the whole form, also where that is longer than the model's limit.
    """
    columns: list[Tensor] = []
    bare: Any = accelerator.unwrap_model(model)
    model.eval()
    with torch.no_grad():
        for batch in loader:
            labels = batch["labels"]
            logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).logits
            losses = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
            ).sum(1)
            generated = bare.generate(batch["input_ids"], attention_mask=batch["attention_mask"])
            forms = [data.validation[index].form for index in batch["index"].tolist()]
            outputs = [data.symbols.decode(row[1:]) for row in generated.tolist()]
            distances = [edit_distance(output, form) for output, form in zip(outputs, forms, strict=True)]
            measured = torch.tensor(distances, dtype=torch.float32, device=losses.device)
            symbols = (labels != IGNORED).sum(1)
            rows = torch.stack([losses, symbols.float(), measured], 1)
            columns.append(accelerator.gather_for_metrics(rows).double().cpu())
    model.train()
    losses, symbols, measured = torch.cat(columns).unbind(1)
    return {
        "loss": (losses.sum() / symbols.sum()).item(),
        "exact_match": (measured == 0).double().mean().item(),
        "edit_distance": measured.mean().item(),
    }


def edit_distance(a: str, b: str) -> int:
    """Least number of insertions, deletions and substitutions of characters that make ``b`` of ``a`` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """A matrix of lists of numbers, padded on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
