"""Shared by all tests: one thread, no network, and where the data sets lie."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from tally import SHARE, TALLY

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of two workers neither is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Callable[[str], Path]:
    """Gives the folder of a public data set, or skips the test: ``data_dir("babi")``."""
    base = Path(os.environ.get("GUMBEL_ATTENTION_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        folder = base / name
        if not folder.is_dir():
            pytest.skip(f"data set {name!r} is not there; GUMBEL_ATTENTION_DATA names the folder that holds it")
        return folder

    return find


@pytest.fixture(scope="module", autouse=True)
def _excluded_share(request: pytest.FixtureRequest) -> Iterator[None]:
    """The conformance tests of a file leave few rows out of the comparison of choices; says how many."""
    TALLY.rows.clear()
    yield
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    for name, (rows, excluded) in TALLY.rows.items():
        if terminal is not None:
            terminal.write_line(f"\n{TALLY.line(name)}")
        assert excluded <= max(1.0, SHARE * rows), TALLY.line(name)
