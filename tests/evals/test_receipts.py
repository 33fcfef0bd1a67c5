"""The script of the receipts table."""

from pathlib import Path

import pytest

import receipts
from qzoom_agent.errors import ConfigError


def test_a_row_that_there_is_not_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no row 'whole'\. The rows are implicit, always, .*direct-2048"):
        receipts.main(
            [str(tmp_path), "--model", str(tmp_path / "none"), "--out", str(tmp_path), "--rows", "implicit,whole"]
        )
