"""What a study runs: a YAML file in, runs with stable ids out, every mistake refused before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from harness.arguments import RunArguments
from harness.errors import UsageError
from harness.evaluation import NOISE_OFF
from harness.parsing import refuse_unknown
from study.checks import OWN_KEYS, check_arm_name, mapping, own_settings, read_grid, read_seeds, run_settings
from study.evaluation_data import check_other_evaluation_data
from study.questions import Question, modes_of, read_questions
from study.rows import ROWS_FOLDER
from study.scripts import SCRIPTS, Script
from study.yaml_file import read_strict_yaml, yaml_text

SEARCH_FOLDER = "search"
FAILED_FOLDER = "failed"
WORK_FOLDER = "work"
_STUDY_KEYS = (
    *("title", "script", "metric", "better", "output_dir", "seeds", "base", "arms", "reference", "search"),
    "questions",
)
ADDED = ("planned", "chosen")
"""What study.yaml has beside the keys of a study's file; passed over, so that such a copy can be run too."""
_SEARCH_KEYS = ("grid", "seeds", "settings", "mode", "arms", "follow")
_NOT_IN_ID = (*OWN_KEYS[1:], "checkpointing_steps", "keep_last", "report_to", "project_name")


def choice_words(choice: Mapping[str, float]) -> str:
    """What a search tries, in words."""
    return ", ".join(f"{key} {yaml_text(value)}" for key, value in choice.items())


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed.

    Attributes:
        id: ``{arm}-seed{seed}-{hash}``, the hash of all settings that decide the result and are not at their default.
        arm: its arm.
        seed: its seed.
        script: name of the training script, without ``.py``.
        args: its settings; ``output_dir`` means nothing here.
        output_dir: the folder of the study.
        rows_folder: ``runs``, or ``search`` for a run of the search.
        choice: of a run of the search, what it tries.
    """

    id: str
    arm: str
    seed: int
    script: str
    args: RunArguments
    output_dir: Path
    rows_folder: str = ROWS_FOLDER
    choice: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        """The run in words."""
        run = f"{self.arm} seed {self.seed}"
        return f"search: {run}, {choice_words(dict(self.choice))}" if self.choice else run

    @property
    def row(self) -> Path:
        """The file that exists once the run is finished."""
        return self.output_dir / self.rows_folder / f"{self.id}.json"

    @property
    def failure(self) -> Path:
        """The file that says how the run failed, if its last try did."""
        return self.output_dir / FAILED_FOLDER / f"{self.id}.json"

    @property
    def work(self) -> Path:
        """The folder of the run until it is finished."""
        return self.output_dir / WORK_FOLDER / self.id


@dataclasses.dataclass(frozen=True)
class Search:
    """The same small grid for every arm, or for some, on other evaluation data than the study's.

    Attributes:
        grid: setting -> values, ascending.
        seeds: none of them a seed of the study.
        mode: the evaluation mode whose metric is compared.
        settings: differences from the base, under every arm.
        runs: all of them, arm by arm.
        arms: those that are searched -> what is different in their runs beside ``settings``, such as a budget.
        follow: arm -> the searched arm whose choice it takes. All others keep the base's values.
    """

    grid: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    mode: str
    settings: dict[str, Any]
    runs: tuple[PlannedRun, ...]
    arms: dict[str, dict[str, Any]]
    follow: dict[str, str]

    def choices(self) -> list[dict[str, float]]:
        """Every combination of the grid's values, smaller ones first."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as planned.

    Attributes:
        title: one line.
        script: name of the training script, without ``.py``.
        metric: the main metric.
        better: whether ``higher`` or ``lower`` values of it are better.
        output_dir: the folder of the study.
        runs: all runs, arm by arm. Before the search has chosen, they have the base's value of what it chooses.
        arms: name -> differences from the base, as the file has them.
        base: settings of all arms.
        seeds: the seeds.
        reference: the arm that tables compare with; None if the file names none.
        search: the search that comes first; None without one.
        questions: planned comparisons.
        chosen: arm -> what the search chose for it; empty before.
    """

    title: str
    script: str
    metric: str
    better: Literal["higher", "lower"]
    output_dir: Path
    runs: tuple[PlannedRun, ...]
    arms: dict[str, dict[str, Any]]
    base: dict[str, Any]
    seeds: tuple[int, ...]
    reference: str | None = None
    search: Search | None = None
    questions: tuple[Question, ...] = ()
    chosen: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def unsettled(self) -> list[str]:
        """The arms that wait for what the search chooses for them."""
        waiting = () if self.search is None else (*self.search.arms, *self.search.follow)
        return [arm for arm in waiting if arm not in self.chosen]

    def with_chosen(self, chosen: Mapping[str, Mapping[str, float]]) -> Study:
        """The study with what its search chose for some or all arms."""
        follow = {} if self.search is None else self.search.follow
        known = {arm: dict(values) for arm, values in chosen.items() if arm in self.arms and arm not in follow}
        known |= {arm: known[other] for arm, other in follow.items() if other in known}
        runs = _plan_runs(self.script, self.base, self.arms, self.seeds, self.output_dir, known)
        return dataclasses.replace(self, runs=runs, chosen=known)


def load_study(path: str | Path, output_dir: str | None = None) -> Study:
    """Reads a study's YAML file.

    ``base``, ``arms``, ``seeds`` and ``output_dir`` are needed; ``script`` is finetune and ``metric`` the first of the
    script's metrics unless they are given.

    Args:
        path: the file.
        output_dir: overrides the one in the file.

    Raises:
        UsageError: a key that is unknown or there twice, settings that a run would refuse, arms that are equal, a
            question about what there is not, a search on the data of the study's own evaluation.
    """
    content = {key: value for key, value in read_strict_yaml(path).items() if key not in ADDED}
    return study_of(content, path, output_dir)


def study_of(content: Mapping[str, Any], path: str | Path, output_dir: str | None = None) -> Study:
    """The study of a mapping as the file has it; ``path`` is named in messages. Raises as :func:`load_study`."""
    refuse_unknown(content, _STUDY_KEYS, f"in {path}")
    script_name, script = _script(content, path)
    metric, better = _metric(content, script, script_name, path)
    base = own_settings(script.arguments, content.get("base"), f"base of {path}")
    arms = _arms(content.get("arms"), script.arguments, path)
    seeds = read_seeds(content.get("seeds"), f"seeds in {path}")
    reference = content.get("reference")
    if reference is not None and reference not in arms:
        raise UsageError(f"reference in {path}: no arm is called {reference!r}; the arms are {', '.join(arms)}.")
    folder = output_dir or content.get("output_dir")
    if not isinstance(folder, str):
        raise UsageError(f"output_dir in {path}: expected a folder name, got {folder!r}.")
    title = content.get("title", Path(path).stem)
    if not isinstance(title, str) or not title.strip() or "\n" in title.strip():
        raise UsageError(f"title in {path}: expected one line of text, got {title!r}.")
    runs = _plan_runs(script_name, base, arms, seeds, Path(folder), {}, str(path))
    _refuse_equal_arms(runs, base, arms, reference, path)
    search = None
    if content.get("search") is not None:
        search = _search(content["search"], script_name, base, arms, seeds, Path(folder), path)
    by_arm = {run.arm: run.args for run in runs}
    questions = read_questions(content.get("questions"), by_arm, script.metrics, metric, len(seeds), path)
    return Study(
        title=title.strip(),
        script=script_name,
        metric=metric,
        better=better,
        output_dir=Path(folder),
        runs=runs,
        arms=arms,
        base=base,
        seeds=seeds,
        reference=reference,
        search=search,
        questions=questions,
    )


def plan_run(
    arm: str, args: RunArguments, output_dir: Path, script: str, choice: Mapping[str, float] | None = None
) -> PlannedRun:
    """The run of an arm with a seed, in the study or, with a ``choice``, in its search.

    Settings left at their default do not enter its id: one that is added later leaves finished runs' ids alone.
    """
    default = {field.name: field.default for field in dataclasses.fields(args)}
    content = {k: v for k, v in args.to_dict().items() if k not in _NOT_IN_ID and v != default[k]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{arm}-seed{args.seed}-{digest}"
    if choice is None:
        return PlannedRun(name, arm, args.seed, script, args, output_dir)
    return PlannedRun(name, arm, args.seed, script, args, output_dir, SEARCH_FOLDER, tuple(choice.items()))


def deciding_settings(args: RunArguments) -> dict[str, Any]:
    """All settings that decide a result, but the seed."""
    return {key: value for key, value in args.to_dict().items() if key not in (*_NOT_IN_ID, "seed")}


def _plan_runs(
    script: str,
    base: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    output_dir: Path,
    chosen: Mapping[str, Mapping[str, float]],
    where: str = "the study",
) -> tuple[PlannedRun, ...]:
    """Arms times seeds."""
    kind = SCRIPTS[script].arguments
    runs = []
    for arm, differences in arms.items():
        for seed in seeds:
            settings = {**base, **differences, **chosen.get(arm, {}), "seed": seed}
            runs.append(plan_run(arm, run_settings(kind, settings, f"arm {arm!r} of {where}"), output_dir, script))
    return tuple(runs)


def _script(content: Mapping[str, Any], path: str | Path) -> tuple[str, Script]:
    name = content.get("script", next(iter(SCRIPTS)))
    if name not in SCRIPTS:
        raise UsageError(f"script in {path}: expected one of {', '.join(SCRIPTS)}, got {name!r}.")
    return name, SCRIPTS[name]


def _metric(
    content: Mapping[str, Any], script: Script, script_name: str, path: str | Path
) -> tuple[str, Literal["higher", "lower"]]:
    """The main metric and its direction, which may be left out: it is known of every metric."""
    metric = content.get("metric", next(iter(script.metrics)))
    if metric not in script.metrics:
        raise UsageError(
            f"metric in {path}: expected one of the metrics of {script_name}, {', '.join(script.metrics)}; "
            f"got {metric!r}."
        )
    better = content.get("better", script.metrics[metric])
    if better not in ("higher", "lower"):
        raise UsageError(f"better in {path}: expected higher or lower, got {better!r}.")
    if better != script.metrics[metric]:
        raise UsageError(f"better in {path}: {script.metrics[metric]} values of {metric} are better, got {better!r}.")
    return metric, script.metrics[metric]


def _arms(value: Any, kind: type[RunArguments], path: str | Path) -> dict[str, dict[str, Any]]:
    arms = mapping(value, f"arms in {path}")
    if not arms:
        raise UsageError(f"arms in {path}: expected at least one arm.")
    for arm in arms:
        check_arm_name(arm, f"arm {arm!r} of {path}")
    lowered: dict[str, str] = {}
    for arm in arms:
        other = lowered.setdefault(arm.lower(), arm)
        if other != arm:
            raise UsageError(f"arms in {path}: {other!r} and {arm!r} differ in case only; give one another name.")
    return {arm: own_settings(kind, differences, f"arm {arm!r} of {path}") for arm, differences in arms.items()}


def _refuse_equal_arms(
    runs: Sequence[PlannedRun],
    base: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    reference: str | None,
    path: str | Path,
) -> None:
    """Raises UsageError for an arm that says nothing the base does not say, and for two arms of equal settings."""
    for arm, differences in arms.items():
        if {**base, **differences} == base and arm != reference:
            raise UsageError(
                f"arm {arm!r} of {path} differs from the base in nothing. Give it a difference, write the settings "
                f"that make it out, or name it as the one to compare with (reference: {arm})."
            )
    seen: list[tuple[str, dict[str, Any]]] = []
    for arm in arms:
        settings = deciding_settings(next(run.args for run in runs if run.arm == arm))
        for other, others in seen:
            if settings == others:
                raise UsageError(f"arms {other!r} and {arm!r} of {path} have equal settings: remove one of them.")
        seen.append((arm, settings))


def _search(
    value: Any,
    script: str,
    base: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    study_seeds: Sequence[int],
    output_dir: Path,
    path: str | Path,
) -> Search:
    """The search of a study.

    Raises:
        UsageError: it has a seed of the study, or evaluates on the study's own evaluation data.
    """
    where, kind = f"search of {path}", SCRIPTS[script].arguments
    content = mapping(value, where)
    refuse_unknown(content, _SEARCH_KEYS, f"in {where}")
    seeds = read_seeds(content.get("seeds"), f"seeds in {where}")
    shared = sorted(set(seeds) & set(study_seeds))
    if shared:
        raise UsageError(f"seeds in {where}: {shared} are seeds of the study too; the search needs others.")
    settings = own_settings(kind, content.get("settings"), f"settings of {where}")
    searched = _searched_arms(content.get("arms"), arms, kind, where)
    follow = _followers(content.get("follow"), arms, searched, where)
    choosing = {arm: {**arms[arm], **searched.get(arm, {})} for arm in (*searched, *follow)}
    grid = read_grid(content.get("grid"), kind, choosing, settings, where)
    mode = content.get("mode", NOISE_OFF)
    search = Search(grid, seeds, mode, settings, (), searched, follow)
    runs = []
    for arm, own in searched.items():
        differences = arms[arm]
        here = f"arm {arm!r} in the {where}"
        plain, *others = (run_settings(kind, {**base, **differences, "seed": seed}, here) for seed in study_seeds)
        if mode not in modes_of(plain):
            raise UsageError(f"mode in {where}: {here} is evaluated in {', '.join(modes_of(plain))}, got {mode!r}.")
        for choice, seed in itertools.product(search.choices(), seeds):
            args = run_settings(kind, {**base, **differences, **settings, **own, **choice, "seed": seed}, here)
            for studied in (plain, *others):  # {seed} in a path makes other files of other seeds
                check_other_evaluation_data(args, studied, here)
            runs.append(plan_run(arm, args, output_dir, script, choice))
    return dataclasses.replace(search, runs=tuple(runs))


def _searched_arms(
    value: Any, arms: Mapping[str, Any], kind: type[RunArguments], where: str
) -> dict[str, dict[str, Any]]:
    """The searched arms, in the order of the study, and what is different in their runs; None is all of them."""
    if value is None:
        return {arm: {} for arm in arms}
    named = value if isinstance(value, dict) else dict.fromkeys(map(str, value)) if isinstance(value, list) else {}
    if not named or len(named) != len(value) or set(named) - set(arms):
        raise UsageError(f"arms in {where}: expected some of {', '.join(arms)}, none twice, got {value!r}.")
    return {arm: own_settings(kind, named[arm], f"arm {arm!r} in the {where}") for arm in arms if arm in named}


def _followers(value: Any, arms: Mapping[str, Any], searched: Mapping[str, Any], where: str) -> dict[str, str]:
    """Arm -> the searched arm whose choice it takes, in the order of the study."""
    follow = mapping(value, f"follow in {where}")
    for arm, other in follow.items():
        if arm not in arms or arm in searched or other not in searched:
            raise UsageError(
                f"follow in {where}: expected arms that are not searched, each with one that is "
                f"({', '.join(searched)}), got {arm}: {other}."
            )
    return {arm: follow[arm] for arm in arms if arm in follow}
