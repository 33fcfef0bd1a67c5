"""Results of `qzoom bench pareto` in the documents."""

from pathlib import Path

import pytest

from pareto_pages import main, put
from qzoom_agent.errors import ConfigError


def test_results_replace_those_between_the_marks(tmp_path: Path) -> None:
    run, images = tmp_path / "run", tmp_path / "docs" / "images"
    run.mkdir()
    images.mkdir(parents=True)
    (run / "pareto.md").write_text("| summary |\n|---|\n\n| every |\n|---|\n")
    (run / "pareto.png").write_bytes(b"picture")
    pages = [tmp_path / "README.md", tmp_path / "docs" / "results.md"]
    for page in pages:
        page.write_text("before\n<!-- pareto:begin -->\nold\n<!-- pareto:end -->\nafter\n")
    assert main([str(run), "--checkout", str(tmp_path)]) == 0
    readme, results = (page.read_text() for page in pages)
    for text in (readme, results):
        assert text.startswith("before\n") and text.endswith("<!-- pareto:end -->\nafter\n") and "old" not in text
        assert "| summary |" in text
    assert "| every |" in results and "| every |" not in readme
    assert (images / "pareto.png").read_bytes() == b"picture"


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ConfigError, match="pareto:begin"):
        put(tmp_path / "page.md", "new")
    with pytest.raises(ConfigError, match=r"none\.md"):
        put(tmp_path / "none.md", "new")
