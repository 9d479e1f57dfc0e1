"""Runs a study: every arm with every seed, each run a process of its own.

    python training/ablate.py --config configs/ablation/sst2_minilm.yaml
        [--output_dir DIR] [--only ARM,ARM] [--seeds 0,1] [--jobs N] [--dry_run] [--keep_work] [--replace_plan]

The file holds ``base`` (settings of the script), ``arms`` (name: settings that differ), ``seeds``, ``output_dir`` and,
where they are not finetune.py and its accuracy, ``script`` (its name without .py) and ``metric``; further ``title``,
``reference`` (the arm to compare with), ``questions`` (planned comparisons) and ``search`` (a learning rate for each
arm, or for some, from the same small grid, on other data than the study evaluates on; ``follow`` in it says which arms
take what another one's search chose). Unknown and repeated keys are refused. ``{seed}`` in a text setting, such as a
path, is the seed of the run.

``output_dir`` holds study.yaml, a copy of the file with all defaults; runs/ID.json for every finished run, written
whole or not at all; the same of the search in search/, with what it chose in search/chosen.json; failed/ID.json with
the end of the log of a run that failed; and work/ID with settings, log and checkpoints of a run that is not finished.

Started again, it goes on: finished runs are not repeated, others go on from their checkpoint if they have one
(``checkpointing_steps``), else from the start. Several runners, also on several machines that share the folder, may
work on one study at a time: start the same command in each. A run whose runner died is taken over, on the same machine
at once, on another one after a minute. SIGTERM and SIGINT end the runs after a checkpoint; they also end if the runner
is killed. Models and trackers' files lie in the runs' folders and go with them unless ``--keep_work`` is given.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from harness.errors import UsageError
from study.execute import Interrupted, Options, run_all
from study.folder import chosen_before, write_study
from study.plan import PlannedRun, Study, choice_words, load_study
from study.process import Starter, SupervisedProcess, launch_command, threads_per_run
from study.progress import Progress, duration
from study.rows import is_row
from study.search import chosen_so_far, evaluate_search, write_chosen
from study.tables import TABLE_FILE, write_table


class StopSignals:
    """Within this context SIGINT and SIGTERM are noted in ``received``."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """Why to stop; None while there is no reason."""
        return None if self.received is None else f"stopped by {self.received}"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def main(argv: Sequence[str] | None = None, start: Starter = SupervisedProcess) -> int:
    """Runs the study.

    Returns:
        Exit status: 0, or 1 if a run failed, 2 for a mistake in the settings, 130 if interrupted.
    """
    options = parse_options(argv)
    try:
        study = load_study(options.config, options.output_dir)
        study = study.with_chosen(chosen_before(study) | chosen_so_far(study))
        select = selection(study, options.only, options.seeds)
        if options.dry_run:
            print_plan(study, select, options.jobs)
            return 0
        write_study(study, options.replace_plan)
        with StopSignals() as signals:
            tell = functools.partial(print, flush=True)
            how = Options(options.jobs, options.keep_work, start, tell, signals.reason)
            failures = run_study(study, select, how)
    except UsageError as error:
        print(f"ablate.py: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"ablate.py: {error}; finished runs are kept, start again to go on.", file=sys.stderr)
        return 130
    for name, message in failures.items():
        print(f"ablate.py: run {name} failed: {message}", file=sys.stderr)
    return 1 if failures else 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the study")
    parser.add_argument("--output_dir", help="overrides the one in the file")
    parser.add_argument("--only", metavar="ARM,ARM", help="run these arms only; the report covers all")
    parser.add_argument("--seeds", metavar="SEED,SEED", help="run these seeds only, of those in the file")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time; 1 unless given")
    parser.add_argument("--dry_run", action="store_true", help="show the runs, their commands and an estimate of time")
    parser.add_argument("--keep_work", action="store_true", help="leave the folders of finished runs")
    parser.add_argument(
        "--replace_plan", action="store_true", help="let output_dir hold this study, not the one there"
    )
    return parser.parse_args(argv)


def selection(study: Study, only: str | None, seeds: str | None) -> Callable[[PlannedRun], bool]:
    """Which runs the comma-separated ``only`` and ``seeds`` select; None selects all. Seeds are not those of a search.

    Raises:
        UsageError: no such arm or seed.
    """
    arms = list(study.arms) if only is None else [name.strip() for name in only.split(",")]
    for name in arms:
        if name not in study.arms:
            raise UsageError(f"--only names the arm {name!r}, the study has {', '.join(study.arms)}.")
    known = {str(seed): seed for seed in study.seeds}
    words = list(known) if seeds is None else [word.strip() for word in seeds.split(",")]
    for word in words:
        if word not in known:
            raise UsageError(f"--seeds names {word!r}, the study has {', '.join(known)}.")
    wanted = {known[word] for word in words}
    follow = {} if study.search is None else study.search.follow
    searched = {follow.get(arm, arm) for arm in arms}
    return lambda run: run.arm in searched if run.choice else run.arm in arms and run.seed in wanted


def run_study(study: Study, select: Callable[[PlannedRun], bool], options: Options) -> dict[str, str]:
    """The search, if there is one, then the study, and a table of all that is finished.

    Returns:
        The message of every failed run by id, and of every arm whose search failed by name.
    """
    failures: dict[str, str] = {}
    search_runs = [run for run in study.search.runs if select(run)] if study.search is not None else []
    if study.search is not None:
        progress = Progress([*search_runs, *filter(select, study.runs)])
        failures |= run_all(search_runs, study.title, progress, options)
        study = _with_search(study, {run.arm for run in search_runs}, failures, options)
    runs = [run for run in study.runs if select(run) and run.arm not in study.unsettled]
    progress = Progress([*search_runs, *runs])
    failures |= run_all(runs, study.title, progress, options)
    options.tell(f"\n{write_table(study)}\nin {study.output_dir / TABLE_FILE}")
    return failures


def _with_search(study: Study, arms: set[str], failures: dict[str, str], options: Options) -> Study:
    """The study with what its search chose; an arm for which it chose nothing is added to ``failures``."""
    found = evaluate_search(study)
    chosen = study.chosen | chosen_before(study) | chosen_so_far(study)  # of other runners, too
    for arm in arms:
        choice = found[arm].chosen
        if choice is None:
            failures[f"search of {arm}"] = "no value of the grid has finished with all seeds; the arm is not run"
            chosen.pop(arm, None)
            continue
        means = ", ".join(
            f"{choice_words(tried)}: {'none' if mean is None else f'{mean:.4g}'}" for tried, mean in found[arm].means
        )
        options.tell(f"search: {arm} takes {choice_words(choice)} ({study.metric} {means})")
        chosen[arm] = choice
    write_chosen(study, found)
    study = study.with_chosen(chosen)
    write_study(study)
    return study


def print_plan(study: Study, select: Callable[[PlannedRun], bool], jobs: int) -> None:
    """Prints each run, whether it is finished, its command, and what is left to do."""
    search_runs = [] if study.search is None else [run for run in study.search.runs if select(run)]
    runs = [*search_runs, *filter(select, study.runs)]
    threads = threads_per_run(jobs)
    for run in runs:
        state = "finished" if is_row(run.row) else "to run"
        open_choice = not run.choice and run.arm in study.unsettled
        later = f"; its {', '.join(study.search.grid)} is chosen first" if open_choice and study.search else ""
        print(f"{run.id} ({state}{later})\n    {shlex.join(launch_command(run, threads))}")
    progress = Progress(runs)
    seconds = progress.seconds_left(jobs)
    left = "unknown, no run has finished yet" if seconds is None else f"about {duration(seconds)}"
    together = f" with {jobs} at a time" if jobs > 1 else ""
    print(f"{progress.total} runs, {progress.finished} finished, {progress.total - progress.finished} to do")
    print(f"time left{together}: {left}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
