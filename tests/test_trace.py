"""A trace survives its file whatever a model wrote, and a file that is not a trace says so."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from qzoom_agent.errors import TraceError
from qzoom_agent.geometry import Box
from qzoom_agent.images import digest
from qzoom_agent.trace import (
    VERSION,
    CallRecord,
    PerceptionRecord,
    Seconds,
    Trace,
    Turn,
    Usage,
    by_digest,
    describe_environment,
    saved_images,
)
from qzoom_agent.views import View, ViewStore
from tests.cases import each_case

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
COUNT = st.integers(0, 10**6)
FLOAT = st.floats(allow_nan=False, width=64)
QUAD = st.tuples(FLOAT, FLOAT, FLOAT, FLOAT)
PLACE = st.floats(-1e6, 1e6)
DIGEST = st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)
VIEWS = st.builds(
    View, id=TEXT, parent=st.none() | TEXT, kind=st.sampled_from(["original", "coarse", "crop"]),
    box=st.tuples(PLACE, PLACE, PLACE, PLACE),
    width=st.integers(1, 9999), height=st.integers(1, 9999), digest=DIGEST, tokens=COUNT,
)  # fmt: skip
CALLS = st.builds(
    CallRecord, name=TEXT, raw=TEXT, box=st.none() | QUAD,
    frame=st.sampled_from(["pixel", "unit", "per_mille", "cell"]),
    view=TEXT, label=TEXT, reason=TEXT, code=TEXT,
    decision=st.sampled_from(["served", "grown", "snapped", "refused", "failed"]),
    numbers=st.dictionaries(TEXT, FLOAT, max_size=3), served=st.none() | QUAD, result=st.none() | TEXT,
)  # fmt: skip
TURNS = st.builds(
    Turn, index=COUNT, text=TEXT, thought=TEXT, answer=st.none() | TEXT, calls=st.lists(CALLS, max_size=2),
    problems=st.lists(TEXT, max_size=2), repairs=st.lists(TEXT, max_size=2), finish=st.sampled_from(["stop", "length"]),
    prompt_tokens=COUNT, cached_tokens=COUNT, new_tokens=COUNT, visual_tokens=COUNT, seconds=FLOAT, act_seconds=FLOAT,
    forced=st.booleans(),
)  # fmt: skip
PERCEPTION = st.builds(
    PerceptionRecord, score=st.none() | FLOAT, threshold=st.none() | FLOAT, boxes=st.lists(QUAD, max_size=2),
    seconds=FLOAT,
    heat=st.integers(0, 3).flatmap(lambda n: st.lists(st.lists(FLOAT, min_size=n, max_size=n), max_size=3)),
)  # fmt: skip
TRACES = st.builds(
    Trace, id=TEXT, question=TEXT, status=st.sampled_from(["answered", "budget", "refused", "error"]),
    answer=st.none() | TEXT, model=TEXT, protocol=TEXT, policy=TEXT, seed=st.integers(),
    gold=st.lists(QUAD, max_size=2),
    config=st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT), max_size=3),
    views=st.lists(VIEWS, max_size=3), perception=st.none() | PERCEPTION, turns=st.lists(TURNS, max_size=3),
    usage=st.builds(
        Usage, coarse_tokens=COUNT, requested=COUNT, refused_by=st.dictionaries(TEXT, COUNT, max_size=2),
        seconds=st.builds(Seconds, think=FLOAT),
    ),
    environment=st.dictionaries(TEXT, TEXT, max_size=2), error=st.none() | TEXT,
)  # fmt: skip


def no_pixels(_: str) -> Image.Image:
    return Image.new("RGB", (2, 2))


def small(**changes: object) -> Trace:
    return Trace.model_validate({"question": "What?", "status": "answered", **changes})


def written(folder: Path, **changes: object) -> Path:
    file = small().save(folder, no_pixels) / "trace.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(trace=TRACES)
def test_any_trace_survives_its_file(trace: Trace, tmp_path: Path) -> None:
    assert Trace.load(trace.save(tmp_path, no_pixels)) == trace


def test_a_saved_folder_holds_every_image_and_no_pixels_in_the_record(tmp_path: Path) -> None:
    store = ViewStore()
    store.add_original(Image.effect_noise((90, 60), 40))
    store.add_coarse(factor=14, min_tokens=4, max_tokens=9)
    store.add_crop(Box(10, 10, 40, 40), factor=14, min_tokens=4, max_tokens=9)
    trace = small(views=store.views)
    folder = trace.save(tmp_path / "new" / "run", by_digest(store.views, store.image))

    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(
        ["trace.json", *(f"{view.digest}.png" for view in store.views)]
    )
    # packed with little effort (zlib's lowest level): a photograph takes seconds else
    for path in folder.rglob("*.png"):
        assert path.read_bytes().partition(b"IDAT")[2][:2] == b"\x78\x01"
    assert (folder / "trace.json").stat().st_size < 2500
    loaded = Trace.load(folder / "trace.json")
    for images in (saved_images(folder), saved_images(folder / "trace.json")):
        for view in loaded.views:
            assert digest(images(view.digest)) == view.digest
    assert ViewStore.restore(folder / "images", loaded.views).views == store.views


def test_saving_again_replaces_the_record_and_leaves_no_parts(tmp_path: Path) -> None:
    small(answer="first").save(tmp_path, no_pixels)
    small(answer="second").save(tmp_path, no_pixels)
    assert Trace.load(tmp_path).answer == "second"
    assert not list(tmp_path.rglob("*.part"))


def test_an_interrupted_save_leaves_the_record_before_it(tmp_path: Path) -> None:
    small(answer="first").save(tmp_path, no_pixels)
    view = View(
        id="original", parent=None, kind="original", box=(0, 0, 2, 2), width=2, height=2, digest="a" * 64, tokens=0
    )

    def stop(_: str) -> Image.Image:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(answer="second", views=[view]).save(tmp_path, stop)
    assert Trace.load(tmp_path).answer == "first"


def test_what_only_a_model_would_write_is_kept(tmp_path: Path) -> None:
    half = json.loads('"\\ud83d broken \\ud83d\\ude00 whole"')
    call = CallRecord(name=half, decision="failed", box=(math.inf, -math.inf, 1e308, math.nan), numbers={"x": math.nan})
    trace = small(turns=[Turn(index=0, text=half, calls=[call])])
    loaded = Trace.load(trace.save(tmp_path, no_pixels))
    assert loaded.turns[0].text == "\ufffd broken \U0001f600 whole" == loaded.turns[0].calls[0].name
    box = loaded.turns[0].calls[0].box
    assert box is not None and box[:3] == (math.inf, -math.inf, 1e308) and math.isnan(box[3])


def test_a_newer_minor_version_loads_and_its_fields_are_left_out(tmp_path: Path) -> None:
    view = {"id": "original", "parent": None, "kind": "original", "box": [0, 0, 4, 4], "width": 4, "height": 4}
    view |= {"digest": "b" * 64, "tokens": 0, "colour_profile": "new"}
    major = VERSION.split(".")[0]
    turns = [{"index": 0, "text": "hi", "mood": "new"}]
    loaded = Trace.load(written(tmp_path, version=f"{major}.99", later={"x": 1}, views=[view], turns=turns))
    assert (loaded.version, loaded.views[0].digest, loaded.turns[0].text) == (f"{major}.99", "b" * 64, "hi")
    assert "later" not in loaded.model_dump()


@each_case(
    "change", [{"status": "paused"}, {"turns": [{"index": 0, "text": "", "calls": [{"name": "z", "decision": "x"}]}]}]
)
def test_a_word_of_a_newer_minor_version_is_not_called_damage(change: dict[str, object], tmp_path: Path) -> None:
    newer = written(tmp_path, version="1.99", **change)
    with pytest.raises(
        TraceError, match=r"version 1\.99, this qzoom-agent knows 1\.\d+ - install the release that wrote it"
    ):
        Trace.load(newer)
    with pytest.raises(TraceError, match="was edited or is not a trace"):
        Trace.load(written(tmp_path, version=VERSION, **change))


def test_a_file_of_an_older_minor_version_loads(tmp_path: Path) -> None:
    call = {"name": "zoom", "box": [1, 2, 3, 4], "decision": "refused", "reason": "No.", "numbers": {"views": 2}}
    usage = {"coarse_tokens": 54, "requested": 1, "served": 0, "refused": 1}
    turns = [{"index": 0, "text": "hi", "calls": [call]}]
    folder = written(tmp_path, version="1.0", turns=turns, usage=usage, perception={"heat": [[0.1]], "cutoff": 0.2})
    loaded = Trace.load(folder)
    assert (loaded.turns[0].calls[0].code, loaded.usage.refused, loaded.usage.refused_by) == ("", 1, {})
    assert loaded.perception is not None and loaded.perception.extent is None


def test_what_became_of_calls_is_counted() -> None:
    def call(decision: str, code: str = "", tokens: float = 40) -> CallRecord:
        given = {"name": "zoom", "decision": decision, "code": code, "numbers": {"crop_tokens": tokens}}
        return CallRecord.model_validate(given)

    last = CallRecord(name="zoom", decision="refused", code="last_turn")
    calls = [call("served"), call("grown"), call("snapped", "cut"), call("refused", "gate", 50), call("failed")]
    turns = [Turn(index=0, text="", calls=calls), Turn(index=1, text="", calls=[call("refused", "gate"), last])]
    usage = Usage.tally([], turns)
    assert (usage.requested, usage.served, usage.snapped, usage.refused, usage.failed) == (7, 3, 1, 3, 1)
    assert usage.refused_by == {"gate": 2, "last_turn": 1}
    assert usage.saved_tokens == 90


@pytest.mark.parametrize("version", ["2.0", "0.3", "17.1"])
def test_another_major_version_says_what_reads_it(tmp_path: Path, version: str) -> None:
    with pytest.raises(TraceError, match=rf"version {version}, this qzoom-agent reads 1\.x - install"):
        Trace.load(written(tmp_path, version=version, question=["a", "shape", "of", "its", "own"]))


@pytest.mark.parametrize("version", [None, 1, 1.0, "", "1", "one.two", "1.0.0", [1]])
def test_a_file_without_a_version_is_not_a_trace(tmp_path: Path, version: object) -> None:
    with pytest.raises(TraceError, match=r'not a trace - .*no "version"'):
        Trace.load(written(tmp_path, version=version))


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"version": "1.0", "question"', b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"1"]
)
def test_a_torn_or_foreign_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(TraceError, match=r"trace\.json: .* - "):
        Trace.load(tmp_path)


def test_every_cut_of_a_trace_is_a_clear_error(tmp_path: Path) -> None:
    file = small(turns=[Turn(index=0, text="hi")]).save(tmp_path, no_pixels) / "trace.json"
    whole = file.read_bytes().rstrip()
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(TraceError):
            Trace.load(tmp_path)


def test_a_missing_trace_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere.* - give the folder"):
        Trace.load(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"trace\.json: No such file"):
        Trace.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"status": "fine"}, "status"),
        ({"turns": [{"index": 0, "text": 3}]}, r"turns\.0\.text"),
        ({"turns": [{"index": -1, "text": ""}]}, r"turns\.0\.index"),
        ({"perception": {"heat": [[1, 2], [3]]}}, "perception: .*differ in length"),
        ({"views": "none"}, "views"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, object], where: str) -> None:
    with pytest.raises(TraceError, match=where):
        Trace.load(written(tmp_path, **changes))


@pytest.mark.parametrize(
    "change", [{"width": 0}, {"height": -3}, {"tokens": -1}, {"width": 10**30}, {"digest": "../../x"}]
)
def test_an_impossible_view_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    view = {"id": "original", "parent": None, "kind": "original", "box": [0, 0, 4, 4], "width": 4, "height": 4}
    with pytest.raises(TraceError, match="views"):
        Trace.load(written(tmp_path, views=[view | {"digest": "b" * 64, "tokens": 0} | change]))


@pytest.mark.parametrize("name", ["../secret", "a/b", "", "..", "a.png", "x" * 200, "a\n"])
def test_a_digest_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match="no legal digest"):
        saved_images(tmp_path)(name)


def test_a_missing_or_torn_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    for name in ("gone", "torn"):
        with pytest.raises(TraceError, match=rf"{name}\.png.* - copy the whole folder"):
            saved_images(tmp_path)(name)


def test_an_image_of_a_trace_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives an EPS file, whatever its name, to Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(TraceError, match=r"page\.png.*Not an image"):
        saved_images(tmp_path)("page")


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        TraceError, match=r"Cannot write .*file.*trace.json: there is a file where a folder is needed. Choose"
    ):
        small().save(tmp_path / "file", no_pixels)


def test_usage_adds_up_an_episode() -> None:
    def view(id: str, kind: str, tokens: int) -> View:
        fields = {"id": id, "parent": None, "kind": kind, "box": (0, 0, 9, 9), "width": 9, "height": 9, "digest": id}
        return View.model_validate(fields | {"tokens": tokens})

    views = [
        view("original", "original", 0),
        view("coarse", "coarse", 64),
        view("crop1", "crop", 32),
        view("crop2", "crop", 48),
    ]
    calls = [
        CallRecord(name="zoom", decision="grown", result="crop2"),
        CallRecord(name="zoom", decision="refused"),
        CallRecord(name="zoom", decision="failed"),
    ]
    turns = [
        Turn(index=0, text="a", calls=calls, prompt_tokens=110, new_tokens=20, seconds=1.5, act_seconds=0.25),
        Turn(index=1, text="b", prompt_tokens=190, cached_tokens=130, new_tokens=10, seconds=0.5),
    ]
    usage = Usage.tally(views, turns, perceive=0.75)
    assert (usage.coarse_tokens, usage.crop_tokens, usage.visual_tokens) == (64, 80, 144)
    assert (usage.requested, usage.served, usage.refused, usage.failed, usage.inserted) == (3, 1, 1, 1, 1)
    assert (usage.text_tokens, usage.written_tokens) == (190 + 10 - 144, 30)
    assert usage.seconds == Seconds(perceive=0.75, think=2.0, act=0.25) and usage.seconds.total == 3.0
    assert Usage.tally([], []) == Usage()


def test_the_environment_names_what_a_result_depends_on() -> None:
    found = describe_environment()
    assert {"python", "platform", "qzoom-agent", "torch", "transformers", "langgraph"} <= found.keys()
    assert all(found.values())
