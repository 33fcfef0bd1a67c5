"""Losses of nano's training, and the dense heads that are thrown away when the model ships.

The vision tower learns to read from labels on every visual token long before the language loss would teach it (from
scratch through the answers alone, reading stays at chance). The second decoder layer learns in which column and row
each visual token lies, as classes, so that "in the same row" is a match: Qwen2.5-VL's relative positions give it only
indirectly, and it has to be known below the layer that looks for what a question names, or the look finds the thing and
not its place (docs/maintainers/notebook.md, 13).
Half the attention heads of three layers are told where to look: a naming word at what it names, an answer at the word
that its question is about, and then at the visual tokens that it is read from, whose column and row it has to know by
then (`aim`). Found through answers alone, that takes ten times the questions (docs/maintainers/notebook.md, 5 and 13).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2_5_VLForConditionalGeneration

from nano.examples import DENSE_CLASSES
from nano.packed import see, think
from nano.reading import LineReader, along_lines, reading_losses
from nano.trees import COUNTED, MERGE

PLACE_LAYER = 1
"""Decoder layer whose output must know the column and row of its visual tokens (which the tower cannot: its positions
are relative)."""
FOCUS_LAYER = 5
"""Decoder layer whose first heads are told where to look."""
GROUND_LAYER = 2
"""Decoder layer whose first heads are told where the things lie that a question names; later layers use it."""
POINT_LAYER = 3
"""Decoder layer whose first heads are told, where an answer is said, which word of the question it is about."""
TOLD = {"ground": GROUND_LAYER, "point": POINT_LAYER, "focus": FOCUS_LAYER}
"""Loss terms of attention that is told where to look, and their decoder layers."""
FOCUS_HEADS = 2
ENOUGH = 0.02
"""Shortfall of attention without a loss: 0.98 is enough."""
LARGEST, LARGE = 16.0, 0.01
"""Size of scores, of their highest and of their average, from which on they cost, and how much a nat."""
AIM_LAYER = 4
"""Decoder layer whose output must know, where something is said, the column and row that it is read from."""
PLACES = 128
"""Columns, and rows, that a view can have."""
TALLY: dict[int, float] = {2: 1.0, 3: 6.0}
"""Heads of the focus layer that count, and what the first token of the conversation weighs against one counted thing.

Attention that is shared among n things is the same for every n; what the first token keeps of it tells the number."""
_DENSE_WEIGHTS = (1.0, 1.0, 0.8, 0.4, 0.6, 0.4)
"""Of the dense labels; shapes are learned last of all when they weigh as little as colours (notebook, 9)."""


class TrainingHeads(nn.Module):
    """Linear readers of visual tokens: what is printed there, and where they lie; and of where an answer is read."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lines = LineReader(hidden)
        self.read = nn.Linear(hidden, sum(DENSE_CLASSES))
        self.place = nn.Linear(hidden, 2 * PLACES)
        self.aim = nn.Linear(hidden, 2 * PLACES)
        self.spell = nn.Linear(hidden, 2 * COUNTED)


def losses(
    model: Qwen2_5_VLForConditionalGeneration,
    heads: TrainingHeads,
    batch: dict[str, Any],
    *,
    tower: bool = True,
    fuse: bool = False,
) -> dict[str, Tensor]:
    """Loss terms of a batch: `read` (dense labels), `glyphs` and `lines` (print on paper), and for what is said
    `answer`, `place`, `aim`, `tally` and those in `TOLD`; `spell` where lines of print are read out: both what shows a
    character and what says it know the number of its word in the line and its own in the word. How wide characters are
    differs from line to line, so that where the tenth one lies does not follow from where the first one does.

    Also `dense` and `along`, the logits behind `read` and along lines of paper, `logits` at the positions that predict
    a label, and `predicts`, the flat indices of those labels. With `tower` false the vision tower is left as it is, and
    the batch costs half.
    `fuse` compiles what it can (see `packed`).
    """
    labels = batch["labels"]
    predicts = torch.nonzero(labels != -100)[:, 0]
    with torch.set_grad_enabled(torch.is_grad_enabled() and tower):
        seen = see(model, batch["pixels"], batch["grids"], windows=batch["windows"], whole=batch["whole"], fuse=fuse)
    out: dict[str, Tensor] = {}
    if "dense" in batch and tower:
        out["dense"] = heads.read(seen)
        out["read"] = dense_loss(out["dense"], batch["dense"])
    if "reading" in batch and tower:
        along = along_lines(heads.lines(seen), batch["reading"])
        out |= reading_losses(along, batch["reading"])
        out["along"] = along
    if len(predicts) == 0:
        return out
    image = batch["ids"] == model.config.image_token_id
    embeds = model.model.language_model.embed_tokens(batch["ids"])
    embeds = embeds.masked_scatter(image[:, None], seen.to(embeds.dtype))
    thought = think(
        model,
        embeds,
        batch["positions"],
        batch["blocks"],
        tap=(PLACE_LAYER, AIM_LAYER),
        watch=tuple(TOLD.values()),
        fuse=fuse,
    )
    logits = model.lm_head(thought.hidden[predicts - 1])
    out["answer"] = cross_entropy(logits.float(), labels[predicts])
    placed = heads.place(thought.tapped[PLACE_LAYER][image]).float().view(-1, PLACES)
    out["place"] = cross_entropy(placed, _cells(batch["grids"]).view(-1))
    if batch["aim"].shape[1]:
        asking, *cell = batch["aim"]
        aimed = heads.aim(thought.tapped[AIM_LAYER][asking]).float().view(-1, PLACES)
        out["aim"] = cross_entropy(aimed, torch.stack(cell, dim=1).view(-1))
    if batch["spell"].shape[1]:
        token, *count = batch["spell"]
        counted = heads.spell(thought.tapped[AIM_LAYER][token]).float().view(-1, COUNTED)
        out["spell"] = cross_entropy(counted, torch.stack(count, dim=1).view(-1))
    for name, layer in TOLD.items():
        if batch[name].shape[1]:
            out[name] = focus_loss(*thought.watched[layer], batch, name)
    if batch["tally"].shape[1]:
        out["tally"] = tally_loss(*thought.watched[FOCUS_LAYER], batch)
    out["logits"], out["predicts"] = logits, predicts
    return out


def _told(batch: dict[str, Any], pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that look (Q), what each can see, and what it is told to look at, both (Q, N) bool."""
    asking, row = torch.unique(batch[pairs][0], return_inverse=True)
    branch, tree = batch["branch"], batch["tree"]
    index = torch.arange(len(tree), device=tree.device)
    visible = (tree[asking][:, None] == tree) & (index <= asking[:, None])
    visible &= (branch == -1) | (branch == branch[asking][:, None])
    right = torch.zeros_like(visible)
    right[row, batch[pairs][1]] = True
    return asking, visible, right


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Attention scores (Q, N) in full precision: in bfloat16 a score of 100 is half a nat off."""
    with torch.autocast(query.device.type, enabled=False):
        scores: Tensor = query.float() @ key.float().T * query.shape[-1] ** -0.5
    return scores


def focus_loss(query: Tensor, key: Tensor, batch: dict[str, Any], pairs: str = "focus") -> Tensor:
    """Mean of -log of the attention that the told heads give to the right tokens, over the tokens that look.

    Nearly all of it is enough, and large scores cost a little. Otherwise a head that is always right grows sharper
    without end, and what all its scores have in common, which attention does not see, drifts: to -2,000 in training so
    far, where bfloat16 counts in steps of 16 and the first thing that is new to the head outweighs a whole batch.
    """
    asking, visible, right = _told(batch, pairs)
    groups = query.shape[1] // key.shape[1]
    total = query.new_zeros(())
    for head in range(FOCUS_HEADS):
        scores = _scores(query[asking, head], key[:, head // groups])
        every = scores.masked_fill(~visible, -torch.inf).logsumexp(1)
        wanted = scores.masked_fill(~right, -torch.inf).logsumexp(1)
        average = (scores * visible).sum(1) / visible.sum(1)
        large = ((size.abs() - LARGEST).clamp(min=0).mean() for size in (every, average))
        total = total + (every - wanted - ENOUGH).clamp(min=0).mean() + LARGE * sum(large)
    return total / FOCUS_HEADS


def tally_loss(query: Tensor, key: Tensor, batch: dict[str, Any]) -> Tensor:
    """Divergence of the counting heads' attention from one share for each counted thing and `TALLY` for token 0."""
    asking, visible, right = _told(batch, "tally")
    first = torch.zeros_like(right)
    first[torch.arange(len(asking)), visible.int().argmax(1)] = True
    groups = query.shape[1] // key.shape[1]
    total = query.new_zeros(())
    for head, weight in TALLY.items():
        scores = _scores(query[asking, head], key[:, head // groups])
        shares = scores.masked_fill(~visible, -torch.inf).log_softmax(1)
        wanted = right.float() + weight * first.float()
        wanted = wanted / wanted.sum(1, keepdim=True)
        told = wanted > 0
        total = total + (wanted[told] * (wanted[told].log() - shares[told])).sum() / len(asking)
    return total / len(TALLY)


def dense_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the dense labels; tokens with something on them weigh as much as all empty ones."""
    total = logits.new_zeros(())
    for slot, part in enumerate(torch.split(logits.float(), list(DENSE_CLASSES), dim=1)):
        label = labels[:, slot]
        each = cross_entropy(part, label, reduction="none", ignore_index=-100)
        for chosen in (label > 0, label == 0):
            if bool(chosen.any()):
                total = total + each[chosen].mean() * _DENSE_WEIGHTS[slot]
    return total / 2


def _cells(grids: Tensor) -> Tensor:
    """Column and row of every visual token of all images, shape (tokens, 2)."""
    parts = []
    for _, rows, columns in grids.tolist():
        y, x = torch.meshgrid(torch.arange(rows // MERGE), torch.arange(columns // MERGE), indexing="ij")
        parts.append(torch.stack([x.flatten(), y.flatten()], dim=1))
    return torch.cat(parts).to(grids.device)
