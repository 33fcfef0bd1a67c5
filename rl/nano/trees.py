"""Question trees: one encoded image, many conversations that continue from it.

Encoding an image costs far more than a question about it. A tree is a prefix (the first image) and branches; each
branch attends to the prefix and to itself, and its positions continue from the prefix, so every branch computes exactly
what it would compute alone (a test compares them), while the image is encoded once.

Token and position layout are those of Qwen2.5-VL: `<|vision_start|>` + one token per 28 x 28 pixels + `<|vision_end|>`,
and three position axes (time, row, column) that all continue from the largest position so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nano.frames import Reading, reading_batch

PATCH, MERGE, TEMPORAL = 14, 2, 2
COUNTED = 16
"""Words of a line, and characters of a word, that are told apart."""
_CLOSE = 4  # tokens that something small may span
WINDOW = 4  # tokens a side of the vision tower's attention window of 112 pixels
_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32) * 255
_STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32) * 255


@dataclass(frozen=True)
class Look:
    """An image in a conversation, sized in whole tokens, with optional dense labels of shape (tokens, k).

    `note`: visual tokens of it with print that names a place, and the earlier image and the visual tokens of it that
    show that place. What is said next is about that place, whatever a question between them names.
    `readings`: the lines of print in it that the tower learns to read; None: it is not paper.
    `place`: the earlier image that it is a crop of, and its box there in visual tokens (left, top, right, bottom).
    """

    image: Image.Image
    dense: NDArray[np.int64] | None = None
    note: tuple[Sequence[int], "Look", Sequence[int]] | None = None
    readings: Sequence[Reading] | None = None
    place: tuple["Look", tuple[float, float, float, float]] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.image.height // (PATCH * MERGE), self.image.width // (PATCH * MERGE)


@dataclass(frozen=True)
class Say:
    """Text in a conversation; `learn` marks what the model itself says, `looks` what it only has to look up: where it
    would be read from is learned, and not the text.

    `focus` names, for each of its first tokens, the image and the visual tokens of it (numbered in reading order) that
    the token is read from: what the token *before* it should look at. In text that is not learned it grounds that token
    itself: see `referents`.
    """

    text: str
    learn: bool = False
    looks: bool = False
    focus: Sequence[tuple[Look, Sequence[int]]] = ()
    line: bool = False
    """Whether it is a line of print from its start, so that its words and characters can be counted."""
    tally: tuple[Look, Sequence[int]] | None = None
    """The image and the visual tokens that are counted in it, one for each thing, for a number that is said."""


Piece = Look | Say


@dataclass(frozen=True)
class Tree:
    """A first image, the conversations that continue from it, and what each of those is called in validation tables."""

    prefix: Sequence[Piece]
    branches: Sequence[Sequence[Piece]]
    names: Sequence[str] = ()


def patchify(image: Image.Image, *, frames: int = TEMPORAL) -> NDArray[np.float32]:
    """Pixels to the rows Qwen2.5-VL's tower takes, shape (patches, 588 * frames); sides are multiples of 28.

    The stock tower takes an image as two equal frames; the packed forward takes one and halves the work.
    """
    pixels = (np.asarray(image, dtype=np.float32) - _MEAN) / _STD
    rows, columns = image.height // (PATCH * MERGE), image.width // (PATCH * MERGE)
    grid = pixels.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    grid = grid.transpose(0, 3, 1, 4, 6, 2, 5)  # row, column, inner row, inner column, channel, y, x
    if frames > 1:
        grid = np.repeat(grid[..., None, :, :], frames, axis=-3)
    return grid.reshape(rows * columns * MERGE * MERGE, -1)


def pixels_of(looks: Sequence[Look]) -> tuple[Tensor, Tensor]:
    """Return the patches of all images, of one frame each, and their grids of patches, shape (images, 3)."""
    patches = np.concatenate([patchify(look.image, frames=1) for look in looks])
    grids = [(1, MERGE * rows, MERGE * columns) for rows, columns in (look.grid for look in looks)]
    return torch.from_numpy(patches), torch.tensor(grids)


@dataclass
class _Row:
    """One tree, flattened."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[tuple[float, float, float]] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    """Index of the first visual token of a look (by identity)."""
    focus: list[tuple[int, int]] = field(default_factory=list)
    """Pairs of a predicting token and a visual token that it should look at."""
    ground: list[tuple[int, int]] = field(default_factory=list)
    """Pairs of a naming token and a visual token of what it names."""
    point: list[tuple[int, int]] = field(default_factory=list)
    """Pairs of a predicting token of an answer and a token that names what it is about, printed or in the question."""
    aim: list[tuple[int, int, int]] = field(default_factory=list)
    """A predicting token, and the column and row in the middle of the visual tokens that it is read from."""
    spell: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Number of the word in its line and of the character in its word that a token shows or says next."""
    tally: list[tuple[int, int]] = field(default_factory=list)
    """Pairs of a token that predicts a number and a visual token that is counted."""


class Packer:
    """Turns trees into the tensors of one training batch.

    `aligned`: a crop with a place gets the rows and columns of that place (Q-Zoom 3.3) instead of a grid of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, aligned: bool = False) -> None:
        self.tokenizer, self.aligned = tokenizer, aligned
        names = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
        self.start, self.pad, self.end = cast(list[int], tokenizer.convert_tokens_to_ids(names))
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    def _extend(self, row: _Row, pieces: Sequence[Piece], branch: int, position: int) -> int:
        named: list[int] = []
        noted = False
        for piece in pieces:
            if isinstance(piece, Say):
                ids = self._encode(piece.text)
                where: list[tuple[float, float, float]] = [(position + step,) * 3 for step in range(len(ids))]
                position += len(ids)
                labels = ids if piece.learn else [-100] * len(ids)
                said = piece.learn or piece.looks
                for step, (look, cells) in enumerate(piece.focus):
                    predicting, begin = len(row.ids) + step - 1, row.starts[id(look)]
                    pairs = row.focus if said else row.ground
                    pairs += [(predicting, begin + cell) for cell in cells]
                    if cells and not said and not noted:
                        named = [predicting]
                    middle = _middle(cells, look.grid[1])
                    if said and middle is not None:
                        row.aim.append((predicting, *middle))
                if piece.line:
                    self._count(row, piece, len(row.ids))
                if piece.tally is not None:
                    look, cells = piece.tally
                    row.tally += [(len(row.ids) - 1, row.starts[id(look)] + cell) for cell in cells]
                if said:
                    row.point += [(len(row.ids) + step - 1, word) for step in range(len(ids)) for word in named]
                    named, noted = [], False
            else:
                rows, columns = piece.grid
                ids = [self.start, *[self.pad] * (rows * columns), self.end]
                first = position + 1
                after = first + max(rows, columns)
                down: Sequence[float] = range(first, first + rows)
                across: Sequence[float] = range(first, first + columns)
                if self.aligned and piece.place is not None:
                    source, (left, top, right, bottom) = piece.place
                    _, above, before = row.positions[row.starts[id(source)]]  # of its first visual token
                    down = np.linspace(above + top, above + bottom - 1, rows).tolist()
                    across = np.linspace(before + left, before + right - 1, columns).tolist()
                inside: list[tuple[float, float, float]] = [(first, y, x) for y in down for x in across]
                where = [(position,) * 3, *inside, (after,) * 3]
                position = after + 1
                labels = [-100] * len(ids)
                row.starts[id(piece)] = len(row.ids) + 1
                row.looks.append(piece)
                if piece.note is not None:
                    tokens, place, cells = piece.note
                    named = [row.starts[id(piece)] + token for token in tokens]
                    noted = bool(named)
                    row.ground += [(word, row.starts[id(place)] + cell) for word in named for cell in cells]
            row.ids += ids
            row.labels += labels
            row.positions += where
            row.branch += [branch] * len(ids)
        return position

    def _count(self, row: _Row, line: Say, first: int) -> None:
        """Number the words of a line and the characters of each word, where they are read and where they are said."""
        word, character = 0, 0
        for step, (sign, (look, cells)) in enumerate(zip(line.text, line.focus, strict=False)):
            where = (min(word, COUNTED - 1), min(character, COUNTED - 1))
            row.spell[first + step - 1] = where
            for cell in cells:
                row.spell.setdefault(row.starts[id(look)] + cell, where)
            word, character = (word + 1, 0) if sign == " " else (word, character + 1)

    def row(self, tree: Tree) -> _Row:
        row = _Row()
        position = self._extend(row, tree.prefix, 0, 0)
        for index, pieces in enumerate(tree.branches, start=1):
            self._extend(row, pieces, index, position)
        return row

    def batch(self, trees: Sequence[Tree]) -> dict[str, Any]:
        """One training batch, without padding.

        Tensors over all N tokens of all trees in reading order: `ids`, `labels`, `positions` (3, N; fractions of a
        visual token in aligned crops), `branch` (number
        of the branch in the batch, -1 in prefixes), `tree`. `focus` (2, K) pairs predicting tokens with visual tokens
        they should look at, `ground` naming tokens with those of what they name, `point` predicting tokens with the
        naming token that their question is about, `tally` those that predict a number with what is counted; `aim`
        (3, K) gives predicting tokens the column and row that they are read from. `blocks`, `windows` and `whole` are
        the attention index sets of `packed.py` for text, vision windows and whole images. Pixels, grids and dense
        labels cover all images in order.
        """
        rows = [self.row(tree) for tree in trees]
        looks = [look for row in rows for look in row.looks]
        branch, first, offset = [], 0, 0
        pairs: dict[str, list[tuple[int, int]]] = {"focus": [], "ground": [], "point": [], "tally": []}
        aim: list[tuple[int, int, int]] = []
        spell: list[tuple[int, int, int]] = []
        spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for row, tree in zip(rows, trees, strict=True):
            local = np.array(row.branch)
            prefix = offset + np.flatnonzero(local == 0)
            spans.append((prefix[:0], prefix))
            for index in range(1, len(tree.branches) + 1):
                spans.append((prefix, offset + np.flatnonzero(local == index)))
            branch.append(np.where(local == 0, -1, local - 1 + first))
            for name, known in pairs.items():
                known += [(offset + asking, offset + seen) for asking, seen in getattr(row, name)]
            aim += [(offset + asking, column, line) for asking, column, line in row.aim]
            spell += [(offset + token, *where) for token, where in row.spell.items()]
            first += len(tree.branches)
            offset += len(local)
        grids = [look.grid for look in looks]
        batch: dict[str, Any] = {
            "ids": torch.tensor([token for row in rows for token in row.ids]),
            "labels": torch.tensor([label for row in rows for label in row.labels]),
            "positions": torch.tensor([where for row in rows for where in row.positions]).T.contiguous(),
            "branch": torch.from_numpy(np.concatenate(branch)),
            "tree": torch.tensor([index for index, row in enumerate(rows) for _ in row.ids]),
            **{name: torch.tensor(known, dtype=torch.long).reshape(-1, 2).T for name, known in pairs.items()},
            "aim": torch.tensor(aim, dtype=torch.long).reshape(-1, 3).T,
            "spell": torch.tensor(spell, dtype=torch.long).reshape(-1, 3).T,
            "blocks": text_blocks(spans),
            "windows": image_blocks(grids, window=WINDOW),
            "whole": image_blocks(grids, window=None),
        }
        batch["pixels"], batch["grids"] = pixels_of(looks)
        if all(look.dense is not None for look in looks):
            batch["dense"] = torch.from_numpy(np.concatenate([look.dense for look in looks if look.dense is not None]))
        if any(look.readings for look in looks):
            batch["reading"] = reading_batch([(*look.grid, look.readings or ()) for look in looks])
        return batch


def _middle(cells: Sequence[int], columns: int) -> tuple[int, int] | None:
    """Column and row in the middle of some visual tokens, if they lie close together."""
    xs, ys = [cell % columns for cell in cells], [cell // columns for cell in cells]
    if not cells or max(max(xs) - min(xs), max(ys) - min(ys)) > _CLOSE:
        return None
    return (min(xs) + max(xs)) // 2, (min(ys) + max(ys)) // 2


class Block(NamedTuple):
    """Attention of `query` tokens (n, Lq) over `key` tokens (n, Lk).

    `bias` (n, 1, Lq, Lk) is -inf where they must not look, and None when everything is visible. Index -1 is padding.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None


def text_blocks(spans: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> list[Block]:
    """Causal attention of every span over its prefix and itself; spans of similar length share a block."""
    order = sorted(spans, key=lambda span: len(span[1]))
    groups: list[list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = []
    for span in order:
        if groups and len(span[1]) <= 1.25 * len(groups[-1][0][1]) + 4:
            groups[-1].append(span)
        else:
            groups.append([span])
    blocks = []
    for group in groups:
        longest, before = max(len(own) for _, own in group), max(len(prefix) for prefix, _ in group)
        query = np.full((len(group), longest), -1)
        key = np.full((len(group), before + longest), -1)
        bias = np.full((len(group), 1, longest, before + longest), -np.inf, dtype=np.float32)
        causal = np.where(np.tril(np.ones((longest, longest), dtype=bool)), 0.0, -np.inf)
        for index, (prefix, own) in enumerate(group):
            query[index, : len(own)] = own
            key[index, : len(prefix)] = prefix
            key[index, before : before + len(own)] = own
            bias[index, 0, :, : len(prefix)] = 0.0
            bias[index, 0, :, before:] = causal
        blocks.append(Block(torch.from_numpy(query), torch.from_numpy(key), torch.from_numpy(bias)))
    return blocks


def image_blocks(grids: Sequence[tuple[int, int]], *, window: int | None) -> list[Block]:
    """Attention among the patches of each window of `window` tokens a side, or of each whole image (None).

    Windows of equal size share a block.
    """
    unit = MERGE * MERGE
    by_length: dict[int, list[NDArray[np.int64]]] = {}
    offset = 0
    for rows, columns in grids:
        tokens = offset + np.arange(rows * columns).reshape(rows, columns)
        step_y, step_x = (rows, columns) if window is None else (window, window)
        for y in range(0, rows, step_y):
            for x in range(0, columns, step_x):
                members = tokens[y : y + step_y, x : x + step_x].reshape(-1)
                patches = (members[:, None] * unit + np.arange(unit)).reshape(-1)
                by_length.setdefault(len(patches), []).append(patches)
        offset += rows * columns
    stacked = [torch.from_numpy(np.stack(group)) for group in by_length.values()]
    return [Block(patches, patches, None) for patches in stacked]
