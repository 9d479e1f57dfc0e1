"""Which architectures run, what is excepted, and the table of what was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from .case import Case
from .catalogue import architectures
from .exceptions import EXCEPTIONS, OTHERS
from .report import Recorder

SAMPLE = (
    "afmoe",
    "bamba",
    "big_bird",
    "bloom",
    "deberta-v2",
    "deepseek_v3",
    "gemma3_text",
    "led",
    "modernbert",
    "qwen3_next",
    "switch_transformers",
    "t5gemma",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-architectures", action="store_true", help="every text architecture, not a sample of them")
    parser.addoption("--architecture", action="append", default=[], help="only this model type; may be repeated")
    parser.addoption("--support-table", metavar="PATH", help="write what was found into this file")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The other modalities run with ``--all-architectures`` only."""
    everything = config.getoption("--all-architectures", default=False)
    return True if collection_path.name == "test_other_modalities.py" and not everything else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config), "architectures")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "other" in metafunc.fixturenames:
        names = sorted(found.name for found in architectures() if found.modality != "text")
        strict = {name: pytest.mark.xfail(reason=reason, strict=True) for name, reason in OTHERS.items()}
        metafunc.parametrize("other", [pytest.param(name, marks=strict.get(name, ())) for name in names])
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        names = option("--architecture", default=[]) or list(SAMPLE)
        if option("--all-architectures", default=False):
            names = sorted(found.name for found in architectures() if found.modality == "text")
        metafunc.parametrize("case", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """One architecture."""
    return Case(request.param)


@pytest.fixture
def taken(case: Case) -> Case:
    """One architecture that patch_model takes."""
    if case.refusal:
        pytest.skip(f"patch_model refuses it: {case.refusal}")
    return case


@pytest.fixture(autouse=True)
def _excepted(request: pytest.FixtureRequest) -> None:
    """Expects the failures that the table of exceptions explains, and these only."""
    if "other" in request.fixturenames:
        request.node.user_properties.append(("other", request.getfixturevalue("other")))
    if "case" in request.fixturenames:
        name = request.getfixturevalue("case").name
        request.node.user_properties.append(("architecture", name))
        reason = EXCEPTIONS.get((name, request.node.originalname))
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
