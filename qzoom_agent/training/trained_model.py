"""What the runs share that end in one fine-tuned model (cold start and GRPO): their folder, LoRA, and `final/`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, JsonValue

from qzoom_agent.errors import ConfigError
from qzoom_agent.extras import require
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import text_model
from qzoom_agent.training import recipe_io
from qzoom_agent.training.branches.sharded_table import together
from qzoom_agent.training.fingerprint import begin, require_same
from qzoom_agent.training.recipe_io import LoraSection


def is_finished(recipe: BaseModel, stored: Path, settings: Mapping[str, JsonValue]) -> bool:
    """Return True, and print it, if the run's folder holds the model that this recipe trains.

    Args:
        recipe: Of the run.
        stored: The file of the run's folder with the settings of its model.
        settings: The keys of the recipe that decide the model.

    Raises:
        ConfigError: The folder holds the model of another recipe; the message names the keys that differ.
    """
    final = stored.parent / "final"
    if not final.exists():
        return False
    require_same(stored, settings, made=final, kind=type(recipe))
    if together().is_main_process:
        print(f"{final} is there already. Delete {stored.parent} to train again.")
    return True


def keep_recipe(recipe: BaseModel, stored: Path, settings: Mapping[str, JsonValue], *, made: Path) -> None:
    """Write a recipe and the settings of its model into the run's folder; see `is_finished`.

    Raises:
        ConfigError: `made` was begun with another recipe; the message names the keys that differ.
    """
    processes = together()
    begin(stored, settings, made=made, processes=processes, kind=type(recipe))
    if processes.is_main_process:
        recipe_io.keep_recipe(recipe, stored.parent)


def layers_from(backend: HFBackend, first: int) -> range:
    """Return the decoder layers from one on. Raises ConfigError if there are none."""
    count = len(text_model(backend.model).layers)
    if first >= count:
        raise ConfigError(f"from_layer is {first}, but '{backend.name}' has {count} decoder layers. Lower it.")
    return range(first, count)


def lora_config(lora: LoraSection, target_modules: str) -> Any:
    """Return peft's configuration of the adapters on the modules of a regular expression.

    Raises:
        MissingDependency: peft is not installed.
    """
    require("peft", extra="train", use="LoRA")
    from peft import LoraConfig

    return LoraConfig(**lora.model_dump() | {"target_modules": target_modules})


def write_final(backend: HFBackend, output: Path, *, from_layer: int, save: Callable[[Path], object]) -> Path:
    """Write the trained model with its processor and branches into `output/final`, which is whole or not there.

    Args:
        backend: The model.
        output: The run's folder.
        from_layer: Lowest layer that was trained.
        save: Writes the weights; called on all processes.
    """
    processes, final, part = together(), output / "final", output / "final.part"
    save(part)
    if processes.is_main_process:
        backend.processor.save_pretrained(part)
        if backend.branches is not None:
            backend.branches.save(part)
            if from_layer < (k := backend.branches.config.k):
                print(f"Layers below {k}, which the branches read, were trained: fit them again, or set from_layer.")
        part.rename(final)
    processes.wait_for_everyone()
    return final
