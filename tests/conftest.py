"""Shared by all tests: one thread, no network, and where the data sets lie."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (``-n 2 --dist loadgroup``) a file stays together; the conformance files share a count."""
    for item in items:
        together = "conformance" if item.path.name.startswith("test_conformance") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(together))
