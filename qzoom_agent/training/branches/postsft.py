"""Post-SFT: fine-tune the base on questions that a crop made it answer wrongly (Q-Zoom, section 3.3 and stage 2).

Each question is answered twice, over the coarse view alone and with SD-RPN's crop inserted. Where only the first answer
is right (the crop hurt), the base learns its own right answer with the crop in place, if asked for beside a share of
the cases in which the crop `helped`. Most boxes are replaced by random ones, so that no particular crop is learned.
The layers below the branches change, too, so SD-RPN is fitted again afterwards.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from qzoom_agent.evaluation.scorers.judge import Judge
from qzoom_agent.geometry import Box, Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_generation import Prepared
from qzoom_agent.models.hf_session import HFSession
from qzoom_agent.perception.decoder import Decoder, Embedded, Rotaries
from qzoom_agent.perception.labels import IGNORED
from qzoom_agent.perception.masks import Masks
from qzoom_agent.policy import somewhere
from qzoom_agent.training.branches.base_inference import (
    answer_ids,
    ask,
    embed_rows,
    generate_answers,
    is_right,
    with_answer,
)
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, PostSFTStage
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.fitting import Rows, train
from qzoom_agent.training.branches.proposals import answer_with_crop, propose_boxes, with_crop
from qzoom_agent.training.branches.sharded_table import write_table


class AnswerLoss(nn.Module):
    """Cross-entropy of answers, driven layer by layer. Trained are the decoder's layers, and its head unless tied."""

    def __init__(self, backend: HFBackend) -> None:
        super().__init__()
        model: Any = backend.model
        self.model = model.requires_grad_(False)
        Decoder(model).text.layers.requires_grad_(True)
        head = model.get_output_embeddings()
        # a head that is tied to the embeddings would change how prompts are read
        if head.weight is not model.get_input_embeddings().weight:
            head.requires_grad_(True)

    def forward(self, **batch: Any) -> Tensor:
        """Return the mean over the tokens that are learned in an `answer_batch`."""
        logits, targets, _ = answer_logits(self.model, **batch)
        return cross_entropy(logits.float(), targets)


def answer_logits(
    model: PreTrainedModel,
    hidden: Tensor,
    rotary: Rotaries,
    mask: Masks,
    visual: Tensor,
    deepstack: list[Tensor],
    labels: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the decoder over an `answer_batch`; return for each labelled token its logits, its id and its row.

    `labels` (rows, tokens) are -100 where nothing is learned.
    """
    decoder = Decoder(model)
    out = decoder.run(Embedded(hidden, visual, deepstack), range(decoder.depth), rotary=rotary, mask=mask)
    predicts = labels[:, 1:] != IGNORED
    logits = decoder.head(decoder.text.norm(out[:, :-1][predicts]))
    return logits, labels[:, 1:][predicts], predicts.nonzero()[:, 0]


def answer_batch(
    backend: HFBackend, sessions: Sequence[HFSession], ready: Sequence[Prepared], labels: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return conversations as the arguments of `AnswerLoss`, padded on the left.

    `labels` are the ids to learn at the end of each conversation, -100 where one is not learned.
    """
    with torch.no_grad():  # views are encoded by the frozen vision encoder
        new, rotary, mask, valid = embed_rows(backend, sessions, ready)
    padded = torch.full(valid.shape, IGNORED, device=valid.device)
    for at, each in enumerate(labels):
        padded[at, -len(each) :] = torch.tensor(each, device=valid.device)
    return {**new._asdict(), "rotary": rotary, "mask": mask, "labels": padded}


def find_cases(backend: HFBackend, records: Records, stage: PostSFTStage, folder: Path, *, judge: Judge) -> Dataset:
    """Answer each record without and with a crop; return `row`, `image_id`, `box` and both answers and verdicts.

    The table is kept in `folder`, the answers of the judge in its own cache.
    """
    how: dict[str, Any] = {"tokens": None, "aligned": stage.positions == "aligned"}

    def rows(_: range, some: list[Record]) -> Iterator[dict[str, Any]]:
        plain = generate_answers(backend, ask(backend, some, None), max_new_tokens=stage.max_new_tokens)
        boxes = propose_boxes(backend, some, tokens=None)
        cropped = answer_with_crop(backend, some, boxes, max_new_tokens=stage.max_new_tokens, **how)
        for record, before, (after, box) in zip(some, plain, cropped, strict=True):
            yield {
                "box": None if box is None else box.as_list(),
                "plain": before,
                "cropped": after,
                "plain_right": is_right(before, record, judge),
                "cropped_right": is_right(after, record, judge),
            }

    return write_table(folder, records, rows, batch=stage.batch, progress="answered twice")


def choose_cases(cases: Dataset, stage: PostSFTStage, *, seed: int) -> list[int]:
    """Return the indices of the cases in which a crop hurt, and of a share of those in which it helped."""
    verdicts = list(zip(cases["box"], cases["plain_right"], cases["cropped_right"], strict=True))
    hurt = [at for at, (box, plain, cropped) in enumerate(verdicts) if box and plain and not cropped]
    helped = [at for at, (box, plain, cropped) in enumerate(verdicts) if box and cropped and not plain]
    some = Random(f"postsft/{seed}").sample(helped, min(len(helped), round(stage.helped * len(hurt))))
    return sorted([*hurt, *some])


def random_box(rng: Random, size: Size, sides: tuple[float, float]) -> Box:
    """Return a box somewhere in the image, its sides a random share of the image's."""
    width, height = (rng.uniform(*sides) * side for side in size)
    return somewhere(width, height, size, rng)


def train_postsft(
    backend: HFBackend, records: Records, cases: Dataset, chosen: Sequence[int], recipe: BranchRecipe, folder: Path
) -> None:
    """Train the base in place on the chosen cases."""
    stage = recipe.postsft
    images = [cases[at]["image_id"] for at in chosen]

    def read(index: int) -> dict[str, Any]:
        case = cases[chosen[index]]
        return {"record": records[case["row"]], "case": case}

    def prepare(rows: Rows) -> dict[str, Any]:
        learned: list[Record] = [row["record"] for row in rows]
        boxes, targets = [], []
        for row, record in zip(rows, learned, strict=True):
            rng, case = Random(f"{recipe.seed}/{row['draw']}"), row["case"]
            proposed = Box(*case["box"])
            noisy = rng.random() < stage.noise
            boxes.append(random_box(rng, Size(*record.image.size), stage.noise_side) if noisy else proposed)
            own = case["plain"] if case["plain_right"] else case["cropped"]
            targets.append(record.answer if stage.target == "gold" else own)
        with torch.no_grad():
            asked = with_crop(backend, learned, boxes, tokens=None, aligned=stage.positions == "aligned")
        labels = [answer_ids(backend, text) for text in targets]
        ready = [with_answer(one.ready, ids) for one, ids in zip(asked, labels, strict=True)]
        return answer_batch(backend, [one.session for one in asked], ready, labels)

    how = stage.optimisation
    train(AnswerLoss(backend), images, read=read, prepare=prepare, how=how, folder=folder, seed=recipe.seed)
    backend.model.requires_grad_(False)
