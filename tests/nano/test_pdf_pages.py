"""Pages of PDFs with a text layer become a folder of lines that training shows among receipts."""

import gzip
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

import pdf_pages
import train_nano
from nano.paper import Line, transcribed_line
from nano.paper_batches import paper_looks, paper_trees
from nano.receipts import Receipts, read_pages
from nano.trees import Say
from qzoom_agent.errors import ConfigError

TEXT = [f"Line {number}: to be read, with (signs) & {number}.50" for number in range(12)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two PDFs of two pages and one page, the first also packed, and a file that is none."""
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    folder = tmp_path_factory.mktemp("documents")
    for name, pages in (("manual", 2), ("sheet", 1)):
        with PdfPages(folder / f"{name}.pdf") as file:
            for page in range(pages):
                figure = Figure(figsize=(6, 8))
                for row, text in enumerate(TEXT):
                    figure.text(0.1, 0.9 - 0.05 * row, text, fontsize=10 + 2 * page)
                figure.text(0.1, 0.2, "left part")
                figure.text(0.6, 0.2, "right part")
                figure.text(0.1, 0.1, "\u0394 unknown letters \u0416")
                figure.text(0.9, 0.5, "turned", rotation=90)
                figure.text(0.1, 0.15, "cannot be seen", color="white")
                file.savefig(figure)
    (folder / "packed.pdf.gz").write_bytes(gzip.compress((folder / "manual.pdf").read_bytes()))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and no more")
    return folder


@pytest.fixture(scope="module")
def folder(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pages")
    assert pdf_pages.main([str(documents), str(output)]) == 0
    return output


def receipts_among(tmp_path: Path, folder: Path | None) -> Receipts:
    """Receipts of two lines, and pages among them."""
    lines = [{"box": [20, 30, 220, 60], "text": "Total 7"}, {"box": [20, 90, 160, 120], "text": "~~ 9.00"}]
    Image.new("L", (300, 200), 255).save(tmp_path / "one.png")
    row = {"image": "one.png", "fields": {"total": "7"}, "lines": lines}
    (tmp_path / "receipts.jsonl").write_text("\n".join([json.dumps(row)] * 25))
    return Receipts(tmp_path, "train", pages=None if folder is None else read_pages(folder))


def test_the_text_of_each_line_is_where_the_page_has_it(folder: Path) -> None:
    pages = read_pages(folder)
    assert len(pages) == 3  # the packed document is the first once more
    for at in range(len(pages)):
        page = pages[at]
        assert not page.fields and page.image.mode == "L"
        found = {line.text: line for line in page.lines}
        assert set(found) == {*(text.upper() for text in TEXT), "LEFT PART", "RIGHT PART"}
        assert found["LEFT PART"].middle == pytest.approx(found["RIGHT PART"].middle, abs=1)
        pixels = np.asarray(page.image)
        for line in page.lines:
            left, top, right, bottom = (round(edge) for edge in line.box)
            ink = np.nonzero((pixels[top:bottom, left - 4 : right + 5] < 128).any(0))[0] + left - 4
            assert ink[0] == pytest.approx(left, abs=2) and ink[-1] == pytest.approx(right, abs=2)
            assert line.centers is not None and len(line.centers) == len(line.text)
            for char, center in zip(line.text, line.centers, strict=True):
                there = (pixels[top:bottom, round(center) - 2 : round(center) + 3] < 160).any()
                assert there or char == " ", (line.text, char)


def test_pages_are_written_the_same_again(documents: Path, folder: Path, tmp_path: Path) -> None:
    assert pdf_pages.main([str(documents), str(tmp_path), "--most", "1"]) == 0
    some = (tmp_path / "lines.jsonl").read_text().splitlines()
    assert len(some) == 2 and set(some) < set((folder / "lines.jsonl").read_text().splitlines())


def test_what_cannot_be_read_is_told(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="There is no PDF in"):
        pdf_pages.main([str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="text layer"):
        pdf_pages.main([str(documents / "broken.pdf"), str(tmp_path / "out")])
    assert "broken.pdf: left out" in capsys.readouterr().err


def test_a_line_is_transcribed_with_its_places() -> None:
    line = transcribed_line(Line((0, 0, 40, 10), "a\u00e9 b", (5.0, 15.0, 25.0, 35.0)))
    assert (line.text, line.centers) == ("A B", (5.0, 25.0, 35.0))


def test_pages_are_shown_among_receipts(folder: Path, tmp_path: Path) -> None:
    receipts = receipts_among(tmp_path, folder)
    shown = [receipts.any(Random(seed)).name for seed in range(40)]
    assert 4 <= sum(name.startswith("images/") for name in shown) <= 18
    looks = paper_looks(Random(0), "receipts", 0, receipts, tokens=900)
    assert any(one.places is not None for look in looks for one in look.readings or ())


def test_lines_of_pages_are_asked_by_their_place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nano.receipts.PAGES_SHARE", 1.0)
    monkeypatch.setattr("nano.paper_batches._REAL_SHARE", 1.0)
    trees = paper_trees(Random(1), "paper_parts", 0, receipts_among(tmp_path, folder), tokens=60)
    branches = [pieces for tree in trees for pieces in tree.branches]
    said = ["".join(piece.text for piece in pieces if isinstance(piece, Say)) for pieces in branches]
    assert any(text.startswith("read the line at") and "TO BE READ" in text for text in said)


def test_without_pages_the_same_receipts_are_shown(tmp_path: Path) -> None:
    receipts = receipts_among(tmp_path, None)
    rng, again = Random(5), Random(5)
    assert receipts.any(rng) is receipts[again.randrange(len(receipts))] and rng.random() == again.random()


def test_pages_need_receipts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stages: [{name: read, steps: 1, mix: {pages: 1.0}, learning_rate: 0.001}]")
    options = ["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"), "--pages", str(folder)]
    with pytest.raises(ConfigError, match="Give --receipts DIR"):
        train_nano.main(options)
