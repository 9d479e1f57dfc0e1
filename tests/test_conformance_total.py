"""The share of rows that the conformance tests left out of the comparison of choices; last of them by its name."""

import pytest

from conformance import NAMES, SHARE
from tally import TALLY


@pytest.mark.parametrize("name", NAMES)
def test_excluded_share(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows, excluded = TALLY.rows.get(name, (0, 0))
    if not rows:
        pytest.skip(f"{name}: no choice was compared in this run")
    with capsys.disabled():
        print(f"\n{TALLY.line(name)}")
    assert excluded <= max(1.0, SHARE * rows)
