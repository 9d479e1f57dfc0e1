"""Verdicts from rows: planted effects are found, equal arms are not, and the sentences say what the numbers say."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from harness.errors import UsageError
from study.plan import Study
from study.questions import Condition, Question
from study.rows import Row
from study.statistics import smallest_visible
from study.verdicts import direction, judge, probability

SOFTMAX = [0.80, 0.81, 0.79, 0.82, 0.805]
GAIN = [0.021, 0.019, 0.0202, 0.0187, 0.0223]


def question(name="q", compare="gumbel", against="softmax", metric="accuracy", modes=("noise_off", "noise_off")):
    sides = Condition(compare, modes[0]), Condition(against, modes[1])
    return Question(name, "Is it better?", *sides, metric)


def study(*questions, metric="accuracy", better="higher"):
    return Study("a study", "finetune", metric, better, Path("runs"), (), {}, {}, (0, 1), questions=questions)


def rows_of(arm, values, metric="accuracy", mode="noise_off", seeds=None):
    seeds = range(len(values)) if seeds is None else seeds
    content = [{"final": {mode: {metric: value}}} for value in values]
    return [Row(f"{arm}-seed{seed}-x", arm, seed, item) for seed, item in zip(seeds, content, strict=True)]


def two_arms(gains=GAIN, **kwargs):
    shifted = [value + gain for value, gain in zip(SOFTMAX, gains, strict=True)]
    return [*rows_of("softmax", SOFTMAX, **kwargs), *rows_of("gumbel", shifted, **kwargs)]


def test_a_planted_effect_is_found_either_way():
    found, turned = judge(study(question("a"), question("b", "softmax", "gumbel")), two_arms())
    assert (found.outcome, turned.outcome) == ("better", "worse")
    assert found.comparison.mean == pytest.approx(np.mean(GAIN)) == pytest.approx(-turned.comparison.mean)


@pytest.mark.parametrize(("better", "outcome"), [("higher", "better"), ("lower", "worse")])
def test_better_is_what_the_study_says_of_its_metric(better, outcome):
    assert judge(study(question(), better=better), two_arms())[0].outcome == outcome


def test_better_is_what_the_script_says_of_other_metrics():
    verdict = judge(study(question(metric="loss")), two_arms(metric="loss"))[0]
    assert (verdict.better, verdict.outcome) == ("lower", "worse")
    assert direction(study(better="lower"), "accuracy") == "lower"
    assert direction(study(better="lower"), "f1_macro") == "higher"


def test_all_questions_of_the_study_are_corrected_together():
    alone = judge(study(question("a")), two_arms())[0]
    others = [question(f"more{i}", "gumbel", "softmax") for i in range(3)]
    together = judge(study(question("a"), *others), two_arms())
    assert alone.corrected_p == pytest.approx(alone.comparison.p)
    assert [v.corrected_p for v in together] == pytest.approx([4 * alone.comparison.p] * 4)
    assert {v.questions for v in together} == {4}


def test_a_difference_that_holds_alone_may_not_hold_among_many():
    gains = [0.02, 0.01, 0.024, 0.004, 0.016]
    alone = judge(study(question()), two_arms(gains))[0]
    assert alone.comparison.p < 0.05
    assert alone.outcome == "better"
    among = judge(study(*(question(f"q{i}") for i in range(6))), two_arms(gains))
    assert {v.outcome for v in among} == {"no difference found"}


def test_smallest_visible_difference_is_at_the_corrected_level():
    verdict = judge(study(*(question(f"q{i}") for i in range(4))), two_arms())[0]
    deviation = np.std(GAIN, ddof=1)
    assert verdict.smallest_visible == pytest.approx(smallest_visible(deviation, 5, 0.05 / 4))


def test_two_modes_of_one_arm_are_compared():
    rows = rows_of("gumbel", SOFTMAX)
    for row, gain in zip(rows, GAIN, strict=True):
        row.content["final"]["hard"] = {"accuracy": row.metric("noise_off", "accuracy") - gain}
    asked = question(compare="gumbel", against="gumbel", modes=("hard", "noise_off"))
    verdict = judge(study(asked), rows)[0]
    assert verdict.outcome == "worse"
    assert verdict.sentence.startswith("gumbel (hard) is worse than gumbel (noise_off) in accuracy: -0.02")


def test_seeds_that_one_side_lacks_are_left_out_and_named():
    rows = [row for row in two_arms() if (row.arm, row.seed) not in (("gumbel", 0), ("softmax", 3))]
    verdict = judge(study(question()), rows)[0]
    assert verdict.pairs.seeds == (1, 2, 4)
    assert verdict.pairs.dropped == (0, 3)
    assert verdict.sentence.endswith("Left out, as only one side has them: seeds 0, 3.")


def test_sentence_of_a_difference_found():
    verdict = judge(study(question()), two_arms())[0]
    low, high = verdict.comparison.student.low, verdict.comparison.student.high
    assert verdict.sentence == (
        f"gumbel is better than softmax in accuracy (noise_off): +0.0202 (95 % interval {low:+.3g} to {high:+.3g}), "
        "5 seeds, corrected p < 0.0001. It rests on the t-test alone: with 5 seeds the sign-flip test gives no p "
        "below 0.0625 (here 0.0625)."
    )


def test_sentence_of_no_difference_found():
    verdict = judge(study(question()), two_arms([0.01, -0.012, 0.003, 0.004, -0.02]))[0]
    assert verdict.outcome == "no difference found"
    assert verdict.sentence.startswith(
        "No difference found between gumbel and softmax in accuracy (noise_off): -0.003 ("
    )
    assert (
        f"A difference of {verdict.smallest_visible:.2g} would have been found with 80 % probability"
        in verdict.sentence
    )


def test_the_sign_flip_test_is_heard_where_it_can_speak():
    values = [0.8] * 8
    gains = [0.02, 0.021, 0.022, 0.019, 0.0205, 0.0195, 0.0215, 0.0185]
    rows = [*rows_of("softmax", values), *rows_of("gumbel", [a + b for a, b in zip(values, gains, strict=True)])]
    verdict = judge(study(question()), rows)[0]
    assert verdict.comparison.support() == "agrees"
    assert "sign-flip" not in verdict.sentence


def test_equal_values_on_all_seeds():
    verdict = judge(study(question()), two_arms([0.0] * 5))[0]
    assert (verdict.outcome, verdict.corrected_p, verdict.smallest_visible) == ("no difference found", 1, None)
    assert verdict.sentence.endswith("All seeds gave equal values, so what could have been seen is unknown.")
    same = judge(study(question()), two_arms([0.01] * 5))[0]
    assert same.outcome == "no difference found"
    assert same.smallest_visible > 0.01


def test_mixed_rows_are_marked():
    rows = two_arms()
    rows[0] = dataclasses.replace(rows[0], differs=("torch",))
    verdict = judge(study(question()), rows)[0]
    assert verdict.mixed
    assert verdict.sentence.endswith("The rows are of mixed versions.")
    assert not judge(study(question()), two_arms())[0].mixed


def test_verdicts_are_plain_json():
    verdict = judge(study(question()), two_arms())[0]
    written = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert written["sentence"] == verdict.sentence
    assert written["pairs"]["seeds"] == [0, 1, 2, 3, 4]
    assert written["pairs"]["against"] == SOFTMAX
    assert written["comparison"]["student"]["method"] == "t"
    assert written["question"]["compare"] == {"arm": "gumbel", "mode": "noise_off"}
    assert written["support"] == "cannot tell"


def test_no_questions_no_verdicts():
    assert judge(study(), two_arms()) == []


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UsageError, match="question 'q': a paired comparison needs at least 2 seeds"):
        judge(study(question()), rows_of("softmax", SOFTMAX))
    with pytest.raises(UsageError, match="question 'q': run gumbel-seed0-x has no metric 'f1_macro'"):
        judge(study(question(metric="f1_macro")), two_arms())
    twice = [*two_arms(), Row("gumbel-seed1-y", "gumbel", 1, two_arms()[6].content)]
    with pytest.raises(UsageError, match="two runs of arm 'gumbel' with seed 1, gumbel-seed1-x and gumbel-seed1-y"):
        judge(study(question()), twice)


@pytest.mark.parametrize(("p", "text"), [(0.0123, "= 0.012"), (0.00001, "< 0.0001"), (1.0, "= 1")])
def test_probabilities(p, text):
    assert probability(p) == text


def test_studies_of_one_arm_under_several_names_raise_few_alarms_and_a_harmed_arm_is_found():
    """50 whole studies of three questions; chance exceeds the bounds once in a million."""
    rng, studies = np.random.default_rng(11), 50
    names = ["again", "and_again", "harmed"]
    asked = study(*(question(name, name, "softmax") for name in names))
    alarms = hits = 0
    for _ in range(studies):
        chance = 0.8 + 0.02 * rng.standard_normal(5)
        accuracy = {name: rng.binomial(872, chance) / 872 for name in ["softmax", *names]}
        accuracy["harmed"] -= 0.15
        verdicts = judge(asked, [row for name, values in accuracy.items() for row in rows_of(name, values.tolist())])
        alarms += any(verdict.outcome != "no difference found" for verdict in verdicts[:2])
        hits += verdicts[2].outcome == "worse"
    assert alarms <= stats.binom.isf(1e-6, studies, 0.05)
    assert hits >= stats.binom.ppf(1e-6, studies, 0.95)
