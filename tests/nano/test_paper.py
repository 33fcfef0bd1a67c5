"""Paper, its views, and what the tower learns to read along its lines."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from nano.batches import Draw
from nano.drawn_paper import SHARES, draw_paper
from nano.frames import ACROSS, CELL, DOWN, FRAME_HEIGHT, FRAME_WIDTH, Reading, reading_batch
from nano.line_scores import score_lines
from nano.model import build_model
from nano.paper import ALPHABET, BLANK, CLASSES, Line, Paper, classes_of, text_of, transcribed
from nano.paper_batches import paper_looks
from nano.paper_views import crop_view, line_view, page_view, view_of
from nano.reading import LineReader, along_lines, reading_losses, spelled
from nano.receipts import Receipts
from nano.scan import aged
from nano.tokenizer import build_tokenizer
from nano.trees import MERGE, PATCH, Look
from nano.typefaces import FOLDER, Style, faces, installed
from pack_typefaces import pack


@pytest.fixture(scope="module")
def pages() -> list[Paper]:
    return [draw_paper(seed, layout=layout) for seed, layout in enumerate(SHARES)]


def plain(*lines: Line, size: tuple[int, int] = (280, 140)) -> Paper:
    """White paper with a black bar wherever a line is."""
    image = Image.new("L", size, 255)
    for line in lines:
        ImageDraw.Draw(image).rectangle(line.box, fill=0)
    return Paper(image, lines)


def folder_of_receipts(folder: Path, count: int) -> Path:
    """Write a folder of the form of real receipts, each with two lines."""
    (folder / "images").mkdir()
    rows = []
    for number in range(count):
        Image.new("L", (300, 200), 255).save(folder / "images" / f"{number}.jpg")
        lines = [{"box": [20, 30, 220, 60], "text": f"Total {number}"}, {"box": [20, 90, 160, 120], "text": "~~ 9.00"}]
        fields = {"company": "a b", "date": "01/02/2019", "address": "x", "total": f"{number}.00"}
        rows.append({"image": f"images/{number}.jpg", "size": [300, 200], "fields": fields, "lines": lines})
    (folder / "receipts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_what_is_transcribed_can_be_told_apart() -> None:
    assert transcribed("  Total:\t RM 9.00\né") == "TOTAL: RM 9.00 É".removesuffix("É")
    assert len(set(ALPHABET)) == len(ALPHABET) == CLASSES - 1
    assert text_of(classes_of(ALPHABET)) == ALPHABET
    assert BLANK not in classes_of(ALPHABET)


def test_the_view_shows_what_its_readings_say() -> None:
    line = Line((56.0, 42.0, 168.0, 70.0), "AB", (84.0, 140.0))
    look = view_of(plain(line), (0.0, 0.0, 280.0, 140.0), 10, 5)
    assert look.readings is not None
    (one,) = look.readings
    assert one.y == pytest.approx((56.0 / FRAME_HEIGHT) - 0.5)
    assert one.places is not None
    assert [one.first + place for place in one.places] == [84 // FRAME_WIDTH, 140 // FRAME_WIDTH]
    pixels = np.asarray(look.image)[:, :, 0]
    x = int((one.first + one.places[0] + 0.5) * FRAME_WIDTH)
    assert pixels[int((one.y + 0.5) * FRAME_HEIGHT), x] < 20
    small = view_of(plain(line), (0.0, 0.0, 280.0, 140.0), 4, 2)
    assert small.readings == ()


def test_a_line_that_is_cut_is_read_only_where_its_characters_are_known() -> None:
    box = (84.0, 0.0, 280.0, 140.0)
    known = Line((56.0, 42.0, 168.0, 70.0), "AB", (70.0, 140.0))
    kept = view_of(plain(known), box, 7, 5).readings
    assert kept is not None and [text_of(list(one.classes)) for one in kept] == ["B"]
    assert view_of(plain(Line(known.box, known.text)), box, 7, 5).readings == ()


def test_frames_are_numbered_as_the_reader_gives_them() -> None:
    reader = LineReader(3)
    torch.nn.init.zeros_(reader.frames.weight)
    rows, columns = 2, 3
    bias = torch.zeros(ACROSS * DOWN, CLASSES)
    bias[torch.arange(ACROSS * DOWN), torch.arange(ACROSS * DOWN) + 1] = 9.0  # each frame of a token says its number
    reader.frames.bias.data.copy_(bias.view(-1))
    logits = reader(torch.zeros(rows * columns, 3))
    one = Reading(y=3.0, first=2, count=4, classes=(1,), places=None)  # the lowest row of frames of the lower tokens
    batch = reading_batch([(rows, columns, [one])])
    assert along_lines(logits, batch).argmax(1).tolist() == [7, 8, 5, 6]
    between = reading_batch([(rows, columns, [Reading(y=0.25, first=0, count=1, classes=(1,), places=None)])])
    assert along_lines(logits, between)[0, 1].item() == pytest.approx(0.75 * 9.0)


def test_both_losses_fall_to_nothing_where_the_print_is_spelled() -> None:
    classes = tuple(classes_of("AAB"))
    told = Reading(y=0.0, first=0, count=8, classes=classes, places=(0, 2, 4))
    batch = reading_batch([(1, 2, [told, Reading(0.0, 0, 8, classes, None)])])
    logits = torch.full((16, CLASSES), -9.0)
    logits[:, BLANK] = 9.0
    for at, number in zip((0, 2, 4), classes, strict=True):
        for start in (0, 8):
            logits[start + at, BLANK], logits[start + at, number] = -9.0, 9.0
    losses = reading_losses(logits, batch)
    assert set(losses) == {"glyphs", "lines"}
    assert all(float(loss) < 1e-3 for loss in losses.values())
    assert spelled(logits, [8, 8]) == ["AAB", "AAB"]
    wrong = reading_losses(torch.zeros(16, CLASSES), batch)
    assert all(float(loss) > 1.0 for loss in wrong.values())


def test_views_are_whole_tokens_and_lines_fit_their_frames(pages: list[Paper]) -> None:
    rng = Random(3)
    for page in pages:
        looks = [crop_view(rng, page, tokens=(32, 160), heights=(18.0, 60.0)) for _ in range(4)]
        looks += [line_view(page, page.lines[0]), page_view(page, tokens=500)]
        for look in looks:
            assert look.image.width % CELL == look.image.height % CELL == 0
            rows, columns = look.grid
            assert rows * columns <= 500
            for one in look.readings or ():
                assert one.first >= 0 and one.first + one.count <= columns * ACROSS
                assert one.y >= 0 and one.y < rows * DOWN
                assert one.count >= len(one.classes)


def test_ageing_changes_tones_and_not_the_size() -> None:
    image = draw_paper(2).image
    looks = [aged(Random(seed), image) for seed in range(6)]
    assert all(look.size == image.size and look.mode == image.mode for look in looks)
    assert any(not np.array_equal(np.asarray(look), np.asarray(image)) for look in looks)


def test_batches_of_paper_are_drawn_again_from_their_number(tmp_path: Path) -> None:
    receipts = Receipts(folder_of_receipts(tmp_path, 50), "train")
    for kind in ("drawn", "receipts", "sheets"):
        one, again = (paper_looks(Random("x"), kind, 40, receipts, tokens=60) for _ in range(2))
        assert [look.readings for look in one] == [look.readings for look in again]
        assert sum(look.grid[0] * look.grid[1] for look in one) >= 60
        assert all(look.readings for look in one)
    with pytest.raises(ValueError, match="--receipts"):
        paper_looks(Random(0), "receipts", 0, None, tokens=60)


def test_a_large_batch_is_several_small_ones(tmp_path: Path) -> None:
    receipts = Receipts(folder_of_receipts(tmp_path, 50), "train")
    tokenizer = build_tokenizer()
    small = Draw(tokenizer, receipts, paper_tokens=60)
    large = Draw(tokenizer, receipts, paper_tokens=60, times=2, apart=9)

    def shown(draw: Draw, number: int) -> list[Image.Image]:
        return [
            piece.image for tree in draw.trees("receipts", number) for piece in tree.prefix if isinstance(piece, Look)
        ]

    assert shown(large, 3) == [*shown(small, 3), *shown(small, 12)]


def test_real_receipts_are_transcribed(tmp_path: Path) -> None:
    receipts = Receipts(folder_of_receipts(tmp_path, 25), "train")
    assert len(receipts) == 20 and receipts[20] is receipts[0]
    first = receipts[0]
    assert [line.text for line in first.lines] == ["TOTAL 0", "~~ 9.00"]
    assert first.fields["company"] == "A B" and first.image.mode == "L" and first.name == "images/0.jpg"


@pytest.mark.parametrize("style", ["mono", "sans", "bitmap"])
def test_there_are_typefaces_of_every_style(style: Style) -> None:
    assert all(path.is_file() for path in faces(style))


def test_packed_typefaces_are_found_before_installed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack(tmp_path) == len(list(tmp_path.iterdir())) > 3
    names = [path.name for path in faces("mono")]
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for cached in (installed, faces):
        cached.cache_clear()
    assert [path.name for path in faces("mono")] == names
    assert all(path.parent == tmp_path for path in faces("mono"))
    monkeypatch.undo()
    for cached in (installed, faces):
        cached.cache_clear()


def test_an_untrained_tower_reads_nothing_right(pages: list[Paper]) -> None:
    torch.manual_seed(0)
    model = build_model(build_tokenizer())
    model.training_heads = torch.nn.Module()
    model.training_heads.lines = LineReader(model.config.get_text_config().hidden_size)
    count = len(pages[0].lines)
    for most, lines in ((3, 3), (count - 1, count - 1), (2 * count, count)):
        scores = score_lines(model, pages[:1], most=most)
        assert scores.lines == lines and scores.exact == 0.0 and scores.error > 0.5


def test_the_size_for_paper_keeps_within_its_limit() -> None:
    model = build_model(build_tokenizer(), "paper")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 14_000_000
    assert CELL == PATCH * MERGE
