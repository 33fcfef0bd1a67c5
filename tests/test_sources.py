"""What else than files is an image: open files, tensors, pages of PDFs; and files that hold more than one."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pypdfium2 as pdfium
import pytest
import torch
from PIL import Image

from qzoom_agent.errors import ImageError, MissingDependency
from qzoom_agent.images import MAX_PIXELS, check_image, load_image

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, format, **options)
    return buffer.getvalue()


def test_an_open_file_is_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(encoded())
    with (tmp_path / "one.png").open("rb") as file:
        assert np.array_equal(np.asarray(load_image(file)), NOISE)
    assert check_image(io.BytesIO(encoded())) == (30, 20)
    with (tmp_path / "one.png").open(encoding="latin-1") as text, pytest.raises(ImageError, match="binary mode"):
        load_image(text)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="empty"):
        load_image(io.BytesIO(b""))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False], ids=["CHW", "HWC"])
def test_a_tensor_is_an_image(dtype: torch.dtype, first: bool) -> None:
    tensor = torch.from_numpy(NOISE)
    tensor = tensor if dtype is torch.uint8 else (tensor / 255).to(dtype)
    found = np.asarray(load_image(tensor.permute(2, 0, 1) if first else tensor))  # type: ignore[arg-type]
    assert np.abs(found.astype(int) - NOISE).max() <= (2 if dtype is torch.bfloat16 else 0)
    assert check_image(tensor) == (30, 20)  # type: ignore[arg-type]


def test_a_tensor_of_a_batch_is_no_image() -> None:
    with pytest.raises(ImageError, match="2x3x20x30"):
        load_image(torch.zeros(2, 3, 20, 30))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP"])
def test_further_frames_are_said(format: str, caplog: pytest.LogCaptureFixture) -> None:
    more = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    with caplog.at_level(logging.WARNING):
        load_image(encoded(format))
        assert not caplog.records
        load_image(encoded(format, save_all=True, append_images=more))
    assert "several frames" in caplog.text


@pytest.fixture
def document(tmp_path: Path) -> Path:
    pages = [Image.new("RGB", (100, 200), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "two.pdf", save_all=True, append_images=pages[1:])
    return tmp_path / "two.pdf"


def test_a_page_of_a_pdf_is_an_image(document: Path, caplog: pytest.LogCaptureFixture) -> None:
    second = load_image(f"{document}#page=2")
    assert not caplog.text
    first = load_image(document)
    assert "has 2 pages; only the first is shown" in caplog.text
    for page, color in ((first, (255, 0, 0)), (second, (0, 0, 255))):  # Pillow writes the pages as JPEG
        assert np.abs(np.asarray(page)[9, 9].astype(int) - color).max() <= 3
    assert first.size == check_image(f"{document}#page=2") == (278, 556), "200 dots per inch of 100 x 200 points"
    assert load_image(document.read_bytes()).tobytes() == first.tobytes()
    uri = f"data:application/pdf;base64,{base64.b64encode(document.read_bytes()).decode()}"
    assert load_image(uri).tobytes() == first.tobytes() and check_image(uri) == first.size
    assert np.prod(load_image(document, max_pixels=5000).size) <= 5000


def test_a_page_is_checked_without_rendering_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its size is that of the page as it is rendered, at any size, turned, and under any limit."""
    document = pdfium.PdfDocument.new()
    for size, turned in (((100.3, 200.7), 0), ((612, 792), 90), ((33.33, 77.77), 180), ((5000, 3), 270)):
        document.new_page(*size).set_rotation(turned)
    document.save(tmp_path / "sizes.pdf")
    sources = [f"{tmp_path}/sizes.pdf#page={page + 1}" for page in range(3)]
    limits = (5000, 1_000_003, MAX_PIXELS)
    shown = [load_image(source, max_pixels=most).size for source in sources for most in limits]
    monkeypatch.setattr(pdfium.PdfPage, "render", None)
    assert [check_image(source, max_pixels=most) for source in sources for most in limits] == shown
    assert shown[5][0] > shown[5][1] and check_image(tmp_path / "sizes.pdf") == shown[2] and not caplog.text
    with pytest.raises(ImageError, match="longer than 200:1"):
        check_image(f"{tmp_path}/sizes.pdf#page=4")


@pytest.mark.parametrize("page", ["0", "3", "-1", "", "two", "9" * 5000])
@pytest.mark.parametrize("read", [load_image, check_image])
def test_a_page_that_is_not_there(read: Callable[[str], object], page: str, document: Path) -> None:
    with pytest.raises(ImageError, match="pages 1 to 2"):
        read(f"{document}#page={page}")


_FORM = b"""%PDF-1.7
1 0 obj <</Type /Catalog /Pages 2 0 R /AcroForm <</Fields [4 0 R] /DA (/Helv 14 Tf 0 g)>>>> endobj
2 0 obj <</Type /Pages /Kids [3 0 R] /Count 1>> endobj
3 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Rotate 90 /Annots [4 0 R]>> endobj
4 0 obj <</Type /Annot /Subtype /Widget /FT /Tx /T (total) /V (123.45) /Rect [100 140 200 165] /F 4 /P 3 0 R
  /AP <</N 5 0 R>>>> endobj
5 0 obj <</Type /XObject /Subtype /Form /BBox [0 0 100 25] /Length 17>> stream
20 5 60 15 re f
endstream endobj
trailer <</Root 1 0 R>>
"""
"""A page, turned to the right, with a filled-in field that is drawn as a black bar."""


def test_what_is_filled_into_a_form_is_on_the_page() -> None:
    dark = np.argwhere(np.asarray(load_image(_FORM).convert("L")) < 128)
    (top, left), (bottom, right) = dark.min(0), dark.max(0) + 1
    # 120 to 180 and 145 to 160 points from the bottom left, a quarter turned to the right
    assert [left, top, right, bottom] == pytest.approx([145 / 0.36, 120 / 0.36, 160 / 0.36, 180 / 0.36], abs=2)


def test_a_pdf_may_begin_with_white_space(document: Path) -> None:
    page = load_image(document)
    for before in (b"\n\n", b"\xef\xbb\xbf"):
        assert load_image(before + document.read_bytes()).tobytes() == page.tobytes()


def test_a_pdf_without_pages_is_told(tmp_path: Path) -> None:
    pdfium.PdfDocument.new().save(tmp_path / "none.pdf")
    for read in (load_image, check_image):
        with pytest.raises(ImageError, match=r"[^.]\. It has no pages, a password or damage\."):
            read(tmp_path / "none.pdf")


def test_a_damaged_pdf(document: Path) -> None:
    for data in (b"%PDF-", b"%PDF-1.7\n" + b"\0" * 1000, document.read_bytes()[:80]):
        with pytest.raises(ImageError, match="PDF"):
            load_image(data)
    with pytest.raises(ImageError, match=r"Cannot open .*none\.pdf"):
        load_image(document.with_name("none.pdf"))


def test_a_pdf_names_its_extra(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qzoom_agent.extras.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"qzoom-agent\[pdf\]"):
        load_image(document)
