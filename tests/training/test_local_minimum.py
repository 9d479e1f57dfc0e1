"""The local-minimum probe: its task, its columns, its controls, and the study end to end in small."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from scipy import stats

import local_minimum
from harness.errors import UsageError
from harness.local_minimum import CUE, DECOY, ColumnAdam, Columns, Problem, Runs, Schedule, Sizes, draw_examples, fit
from local_minimum import ARMS, CONTROLS, PROBLEMS, SCHEDULES, cells, choose_rates, split, summarise
from study.local_minimum_report import control_of, findings, interval, paired_p, quartiles

FALSE_ALARM = 1e-6
CONSTANT = SCHEDULES["constant"]
SHORT = Sizes(steps=15)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local_minimum") / "new"
    return folder, local_minimum.main(["--quick", "--output_dir", str(folder)])


def columns_of(*problems, seeds=4, rate=0.1):
    grid = [(seed, problem, rate) for problem in problems for seed in range(seeds)]
    return Columns(*zip(*grid, strict=True))


def test_the_decoy_is_right_in_the_stated_share_and_the_cue_always():
    """Three counts of 40,000, each outside its bounds once in a million."""
    examples = draw_examples(10_000, 4, Sizes(), torch.Generator().manual_seed(0))
    right = (examples.words == examples.labels.unsqueeze(-1)).flatten(0, 1)
    total = len(right)
    assert right[:, CUE].all()
    for sentence, share in ((DECOY, 0.8), (2, 0.25), (5, 0.25)):
        count = int(right[:, sentence].sum())
        assert (
            stats.binom.ppf(FALSE_ALARM / 2, total, share) <= count <= stats.binom.isf(FALSE_ALARM / 2, total, share)
        )


def test_the_trap_holds_and_the_plateau_does_not():
    """Without noise: a run that knows the decoy's words leaves it where the cue speaks them too, and only there."""
    columns = columns_of(Problem("trap", 4), Problem("plateau", 4), Problem("trap", 4, favoured=CUE), seeds=8)
    for control in CONTROLS.values():
        trap, plateau, oracle = split(fit(control, 0.0, CONSTANT, columns, Sizes(steps=200), 0), 3)
        assert (trap.choices == DECOY).all()
        assert (plateau.choices[0] == DECOY).all()
        assert (plateau.choices[-1] == CUE).all()
        assert (oracle.choices == CUE).all()
        assert trap.accuracy.mean() == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / 8 / 200))
        assert plateau.accuracy.min() == oracle.accuracy.min() == 1


def test_noise_leaves_a_shallow_trap_that_deterministic_straight_through_does_not():
    columns, sizes = columns_of(Problem("trap", 1), seeds=16, rate=0.03), Sizes(steps=200)
    assert (fit(CONTROLS["det-st"], 0.0, CONSTANT, columns, sizes, 0).choices == DECOY).all()
    escaped = (fit(ARMS["gumbel-st"], 2.0, CONSTANT, columns, sizes, 0).choices[-1] == CUE).sum()
    assert escaped >= 4


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_shares_data_and_start_and_draws_its_own_noise(name):
    """Columns of one seed see the same data: only the noise tells them apart, and it is drawn for each."""
    columns = Columns([0, 0, 1], [Problem("trap", 1)] * 3, [0.1] * 3)
    first, again = (fit(ARMS[name], 2.0, CONSTANT, columns, Sizes(steps=40), 3) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    other = fit(ARMS[name], 2.0, CONSTANT, columns, Sizes(steps=40), 4)
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first.choices[:, 0], first.choices[:, 1])


@pytest.mark.parametrize(("name", "control"), [("gumbel-soft", "softmax-tau"), ("normal-st", "det-st")])
def test_without_noise_an_arm_is_its_control(name, control):
    columns = columns_of(*PROBLEMS)
    ours = fit(ARMS[name], 0.0, CONSTANT, columns, SHORT, 0)
    faint = fit(ARMS[name], 1e-12, CONSTANT, columns, SHORT, 0)
    plain = fit(CONTROLS[control], 0.0, CONSTANT, columns, SHORT, 0)
    for one, other, third in zip(ours, plain, faint, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, third)


def test_columns_do_not_touch_each_other():
    together = fit(CONTROLS["softmax-tau"], 0.0, CONSTANT, columns_of(*PROBLEMS, seeds=2), SHORT, 0)
    alone = fit(CONTROLS["softmax-tau"], 0.0, CONSTANT, Columns([1], [PROBLEMS[1]], [0.1]), SHORT, 0)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one[..., 0], other[..., 3])


def test_column_adam_is_torchs_with_a_rate_for_each_column():
    start, rates = torch.randn(3, 4), [0.1, 0.01, 0.5]
    ours, theirs = start.clone(), [row.clone().requires_grad_() for row in start]
    optimizer = ColumnAdam([ours], torch.tensor(rates))
    reference = torch.optim.Adam([{"params": [row], "lr": rate} for row, rate in zip(theirs, rates, strict=True)])
    for _ in range(5):
        gradient = torch.randn(3, 4)
        optimizer.step([gradient])
        for row, part in zip(theirs, gradient, strict=True):
            row.grad = part
        reference.step()
    torch.testing.assert_close(ours, torch.stack([row.detach() for row in theirs]))


def test_schedules_of_tau_and_noise():
    annealed = Schedule("x", (4.0, 0.5), 0.1)
    tau = annealed.tau_at(100)
    assert (tau(0), tau(100)) == (4.0, 0.5)
    assert tau(50) == pytest.approx(math.sqrt(2))
    assert [annealed.noise_at(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.55, 0.1])
    assert CONSTANT.tau_at(100)(70) == 1
    assert CONSTANT.noise_at(70, 100) == 1


def test_every_noisy_cell_has_a_control_at_its_temperature():
    planned = {(arm.name, scale, schedule.name) for arm, scale, schedule in cells([1.0])}
    for arm, scale, schedule in planned:
        control, same_tau = control_of(arm, schedule)
        assert (control, 0.0, same_tau) in planned
        assert SCHEDULES[same_tau].tau == SCHEDULES[schedule].tau
        assert ARMS.get(arm, CONTROLS.get(arm)).settings.get("hard") == CONTROLS[control].settings.get("hard")
        assert (scale == 0) == (arm in CONTROLS)


def runs_of(*choices):
    """Runs from one list of choices for each column."""
    table = torch.tensor(choices, dtype=torch.int8).T
    return Runs(table, torch.full((len(choices),), 0.8), torch.ones(len(choices)))


def test_summary_by_hand():
    row = summarise(runs_of([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 3, 3, 3], [1, 1, 1, 1]))
    assert row["steps"] == [2, 3, None, None, None, 0]
    assert row["changes"] == round(7 / 6, 2)
    assert row["ended"] == [2, 3, 1]
    assert row["trajectory"] == [round(1 / 6, 3)]
    assert (row["accuracy"], row["hard_accuracy"]) == (0.8, 1.0)


def test_the_rate_with_most_escapes_is_chosen_and_the_sooner_of_equals():
    never, late, soon = [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]
    of_problem = [[never, late], [late, late], [never, soon]]
    assert choose_rates(runs_of(*itertools.chain(*of_problem * len(PROBLEMS))), [1.0, 2.0, 3.0]) == [2.0] * len(
        PROBLEMS
    )
    of_problem = [[late, late], [soon, soon], [never, soon]]
    assert choose_rates(runs_of(*itertools.chain(*of_problem * len(PROBLEMS))), [1.0, 2.0, 3.0]) == [2.0] * len(
        PROBLEMS
    )


def test_quartiles_count_the_censored():
    assert quartiles([10, None, 30, None]) == [10, 30, math.inf]
    assert quartiles([4, 1, 3, 2]) == [1, 2, 3]


def test_intervals_and_paired_test():
    assert interval(0, 10) == pytest.approx((0, 1 - 0.025**0.1))
    assert interval(10, 10) == pytest.approx((0.025**0.1, 1))
    one, other = {"steps": [1, 5, 2, 9, 3, None, 1]}, {"steps": [None, None, None, None, None, 4, 1]}
    assert paired_p(one, other) == pytest.approx(2 * (1 + 6) / 2**6)
    assert paired_p(one, one) == 1


def test_quick_run_writes_numbers_table_and_plots(quick_run):
    folder, results = quick_run
    assert sorted(path.name for path in folder.iterdir()) == [
        "escape_share.png",
        "local_minimum.json",
        "table.md",
        "trajectories.png",
    ]
    assert json.loads((folder / "local_minimum.json").read_text()) == results
    assert len(results["rows"]) == len(cells([1.0])) * len(PROBLEMS)
    assert all(len(row["steps"]) == sum(row["ended"]) == 4 for row in results["rows"])
    text = (folder / "table.md").read_text()
    assert results["command"] in text
    for problem in results["problems"]:
        assert f"**{problem}**: best share with temperature alone" in text
    for arm in {**ARMS, **CONTROLS}:
        assert f"`{arm}`" in text


def test_table_and_plots_can_be_drawn_again(quick_run, tmp_path):
    folder, results = quick_run
    (tmp_path / "local_minimum.json").write_text((folder / "local_minimum.json").read_text())
    assert local_minimum.main(["--redraw", "--output_dir", str(tmp_path)]) == results
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    with pytest.raises(UsageError, match="--redraw needs the numbers of a run"):
        local_minimum.main(["--redraw", "--output_dir", str(tmp_path / "empty")])


def test_findings_count_what_differs_and_name_the_best(quick_run):
    results = json.loads(json.dumps(quick_run[1]))
    for row in results["rows"]:
        escaped = row["problem"] == "trap 1" and row["arm"] == "gumbel-st" and row["schedule"] == "constant"
        row["steps"] = [7 if escaped else None] * 40
        row["ended"] = [0, 40, 0] if escaped else [40, 0, 0]
    first, second, *_ = findings(results)
    assert "best share with temperature alone 0.00" in first
    assert "best with noise 1.00 (`gumbel-st`, constant, noise 1" in first
    assert (
        "soft arms 0 of 6 settings escape more often and 0 less often, hard arms 1 of 12 more often and 0 less often"
        in first
    )
    assert "hard arms 0 of 12 more often and 0 less often" in second


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["--steps", "0"], "--steps must be at least 2, got 0"),
        (["--noise_scales", "1", "1"], "--noise_scales must be finite, > 0 and differ from each other"),
        (["--noise_scales", "0"], "--noise_scales must be finite, > 0"),
        (["--learning_rates", "inf"], "--learning_rates must be finite, > 0"),
    ],
)
def test_bad_arguments_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        local_minimum.parse_args(argv)
    assert message in capsys.readouterr().err


def test_the_script_is_one():
    found = subprocess.run(
        [sys.executable, local_minimum.__file__, "--help"], capture_output=True, text=True, check=True
    )
    assert "--noise_scales" in found.stdout
