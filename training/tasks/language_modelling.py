"""Causal language modelling: texts in, packed blocks and metrics out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from torch.utils.data import DataLoader

from harness.errors import UsageError
from harness.saved_run import describe_data
from tasks.language_arguments import LanguageModelArguments
from tasks.packing import PADDING_LABEL, BlockCollator, DealtBlocks, PackedBlocks, StreamedBlocks
from tasks.text_corpus import Documents, share_of_stream

_ENCODED = Features({"tokens": Sequence(Value("int32")), "characters": Value("int64")})
_STREAMED_AT_ONCE = 64  # documents in one call of the tokenizer
_LARGEST_EXPONENT = 700.0  # of a perplexity that a float can hold


@dataclasses.dataclass(frozen=True)
class LanguageData:
    """Blocks of both splits.

    Attributes:
        train: those of a stream are this process's own, others are those of all processes.
        validation: to evaluate on.
        characters: of the validation texts, all of which are predicted.
        train_characters: None for a stream.
        name: of the training texts, for messages.
        process: number of this process, from 0.
        processes: how many there are.
    """

    train: PackedBlocks | StreamedBlocks
    validation: PackedBlocks
    characters: int
    train_characters: int | None
    name: str
    process: int
    processes: int

    def facts(self) -> dict[str, Any]:
        """The sizes of the data; of a stream only what is known."""
        known = {"validation_characters": self.characters, "validation_tokens": self.validation.tokens - 1}
        if isinstance(self.train, PackedBlocks):
            known |= {"train_characters": self.train_characters, "train_tokens": self.train.tokens - 1}
        return known | {"train_blocks": self._train_blocks(), "validation_blocks": len(self.validation)}

    def identity(self) -> dict[str, Any]:
        """What tells these data from others; of a stream the first blocks of each process, and the processes.

        All processes call this together.

        Raises:
            UsageError: a process has nothing to read of a stream.
        """
        described = describe_data("validation", self.validation)
        if isinstance(self.train, StreamedBlocks):
            described |= self._stream_identity(self.train)
        else:
            described |= describe_data("train", self.train)
        return described | {"train_rows": self._train_blocks(), "validation_characters": self.characters}

    def _train_blocks(self) -> int:
        """Of all processes."""
        return len(self.train) * (self.processes if isinstance(self.train, StreamedBlocks) else 1)

    def _stream_identity(self, train: StreamedBlocks) -> dict[str, Any]:
        own = None
        if not train.empty():
            own = describe_data("train", [train[index] for index in range(min(len(train), 64))])["train_sha256"]
        found = gather_object([own])
        if None not in found:
            one = len(found) == 1
            digest = found[0] if one else hashlib.sha256("".join(found).encode()).hexdigest()
            return {"train_sha256": digest} | ({} if one else {"stream_shares": len(found)})
        if not any(found):
            raise UsageError(f"{self.name} is empty: expected at least one document with text.")
        raise UsageError(
            f"{self.name} has no document with text for process {found.index(None)} of {len(found)}: a stream is "
            "divided among the processes by files, if there are as many or a multiple, else by documents. Use fewer "
            "processes, or divide the text into more documents."
        )


def load_data(
    args: LanguageModelArguments,
    train: Documents,
    validation: Documents,
    tokenizer: Any,
    block_size: int,
    accelerator: Accelerator,
) -> LanguageData:
    """Tokenises and packs the documents of both splits.

    Args:
        args: the settings.
        train: documents to train on, a stream if so configured.
        validation: documents to evaluate on.
        tokenizer: has a token that separates documents.
        block_size: inputs per block.
        accelerator: of a stream, each of its processes reads a share.

    Raises:
        UsageError: a split has no text, or the training text is shorter than a block.
    """
    evaluated = encode(validation, tokenizer)
    characters = _characters(evaluated)
    if not characters:
        raise UsageError(f"{validation.name} is empty: expected at least one document with text.")
    _tell_unknown(evaluated, tokenizer, validation.name, accelerator)
    packed = PackedBlocks(pieces(evaluated), block_size)
    of_all = accelerator.process_index, accelerator.num_processes
    if isinstance(train.rows, IterableDataset):
        stream = _stream(args, train, tokenizer, block_size, accelerator)
        return LanguageData(stream, packed, characters, None, train.name, *of_all)
    encoded = encode(train, tokenizer)
    train_characters = _characters(encoded)
    if not train_characters:
        raise UsageError(f"{train.name} is empty: expected at least one document with text.")
    blocks = PackedBlocks(pieces(encoded), block_size)
    if blocks.tokens <= block_size:
        raise UsageError(
            f"{train.name} has {blocks.tokens - 1} tokens to predict, fewer than one block of {block_size}: "
            f"lower block_size to at most {blocks.tokens - 1}, or give more text."
        )
    return LanguageData(blocks, packed, characters, train_characters, train.name, *of_all)


def make_loaders(
    data: LanguageData, args: LanguageModelArguments, block_size: int, padding_id: int, order: torch.Generator
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches of blocks; ``order`` shuffles those of training, a stream shuffles itself."""
    collate, batch_size = BlockCollator(block_size, padding_id), args.per_device_train_batch_size
    blocks: Any = data.train
    if isinstance(blocks, StreamedBlocks):
        blocks = DealtBlocks(blocks, batch_size, data.process, data.processes)
    train = DataLoader(
        blocks,
        batch_size=batch_size,
        shuffle=not args.streaming,
        generator=order,
        collate_fn=collate,
    )
    return train, DataLoader(data.validation, batch_size=args.per_device_eval_batch_size, collate_fn=collate)


def token_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """-log p of each label in nats, (B, L), 0 in the padding."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits.float()
    labels = batch["labels"]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING_LABEL, reduction="none"
    )
    return losses.view_as(labels)


def compute_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over the positions; padding counts as 0, so that each token has the same weight in any batch."""
    return token_losses(model, batch).mean()


def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: Any, characters: int) -> dict[str, float]:
    """Nats per token, its exponential, and bits per character, over all tokens of all processes.

    Bits per character are the nats of all predicted tokens, those between documents too, divided by ln 2 and the
    number of characters of the texts.
    """
    nats: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    model.eval()
    with torch.no_grad():
        for batch in loader:
            row_nats = token_losses(model, batch).double().sum(1)
            row_counts = (batch["labels"] != PADDING_LABEL).sum(1)
            row_nats, row_counts = accelerator.gather_for_metrics((row_nats, row_counts))
            nats.append(row_nats.cpu())
            counts.append(row_counts.cpu())
    model.train()
    total, tokens = torch.cat(nats).sum().item(), int(torch.cat(counts).sum())
    return {
        "loss": total / tokens,
        "perplexity": math.exp(min(total / tokens, _LARGEST_EXPONENT)),
        "bits_per_character": total / math.log(2) / characters,
    }


def separator_of(tokenizer: Any) -> int:
    """The id of the token that stands before each document.

    Raises:
        UsageError: the tokenizer has no token for the end of a text.
    """
    for name in ("eos_token_id", "bos_token_id", "sep_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    raise UsageError("the tokenizer has no end-of-text token (eos_token) to put between documents: add one to it.")


def encode(documents: Documents, tokenizer: Any) -> Dataset:
    """Tokens with the separator first, and the number of characters, of all documents that have any.

    The result is cached on disk under a name that depends on the content, and mapped into memory.
    """
    rows, separator = documents.rows, separator_of(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    what = backend.to_str() if backend is not None else repr(tokenizer)
    content = repr((rows._fingerprint, what, separator, documents.column, documents.part))
    return rows.map(
        functools.partial(_encode_batch, documents=documents, tokenizer=tokenizer, separator=separator),
        batched=True,
        remove_columns=rows.column_names,
        features=_ENCODED,
        new_fingerprint=hashlib.sha256(content.encode()).hexdigest()[:32],
        desc="tokenise",
    )


def pieces(encoded: Dataset) -> Iterator[np.ndarray[Any, Any]]:
    """The tokens of all documents in order, as views of the mapped file."""
    for chunk in encoded.data.column("tokens").chunks:
        yield chunk.flatten().to_numpy(zero_copy_only=True)


def _encode_batch(
    batch: dict[str, list[Any]], documents: Documents, tokenizer: Any, separator: int
) -> dict[str, list[Any]]:
    texts = [text for text in map(documents.cut, batch[documents.column]) if text]
    if not texts:
        return {"tokens": [], "characters": []}
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"tokens": [[separator, *tokens] for tokens in encoded], "characters": [len(text) for text in texts]}


def _characters(encoded: Dataset) -> int:
    return sum(int(np.sum(chunk.to_numpy())) for chunk in encoded.data.column("characters").chunks)


def _tell_unknown(encoded: Dataset, tokenizer: Any, name: str, accelerator: Accelerator) -> None:
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id == separator_of(tokenizer):
        return
    unknown = sum(int((piece == tokenizer.unk_token_id).sum()) for piece in pieces(encoded))
    if unknown:
        accelerator.print(
            f"{name}: {unknown} tokens are unknown to the tokenizer and stand as {tokenizer.unk_token!r}: bits per "
            "character do not count what it would take to tell them apart"
        )


def _stream(
    args: LanguageModelArguments, train: Documents, tokenizer: Any, block_size: int, accelerator: Accelerator
) -> StreamedBlocks:
    """The blocks of this process; it begins its share of the documents anew whenever it has read all of it."""
    separator = separator_of(tokenizer)
    length = args.per_device_train_batch_size * args.gradient_accumulation_steps * int(args.max_train_steps or 0)
    if accelerator.num_processes > 1:  # of the first so many documents, a share of the files is not a part
        whole_files = args.max_train_samples is None
        train = share_of_stream(train, accelerator.process_index, accelerator.num_processes, whole_files)

    def documents() -> Iterator[list[int]]:
        for batch in train.rows.iter(batch_size=_STREAMED_AT_ONCE):
            yield from _encode_batch(batch, train, tokenizer, separator)["tokens"]

    return StreamedBlocks(documents, block_size, length, args.shuffle_buffer, args.seed)
