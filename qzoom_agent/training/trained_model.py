"""Runs that end in one fine-tuned model (cold start and GRPO): common keys of their recipes, folder, LoRA, `final/`."""

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, JsonValue
from transformers import PreTrainedModel

from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers.judge import KEY_VARIABLE, Judge
from qzoom_agent.extras import require
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import keep_origin
from qzoom_agent.models.prompts import save_processor
from qzoom_agent.perception.adapters import text_model
from qzoom_agent.protocols.wording import write_prompt
from qzoom_agent.training import recipe_io
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.branches.sharded_table import say, together
from qzoom_agent.training.contents import contents
from qzoom_agent.training.recipe_io import LoraSection, Section, begin, require_same


class ModelRecipe(Section, ABC):
    """Keys of every recipe of one fine-tuned model."""

    stored: ClassVar[str]
    """File of the run's folder with the settings that decide the model."""

    model: str = "nano"
    """Preset, hub id or folder of the base."""
    branches: str | None = None
    """Folder or hub id of branches to use and ship with it; None: the model's own, if any."""
    protocol: str | None = None
    """Format of the zoom calls; None: the base's own."""
    judge: str | None = None
    """Base URL of an OpenAI-compatible server that judges answers which a rule refuses."""
    judge_model: str = "default"
    judge_key_variable: str = KEY_VARIABLE
    """Environment variable with the key of that server; one of your own needs none."""
    from_layer: int = Field(default=0, ge=0)
    """Lowest decoder layer that is trained. From a layer up that branches leave at, what they read stays as it is."""

    @abstractmethod
    def decisive(self) -> dict[str, JsonValue]:
        """Return the keys that decide the model."""

    @property
    @abstractmethod
    def sources(self) -> list[DatasetSpec]:
        """All sources of questions."""

    @abstractmethod
    def begun(self, output: Path) -> Path:
        """Return a path that is there once a run in `output` has something to resume."""

    def ready_judge(self, output: Path) -> Judge | None:
        """Return the judge that the recipe names, after it has answered once; its verdicts are kept in `output`."""
        if self.judge is None:
            return None
        cache = output / "verdicts.jsonl"
        judge = Judge(self.judge, model=self.judge_model, key_variable=self.judge_key_variable, cache=cache)
        judge.check()
        return judge


def is_finished(recipe: ModelRecipe, output: Path) -> bool:
    """Return True, and print it, if a run's folder holds the model that this recipe trains.

    Raises ConfigError if it is that of another recipe; the message names the keys that differ.
    """
    final = output / "final"
    if not final.exists():
        return False
    require_same(output / recipe.stored, _settings(recipe), made=final, kind=type(recipe))
    say(
        f"{final} is there already. Delete it to resume this run, such as for more steps; delete {output} to train "
        "anew."
    )
    return True


def keep_recipe(recipe: ModelRecipe, output: Path) -> None:
    """Write a recipe, and the settings that decide its model, into the run's folder.

    Raises ConfigError if it holds checkpoints of another recipe; the message names the keys that differ.
    """
    processes = together()
    begin(output / recipe.stored, _settings(recipe), made=recipe.begun(output), processes=processes, kind=type(recipe))
    if processes.is_main_process:
        recipe_io.keep_recipe(recipe, output)


def _settings(recipe: ModelRecipe) -> dict[str, JsonValue]:
    """Return what decides a model: keys of its recipe, and what its paths hold."""
    return {**recipe.decisive(), "contents": contents(recipe.model, recipe.sources, branches=recipe.branches)}


def layers_from(backend: HFBackend, first: int) -> range:
    """Return the decoder layers from one on. Raises ConfigError if there are none."""
    count = len(text_model(backend.model).layers)
    if first >= count:
        raise ConfigError(f"from_layer is {first}, but '{backend.name}' has {count} decoder layers. Lower it.")
    return range(first, count)


def lora_config(lora: LoraSection, target_modules: str, model: PreTrainedModel) -> Any:
    """Return peft's configuration of the adapters on the modules of a regular expression.

    Raises ConfigError if it names no linear layer, MissingDependency without peft.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if not any(re.fullmatch(target_modules, name) for name in linear):
        raise ConfigError(
            f"lora.target_modules names no linear layer of the model that is trained (as an expression: "
            f"{target_modules}). Its layers have names such as {linear[-2]}."
        )
    require("peft", extra="train", use="LoRA")
    from peft import LoraConfig

    return LoraConfig(**lora.model_dump() | {"target_modules": target_modules})


def write_final(backend: HFBackend, output: Path, *, from_layer: int, save: Callable[[Path], object]) -> Path:
    """Write the trained model with its processor and branches into `output/final`, which is whole or not there.

    Args:
        from_layer: Lowest layer that was trained.
        save: Writes the weights; called on all processes.
    """
    processes, final, part = together(), output / "final", output / "final.part"
    if processes.is_main_process:
        shutil.rmtree(part, ignore_errors=True)  # of a killed process, whose files may be others
    processes.wait_for_everyone()
    save(part)
    processes.wait_for_everyone()  # shards that others write
    if processes.is_main_process:
        save_processor(backend.processor, part)
        keep_origin(part, backend.name, protocol=backend.protocol)
        write_prompt(backend.prompt, part)
        if backend.branches is not None:
            backend.branches.save(part)
            if from_layer < (k := backend.branches.config.k):
                print(f"Layers below {k}, which the branches read, were trained: fit them again, or set from_layer.")
        part.rename(final)
    processes.wait_for_everyone()
    return final
