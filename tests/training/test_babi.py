"""Stories: the format, the generator checked by an independent solver, the tensors."""

import re

import pytest
import torch

from tasks.babi import (
    UNKNOWN,
    Story,
    Vocabulary,
    WorldSettings,
    encode_stories,
    format_babi,
    generate_stories,
    parse_babi,
    read_babi,
    write_babi,
)

TEXT = (
    "1 Nora walked to the tower.\n"
    "2 Emil walked to the cellar.\n"
    "3 Where is Nora? \ttower\t1\n"
    "4 Nora walked to the museum.\n"
    "5 Where is Nora? \tmuseum\t4\n"
    "1 Emil collected the atlas.\n"
    "2 Emil walked to the tower.\n"
    "3 Where is the atlas? \ttower\t1 2\n"
)

GO = "walked to|hurried to|cycled to|strolled over to|went to|went back to|moved to|journeyed to|travelled to"
TAKE = "collected|packed|lifted|got|took|grabbed|picked up"
DROP = "unpacked|set down|let go of|dropped|discarded|left|put down"


def solve(facts: tuple[str, ...], question: str) -> tuple[str, tuple[int, ...]]:
    """Answers a question by reading the facts backwards: place, and the facts that show it."""

    def last(pattern: str, before: int) -> tuple[int, re.Match[str]]:
        for index in reversed(range(before)):
            if match := re.fullmatch(pattern, facts[index]):
                return index, match
        raise LookupError(f"nothing matches {pattern!r}")

    thing = re.fullmatch(r"Where is the (\w+)\?", question)
    if thing is None:
        actor = re.fullmatch(r"Where is (\w+)\?", question)[1]
        index, match = last(rf"{actor} (?:{GO}) the (\w+)\.", len(facts))
        return match[1], (index,)
    handled, match = last(rf"(\w+) ({TAKE}|{DROP}) the {thing[1]}(?: there)?\.", len(facts))
    carried = re.fullmatch(TAKE, match[2]) is not None
    moved, place = last(rf"{match[1]} (?:{GO}) the (\w+)\.", len(facts) if carried else handled)
    return place[1], (handled, moved)


def wrong(stories: list[Story]) -> list[int]:
    """Indices of the stories whose answer or supports the solver does not confirm."""
    return [i for i, s in enumerate(stories) if solve(s.facts, s.question) != (s.answer, s.supports)]


def settings(supporting_facts: int = 1, **kw: int) -> WorldSettings:
    return WorldSettings(supporting_facts=supporting_facts, **{"stories": 300, "distractors": 2, **kw})


def test_reader_leaves_questions_out_of_the_facts():
    stories = parse_babi(TEXT)
    assert stories[1] == Story(
        ("Nora walked to the tower.", "Emil walked to the cellar.", "Nora walked to the museum."),
        "Where is Nora?",
        "museum",
        (2,),
        0,
    )
    assert stories[2].supports == (0, 1)
    assert [story.story_id for story in stories] == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected bAbI stories, got an empty file"),
        ("\n \n", "got an empty file"),
        ("1 Nora walked to the tower.\n", "expected at least one question line, got only facts"),
        ("Nora walked to the tower.\n", "line 1: expected 'ID text'.*got 'Nora walked"),
        ("2 Nora walked to the tower.\n", r"line 1: expected ID 1 \(a first line\), got 'ID 2'"),
        ("1 A b.\n3 C d.\n", "line 2: expected ID 2, or 1 for a new story, got 'ID 3'"),
        ("1 A b.\n\n2 C d.\n", "line 2: expected 'ID text'.*got ''"),
        ("1 A b.\n2 Where is A?\n", "line 2: expected a question with <TAB>answer.*got 'Where is A.'"),
        ("1 A b.\n2 Where is A?\tb\n", "line 2: expected question<TAB>answer<TAB>supporting ids"),
        ("1 A b.\n2 Where is A?\t\t1\n", "line 2: .*none of them empty"),
        ("1 A b.\n2 Where is A?\tb\t1,1\n", "line 2: expected supporting ids of earlier facts.*got '1,1'"),
        ("1 A b.\n2 Where is A?\tb\t3\n3 C d.\n", "line 2: expected supporting ids of earlier.*got '3'"),
        ("1 A b.\n2 Where is A?\tb\t1\n3 Where is A?\tb\t2\n", "line 3: .*got '2'"),
        ("1 A b.\n2 Where is A?\tb\t1\n1 C d.\n2 Where is C?\td\t2\n", "line 4: .*got '2'"),
    ],
)
def test_malformed_text_is_refused_with_its_place(tmp_path, text, message):
    path = tmp_path / "stories.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"stories.txt.*{message}"):
        read_babi(path)


def test_reader_takes_windows_line_ends():
    assert parse_babi(TEXT.replace("\n", "\r\n")) == parse_babi(TEXT)


def test_writer_refuses_questions_that_do_not_share_their_facts():
    first, _, other = parse_babi(TEXT)
    with pytest.raises(ValueError, match="story 1: expected it to begin with the facts"):
        format_babi([first, Story(other.facts, other.question, other.answer, other.supports, first.story_id)])


@pytest.mark.parametrize("supporting_facts", [1, 2])
@pytest.mark.parametrize("sizes", [{}, {"questions": 3}, {"facts": 2, "actors": 1, "places": 2}])
def test_generated_stories_are_right_and_round_trip(tmp_path, supporting_facts, sizes):
    stories = generate_stories(settings(supporting_facts, **sizes), seed=3)
    questions = sizes.get("questions", 1)
    assert wrong(stories) == []
    assert {len(story.supports) for story in stories} == {supporting_facts}
    assert len(stories) == 300 * questions
    per_question = sizes.get("facts", 6) + 2
    assert {len(story.facts) for story in stories} == {per_question * (q + 1) for q in range(questions)}
    write_babi(stories, tmp_path / "stories.txt")
    assert read_babi(tmp_path / "stories.txt") == stories


@pytest.mark.parametrize("supporting_facts", [1, 2])
def test_the_solver_catches_corrupted_stories(supporting_facts):
    story = generate_stories(settings(supporting_facts), seed=4)[0]
    facts, supports = list(story.facts), story.supports
    facts[supports[-1]] = facts[supports[-1]].replace(f"the {story.answer}.", "the quarry.")
    assert wrong([story]) == []
    assert wrong([Story(tuple(facts), story.question, story.answer, supports, 0)]) == [0]
    assert wrong([Story(story.facts, story.question, "quarry", supports, 0)]) == [0]
    moved = (supports[0] + 1, *supports[1:])
    assert wrong([Story(story.facts, story.question, story.answer, moved, 0)]) == [0]


def test_generator_depends_on_its_seed_alone():
    assert generate_stories(settings(2), 5) == generate_stories(settings(2), 5)
    assert generate_stories(settings(2), 5) != generate_stories(settings(2), 6)


def test_generator_has_objects_carried_and_dropped_and_answers_spread():
    stories = generate_stories(settings(2, stories=600, facts=10), seed=7)
    dropped = [re.search(f" ({DROP}) ", story.facts[story.supports[0]]) is not None for story in stories]
    assert 0.2 < sum(dropped) / len(dropped) < 0.8
    answers = [story.answer for story in stories]
    assert max(answers.count(answer) for answer in set(answers)) < 0.3 * len(answers)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"supporting_facts": 3}, "supporting_facts: expected 1 to 2, got 3"),
        ({"supporting_facts": 2, "facts": 1}, "facts: expected at least 2, got 1"),
        ({"actors": 100}, "actors: expected 1 to 8, got 100"),
        ({"places": 1}, "places: expected 2 to 8, got 1"),
    ],
)
def test_impossible_worlds_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        WorldSettings(**sizes)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_published_files_read_and_write_back(data_dir, number):
    (path,) = sorted(data_dir("babi").glob(f"qa{number}_*_test.txt"))
    stories = read_babi(path)
    assert len(stories) == 1000
    for story in stories:
        assert len(story.supports) == number
        assert all(0 <= support < len(story.facts) for support in story.supports)
        assert any(story.answer in story.facts[support] for support in story.supports)
    assert format_babi(stories) == path.read_text()


@pytest.mark.parametrize("number", [1, 2])
def test_published_stories_agree_with_the_solver(data_dir, number):
    (path,) = sorted(data_dir("babi").glob(f"qa{number}_*_test.txt"))
    assert wrong(read_babi(path)) == []


def test_tensors_say_what_the_stories_say():
    stories = parse_babi(TEXT)
    vocabulary = Vocabulary(stories)
    batch = encode_stories(stories, vocabulary)
    assert vocabulary.answers == ["museum", "tower"]
    assert batch.facts.shape == (3, 3, 5)
    assert batch.fact_mask.sum(1).tolist() == [2, 3, 2]
    assert batch.supports.nonzero().tolist() == [[0, 0], [1, 2], [2, 0], [2, 1]]
    assert batch.answer.tolist() == [1, 0, 1]
    for row, story in enumerate(stories):
        for column, fact in enumerate(story.facts):
            encoded = vocabulary.encode(fact)
            assert batch.facts[row, column].tolist() == encoded + [0] * (5 - len(encoded))
    assert not batch.facts[~batch.fact_mask].any()


def test_unknown_words_and_answers_have_their_numbers():
    vocabulary = Vocabulary(parse_babi(TEXT)[:1])
    (story,) = parse_babi("1 Ruth walked to the quarry.\n2 Where is Ruth?\tquarry\t1\n")
    batch = encode_stories([story], vocabulary)
    assert batch.facts[0, 0].tolist().count(UNKNOWN) == 2
    assert batch.answer.tolist() == [-1]


def test_select_trims_padding():
    batch = encode_stories(parse_babi(TEXT), Vocabulary(parse_babi(TEXT)))
    part = batch.select(torch.tensor([2, 0]))
    assert len(part) == 2
    assert part.facts.shape == (2, 2, 5)
    assert torch.equal(part.facts[0], batch.facts[2, :2])
    assert part.supports.tolist() == [[True, True], [True, False]]


def test_no_stories_cannot_be_encoded():
    with pytest.raises(ValueError, match="expected at least one story, got none"):
        encode_stories([], Vocabulary([]))
