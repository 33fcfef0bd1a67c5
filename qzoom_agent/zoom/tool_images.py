"""Images of own tools: the views that a tool may read, and how it says where an image of its own comes from.

    def rotate(image: Image.Image, degrees: int) -> AffineImage: ...

Nothing here imports LangChain, so that a module of tools is cheap to import; the rest is in `own_tools`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from qzoom_agent.errors import BoxError
from qzoom_agent.geometry import Affine, composed, inverse
from qzoom_agent.views import View, ViewStore

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Views:
    """The views of a run, for a tool with a parameter of this type. Images are copies, at their full size."""

    def __init__(self, store: ViewStore, *, names: Sequence[str] = ()) -> None:
        """
        Args:
            store: The views.
            names: The model's names of the views, in order.
        """
        self._store = store
        self._known = {"": "coarse", "image": "coarse", "original": "coarse", "firstimage": "coarse"}
        self._known |= {_plain(name): id for name, id in zip(names, self.ids, strict=False)}

    @property
    def ids(self) -> list[str]:
        """Ids of the views that the model was shown, in order; the user's image is the first, "coarse"."""
        return [view.id for view in self._store.shown]

    def image(self, view: str = "coarse") -> Image.Image:
        """Return a view, not reduced to what the model was shown. Raises BoxError if there is no such view."""
        return self._store.full_size(self.view(view).id)

    def view(self, name: str) -> View:
        """Return the record of a view, by its id in any spelling. Raises BoxError if there is no such view."""
        wanted = _plain(name)
        known = {view.id: view for view in self._store.shown}
        found = known.get(wanted) or known.get(self._known.get(wanted, ""))
        if found is None:
            raise BoxError(f"There is no image {name[:80]!r}; the images are {', '.join(self.ids)}.")
        return found


@dataclass(frozen=True)
class AffineImage:
    """An image that an affine map made of a view, such as a rotation: boxes in it refer to the original."""

    image: Image.Image | NDArray[np.uint8]
    """The new picture, as the model is to see it."""
    matrix: Affine | None = None
    """Place (in the view as the tool was given it) of each pixel, as `Image.transform` takes it: x, y comes from
    a x + b y + c, d x + e y + f. None: the same picture, perhaps in another size."""
    of: str | None = None
    """Id of the view. None: the one that the tool was given."""

    def on_original(self, view: View, size: tuple[int, int]) -> Affine | None:
        """Return the map of pixels of the image to pixels of the original; None if the view has no place there.

        `size` is that of the image, which may be an array.

        Raises:
            BoxError: The matrix is not six finite numbers, or keeps no area.
        """
        held = view.extent
        width, height = size
        matrix = self.matrix or (held.width / width, 0.0, 0.0, 0.0, held.height / height, 0.0)
        try:
            a, b, c, d, e, f = (float(number) for number in matrix)
        except (TypeError, ValueError):
            raise BoxError(
                f"The matrix of an AffineImage is six numbers a, b, c, d, e, f; got {matrix!r:.80}."
            ) from None
        if not all(map(math.isfinite, (c, f))):
            raise BoxError(f"The matrix of an AffineImage is six finite numbers; got {matrix!r:.80}.")
        inverse((a, b, c, d, e, f))
        if not view.placed:
            return None
        inside = (a, b, c + held.x1, d, e, f + held.y1)
        return inside if view.matrix is None else composed(inside, view.matrix)


def _plain(name: str) -> str:
    return "".join(char for char in name[:80].casefold() if char.isalnum()).removeprefix("the")
