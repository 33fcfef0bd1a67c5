"""Views are exactly what they say they are, in memory and on disk."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.errors import BoxError, ConfigError, ImageError
from qzoom_agent.geometry import Box
from qzoom_agent.images import digest, load_image
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.shipped_tools import rotate
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig

BUDGET = {"factor": 28, "min_tokens": 32, "max_tokens": 64}


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (700, 900, 3), dtype=np.uint8)


def filled_store(folder=None, seed=0):
    store = ViewStore(folder)
    store.add_original(Image.fromarray(noise(seed)))
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
    original = Image.fromarray(noise())
    expected = original.crop((100, 50, 200, 110)).resize(store.view("crop1").size, Image.Resampling.BICUBIC)
    assert store.image("crop1") == expected
    assert store.view("crop2").box == (0, 0, 900, 31)
    assert store.image("coarse") == original.resize((252, 196), Image.Resampling.BICUBIC)


def test_whoever_gets_an_image_may_change_it():
    store = filled_store()
    for view in store.views:
        store.image(view.id).thumbnail((8, 8))
        store.full_size(view.id).paste("red", (0, 0, 90, 70))
        assert digest(store.image(view.id)) == view.digest


@pytest.mark.parametrize(("shrunk", "apart"), [(7, 0), (9, 3), (18, 3)])
def test_what_is_shrunk_much_is_as_if_it_were_resized_at_once(shrunk, apart):
    small = Image.fromarray(noise()).resize((90, 70), Image.Resampling.BICUBIC)
    original = small.resize((shrunk * 252, shrunk * 196), Image.Resampling.BICUBIC)
    store = ViewStore(None)
    store.add_original(original)
    store.add_coarse(factor=28, min_tokens=16, max_tokens=63)
    at_once = original.resize((252, 196), Image.Resampling.BICUBIC)
    found = np.abs(np.asarray(store.image("coarse"), int) - np.asarray(at_once, int)).max()
    assert found <= apart, "levels of 255"


def test_a_crop_of_legal_size_is_not_resized_at_all():
    store = filled_store()
    crop = store.add_crop(Box(56, 28, 56 + 8 * 28, 28 + 6 * 28), **BUDGET)
    assert np.array_equal(np.asarray(store.image(crop.id)), noise()[28:196, 56:280])


@settings(deadline=None, derandomize=True, max_examples=30)
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


def test_a_view_of_an_image_that_a_tool_made_covers_that_image_and_where_it_has_a_place_the_original():
    store = filled_store()
    shown = []
    for matrix in (None, (1.0, 0.0, 600.0, 0.0, 1.0, 500.0)):  # moved by 600 and 500 pixels
        store.add_tool_image(Image.new("RGB", (200, 100)), matrix=matrix, **BUDGET)
        source = store.views[-1].source
        view = store.add_crop(Box(0, 0, 100, 100, view=source), parent=store.views[-1].id, **BUDGET)
        inside, other = Box(50, 0, 150, 100, view=source), Box(50, 0, 150, 100, view="original2")
        shown.append([view.coverage(box) for box in (inside, Box(650, 500, 750, 600), other)])
    assert shown == [[0.5, 0.0, 0.0], [0.5, 0.5, 0.0]]


def test_an_extreme_shape_is_refused():
    store = ViewStore()
    store.add_original(Image.new("RGB", (1, 100_000)))
    with pytest.raises(ImageError, match="1x100000 px is longer than 200:1"):
        store.add_coarse(**BUDGET)
    assert [view.id for view in store.views] == ["original"]


def test_a_store_is_for_one_image():
    store = ViewStore()
    with pytest.raises(ImageError, match="add_original"):
        store.add_coarse(**BUDGET)
    with pytest.raises(ImageError, match="add_original"):
        store.add_crop(Box(0, 0, 9, 9), **BUDGET)
    store.add_original(Image.new("RGBA", (60, 60), (0, 0, 0, 0)))
    assert store.image("original") == Image.new("RGB", (60, 60), "white")
    with pytest.raises(ImageError, match="already has its view 'original'"):
        store.add_original(Image.new("RGB", (60, 60)))
    store.add_coarse(**BUDGET)
    with pytest.raises(ImageError, match="already has its view 'coarse'"):
        store.add_coarse(**BUDGET)
    with pytest.raises(ConfigError, match="min_tokens=9, max_tokens=3"):
        store.add_crop(Box(0, 0, 9, 9), factor=28, min_tokens=9, max_tokens=3)


def test_crops_that_are_cut_side_by_side_have_names_of_their_own(monkeypatch):
    store, together = filled_store(), Barrier(4, timeout=10)

    def digest_together(image):
        together.wait()
        return digest(image)

    monkeypatch.setattr("qzoom_agent.views.digest", digest_together)
    boxes = [Box(place, 0, place + 60, 60) for place in range(0, 400, 100)]
    with ThreadPoolExecutor(4) as threads:
        crops = list(threads.map(lambda box: store.add_crop(box, **BUDGET), boxes))
    assert {view.id for view in crops} == {"crop3", "crop4", "crop5", "crop6"}
    assert [store.view(view.id).box for view in crops] == [box.corners for box in boxes]
    assert [digest(store.image(view.id)) for view in crops] == [view.digest for view in crops]


# ---- on disk -------------------------------------------------------------------------------------------------


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
        with pytest.raises(ImageError, match=r"No space left on device\. Free some space"):
            store.add_original(Image.new("RGB", (9, 9)))
    assert list(store.folder.iterdir()) == []
    assert store.views == []
    store.add_original(Image.new("RGB", (9, 9)))
    assert len(list(store.folder.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ImageError, match=r"Cannot write .*file.*png: there is a file where a folder is needed"):
        ViewStore(tmp_path / "file").add_original(Image.new("RGB", (9, 9)))


def test_a_crop_of_a_turned_image_has_a_box_of_whole_pixels() -> None:
    store = ViewStore()
    store.add_original(Image.new("RGB", (1000, 700)))
    budget = {"factor": 28, "min_tokens": 16, "max_tokens": 64}
    store.add_coarse(**budget)
    turned = rotate(Image.new("RGB", (1000, 700)), 30)
    assert isinstance(turned.image, Image.Image)
    tool = store.add_tool_image(turned.image, matrix=turned.matrix, **budget)
    plan = Zoom(ZoomConfig(**budget)).plan(store, Box(0.4, 0.4, 0.6, 0.6, frame="unit", view=tool.id))
    crop = Zoom(ZoomConfig(**budget)).cut(store, plan).view
    assert plan.box is not None and crop is not None
    assert crop.box == plan.box.corners == tuple(map(round, crop.box))
