"""Every kind of image becomes the RGB a person would see."""

import base64
import http.server
import io
import socket
import threading
import time
import warnings
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from PIL import Image, ImageOps

from qzoom_agent import images
from qzoom_agent.errors import ImageError
from qzoom_agent.geometry import Box
from qzoom_agent.images import check_image, cut, digest, load_image
from tests.cases import each_case


def noise(width=90, height=70, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def turn(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def pixel(image, at=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(at)


# ---- sources -------------------------------------------------------------------------------------------------------


def test_one_image_from_every_source(tmp_path):
    array = noise()
    picture = Image.fromarray(array)
    data = encoded(picture)
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, uri, picture, array):
        found = load_image(source)
        assert found.mode == "RGB" and type(found) is Image.Image
        assert np.array_equal(np.asarray(found), array)
        assert found.info == {}


def test_the_result_is_the_callers_own():
    picture = Image.new("RGB", (4, 4), "red")
    load_image(picture).putpixel((0, 0), (0, 0, 0))
    assert pixel(picture) == (255, 0, 0)
    array = np.zeros((4, 4, 3), np.uint8)
    load_image(array).putpixel((0, 0), (9, 9, 9))
    assert not array.any()


class Files(http.server.BaseHTTPRequestHandler):
    """Serves one PNG, and 404 under any other path."""

    body = encoded(Image.new("RGB", (3, 2), "blue"))

    def do_GET(self):
        self.send_response(200 if self.path == "/blue.png" else 404)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        return


class Garbage(Files):
    """Answers with what is no HTTP."""

    def do_GET(self):
        self.wfile.write(b"garbage\r\n\r\n")


@contextmanager
def serving(handler):
    """Run a server; yield its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_speaks_no_http_is_an_image_error():
    with serving(Garbage) as url:
        for path in ("/blue.png", "/a b"):
            with pytest.raises(ImageError, match="Cannot fetch"):
                load_image(f"{url}{path}", allow_url=True)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
def test_a_download_has_one_deadline(head: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_URL_TIMEOUT_S", 0.5)
    left = threading.Event()

    def drip(server: socket.socket) -> None:
        client, _ = server.accept()
        with client, suppress(OSError):
            client.sendall(head)
            while not left.wait(0.1):
                client.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ImageError, match=r"Cannot fetch .*: it took longer than 0\.5 s"):
            load_image(f"http://127.0.0.1:{server.getsockname()[1]}/a.png", allow_url=True)
        assert time.monotonic() - began < 5
        left.set()


def test_urls_are_off_unless_allowed():
    with serving(Files) as url:
        with pytest.raises(ImageError, match=r"Download it and give the file; .*allow_url=True"):
            load_image(f"{url}/blue.png")
        assert pixel(load_image(f"{url}/blue.png", allow_url=True)) == (0, 0, 255)
        with pytest.raises(ImageError, match=r"Cannot fetch .*404"):
            load_image(f"{url}/other.png", allow_url=True)
    with pytest.raises(ImageError, match="Cannot fetch"):
        load_image(f"{url}/blue.png", allow_url=True)


@each_case(
    ("source", "says"),
    [
        ("no such file.png", "There is no image file at 'no such file.png'"),
        ("x" * 5000, "Check the path"),
        ("", "'' is no path"),
        ("file:///a.png", "without file://"),
        ("nul\0byte", "Check the path"),
        (".", "is a folder"),
        (b"", "it is empty"),
        (b"hello", "Not an image that can be read: the 5 bytes given"),
        (bytearray(b"\0\0\0\x18ftypheic"), "Save it as PNG or JPEG"),
        ("data:image/png,abc", "write it as data:image/png;base64"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,", "it is empty"),
        ("ftp://host/a.png", "There is no image file"),
        ("https://host/a.pdf", "Will not fetch 'https://host/a.pdf'"),
        ("HTTP://host/a.pdf#page=2", "Will not fetch"),
        (None, "Cannot read an image from NoneType"),
        ([1, 2], "Cannot read an image from list"),
        (np.zeros((0, 5)), "5x0 px has no pixels: the 0x5 array"),
        (np.zeros(5), "shape 5 is not an image"),
        (np.zeros((3, 20, 20)), "shape 3x20x20 is not an image"),
        (np.zeros((2, 2), complex), "dtype complex128"),
        (np.array([["a"]]), "dtype <U1"),
        (Image.new("RGB", (0, 3)), "0x3 px has no pixels: the Pillow image"),
    ],
)
def test_what_cannot_be_read_is_named(source, says):
    with pytest.raises(ImageError) as raised:
        load_image(source)
    assert says in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "half.jpg"
    data = encoded(Image.fromarray(noise()), "JPEG")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"Cannot decode .*half\.jpg.*truncated"):
        load_image(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"half\.jpg': it is empty"):
        load_image(path)


def test_formats_that_run_programs_are_not_tried():
    with pytest.raises(ImageError, match="Not an image that can be read"):
        load_image(encoded(Image.new("RGB", (4, 4)), "EPS"))


# ---- limits --------------------------------------------------------------------------------------------------------


def test_the_limit_is_checked_before_decoding(monkeypatch):
    data = encoded(Image.new("1", (3000, 3000)))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"3000x3000 px is over the limit of 1000000 px: .* max_pixels"):
        load_image(data, max_pixels=1_000_000)


@pytest.mark.parametrize("source", [Image.new("1", (20, 20)), np.zeros((20, 20))])
def test_the_limit_holds_for_images_in_memory(source):
    assert load_image(source, max_pixels=400).size == (20, 20)
    for read in (load_image, check_image):
        with pytest.raises(ImageError, match="20x20 px is over the limit of 399 px"):
            read(source, max_pixels=399)


def test_beyond_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(Image.new("1", (300, 300)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data, max_pixels=90_000).size == (300, 300)
        with pytest.raises(
            ImageError, match=r"300x300 px is over the limit of 50000 px.* raise the setting max_pixels"
        ):
            load_image(data, max_pixels=50_000)
        with pytest.raises(ImageError, match=r"over the limit of 100 px.*90000 pixels.* raise the setting max_pixels"):
            load_image(data, max_pixels=100)
        assert cut(load_image(data), Box(0, 0, 300, 299)).size == (300, 299)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_encoded_size_is_limited(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    (tmp_path / "a.png").write_bytes(bytes(11))
    for source in (bytes(11), tmp_path / "a.png"):
        with pytest.raises(ImageError, match="has 11 bytes, over the limit of 10"):
            load_image(source)


# ---- what the pixels become ----------------------------------------------------------------------------------------


@each_case("orientation", range(1, 9))
@each_case("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_turns_the_image_upright(orientation, format):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 8))
    # The camera stored the inverse of the turn that the tag asks for.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    found = load_image(encoded(stored, format, exif=turn(orientation), quality=95))
    assert found.size == (32, 16)
    assert pixel(found, (3, 3)) == pytest.approx((255, 0, 0), abs=12)
    for white in ((28, 3), (3, 12), (28, 12)):
        assert pixel(found, white) == pytest.approx((255, 255, 255), abs=12)


def test_a_pillow_image_whose_file_was_closed_says_what_to_do(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pass
    with pytest.raises(ImageError, match=r"closed before its pixels were read: call load\(\) on the image first"):
        load_image(image)


def test_transparency_is_flattened_on_white():
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    assert [pixel(load_image(clear), (x, 0)) for x in (0, 1)] == [(255, 255, 255), (127, 127, 127)]
    assert pixel(load_image(Image.new("LA", (1, 1), (40, 0)))) == (255, 255, 255)
    assert pixel(load_image(Image.new("LA", (1, 1), (40, 255)))) == (40, 40, 40)
    assert pixel(load_image(clear.convert("RGBa"))) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    for found in (load_image(encoded(palette, transparency=0)), load_image(encoded(palette, "GIF", transparency=0))):
        assert [pixel(found, (x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 200, 0)]
    half = load_image(encoded(palette, transparency=bytes([255, 0])))
    assert [pixel(half, (x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]
    assert pixel(load_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)))) == (255, 255, 255)
    deep = load_image(encoded(Image.fromarray(np.array([[0, 257]], np.uint16)), transparency=0))
    assert [pixel(deep, (x, 0)) for x in (0, 1)] == [(255, 255, 255), (1, 1, 1)]


@each_case(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), 255),
        (Image.new("L", (2, 2), 77), 77),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 255)), 0),
        (Image.new("YCbCr", (2, 2), (90, 128, 128)), 90),
        (Image.new("HSV", (2, 2), (0, 0, 60)), 60),
        (Image.new("I;16", (2, 2), 65535), 255),
        (Image.new("I;16", (2, 2), 128 * 257), 128),
        (Image.new("I;16B", (2, 2), 0x8080), 128),
        (Image.new("I", (2, 2), 200), 200),
        (Image.new("I", (2, 2), 257 * 30), 30),
        (Image.new("I", (2, 2), 2**31 - 1), 255),
        (Image.new("F", (2, 2), 0.5), 128),
        (Image.new("F", (2, 2), 200.0), 200),
        (Image.new("F", (2, 2), float("nan")), 0),
    ],
)
def test_every_mode_becomes_the_grey_it_means(image, expected):
    assert pixel(load_image(image)) == (expected,) * 3


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_files(format):
    deep = Image.frombytes("I;16", (3, 1), np.array([0, 128 * 257, 65535], "<u2").tobytes())
    found = load_image(encoded(deep, format))
    assert [pixel(found, (x, 0))[0] for x in range(3)] == [0, 128, 255]


@each_case(
    ("values", "expected"),
    [
        (np.array([[False, True]]), [0, 255]),
        (np.array([[0, 255]], np.uint8), [0, 255]),
        (np.array([[0, 65535]], np.uint16), [0, 255]),
        (np.array([[0, 255]], np.uint16), [0, 1]),
        (np.array([[0, 200]], np.int64), [0, 200]),
        (np.array([[-5, 5]], np.int32), [0, 255]),
        (np.array([[0.0, 1.0]]), [0, 255]),
        (np.array([[0.0, 100.0]], np.float16), [0, 100]),
        (np.array([[-1.0, 1.0]], np.float32), [0, 255]),
        (np.array([[-0.05, 0.2, 1.1]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 0.2, 1.02]]), [0, 51, 255]),
        (np.array([[-0.2, 0.0, 0.2]]), [0, 128, 255]),
        (np.array([[0.0, np.nan, np.inf, -np.inf, 1.0]]), [0, 0, 255, 0, 255]),
        (np.array([[-1.7e308, 1.7e308]]), [0, 255]),
        (np.array([[[7], [9]]], np.uint8), [7, 9]),
        (np.array([[[7, 255], [9, 0]]], np.uint8), [7, 255]),
    ],
)
def test_arrays_are_scaled_by_their_samples(values, expected):
    found = load_image(values)
    assert [pixel(found, (x, 0))[0] for x in range(found.width)] == expected


def test_large_arrays_are_scaled_in_strips_alike(monkeypatch):
    values = np.random.default_rng(1).normal(size=(97, 13, 3))
    whole = load_image(values)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 50)
    assert load_image(values) == whole
    assert digest(whole) == digest(load_image(values))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        data = encoded(frames[0].copy(), format, save_all=True, append_images=[frame.copy() for frame in frames[1:]])
        assert pixel(load_image(data), (4, 4)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_pixels_of_a_file_are_decoded_and_not_copied(format, monkeypatch):
    copied = []
    copy = Image.Image.copy
    monkeypatch.setattr(Image.Image, "copy", lambda self: copied.append(self.size) or copy(self))
    for options, size in (({}, (60, 40)), ({"exif": turn(6)}, (40, 60))):
        data = encoded(Image.fromarray(noise()).resize((60, 40)), format, **options)
        found = load_image(data)
        assert found.size == size and type(found) is Image.Image and not copied
        with Image.open(io.BytesIO(data)) as opened:
            assert digest(found) == digest(ImageOps.exif_transpose(opened).convert("RGB"))
        copied.clear()
        found.putpixel((0, 0), (1, 2, 3))
        assert pixel(found) == (1, 2, 3) and load_image(found) is not found and copied == [size]
        copied.clear()


@pytest.mark.parametrize("format", ["BMP", "GIF", "JPEG", "PNG", "PPM"])
def test_a_common_file_is_read_without_the_modules_of_the_rarer_formats(format, monkeypatch):
    Image.init()
    data = encoded(Image.new("RGB", (8, 8), "red"), format)
    for name in images.FORMATS:  # as in a process that has opened no image yet
        if name not in ("BMP", "GIF", "JPEG", "PNG", "PPM"):
            monkeypatch.delitem(Image.OPEN, name)
    asked = []
    monkeypatch.setattr(Image, "init", lambda: asked.append(1))
    assert pixel(load_image(data), (4, 4)) == pytest.approx((255, 0, 0), abs=3) and not asked


def test_jpegs_are_read_at_full_detail():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    found = np.asarray(load_image(encoded(Image.fromarray(stripes), "JPEG", quality=95)))
    assert abs(int(found[5, 0, 0]) - int(found[5, 1, 0])) > 200


def test_shapes_that_no_model_is_shown_are_refused():
    assert load_image(encoded(Image.new("L", (1, 200)))).size == (1, 200)
    for size in ((1, 201), (100_000, 1)):
        with pytest.raises(ImageError, match="longer than 200:1"):
            load_image(encoded(Image.new("L", size)))


def test_a_header_is_checked_without_decoding(tmp_path):
    path = tmp_path / "turned.jpg"
    Image.effect_noise((40, 30), 90).convert("RGB").save(path, exif=turn(6))
    assert check_image(path) == load_image(path).size == (30, 40)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ImageError, match="Cannot decode"):
        check_image(path)
    for format in ("PNG", "WEBP", "TIFF"):  # Pillow turns the size of a TIFF by itself
        turned = encoded(Image.new("RGB", (40, 30)), format, exif=turn(6))
        opened = Image.open(io.BytesIO(turned))
        assert check_image(turned) == check_image(opened) == load_image(opened).size == (30, 40)
        assert check_image(opened) == (30, 40)  # now that its pixels are there
    for source in (Image.new("RGB", (8, 6)), np.zeros((6, 8))):
        assert check_image(source) == (8, 6)
    with pytest.raises(ImageError, match="over the limit of 9 px"):
        check_image(encoded(Image.new("L", (8, 6))), max_pixels=9)


def test_the_digest_tells_shapes_apart():
    flat = Image.new("RGB", (4, 9))
    assert digest(flat) != digest(flat.transpose(Image.Transpose.ROTATE_90))
    assert digest(flat) == digest(load_image(encoded(flat)))
    assert len(digest(flat)) == 64


@pytest.mark.parametrize("value", [1e300, -1e300, 1.7e308, -5.0, 70000.0, 5e-324, -5e-324])
def test_an_array_of_one_extreme_value_is_an_image(value: float) -> None:
    array = np.full((4, 5), value)
    colours = load_image(array).getcolors()
    assert colours is not None and len(colours) == 1
    array[0, 0] = -value
    array[1, 1] = np.nan
    assert load_image(array).size == (5, 4)


def test_an_open_file_is_read_from_its_beginning_wherever_it_stands() -> None:
    written = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(written, "PNG")
    for _ in range(2):
        assert load_image(written).size == (40, 30)

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation("seek")

    assert load_image(Stream(written.getvalue())).size == (40, 30)
