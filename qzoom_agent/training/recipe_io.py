"""Recipes on disk: YAML files that become pydantic models, with one kind of error for whatever is wrong with them."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import safe_dump

from qzoom_agent.errors import ConfigError
from qzoom_agent.files import read_yaml, require_folder, write_text

_Recipe = TypeVar("_Recipe", bound=BaseModel)


class Section(BaseModel):
    """Part of a recipe: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def read_recipe(path: Path, kind: type[_Recipe], **changes: Any) -> _Recipe:
    """Read a recipe; `changes` replace whole keys.

    Raises:
        ConfigError: the file is missing, is no text, is not YAML, or has unknown or illegal keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read the recipe {path}: {error.strerror}. Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The recipe {path} is not text in UTF-8 ({error}). Save it as UTF-8.") from None
    try:
        data = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"The recipe {path} is not YAML: {error}") from None
    try:
        return kind.model_validate({**data, **changes} if isinstance(data, dict) else data)
    except (ValidationError, ConfigError) as error:
        raise ConfigError(f"The recipe {path} is not valid: {error}") from None


def keep_recipe(recipe: BaseModel, folder: Path) -> None:
    """Write a resolved recipe into the folder of a run (`--output`), which is made if it is not there.

    Raises:
        ConfigError: there can be no such folder.
    """
    text = safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    write_text(require_folder(folder) / "recipe.yaml", text)
