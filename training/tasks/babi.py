"""Stories with supporting facts in the bAbI text format: reader, writer, generator and tensors.

The format is that of the bAbI tasks (Weston et al. 2015, arXiv:1502.05698). A line is either a fact,
``ID text``, or a question, ``ID question<TAB>answer<TAB>supporting ids``. ID 1 starts a new story, and the
IDs count question lines too. The generator has a vocabulary and a small world of its own, no download needed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ACTORS = ("Nora", "Emil", "Priya", "Tomas", "Aiko", "Lena", "Omar", "Ruth")
PLACES = ("library", "harbour", "bakery", "station", "museum", "orchard", "cellar", "tower")
OBJECTS = ("lantern", "violin", "atlas", "teapot")
MOVES = ("walked to", "hurried to", "cycled to", "strolled over to")
TAKES = ("collected", "packed", "lifted")
DROPS = ("unpacked", "set down", "let go of")
IDLES = ("hummed a tune", "looked at the clock", "told a joke")

PADDING, UNKNOWN = 0, 1


@dataclass(frozen=True)
class Story:
    """One question with the facts that were told before it.

    Attributes:
        facts: the statements of the story so far, oldest first; earlier questions are left out.
        question: the question.
        answer: its answer, one word in the single-word tasks.
        supports: positions in ``facts`` of the supporting facts, in the order of the file.
        story_id: which story of the file it belongs to, counted from 0; a story can have several questions.
    """

    facts: tuple[str, ...]
    question: str
    answer: str
    supports: tuple[int, ...]
    story_id: int


def read_babi(path: str | Path) -> list[Story]:
    """Reads a bAbI file; see `parse_babi`."""
    return parse_babi(Path(path).read_text(encoding="utf-8"), name=str(path))


def parse_babi(text: str, name: str = "<text>") -> list[Story]:
    """Parses bAbI text into one `Story` per question.

    Args:
        text: the content of a file.
        name: what error messages call it.

    Raises:
        ValueError: for an empty file, a file without a question, or a malformed line (with its number).
    """
    if not text.strip():
        raise ValueError(f"{name}: expected bAbI stories, got an empty file; check the file")
    stories: list[Story] = []
    facts: dict[int, str] = {}  # line ID -> statement, of the current story
    previous, story_id = 0, -1
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        where = f"{name}, line {number}"
        line_id, body = _split_id(line, previous, where)
        if line_id == 1:
            facts, story_id = {}, story_id + 1
        if "\t" in body:
            question, answer, supports = _split_question(body, facts, where)
            stories.append(Story(tuple(facts.values()), question, answer, supports, story_id))
        elif body.endswith("?"):
            raise _malformed(where, "a question with <TAB>answer<TAB>supporting ids after it", body)
        else:
            facts[line_id] = body
        previous = line_id
    if not stories:
        raise ValueError(f"{name}: expected at least one question line, got only facts; check the file")
    return stories


def _split_id(line: str, previous: int, where: str) -> tuple[int, str]:
    """Splits a line into its ID, which must be 1 or the successor of `previous`, and the rest."""
    match = re.fullmatch(r"([0-9]+) +(\S.*)", line.rstrip(" \r"))
    if match is None:
        raise _malformed(where, "'ID text' with a whole number and a space in front", line)
    line_id = int(match[1])
    if line_id not in (1, previous + 1):
        wanted = "ID 1 (a first line)" if previous == 0 else f"ID {previous + 1}, or 1 for a new story"
        raise _malformed(where, wanted, f"ID {line_id}")
    return line_id, match[2]


def _split_question(body: str, facts: dict[int, str], where: str) -> tuple[str, str, tuple[int, ...]]:
    """Splits a question line and turns its supporting IDs into positions among `facts`."""
    fields = [field.strip() for field in body.split("\t")]
    if len(fields) != 3 or not all(fields):
        raise _malformed(where, "question<TAB>answer<TAB>supporting ids, none of them empty", body)
    position = {str(line_id): index for index, line_id in enumerate(facts)}
    for support in fields[2].split():
        if support not in position:
            raise _malformed(where, "supporting ids of earlier facts, separated by spaces", support)
    return fields[0], fields[1], tuple(position[support] for support in fields[2].split())


def _malformed(where: str, expected: str, got: str) -> ValueError:
    return ValueError(f"{where}: expected {expected}, got {got!r}; correct the line or leave out its story")


def format_babi(stories: Sequence[Story]) -> str:
    """Writes stories as bAbI text, the inverse of `parse_babi`.

    Neighbours with the same ``story_id`` become one story of the file: the later must begin with the facts
    of the earlier.
    """
    lines: list[str] = []
    line_ids: list[int] = []  # of the facts of the current story
    for index, story in enumerate(stories):
        before = stories[index - 1] if index else None
        if before is None or before.story_id != story.story_id:
            line_ids, next_id = [], 1
        elif story.facts[: len(before.facts)] != before.facts:
            raise ValueError(
                f"story {index}: expected it to begin with the facts of the question before it, which has "
                f"the same story_id {story.story_id}, got other facts; give it a story_id of its own"
            )
        for fact in story.facts[len(line_ids) :]:
            lines.append(f"{next_id} {fact}")
            line_ids.append(next_id)
            next_id += 1
        supports = " ".join(str(line_ids[support]) for support in story.supports)
        lines.append(f"{next_id} {story.question} \t{story.answer}\t{supports}")
        next_id += 1
    return "".join(line + "\n" for line in lines)


def write_babi(stories: Sequence[Story], path: str | Path) -> None:
    """Writes stories to a file in the bAbI format; see `format_babi`."""
    Path(path).write_text(format_babi(stories), encoding="utf-8")


@dataclass(frozen=True)
class WorldSettings:
    """What `generate_stories` makes.

    Attributes:
        supporting_facts: 1 asks where an actor is; 2 asks where an object is that actors take and drop.
        stories: number of stories.
        questions: questions in each story.
        facts: facts about the world before each question.
        distractors: sentences before each question that name an actor and change nothing.
        actors: number of actors.
        places: number of places.
        objects: number of objects; of no effect with one supporting fact.
    """

    supporting_facts: int = 1
    stories: int = 1000
    questions: int = 1
    facts: int = 6
    distractors: int = 0
    actors: int = 4
    places: int = 6
    objects: int = 3

    def __post_init__(self) -> None:
        ranges = {
            "supporting_facts": (1, 2),
            "stories": (1, None),
            "questions": (1, None),
            "facts": (self.supporting_facts, None),
            "distractors": (0, None),
            "actors": (1, len(ACTORS)),
            "places": (2, len(PLACES)),
            "objects": (1, len(OBJECTS)),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                wanted = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name}: expected {wanted}, got {value}; choose a value in that range")


class _World:
    """Actors who move between places and carry objects; remembers which sentence last told each thing."""

    def __init__(self, settings: WorldSettings, rng: random.Random) -> None:
        self.rng = rng
        self.actors = ACTORS[: settings.actors]
        self.places = PLACES[: settings.places]
        self.objects = OBJECTS[: settings.objects] if settings.supporting_facts == 2 else ()
        self.facts: list[str] = []
        self.actor_at: dict[str, tuple[str, int]] = {}  # actor -> place, the fact that told it
        self.carried: dict[str, tuple[str, int]] = {}  # object -> who carries it, the fact that told it
        self.lying: dict[str, tuple[str, tuple[int, int]]] = {}  # object -> place, the two facts that told it

    def act(self, must_take: bool) -> None:
        """Tells one thing that changes the world; `must_take` has an object taken."""
        takes = [
            (actor, thing)
            for actor, (place, _) in self.actor_at.items()
            for thing in self.objects
            if thing not in self.carried and (thing not in self.lying or self.lying[thing][0] == place)
        ]
        drops = [(actor, thing) for thing, (actor, _) in self.carried.items()]
        options = [self._move] if not (must_take and takes) else []
        if takes:
            options.append(lambda: self._take(*self.rng.choice(takes)))
        if drops:
            options.append(lambda: self._drop(*self.rng.choice(drops)))
        self.rng.choice(options)()

    def idle(self) -> None:
        """Tells something that changes nothing."""
        self.facts.append(f"{self.rng.choice(self.actors)} {self.rng.choice(IDLES)}.")

    def ask(self) -> tuple[str, str, tuple[int, ...]]:
        """Returns a question that the facts answer, its answer and the supporting facts."""
        if not self.objects:
            actor = self.rng.choice(list(self.actor_at))
            place, told = self.actor_at[actor]
            return f"Where is {actor}?", place, (told,)
        thing = self.rng.choice([*self.carried, *self.lying])
        if thing in self.carried:
            actor, taken = self.carried[thing]
            place, moved = self.actor_at[actor]
            return f"Where is the {thing}?", place, (taken, moved)
        place, supports = self.lying[thing]
        return f"Where is the {thing}?", place, supports

    def _move(self) -> None:
        actor = self.rng.choice(self.actors)
        here = self.actor_at.get(actor, ("", -1))[0]
        place = self.rng.choice([place for place in self.places if place != here])
        self.actor_at[actor] = (place, len(self.facts))
        self.facts.append(f"{actor} {self.rng.choice(MOVES)} the {place}.")

    def _take(self, actor: str, thing: str) -> None:
        self.lying.pop(thing, None)
        self.carried[thing] = (actor, len(self.facts))
        self.facts.append(f"{actor} {self.rng.choice(TAKES)} the {thing}.")

    def _drop(self, actor: str, thing: str) -> None:
        del self.carried[thing]
        place, moved = self.actor_at[actor]
        self.lying[thing] = (place, (len(self.facts), moved))
        self.facts.append(f"{actor} {self.rng.choice(DROPS)} the {thing}.")


def generate_stories(settings: WorldSettings, seed: int) -> list[Story]:
    """Makes stories whose answers and supporting facts are right by construction, fixed by the seed."""
    rng = random.Random(seed)
    stories: list[Story] = []
    for story_id in range(settings.stories):
        world = _World(settings, rng)
        for _ in range(settings.questions):
            _tell(world, settings)
            question, answer, supports = world.ask()
            stories.append(Story(tuple(world.facts), question, answer, supports, story_id))
    return stories


def _tell(world: _World, settings: WorldSettings) -> None:
    """Tells the facts and distractors before one question, and sees to it that there is something to ask."""
    idle = [False] * settings.facts + [True] * settings.distractors
    world.rng.shuffle(idle)
    remaining = settings.facts
    for is_idle in idle:
        if is_idle:
            world.idle()
            continue
        nothing_to_ask = bool(world.objects) and not (world.carried or world.lying)
        world.act(must_take=nothing_to_ask and remaining == 1)
        remaining -= 1


def words(sentence: str) -> list[str]:
    """Splits a sentence into lower-case words, without punctuation."""
    return re.findall(r"\w+", sentence.lower())


class Vocabulary:
    """Numbers for words (0 pads, 1 is any unknown word) and for answers.

    Args:
        stories: the training stories; every word and answer in them gets a number, in alphabetical order.
    """

    def __init__(self, stories: Iterable[Story]) -> None:
        stories = list(stories)
        sentences = {sentence for story in stories for sentence in (*story.facts, story.question)}
        known = sorted({word for sentence in sentences for word in words(sentence)})
        self._number(known, sorted({story.answer for story in stories}))

    @classmethod
    def of(cls, words: Sequence[str], answers: Sequence[str]) -> Vocabulary:
        """The vocabulary with these words and answers, in the order of their numbers."""
        vocabulary = cls(())
        vocabulary._number(words, answers)
        return vocabulary

    def _number(self, words: Sequence[str], answers: Sequence[str]) -> None:
        self.words = {word: index for index, word in enumerate(words, start=2)}
        self.answers = list(answers)
        self.answer_index = {answer: index for index, answer in enumerate(self.answers)}

    @property
    def size(self) -> int:
        """Number of word numbers, padding and the unknown word included."""
        return len(self.words) + 2

    def encode(self, sentence: str) -> list[int]:
        """Turns a sentence into word numbers."""
        return [self.words.get(word, UNKNOWN) for word in words(sentence)]


@dataclass(frozen=True)
class StoryBatch:
    """Stories as tensors, padded to the longest.

    Attributes:
        facts: (B, N, W) word numbers, 0 where there is no word.
        fact_mask: (B, N) bool, True where there is a fact.
        question: (B, W') word numbers.
        answer: (B,) answer numbers, -1 for an answer that the vocabulary does not know.
        supports: (B, N) bool, True at supporting facts.
    """

    facts: Tensor
    fact_mask: Tensor
    question: Tensor
    answer: Tensor
    supports: Tensor

    def __len__(self) -> int:
        return len(self.answer)

    def select(self, rows: Tensor | slice) -> StoryBatch:
        """Returns the chosen stories, without columns that only pad."""
        facts, mask, question = self.facts[rows], self.fact_mask[rows], self.question[rows]
        longest, width = int(mask.sum(1).max()), int((facts != PADDING).sum(2).max())
        question = question[:, : int((question != PADDING).sum(1).max())]
        supports = self.supports[rows][:, :longest]
        facts, mask = facts[:, :longest, :width], mask[:, :longest]
        return StoryBatch(facts, mask, question, self.answer[rows], supports)

    def to(self, device: torch.device | str) -> StoryBatch:
        """Returns the batch on another device."""
        return StoryBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def encode_stories(stories: Sequence[Story], vocabulary: Vocabulary) -> StoryBatch:
    """Turns stories into one padded batch."""
    if not stories:
        raise ValueError("stories: expected at least one story, got none; pass what read_babi returns")
    sentences = sorted({fact for story in stories for fact in story.facts})
    row_of = {sentence: row for row, sentence in enumerate(sentences, start=1)}
    table = _pad([[PADDING], *(vocabulary.encode(sentence) for sentence in sentences)])  # row 0 is padding
    told = _pad([[row_of[fact] for fact in story.facts] for story in stories])
    supports = torch.zeros(told.shape, dtype=torch.bool)
    for row, story in enumerate(stories):
        supports[row, list(story.supports)] = True
    question = _pad([vocabulary.encode(story.question) for story in stories])
    answer = torch.tensor([vocabulary.answer_index.get(story.answer, -1) for story in stories])
    return StoryBatch(table[told], told != 0, question, answer, supports)


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Makes a matrix of lists of numbers, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PADDING] * (width - len(row))] for row in rows])
