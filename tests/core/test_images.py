"""Every kind of image becomes the RGB a person would see, and views are exactly what they say they are."""

import base64
import http.server
import io
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent import images
from qzoom_agent.errors import BoxError, ConfigError, ImageError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.images import View, ViewStore, digest, load_image

BUDGET = {"factor": 28, "min_tokens": 32, "max_tokens": 64}


def noise(width=90, height=70, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


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


def test_urls_are_off_unless_allowed():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ImageError, match="allow_url=True"):
            load_image(f"{url}/blue.png")
        assert pixel(load_image(f"{url}/blue.png", allow_url=True)) == (0, 0, 255)
        with pytest.raises(ImageError, match=r"Cannot fetch .*404"):
            load_image(f"{url}/other.png", allow_url=True)
        server.shutdown()
    with pytest.raises(ImageError, match="Cannot fetch"):
        load_image(f"{url}/blue.png", allow_url=True)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no such file.png", "There is no image file at 'no such file.png'"),
        ("x" * 5000, "Check the path"),
        ("nul\0byte", "Check the path"),
        (".", "is a folder"),
        (b"", "it is empty"),
        (b"hello", "Not an image that can be read: the 5 bytes given"),
        ("data:image/png,abc", "write it as data:image/png;base64"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,", "it is empty"),
        ("ftp://host/a.png", "There is no image file"),
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
    with pytest.raises(ImageError, match="20x20 px is over the limit of 399 px"):
        load_image(source, max_pixels=399)


def test_beyond_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"PIL\.Image\.MAX_IMAGE_PIXELS"):
        load_image(encoded(Image.new("1", (300, 300))), max_pixels=10**9)


def test_the_encoded_size_is_limited(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    (tmp_path / "a.png").write_bytes(bytes(11))
    for source in (bytes(11), tmp_path / "a.png"):
        with pytest.raises(ImageError, match="has 11 bytes, over the limit of 10"):
            load_image(source)


# ---- what the pixels become ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_turns_the_image_upright(orientation, format):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 8))
    # The camera stored the inverse of the turn that the tag asks for.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = load_image(encoded(stored, format, exif=exif, quality=95))
    assert found.size == (32, 16)
    assert pixel(found, (3, 3)) == pytest.approx((255, 0, 0), abs=12)
    for white in ((28, 3), (3, 12), (28, 12)):
        assert pixel(found, white) == pytest.approx((255, 255, 255), abs=12)


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


@pytest.mark.parametrize(
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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[False, True]]), [0, 255]),
        (np.array([[0, 255]], np.uint8), [0, 255]),
        (np.array([[0, 65535]], np.uint16), [0, 255]),
        (np.array([[0, 200]], np.int64), [0, 200]),
        (np.array([[-5, 5]], np.int32), [0, 255]),
        (np.array([[0.0, 1.0]]), [0, 255]),
        (np.array([[0.0, 100.0]], np.float16), [0, 100]),
        (np.array([[-1.0, 1.0]], np.float32), [0, 255]),
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


def test_jpegs_are_read_at_full_detail():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    found = np.asarray(load_image(encoded(Image.fromarray(stripes), "JPEG", quality=95)))
    assert abs(int(found[5, 0, 0]) - int(found[5, 1, 0])) > 200


def test_an_extreme_shape_loads_and_is_refused_as_a_view():
    strip = load_image(encoded(Image.new("L", (1, 100_000))))
    assert strip.size == (1, 100_000)
    store = ViewStore()
    store.add_original(strip)
    with pytest.raises(ImageError, match="1x100000 px is longer than 200:1"):
        store.add_coarse(**BUDGET)
    assert [view.id for view in store.views] == ["original"]


# ---- views ---------------------------------------------------------------------------------------------------------


def filled_store(folder=None, seed=0):
    store = ViewStore(folder)
    store.add_original(Image.fromarray(noise(900, 700, seed)))
    store.add_coarse(factor=28, min_tokens=16, max_tokens=64)
    store.add_crop(Box(100, 50, 200, 110), **BUDGET)
    store.add_crop(Box(0.5, 0.5, 899.2, 30.9), **BUDGET, parent="crop1")
    return store


def test_a_store_keeps_views_in_order():
    store = filled_store()
    assert [view.id for view in store.views] == ["original", "coarse", "crop1", "crop2"]
    assert [view.id for view in store.shown] == ["coarse", "crop1", "crop2"]
    assert [view.parent for view in store.views] == [None, "original", "coarse", "crop1"]
    assert [view.kind for view in store.views] == ["original", "coarse", "crop", "crop"]
    original, coarse, crop, _ = store.views
    assert original.size == (900, 700) and original.tokens == 0
    assert coarse.size == (252, 196) and coarse.tokens == 63 and coarse.region == Box(0, 0, 900, 700)
    assert crop.size.width % 28 == crop.size.height % 28 == 0
    assert crop.tokens == crop.size.area // 28**2 and 32 <= crop.tokens <= 64
    for view in store.views:
        assert store.image(view.id).size == view.size
        assert digest(store.image(view.id)) == view.digest
        assert View.model_validate_json(view.model_dump_json()) == view


def test_a_crop_is_cut_from_the_original_and_resized_once():
    store = filled_store()
    original = Image.fromarray(noise(900, 700))
    expected = original.crop((100, 50, 200, 110)).resize(store.view("crop1").size, Image.Resampling.BICUBIC)
    assert store.image("crop1") == expected
    assert store.view("crop2").box == (0, 0, 900, 31)
    assert store.image("coarse") == original.resize((252, 196), Image.Resampling.BICUBIC)


def test_a_crop_of_legal_size_is_not_resized_at_all():
    store = filled_store()
    crop = store.add_crop(Box(56, 28, 56 + 8 * 28, 28 + 6 * 28), **BUDGET)
    assert np.array_equal(np.asarray(store.image(crop.id)), noise(900, 700)[28:196, 56:280])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.floats(-100, 300), min_size=4, max_size=4), st.sampled_from([28, 32]))
def test_any_pixel_box_can_be_cut(numbers, factor):
    store = ViewStore()
    store.add_original(Image.new("RGB", (199, 150)))
    box = Box(*numbers).ordered()
    crop = store.add_crop(box, factor=factor, min_tokens=4, max_tokens=400, parent="original")
    x1, y1, x2, y2 = crop.box
    assert 0 <= x1 < x2 <= 199 and 0 <= y1 < y2 <= 150
    assert all(float(value).is_integer() for value in crop.box)
    assert crop.region.coverage(box.clamp((199, 150))) == pytest.approx(1, abs=1e-5)
    assert crop.cell == factor


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.sampled_from(["unit", "per_mille", "cell", "pixel"]))
def test_views_map_to_the_original_and_back(numbers, frame):
    view = View(
        id="crop3", parent="coarse", kind="crop", box=(40, 60, 240, 110), width=448, height=112, digest="", tokens=64
    )
    x1, y1, x2, y2 = numbers
    expected = [40 + 200 * x1, 60 + 50 * y1, 40 + 200 * x2, 60 + 50 * y2]
    box = Box(x1, y1, x2, y2, "unit", "crop3").to_frame(frame, view.size, 28)
    found = view.to_original(box)
    assert found.as_list() == pytest.approx(expected)
    assert (found.view, found.frame) == ("original", "pixel")
    back = view.from_original(found)
    assert (back.view, back.frame) == ("crop3", "pixel")
    assert back.to_frame("unit", view.size).as_list() == pytest.approx(numbers, abs=1e-9)


def test_a_box_of_another_view_is_refused():
    store = filled_store()
    with pytest.raises(BoxError, match="view 'original' was given to view 'coarse'"):
        store.view("coarse").to_original(Box(0, 0, 1, 1))
    with pytest.raises(BoxError, match="needs a box in original pixels"):
        store.view("coarse").from_original(Box(0, 0, 1, 1, view="crop1"))
    with pytest.raises(BoxError, match="no token grid"):
        store.to_original(Box(0, 0, 1, 1, "cell"))
    with pytest.raises(BoxError, match=r"no view 'crop9'; the views are original, coarse, crop1, crop2"):
        store.image("crop9")
    with pytest.raises(BoxError, match="cut from the original"):
        store.add_crop(Box(0, 0, 1, 1, view="coarse"), **BUDGET)
    with pytest.raises(BoxError, match="to_pixel"):
        store.add_crop(Box(0, 0, 1, 1, "unit"), **BUDGET)
    with pytest.raises(BoxError, match="no view 'crop9'"):
        store.add_crop(Box(0, 0, 9, 9), **BUDGET, parent="crop9")
    assert "crop2" in store and "crop3" not in store


def test_a_store_is_for_one_image():
    store = ViewStore()
    with pytest.raises(ImageError, match="add_original"):
        store.add_coarse(**BUDGET)
    with pytest.raises(ImageError, match="add_original"):
        store.add_crop(Box(0, 0, 9, 9), **BUDGET)
    store.add_original(Image.new("RGBA", (60, 60), (0, 0, 0, 0)))
    assert pixel(store.image("original")) == (255, 255, 255)
    with pytest.raises(ImageError, match="already has its view 'original'"):
        store.add_original(Image.new("RGB", (60, 60)))
    store.add_coarse(**BUDGET)
    with pytest.raises(ImageError, match="already has its view 'coarse'"):
        store.add_coarse(**BUDGET)
    with pytest.raises(ConfigError, match="min_tokens=9, max_tokens=3"):
        store.add_crop(Box(0, 0, 9, 9), factor=28, min_tokens=9, max_tokens=3)


# ---- views on disk -------------------------------------------------------------------------------------------------


def test_a_folder_holds_each_view_once_by_digest(tmp_path):
    store = filled_store(tmp_path / "made" / "for it")
    store.add_crop(Box(100, 50, 200, 110), **BUDGET)
    names = {path.name for path in store.folder.iterdir()}
    assert names == {f"{view.digest}.png" for view in store.views} and len(names) == 4
    for view in store.views:
        assert digest(load_image(store.folder / f"{view.digest}.png")) == view.digest


def test_restore_gives_the_same_store(tmp_path):
    store = filled_store(tmp_path)
    again = ViewStore.restore(tmp_path, store.views)
    assert again.views == store.views
    assert all(again.image(view.id) == store.image(view.id) for view in store.views)
    assert again.add_crop(Box(3, 3, 90, 90), **BUDGET) == store.add_crop(Box(3, 3, 90, 90), **BUDGET)


@pytest.mark.parametrize("victim", ["original", "coarse", "crop1"])
def test_restore_names_what_is_wrong(tmp_path, victim):
    store = filled_store(tmp_path)
    path = tmp_path / f"{store.view(victim).digest}.png"
    changed = store.image(victim).copy()
    changed.putpixel((1, 1), (1, 2, 3))
    changed.save(path)
    with pytest.raises(ImageError, match=rf"pixels of view '{victim}' \(.*\) have changed"):
        ViewStore.restore(tmp_path, store.views)
    Image.new("RGB", (5, 5)).save(path)
    with pytest.raises(ImageError, match=rf"pixels of view '{victim}' \(.*\) have changed"):
        ViewStore.restore(tmp_path, store.views)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match=r"Cannot read|Not an image"):
        ViewStore.restore(tmp_path, store.views)
    path.unlink()
    with pytest.raises(ImageError, match=rf"pixels of view '{victim}' \(.*\) are missing"):
        ViewStore.restore(tmp_path, store.views)


def test_restore_refuses_a_view_listed_twice(tmp_path):
    views = filled_store(tmp_path).views
    with pytest.raises(ImageError, match="'coarse' is listed twice"):
        ViewStore.restore(tmp_path, [*views, views[1]])


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, file, **_):
        file.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    store = ViewStore(tmp_path / "views")
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", fail)
        with pytest.raises(ImageError, match=r"No space left on device.* Check the folder"):
            store.add_original(Image.new("RGB", (9, 9)))
    assert list(store.folder.iterdir()) == []
    assert store.views == []
    store.add_original(Image.new("RGB", (9, 9)))
    assert len(list(store.folder.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ImageError, match="Cannot write a view to"):
        ViewStore(tmp_path / "file").add_original(Image.new("RGB", (9, 9)))


def test_the_digest_tells_shapes_apart():
    flat = Image.new("RGB", (4, 9))
    assert digest(flat) != digest(flat.transpose(Image.Transpose.ROTATE_90))
    assert digest(flat) == digest(load_image(encoded(flat)))
    assert len(digest(flat)) == 64
    assert Size(*flat.size).area == 36
