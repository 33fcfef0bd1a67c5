"""The views of one run: the images that the model is shown, cut from the original or made by a tool.

A `View` is plain data and knows its box in the original. A crop is cut from the original's pixels and resized once, to
the size shown, so "pixel" of a view always means shown pixels. The image that a tool returns is kept at its full size,
as a `source` from which the view of it and the crops of that view are cut. A `ViewStore` with a folder also keeps the
pixels as PNG files named by their digest; `restore` reads them back and checks every digest.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal, Self, TypedDict, Unpack

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from qzoom_agent.errors import BoxError, ImageError
from qzoom_agent.files import atomic_write
from qzoom_agent.geometry import Box, Size, fit_tokens, inverse, mapped, tokens
from qzoom_agent.images import MAX_PIXELS, cut, digest, load_image

Matrix = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
"""See `geometry.Affine`."""
Kind = Literal["original", "coarse", "crop", "tool", "source"]
"""`tool`: an image that a tool returned, as the model is shown it. `source`: the same at its full size, never shown."""
Kept = tuple[Annotated[str, Field(pattern="^[01]+$")], ...]
"""Rows of a view's token grid, top to bottom: "1" for a token that the model is shown, "0" for one that is left out."""
_UNSHOWN = ("original", "source")
_REDUCING_GAP = 4.0
"""Where a view shrinks to an eighth or less, whole blocks of pixels are averaged first: twice as fast, and as good."""
_ADDING = Lock()
"""Agents of other frameworks run the calls of a turn side by side, and each crop gets a name of its own."""


def original_id(image: int) -> str:
    """Return the id of the original of image number `image`, counted from 0."""
    return f"original{image + 1}" if image else "original"


def coarse_id(image: int) -> str:
    """Return the id of the coarse view of image number `image`, counted from 0."""
    return f"coarse{image + 1}" if image else "coarse"


class TokenBudget(TypedDict):
    """Limits of the visual tokens of a view."""

    factor: int
    """Side in pixels of one token."""
    min_tokens: int
    """A smaller image is shown magnified to this many."""
    max_tokens: int
    """A larger image is shown shrunk to this many."""


class View(BaseModel):
    """One image of a run. Plain data; the pixels are in the ViewStore."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a file of a newer minor version may have more fields

    id: str
    """Its name: original, coarse, crop1, crop2 and so on; tool1 for the first image that a tool returned. Of several
    images that a question is about, the second has original2 and coarse2."""
    parent: str | None
    """The view the model was looking at when it asked for this one; None for the original."""
    kind: Kind
    image: int = Field(default=0, ge=0, exclude_if=operator.not_)
    """Number of the image that it shows, counted from 0, where a question is about several."""
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    """Region of the view in original pixels: the box around it where a tool turned it, and the whole original where an
    image of a tool has no place in it."""
    source: str = Field(default="", exclude_if=operator.not_)
    """Id of the full-size image of a tool that the view was cut from; empty: the original."""
    inside: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = Field(
        default=None, exclude_if=lambda box: box is None
    )
    """Region of the view in pixels of `source`."""
    matrix: Matrix | None = Field(default=None, exclude_if=lambda matrix: matrix is None)
    """Affine map of pixels of `source` to pixels of the original; None without a source, or where there is no map."""
    width: int = Field(gt=0, lt=10**7)
    """Shown width in pixels; a multiple of the model's factor for coarse and crops."""
    height: int = Field(gt=0, lt=10**7)
    """Shown height in pixels."""
    digest: str = Field(pattern="^[A-Za-z0-9_-]{0,128}$")
    """SHA-256 of the shown pixels, see `images.digest`; names a file."""
    tokens: int = Field(ge=0, lt=10**9)
    """Visual tokens the view costs; 0 for the original and sources, which are never shown."""
    kept: Kept | None = Field(default=None, exclude_if=lambda rows: rows is None)
    """Tokens of a sparse crop that the model is shown (`perception.sparse_crop`). None: all."""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        rows = self.kept
        if rows is not None and (len({len(row) for row in rows}) != 1 or "".join(rows).count("1") != self.tokens):
            raise ValueError(f"view {self.id} has {self.tokens} tokens, and its rows of kept ones do not fit: {rows}")
        return self

    @property
    def size(self) -> Size:
        """Shown size in pixels."""
        return Size(self.width, self.height)

    @property
    def origin(self) -> str:
        """Id of the original that it shows."""
        return original_id(self.image)

    @property
    def region(self) -> Box:
        """Region of the view as a box in pixels of its original."""
        return Box(*self.box, view=self.origin)

    @property
    def extent(self) -> Box:
        """Region of the view in pixels of the image that it was cut from: the original, or a source."""
        return Box(*(self.inside or self.box), view=self.source or self.origin)

    @property
    def cell(self) -> int:
        """Side of one token in shown pixels. Raises BoxError for the original, which has no token grid."""
        if self.tokens == 0:
            raise BoxError(f"View {self.id!r} has no token grid; use pixel, unit or per_mille.")
        if self.kept is not None:
            return self.width // len(self.kept[0])
        return math.isqrt(self.width * self.height // self.tokens)

    def coverage(self, box: Box) -> float:
        """Return the share shown of a box in pixels of the view's original or source, 0 to 1.

        It is 0 of another image, and of the original if the view has no place there.
        """
        held = self.region if self.placed and box.view == self.origin else self.extent
        if box.view != held.view:
            return 0.0
        if self.kept is None:
            return held.coverage(box)
        wide, high, shown = held.width / len(self.kept[0]), held.height / len(self.kept), 0.0
        for row, marks in enumerate(self.kept):
            for column in (at for at, mark in enumerate(marks) if mark == "1"):
                x, y = held.x1 + column * wide, held.y1 + row * high
                cell = replace(held, x1=x, y1=y, x2=held.x1 + (column + 1) * wide, y2=held.y1 + (row + 1) * high)
                shown += cell.coverage(box)
        return 1.0 if shown > 1 - 1e-9 else shown

    @property
    def placed(self) -> bool:
        """True if boxes in the view refer to the original: unless a tool made an image that is no map of it."""
        return self.kind == "original" or not self.source or self.matrix is not None

    def to_source(self, box: Box) -> Box:
        """Convert a box in this view, in any frame, into pixels of the image it was cut from, without rounding."""
        if box.view != self.id:
            raise BoxError(f"A box of view {box.view!r} was given to view {self.id!r}. Set Box(view={self.id!r}).")
        pixel = box.to_pixel(self.size, self.cell if box.frame == "cell" else 1)
        held = self.extent
        x, y, sx, sy = held.x1, held.y1, held.width / self.width, held.height / self.height
        return Box(x + pixel.x1 * sx, y + pixel.y1 * sy, x + pixel.x2 * sx, y + pixel.y2 * sy, view=held.view)

    def to_original(self, box: Box) -> Box:
        """Convert a box in this view, in any frame, into original pixels. Nothing is rounded or clamped.

        Raises:
            BoxError: It is a box of another view, or the view has no place in the original.
        """
        found = self.to_source(box)
        if not self.source:
            return found
        if self.matrix is None:
            raise BoxError(f"View {self.id!r} is an image that a tool made; it has no place in the original.")
        return replace(mapped(found, self.matrix), view=self.origin)

    def from_original(self, box: Box) -> Box:
        """Convert a box in original pixels into shown pixels of this view, also where it lies outside."""
        if box.frame != "pixel" or box.view != self.origin or not self.placed:
            raise BoxError(
                f"from_original needs a box in original pixels ({self.origin!r}), got {box.frame!r} of {box.view!r}."
            )
        if self.matrix is not None:
            box = mapped(box, inverse(self.matrix))
        held = self.extent
        x, y, sx, sy = held.x1, held.y1, self.width / held.width, self.height / held.height
        return Box((box.x1 - x) * sx, (box.y1 - y) * sy, (box.x2 - x) * sx, (box.y2 - y) * sy, view=self.id)


class ViewStore:
    """The images of one run, in memory and, if a folder is given, as `<digest>.png` files in it.

    One store serves one run and one thread. Images it hands out are shared: do not change them.
    """

    def __init__(self, folder: Path | None = None, *, count: Callable[[Image.Image], int] | None = None) -> None:
        """
        Args:
            folder: keeps the pixels; None: they are in memory alone.
            count: returns the visual tokens that a model's processor makes of a view; None computes them from its size.
        """
        self.folder = folder
        self.count = count
        self.hidden: frozenset[str] = frozenset()
        """Ids of views that the model was shown and is not shown any longer."""
        self._views: dict[str, View] = {}
        self._images: dict[str, Image.Image] = {}

    @classmethod
    def restore(cls, folder: Path, views: Sequence[View]) -> "ViewStore":
        """Read the store of `views` from `folder`. Raises ImageError if a file is missing or its pixels changed."""
        store = cls(folder)
        for view in views:
            if view.id in store._views:
                raise ImageError(f"View {view.id!r} is listed twice. The record of this run is damaged; run it again.")
            store._views[view.id] = view
            store._images[view.id] = _read_view(folder / f"{view.digest}.png", view)
        return store

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "count": None}  # of a model, which a copy of the pixels does not need

    @property
    def views(self) -> list[View]:
        """All views in the order they were added, the original first."""
        return list(self._views.values())

    @property
    def shown(self) -> list[View]:
        """The views the model is shown: all but the original, sources, and those that are hidden."""
        return [view for view in self.views if view.kind not in _UNSHOWN and view.id not in self.hidden]

    def __contains__(self, view_id: object) -> bool:
        return view_id in self._views

    def view(self, view_id: str) -> View:
        """Return the view of that id. Raises BoxError if there is none."""
        if view_id not in self._views:
            raise BoxError(f"There is no view {view_id!r}; the views are {', '.join(self._views) or 'none yet'}.")
        return self._views[view_id]

    def image(self, view_id: str) -> Image.Image:
        """Return the pixels of a view exactly as shown, RGB, to keep and change. Raises BoxError for no such view."""
        return self._images[self.view(view_id).id].copy()

    def to_original(self, box: Box) -> Box:
        """Convert a box of any view, in any frame, into original pixels. Raises BoxError if there is no such view."""
        return self.view(box.view).to_original(box)

    @property
    def originals(self) -> list[View]:
        """The originals, in order."""
        return [view for view in self._views.values() if view.kind == "original"]

    @property
    def coarse(self) -> list[View]:
        """The coarse views, in the order of their images."""
        return [view for view in self._views.values() if view.kind == "coarse"]

    def original(self, view_id: str) -> View:
        """Return the original that a view shows. Raises BoxError if there is no such view."""
        return self.view(self.view(view_id).origin)

    def add_original(self, image: Image.Image, *, number: int = 0) -> View:
        """Add an image as `load_image` returns it; other modes are converted as there.

        Args:
            image: The image.
            number: Its number among several images, counted from 0.
        """
        rgb = image if image.mode == "RGB" else load_image(image)
        whole = Box(0, 0, *rgb.size, view=original_id(number))
        return self._add("original", rgb, parent=None, box=whole, tokens=0, number=number)

    def add_coarse(self, *, number: int = 0, **budget: Unpack[TokenBudget]) -> View:
        """Add a whole image at a budget of visual tokens, see `fit_tokens`. Raises ImageError beyond 200:1.

        `number`: of the image, counted from 0.
        """
        whole = self._original(number).region
        return self._add_cut("coarse", whole, parent=original_id(number), **budget)

    def add_crop(self, box: Box, *, parent: str = "coarse", **budget: Unpack[TokenBudget]) -> View:
        """Add a crop at a budget of visual tokens.

        Args:
            box: In pixels of the original or of a source; it is rounded outward and clamped.
            parent: Id of the view in which the model asked for it.

        Raises:
            BoxError: The box is in another frame, or there is no such parent.
            ImageError: The box is longer than 200:1.
        """
        self._original()
        source = self.view(box.view)
        if source.kind not in _UNSHOWN:
            raise BoxError(f"A crop is cut from the original, got a box of {box.view!r}. Use store.to_original(box).")
        inside = box.clamp(source.size).rounded()
        kind: Kind = "crop" if source.placed else "tool"
        return self._add_cut(kind, inside, parent=self.view(parent).id, **budget)

    def add_sparse_crop(self, box: Box, *, size: Size, kept: Kept, parent: str = "coarse") -> View:
        """Add a crop of the original of which the model is shown some tokens alone.

        Args:
            box: As for `add_crop`.
            size: Pixels that it is encoded at.
            kept: Rows of its token grid.
            parent: As for `add_crop`.
        """
        inside, count = box.clamp(self.view(box.view).size).rounded(), "".join(kept).count("1")
        return self._add_resized("crop", inside, size, parent=self.view(parent).id, tokens=count, kept=kept)

    def add_tool_image(
        self, image: Image.Image, *, parent: str = "coarse", matrix: Matrix | None = None, **budget: Unpack[TokenBudget]
    ) -> View:
        """Add an image that a tool returned, as a source at its full size and as the view of it that is shown.

        Args:
            image: The image, RGB.
            parent: Id of the view that the tool was given.
            matrix: Affine map of its pixels to pixels of the original; None: it has no place there.

        Raises:
            ImageError: The image is longer than 200:1.
        """
        whole = Box(0, 0, *image.size)
        fit_tokens(image.size, **budget)  # raises before it is kept
        above = self.view(parent)
        source = self._add("source", image, parent=above.id, box=whole, tokens=0, matrix=matrix, number=above.image)
        return self._add_cut("tool", replace(whole, view=source.id), parent=source.id, **budget)

    def full_size(self, view_id: str) -> Image.Image:
        """Return the pixels of a view as they were before it was resized to be shown. Raises BoxError for no view."""
        held = self.view(view_id).extent
        image = self._images[held.view]
        return image.copy() if held.as_list() == [0, 0, *image.size] else cut(image, held.clamp(image.size))

    def cost(self, size: Size, factor: int) -> int:
        """Return the visual tokens of a view that is shown at `size`, with tokens of `factor` x `factor` pixels."""
        return tokens(size, factor) if self.count is None else self.count(Image.new("RGB", size))

    def drop_after(self, count: int) -> None:
        """Drop all but the first `count` views; files of their pixels stay."""
        for view_id in list(self._views)[count:]:
            del self._views[view_id], self._images[view_id]

    def _original(self, number: int = 0) -> View:
        if original_id(number) not in self._views:
            raise ImageError("This store has no original yet. Call add_original(image) first.")
        return self._views[original_id(number)]

    def _add_cut(self, kind: Kind, box: Box, *, parent: str, **budget: Unpack[TokenBudget]) -> View:
        shown = fit_tokens((int(box.width), int(box.height)), **budget)
        return self._add_resized(kind, box, shown, parent=parent, tokens=tokens(shown, budget["factor"]))

    def _add_resized(
        self, kind: Kind, box: Box, size: Size, *, parent: str, tokens: int, kept: Kept | None = None
    ) -> View:
        image = self._images[box.view]
        if (int(box.width), int(box.height)) != image.size:
            image = cut(image, box)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
        number = self.view(box.view).image
        return self._add(kind, image, parent=parent, box=box, tokens=tokens, kept=kept, number=number)

    def _add(
        self,
        kind: Kind,
        image: Image.Image,
        *,
        parent: str | None,
        box: Box,
        tokens: int,
        matrix: Matrix | None = None,
        kept: Kept | None = None,
        number: int = 0,
    ) -> View:
        """Add a view of image `number` that shows `box` of its original or a source; `matrix` places a new source."""
        if kept is None and self.count is not None and kind not in _UNSHOWN:
            tokens = self.count(image)
        shown = digest(image)
        if self.folder is not None and not (path := self.folder / f"{shown}.png").exists():
            with atomic_write(path, error=ImageError) as part:
                image.save(part, format="PNG", compress_level=1)
        with _ADDING:
            count = 1 + sum(view.kind == kind for view in self.views)
            ids = {"original": original_id(number), "coarse": coarse_id(number)}
            view_id = ids.get(kind, f"{kind}{count}")
            if view_id in self._views:
                raise ImageError(f"This store already has its view {view_id!r}. Use a new ViewStore for another image.")
            source = view_id if kind == "source" else "" if box.view == original_id(number) else box.view
            inside = box.corners if source else None
            if source:
                matrix = self._views[source].matrix if kind != "source" else matrix
                original = self._original(number).size
                box = Box(0, 0, *original) if matrix is None else mapped(box, matrix).clamp(original).rounded()
            view = View(
                id=view_id,
                parent=parent,
                kind=kind,
                image=number,
                box=box.corners,
                source=source,
                inside=inside,
                matrix=matrix,
                width=image.width,
                height=image.height,
                digest=shown,
                tokens=tokens,
                kept=kept,
            )
            self._images[view_id] = image
            self._views[view_id] = view
        return view


def _read_view(path: Path, view: View) -> Image.Image:
    name = f"view {view.id!r} ({path})"
    if not path.is_file():
        raise ImageError(f"The pixels of {name} are missing. Put the file back or run the question again.")
    image = load_image(path, max_pixels=max(MAX_PIXELS, view.size.area))
    if image.size != view.size or digest(image) != view.digest:
        raise ImageError(f"The pixels of {name} have changed. Put the file back or run the question again.")
    return image
