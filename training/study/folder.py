"""The folder of a study: study.yaml in it says what is planned there, so that a report needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UsageError
from harness.resume import COMPARED_AS_DATA
from study.plan import ADDED, SEARCH_FOLDER, Study, study_of
from study.rows import ROWS_FOLDER, STUDY_FILE, write_durably
from study.yaml_file import read_strict_yaml

_DECIDING = ("script", "metric", "base", "arms", "seeds", "search")
"""What makes another study; title, questions and reference may change while one runs."""
_GITIGNORE = "work/\n"


def write_study(study: Study, replace: bool = False) -> None:
    """Writes study.yaml, and a .gitignore for the unfinished runs.

    Args:
        study: the study.
        replace: put this study in the place of another one.

    Raises:
        UsageError: the folder holds another study, or cannot be written to.
    """
    try:
        _write(study, replace)
    except OSError as error:
        raise UsageError(f"output_dir {str(study.output_dir)!r} cannot be used: {error.strerror}.") from error


def _write(study: Study, replace: bool) -> None:
    path, content = study.output_dir / STUDY_FILE, study_content(study)
    if path.exists():
        before = read_strict_yaml(path)
        different = _differences(before, content)
        if different and not replace:
            raise UsageError(
                f"{str(study.output_dir)!r} holds another study; these differ (there -> here): "
                f"{'; '.join(different)}. Choose another output_dir, or pass --replace_plan: then finished runs that "
                "the new plan has too stay, and the others are passed over."
            )
        if before == content:
            return
    write_durably(path, yaml.safe_dump(content, sort_keys=False, width=119))
    ignored = study.output_dir / ".gitignore"
    if not ignored.exists():
        write_durably(ignored, _GITIGNORE)


def read_study(folder: str | Path) -> Study:
    """The study that a folder holds, with what its search chose so far.

    Raises:
        UsageError: there is no study.yaml, or it is damaged.
    """
    path = Path(folder) / STUDY_FILE
    content = read_strict_yaml(path)
    plain = {key: value for key, value in content.items() if key not in ADDED}
    return study_of(plain, path, str(folder)).with_chosen(content.get("chosen", {}))


def chosen_before(study: Study) -> dict[str, dict[str, float]]:
    """What the folder's study.yaml says that the search chose; nothing if there is none, or one of another study."""
    path = study.output_dir / STUDY_FILE
    if not path.exists():
        return {}
    content = read_strict_yaml(path)
    chosen: dict[str, dict[str, float]] = content.get("chosen", {})
    return {} if _differences(content, study_content(study)) else chosen


def check_same_study(study: Study, other: Study) -> None:
    """Raises UsageError unless they are one study; their data files may lie in other folders, under the same names."""
    different = _differences(study_content(study), study_content(other), moved=True)
    if different:
        raise UsageError(
            f"{str(study.output_dir)!r} holds another study than the one to compare with; these differ (there -> "
            f"here): {'; '.join(different)}."
        )


def study_content(study: Study) -> dict[str, Any]:
    """What study.yaml holds: the file of the study with all defaults, the ids it plans and what its search chose."""
    search = study.search
    content: dict[str, Any] = {
        "title": study.title,
        "script": study.script,
        "metric": study.metric,
        "better": study.better,
        "seeds": study.seeds,
        "base": study.base,
        "arms": study.arms,
    }
    if study.reference is not None:
        content["reference"] = study.reference
    if search is not None:
        content["search"] = {"grid": search.grid, "seeds": search.seeds, "mode": search.mode}
        content["search"]["settings"] = search.settings
        if any(search.arms.values()):
            content["search"]["arms"] = search.arms
        elif len(search.arms) < len(study.arms):
            content["search"]["arms"] = list(search.arms)
        if search.follow:
            content["search"]["follow"] = search.follow
    content["questions"] = [
        {
            "id": question.id,
            "text": question.text,
            "compare": vars(question.compare),
            "against": vars(question.against),
            "metric": question.metric,
        }
        for question in study.questions
    ]
    content["chosen"] = study.chosen
    content["planned"] = {ROWS_FOLDER: [run.id for run in study.runs]}
    if search is not None:
        content["planned"][SEARCH_FOLDER] = [run.id for run in search.runs]
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], moved: bool = False) -> list[str]:
    """What makes another study, in words; with ``moved``, files of the same names in other folders do not."""
    then, here = (_flat({key: content.get(key) for key in _DECIDING}) for content in (before, now))
    keys = [*here, *(key for key in then if key not in here)]
    absent = "(not there)"
    return [
        f"{key}: {then.get(key, absent)!r} -> {here.get(key, absent)!r}"
        for key in keys
        if then.get(key, absent) != here.get(key, absent)
        and not (moved and key.rpartition(".")[2] in COMPARED_AS_DATA and _is_moved(then.get(key), here.get(key)))
    ]


def _is_moved(then: Any, here: Any) -> bool:
    """Whether two files are of one name."""
    return isinstance(then, str) and isinstance(here, str) and Path(then).name == Path(here).name


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted names of what is inside nested mappings."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    parts = (_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items())
    return {key: item for part in parts for key, item in part.items()}
