"""`qzoom train coldstart`: demonstrations of zooming, and one stage of fine-tuning on them.

    qzoom train coldstart --config rl/recipes/nano/coldstart.yaml --output runs/coldstart
    qzoom train coldstart --config ... --dry-run          (the resolved recipe and its cost)
    accelerate launch -m qzoom_agent.training.sft.fine_tune --config ... --output ...      (many devices)

The output folder gets these results. What is there is not made again, and results of another recipe are refused:

    episodes/         all demonstrations; `dropped` says why one is left out
    conversations/    those to learn from, as a `datasets` folder (`messages`, `images`) that other trainers can read
    train/            checkpoints and log.jsonl
    *.json            settings that conversations and weights were made with
    final/            the fine-tuned base, with its branches if it has some
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from datasets import Dataset
from pydantic import JsonValue

from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.messages import view_ids
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.training import trained_model
from qzoom_agent.training.branches.base_inference import load_frozen
from qzoom_agent.training.branches.cost_estimate import least
from qzoom_agent.training.branches.dataset import count_rows, load_records
from qzoom_agent.training.branches.fitting import Rows, optimizer_steps, require_tracker, train
from qzoom_agent.training.branches.postsft import AnswerLoss, answer_batch
from qzoom_agent.training.branches.sharded_table import say, together, write_parts
from qzoom_agent.training.contents import contents
from qzoom_agent.training.recipe_io import as_yaml, begin, recipe_parser, writing
from qzoom_agent.training.sft.conversations import to_row, training_conversations
from qzoom_agent.training.sft.demonstrations import Demonstrations
from qzoom_agent.training.sft.sft_recipe import ColdStartRecipe, load_coldstart_recipe
from qzoom_agent.training.trained_model import layers_from, lora_config

_TRAINING_KEYS: Final = {"optimisation", "from_layer", "lora"}
"""Keys of a recipe that do not decide what the demonstrations are."""


def demonstrations(backend: HFBackend, recipe: ColdStartRecipe, folder: Path) -> Dataset:
    """Return the conversations to learn from, made by all processes together unless `folder` has them.

    Raises ConfigError if no episode is kept, or `folder` holds those of another recipe or of other data.
    """
    processes, episodes, kept = together(), folder / "episodes", folder / "conversations"
    adapters(backend, recipe)  # what cannot be trained is told before demonstrations are made
    records = load_records(recipe.data, limit=recipe.records)
    stored: dict[str, JsonValue] = {
        "count": len(records),
        **recipe.model_dump(mode="json", exclude=_TRAINING_KEYS),
        "contents": contents(recipe.model, recipe.data, branches=recipe.branches),
    }
    begin(folder / "conversations.json", stored, made=kept, processes=processes, kind=ColdStartRecipe)
    if kept.exists():
        return Dataset.load_from_disk(str(kept))
    make = Demonstrations(backend, recipe, judge=recipe.ready_judge(folder))

    def rows(indices: range) -> Iterator[dict[str, Any]]:
        for record in (records[index] for index in indices):
            answer, conversation, dropped = make(record)
            shown = [answer.store.image(view) for view in view_ids(conversation)]
            yield {
                "id": record.id,
                "image_id": record.cluster,
                "question": record.question,
                "answer": record.answer,
                "crops": answer.trace.usage.served,
                "dropped": dropped,
                **to_row(conversation, shown, codec=backend.codec),
            }

    begin(episodes / "settings.json", stored, made=episodes, processes=processes, kind=ColdStartRecipe)
    chosen = kept_episodes(write_parts(episodes, len(records), rows, progress="episodes"), folder)
    if processes.is_main_process:
        writing = folder / "conversations.part"
        chosen.save_to_disk(str(writing))
        writing.rename(kept)
    processes.wait_for_everyone()
    return Dataset.load_from_disk(str(kept))


def kept_episodes(table: Dataset, folder: Path) -> Dataset:
    """Return the episodes to learn from, and print their number; ConfigError if there are none."""
    reasons = Counter(table["dropped"])
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()) if reason)
    called = sum(crops > 0 and not reason for crops, reason in zip(table["crops"], table["dropped"], strict=True))
    kept = f"{reasons['']} of {len(table)} episodes kept, {called} with a crop"
    say(kept + (f"; left out: {left_out}" if left_out else ""))
    if not reasons[""] and reasons["no box"] == len(table):
        raise ConfigError(
            f"None of {len(table)} questions has a box, and `boxes: oracle` zooms to them. Give the data a column of "
            "boxes ([] where no crop is needed), or set boxes: sdrpn."
        )
    if not reasons[""]:
        raise ConfigError(
            f"None of {len(table)} episodes can be learned from ({left_out}). `dropped` in {folder / 'episodes'} "
            "gives the reason for each; check the data's boxes and answers, `margin`, `needed` or the teacher."
        )
    chosen = [at for at, reason in enumerate(table["dropped"]) if not reason]
    return table.select(chosen).remove_columns("dropped")


def fine_tune(backend: HFBackend, table: Dataset, recipe: ColdStartRecipe, folder: Path) -> None:
    """Train the base in place on the assistant's turns of these conversations."""
    module, adapted, optimisation = AnswerLoss(backend), None, recipe.optimisation
    if (config := adapters(backend, recipe)) is not None:
        from peft import get_peft_model

        adapted = get_peft_model(backend.model, config)
    else:
        Decoder(backend.model).text.layers[: recipe.from_layer].requires_grad_(False)
    if optimisation.gradient_checkpointing:
        backend.model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]

    def prepare(rows: Rows) -> dict[str, Any]:
        entries = [entry for row in rows for entry in training_conversations(backend, row)]
        sessions, ready = [one.session for one in entries], [one.ready for one in entries]
        return answer_batch(backend, sessions, ready, [one.labels for one in entries])

    read: Any = table.__getitem__
    train(module, table["image_id"], read=read, prepare=prepare, how=optimisation, folder=folder, seed=recipe.seed)
    if adapted is not None:
        adapted.merge_and_unload()
    backend.model.requires_grad_(False)


def adapters(backend: HFBackend, recipe: ColdStartRecipe) -> Any:
    """Return peft's configuration of the adapters; None where the weights themselves are trained. See `lora_config`."""
    layers = layers_from(backend, recipe.from_layer)
    if recipe.lora is None:
        return None
    some, names = "|".join(map(str, layers)), "|".join(recipe.lora.target_modules)
    return lora_config(recipe.lora, rf".*language_model\.layers\.({some})\..*({names})", backend.model)


def describe(recipe: ColdStartRecipe) -> str:
    """Describe the work and its size in lines of text."""
    rows = least(recipe.records, count_rows(recipe.data))
    optimisation = recipe.optimisation
    count = "all rows" if rows is None else f"at most {rows}"
    trained = f"LoRA of rank {recipe.lora.r}" if recipe.lora else "weights"
    lines = [
        f"model        {recipe.model}",
        f"episodes     {count} of {', '.join(one.path for one in recipe.data)}",
        f"calls        {recipe.boxes}; answers: {'the teacher' if recipe.boxes == 'teacher' else recipe.answer}",
        f"trained      {trained} from layer {recipe.from_layer}",
    ]
    if rows is not None:
        total = rows * optimisation.num_train_epochs
        lines.append(f"steps        at most {optimizer_steps(optimisation, total)} on one device")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = recipe_parser(__doc__, output="runs/coldstart", prog="qzoom train coldstart")
    parser.add_argument("--model", help="base to use instead of the recipe's: a preset, a hub id or a folder")
    parser.add_argument("--branches", help="branches to use instead of the recipe's: folder or hub id")
    options = parser.parse_args(argv)
    changes = {key: getattr(options, key) for key in ("model", "branches") if getattr(options, key) is not None}
    recipe, output = load_coldstart_recipe(options.config, overrides=options.overrides, **changes), options.output
    if options.dry_run:
        print(as_yaml(recipe))
        print(describe(recipe))
        return 0
    if trained_model.is_finished(recipe, output):
        return 0
    require_tracker(recipe.optimisation.report_to)
    with writing(output, together()):
        trained_model.keep_recipe(recipe, output)
        load_records(recipe.data, limit=recipe.records)  # wrong rows show before the model is loaded
        backend = load_frozen(recipe.model, dtype=recipe.dtype, protocol=recipe.protocol, branches=recipe.branches)
        table = demonstrations(backend, recipe, output)
        fine_tune(backend, table, recipe, output / "train")
        save_model(backend, recipe, output, conversations=len(table))
    return 0


def save_model(backend: HFBackend, recipe: ColdStartRecipe, output: Path, *, conversations: int) -> None:
    """Write the trained model into `output/final`, which gets its name once it is complete."""

    def save(part: Path) -> None:
        if together().is_main_process:
            backend.model.save_pretrained(part)
            made = {"model": recipe.model, "conversations": conversations}
            (part / "coldstart.json").write_text(json.dumps(made) + "\n", encoding="utf-8")

    final = trained_model.write_final(backend, output, from_layer=recipe.from_layer, save=save)
    say(f"written {final}, from {conversations} conversations")


if __name__ == "__main__":
    sys.exit(finished("qzoom train coldstart", main))
