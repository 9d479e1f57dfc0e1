"""Story question answering: bAbI files or generated stories in, batches, metrics, and the model on disk."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

import gumbel_attention as ga
from harness.arguments import RunArguments, check_setting, setting
from harness.attention import attention_config
from harness.errors import UsageError
from harness.right_wrong import to_text
from tasks.babi import Story, StoryBatch, Vocabulary, WorldSettings, encode_stories, generate_stories, read_babi
from tasks.story_memory import MemoryNetwork
from tasks.story_model import StoryModel

MODEL_FILE = "story_model.json"
WEIGHTS_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class StoryArguments(RunArguments):
    """Settings of ``story_qa.py``."""

    model_name_or_path: str = setting("scratch", "'scratch': the model is always built from the sizes below")
    train_file: str | None = setting(None, "file in the bAbI format to train on; null generates stories")
    validation_file: str | None = setting(None, "the file to evaluate on")
    max_train_samples: int | None = setting(None, "train on a subset of this many questions; null is everything")
    holdout_percentage: int | None = setting(
        None,
        "evaluate on all questions of this share of the training stories, not trained on then, in place of the "
        "validation data",
    )
    data_seed: int = setting(0, "chooses the subset and what is held out, makes the stories; does not depend on seed")
    supporting_facts: int = setting(1, "of generated stories: 1 asks for an actor's place, 2 for an object's")
    train_stories: int = setting(2000, "how many to generate to train on")
    validation_stories: int = setting(500, "how many to generate to evaluate on")
    facts: int = setting(6, "facts of a generated story")
    distractors: int = setting(2, "sentences of a generated story that change nothing")
    architecture: Literal["transformer", "memory_network"] = setting(
        "transformer", "encodes sentences by a transformer layer, or is an end-to-end memory network"
    )
    width: int = setting(32, "of the hidden states")
    hops: int | None = setting(None, "attention hops; null is the most supporting facts of a training question")
    max_facts: int = setting(64, "recencies told apart; older facts share the last one")
    max_words: int = setting(16, "longer sentences are cut to this many words")
    soft_start: int = setting(
        0, "of a memory network: this many training batches read with plain softmax, whatever the attention is"
    )
    output_dir: str = setting("runs/story_qa", "where config.yaml, checkpoints and results.json go")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_train_samples", "width", "hops", "max_facts", "max_words", "validation_stories"):
            check_setting(self, name, "> 0", lambda value: value > 0)
        check_setting(self, "holdout_percentage", "from 1 to 99", lambda value: 0 < value < 100)
        for name in ("data_seed", "soft_start"):
            check_setting(self, name, ">= 0", lambda value: value >= 0)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if (self.train_file is None) != (self.validation_file is None):
            raise UsageError("give both train_file and validation_file, or neither to generate stories.")
        if self.model_name_or_path != "scratch":
            raise UsageError(f"model_name_or_path must be 'scratch', got {self.model_name_or_path!r}.")
        if self.soft_start and self.architecture != "memory_network":
            raise UsageError(f"soft_start={self.soft_start} needs architecture: memory_network.")
        if self.gradient_checkpointing:
            raise UsageError("gradient_checkpointing: the story model does not support it, and is small.")
        if self.layers is not None:
            raise UsageError(
                "layers: the story model has one attention layer in each hop, all of which are set alike."
            )


@dataclasses.dataclass(frozen=True)
class StoryData:
    """Both splits as tensors, and the vocabulary of the training stories.

    Attributes:
        train: training questions.
        validation: evaluation questions, held out of the training stories if so configured.
        vocabulary: words and answers.
        supports: most supporting facts of a training question.
    """

    train: StoryBatch
    validation: StoryBatch
    vocabulary: Vocabulary
    supports: int


def load_data(args: StoryArguments, tell: Callable[[str], object]) -> StoryData:
    """Reads or generates the stories; tells how many sentences are cut.

    The validation stories are neither read nor generated where training stories are held out in their place.

    Raises:
        UsageError: a file, or an answer in it, is not usable.
    """
    train, evaluated = _stories(args, "train"), "validation"
    if args.max_train_samples is not None and args.max_train_samples < len(train):
        train = random.Random(args.data_seed).sample(train, args.max_train_samples)
    if args.holdout_percentage is None:
        validation = _stories(args, "validation")
    else:
        train, validation = _hold_out(train, args.holdout_percentage, args.data_seed)
        evaluated = "held-out"
    vocabulary = Vocabulary(train)
    if len(vocabulary.answers) < 2:
        raise UsageError(
            f"all training questions have the answer {vocabulary.answers[0]!r}; there is nothing to learn."
        )
    for number, story in enumerate(validation, start=1):
        if story.answer not in vocabulary.answer_index:
            raise UsageError(
                f"{evaluated} question {number} ({story.question!r}) has the answer {story.answer!r}, which is not "
                f"among the training answers {vocabulary.answers}."
            )
    batches = {}
    for name, stories in (("train", train), (evaluated, validation)):
        sentences = {sentence for story in stories for sentence in (*story.facts, story.question)}
        cut = sum(len(vocabulary.encode(sentence)) > args.max_words for sentence in sentences)
        if cut:
            tell(f"{name}: {cut} of {len(sentences)} different sentences are cut to max_words={args.max_words}")
        batches[name] = _cut(encode_stories(stories, vocabulary), args.max_words)
    supports = max(len(story.supports) for story in train)
    return StoryData(batches["train"], batches[evaluated], vocabulary, supports)


def describe(batch: StoryBatch) -> list[dict[str, Any]]:
    """The questions as plain values, by which data are told apart."""
    columns = {name: tensor.tolist() for name, tensor in vars(batch).items()}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(batch))]


def make_loaders(
    data: StoryData, args: StoryArguments, order: torch.Generator
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training batches in random order, evaluation batches from short to long stories; each a dict of tensors."""

    def collate_from(stories: StoryBatch) -> Callable[[Sequence[int]], dict[str, Tensor]]:
        return lambda rows: dict(vars(stories.select(torch.tensor(rows))))

    train: DataLoader[Any] = DataLoader(
        range(len(data.train)),  # type: ignore[arg-type]  # a sequence is a data set
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        generator=order,
        collate_fn=collate_from(data.train),
    )
    evaluation: DataLoader[Any] = DataLoader(
        data.validation.fact_mask.sum(1).argsort(stable=True).tolist(),
        batch_size=args.per_device_eval_batch_size,
        collate_fn=collate_from(data.validation),
    )
    return train, evaluation


def make_model(data: StoryData, args: StoryArguments) -> StoryModel | MemoryNetwork:
    """The model with the run's attention, or with a plain softmax for ``attention: unpatched``.

    Raises:
        UsageError: the layer refuses a setting.
    """
    config = attention_config(args) or ga.GumbelAttentionConfig(noise="none")
    try:
        return _build(args.architecture, data.vocabulary, config, _sizes(args, args.hops or data.supports))
    except (TypeError, ValueError) as error:
        raise UsageError(f"attention settings: {error}") from error


def compute_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy of the answers; supporting facts are not trained on."""
    return torch.nn.functional.cross_entropy(model(StoryBatch(**batch)).logits.float(), batch["answer"])


def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: Iterable[Any]) -> dict[str, float | str]:
    """Loss and accuracy of the answers, and how the choices fare; leaves the model in train().

    A hop's choice is the fact with the most weight. ``supporting_fact_accuracy`` is the share of choices that are
    supporting facts, ``all_supports_found`` the share of questions whose every supporting fact is chosen, and
    ``right_choices`` which questions these are (:func:`harness.right_wrong.to_text`).
    """
    columns: list[Tensor] = []
    model.eval()
    with torch.no_grad():
        for batch in loader:
            output = model(StoryBatch(**batch))
            logits, answer, supports = output.logits.float(), batch["answer"], batch["supports"]
            losses = torch.nn.functional.cross_entropy(logits, answer, reduction="none")
            gold = supports.gather(1, output.picks)
            found = torch.zeros_like(supports).scatter(1, output.picks, True) & supports
            all_found = found.sum(1) == supports.sum(1)
            rows = torch.stack([losses, logits.argmax(-1) == answer, gold.float().mean(1), all_found], 1)
            columns.append(accelerator.gather_for_metrics(rows).double().cpu())
    model.train()
    table = torch.cat(columns)
    names = ("loss", "accuracy", "supporting_fact_accuracy", "all_supports_found")
    return {**dict(zip(names, table.mean(0).tolist(), strict=True)), "right_choices": to_text(table[:, 3] > 0)}


def save_model(model: StoryModel | MemoryNetwork, data: StoryData, args: StoryArguments, folder: Path) -> None:
    """Writes weights, sizes, vocabulary and attention; :func:`load_model` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / WEIGHTS_FILE)
    attention: Any = model.attention[0].gumbel
    content = {
        "words": list(data.vocabulary.words),
        "answers": data.vocabulary.answers,
        "architecture": args.architecture,
        "sizes": _sizes(args, args.hops or data.supports),
        "attention": attention.config.to_dict(),
        "tau": attention.tau.item() if attention.log_tau is None else None,
    }
    (folder / MODEL_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_model(folder: str | Path) -> tuple[StoryModel | MemoryNetwork, Vocabulary]:
    """The model in eval() with the attention it was saved with, and its vocabulary."""
    content = json.loads((Path(folder) / MODEL_FILE).read_text(encoding="utf-8"))
    vocabulary = Vocabulary.of(content["words"], content["answers"])
    config = ga.GumbelAttentionConfig.from_dict(content["attention"])
    model = _build(content["architecture"], vocabulary, config, content["sizes"])
    model.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE))
    if content["tau"] is not None:
        model.set_tau(content["tau"])
    return model.eval(), vocabulary


def _sizes(args: StoryArguments, hops: int) -> dict[str, int]:
    """Keyword arguments of the model beside its vocabulary and attention."""
    sizes = {"width": args.width, "hops": hops, "max_facts": args.max_facts}
    if args.architecture == "memory_network":
        return sizes | {"soft_start": args.soft_start}
    return sizes | {"max_words": args.max_words}


def _build(
    architecture: str, vocabulary: Vocabulary, config: ga.GumbelAttentionConfig, sizes: dict[str, int]
) -> StoryModel | MemoryNetwork:
    kind = MemoryNetwork if architecture == "memory_network" else StoryModel
    return kind(vocabulary.size, len(vocabulary.answers), config=config, **sizes)


def _stories(args: StoryArguments, split: Literal["train", "validation"]) -> list[Story]:
    """The stories of a split, read from its file or generated, from different seeds for the two."""
    path = args.train_file if split == "train" else args.validation_file
    if path is not None:
        return _read(path, f"{split}_file")
    count = args.train_stories if split == "train" else args.validation_stories
    try:
        world = WorldSettings(args.supporting_facts, count, facts=args.facts, distractors=args.distractors)
    except ValueError as error:
        raise UsageError(f"generated stories: {error}") from error
    return generate_stories(world, 2 * args.data_seed + (split == "validation"))


def _hold_out(questions: list[Story], percentage: int, seed: int) -> tuple[list[Story], list[Story]]:
    """The questions of the stories that stay, and those of the stories held out, chosen at random by the seed.

    A story goes to one side with all of its questions, whose facts are largely the same; the percentage is of stories.
    """
    numbers = sorted({question.story_id for question in questions})
    count = len(numbers) * percentage // 100
    if not 0 < count < len(numbers):
        raise UsageError(
            f"holdout_percentage={percentage} of the {len(numbers)} training stories is {count}: there must be "
            "stories on both sides."
        )
    held = set(random.Random(f"holdout {seed}").sample(numbers, count))  # a stream that makes no stories
    stay = [question for question in questions if question.story_id not in held]
    return stay, [question for question in questions if question.story_id in held]


def _read(path: str, argument: str) -> list[Story]:
    if not Path(path).is_file():
        raise UsageError(f"{argument} {path!r}: no such file (relative paths start at {Path.cwd()}).")
    try:
        return read_babi(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{argument} {path!r} cannot be read as UTF-8 text: {error}.") from error
    except ValueError as error:
        raise UsageError(f"{argument}: {error}") from error


def _cut(batch: StoryBatch, words: int) -> StoryBatch:
    return dataclasses.replace(batch, facts=batch.facts[:, :, :words], question=batch.question[:, :words])
