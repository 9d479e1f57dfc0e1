"""Temperature schedules: their ends, courses and errors, and that they are functions of the step alone."""

import itertools
import math
import tempfile

import pytest
from hypothesis import configuration, given, settings
from hypothesis import strategies as st

import gumbel_attention as ga

configuration.set_hypothesis_home_dir(tempfile.gettempdir())

schedule = ga.temperature_schedule
TIMED = ("linear", "exponential", "cosine", "step")
ROUNDING = 1e-14
"""Relative; of exp and cos, which need not be monotone in their last digit."""

temperatures = st.floats(1e-6, 1e6)
steps_taken = st.integers(0, 10**9)


@given(st.sampled_from(TIMED), temperatures, temperatures, st.integers(1, 10**7), st.lists(steps_taken, max_size=20))
@settings(deadline=None)
def test_it_runs_monotonically_from_start_to_end_and_stays(kind, start, end, steps, asked):
    tau = schedule(kind, start, end, steps)
    assert tau(0) == start
    assert {tau(step) for step in (steps, steps + 1, 10 * steps)} == {end}
    values = [tau(step) for step in sorted([*asked, *(step % steps for step in asked)])]
    assert all(min(start, end) <= value <= max(start, end) for value in values)
    for earlier, later in itertools.pairwise(values):
        gap = ROUNDING * max(start, end) if kind == "cosine" else ROUNDING * earlier
        assert later >= earlier - gap if end >= start else later <= earlier + gap


@given(temperatures, temperatures, st.floats(1e-9, 10.0), st.integers(1, 10**4), st.lists(steps_taken, max_size=20))
@settings(deadline=None)
def test_the_clipped_one_falls_from_start_and_never_below_end(one, other, rate, every, asked):
    start, end = max(one, other), min(one, other)
    tau = schedule("clipped_exponential", start, end, rate=rate, every=every)
    assert tau(0) == tau(every - 1) == start
    assert tau(math.ceil(math.log(start / end) / rate) + 2 * every) == end
    values = [tau(step) for step in sorted(asked)]
    assert all(end <= value <= start for value in values)
    assert all(later <= earlier * (1 + ROUNDING) for earlier, later in itertools.pairwise(values))


@given(st.sampled_from([*TIMED, "clipped_exponential"]), st.lists(st.integers(0, 300), min_size=2, max_size=20))
@settings(deadline=None)
def test_it_depends_on_the_step_alone(kind, asked):
    def make():
        timed = {"steps": 200} if kind in TIMED else {"rate": 0.01, "every": 7}
        return schedule(kind, 2.0, 0.3, **timed)

    tau = make()
    forward = {step: tau(step) for step in asked}
    assert forward == {step: tau(step) for step in reversed(asked)}
    assert forward == {step: make()(step) for step in asked}  # a resumed run's schedule knows nothing of the first's


@given(st.integers(1, 1000), st.integers(1, 100))
@settings(deadline=None)
def test_the_stairs_are_of_equal_length_and_ratio(steps, drops):
    """The n-th drop is at the first step that is not before n / drops of the way; steps may pass several at once."""
    tau = schedule("step", 2.0, 0.5, steps, drops=drops)
    for drop in range(1, drops + 1):
        first = -(-steps * drop // drops)
        passed = first * drops // steps
        assert tau(first) == pytest.approx(2.0 * 0.25 ** (passed / drops), rel=1e-12)
        assert tau(first - 1) > tau(first)


@given(st.integers(1, 100), st.integers(0, 10**5))
@settings(deadline=None)
def test_the_clipped_one_changes_at_multiples_of_every_only(every, step):
    tau = schedule("clipped_exponential", 1.0, 0.01, rate=1e-4, every=every)
    assert tau(step) == tau(step - step % every) == max(0.01, math.exp(-1e-4 * (step - step % every)))


def test_half_way():
    half = {kind: schedule(kind, 2.0, 0.5, 100)(50) for kind in ("linear", "exponential", "cosine")}
    assert half == pytest.approx({"linear": 1.25, "exponential": 1.0, "cosine": 1.25})
    assert schedule("cosine", 2.0, 0.5, 90)(30) == pytest.approx(0.5 + 1.5 * 0.75)
    assert schedule("constant", 0.7)(10**6) == 0.7


def test_stairs_by_hand():
    stairs = schedule("step", 2.0, 0.5, 100, drops=2)
    assert [stairs(s) for s in (0, 49, 50, 99, 100)] == pytest.approx([2.0, 2.0, 1.0, 1.0, 0.5])
    assert [schedule("step", 16.0, 1.0, 8)(s) for s in range(9)] == pytest.approx([16, 16, 8, 8, 4, 4, 2, 2, 1])
    every_step = schedule("step", 2.0, 0.5, 100, drops=100)
    assert every_step(29) == pytest.approx(2.0 * 0.25**0.29)  # 29 / 100 * 100 is below 29


@pytest.mark.parametrize(("rate", "every"), [(1e-5, 500), (1e-4, 1000)])
def test_the_annealing_of_jang_et_al(rate, every):
    tau = schedule("clipped_exponential", 1.0, 0.5, rate=rate, every=every)
    assert tau(every - 1) == 1.0
    assert tau(3 * every + 7) == math.exp(-rate * 3 * every)
    reached = math.ceil(math.log(2) / rate / every) * every
    assert tau(reached - 1) > 0.5
    assert tau(reached) == tau(10 * reached) == 0.5


@pytest.mark.parametrize(
    ("arguments", "own", "message"),
    [
        (("linaer", 1.0, 0.5, 10), {}, "Did you mean 'linear'"),
        (("linear", 0.0, 0.5, 10), {}, "start must be"),
        (("linear", 1.0, -1.0, 10), {}, "end must be"),
        (("linear", 1.0, 0.5, 0), {}, "steps must be an integer >= 1"),
        (("linear", 1.0, 0.5, 2.0), {}, "steps must be an integer >= 1"),
        (("linear", 1.0, 0.5), {}, "'linear' needs steps"),
        (("cosine", 1.0), {"steps": 10}, "'cosine' needs end"),
        (("constant", 1.0, 0.5, 10), {}, "one temperature"),
        (("step", 1.0, 0.5, 10), {"drops": 0}, "drops must be an integer >= 1"),
        (("linear", 1.0, 0.5, 10), {"drops": 4}, "drops belongs to schedules of kind 'step', got drops=4"),
        (("exponential", 1.0, 0.5, 10), {"rate": 1e-4}, "rate belongs to schedules of kind 'clipped_exponential'"),
        (("step", 1.0, 0.5, 10), {"every": 10}, "every belongs to schedules of kind 'clipped_exponential'"),
        (("clipped_exponential", 1.0, 0.5), {}, "'clipped_exponential' needs rate"),
        (("clipped_exponential", 1.0), {"rate": 1e-4}, "'clipped_exponential' needs end"),
        (("clipped_exponential", 1.0, 0.5, 10), {"rate": 1e-4}, "takes no steps, got steps=10"),
        (("clipped_exponential", 1.0, 0.5), {"rate": 0.0}, "rate must be a finite number > 0"),
        (("clipped_exponential", 1.0, 0.5), {"rate": 1e-4, "every": True}, "every must be an integer >= 1"),
        (("clipped_exponential", 0.5, 1.0), {"rate": 1e-4}, "falls from start to end"),
        (("clipped_exponential", 1.0, 0.5), {"rate": 1e-4, "drops": 2}, "drops belongs to"),
    ],
)
def test_arguments_that_do_not_fit(arguments, own, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments, **own)


@pytest.mark.parametrize("kind", [*TIMED, "constant", "clipped_exponential"])
def test_a_negative_step_is_refused(kind):
    rest = {"constant": {}, "clipped_exponential": {"end": 0.5, "rate": 0.1}}.get(kind, {"end": 0.5, "steps": 10})
    with pytest.raises(ValueError, match="step must be >= 0"):
        schedule(kind, 1.0, **rest)(-1)
