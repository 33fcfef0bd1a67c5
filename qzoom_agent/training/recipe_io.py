"""Recipes on disk: YAML files that become pydantic models, and the command-line flags that every stage shares.

The settings that decide a result are stored beside it, so that a run is resumed only under those it began with.

A key that got another name is declared in the `renamed` table of its section. The old name is still read, in recipes,
in Python, with `--set` and in the settings of saved runs, and a warning names the new one.
"""

import json
import re
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from difflib import get_close_matches
from inspect import isabstract
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from accelerate import PartialState
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticUndefined
from yaml import safe_dump

from qzoom_agent.errors import ConfigError
from qzoom_agent.extensions import reference
from qzoom_agent.files import read_json, read_yaml, require_folder, sole_writer, write_text

_Recipe = TypeVar("_Recipe", bound=BaseModel)
_ANY: TypeAdapter[Any] = TypeAdapter(Any)
_WARNED: dict[Any, Any] = {}
"""Warnings that were shown, so that each is shown once."""
_SKIP_BAD = "--skip-bad"
"""Among the overrides, the flag of this name."""


class Section(BaseModel):
    """Part of a recipe: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of keys that are still read, each with its new name."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, given: Any) -> Any:
        return with_new_names(given, cls, warn=True)


class LoraSection(Section):
    """Low-rank adapters instead of all weights. Needs peft, which names the keys."""

    renamed: ClassVar[Mapping[str, str]] = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "modules": "target_modules",
        "targets": "target_modules",
    }

    r: int = Field(default=16, gt=0)
    lora_alpha: int = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("target_modules", check_fields=False)
    @classmethod
    def _are_expressions(cls, given: Any) -> Any:
        for one in (given,) if isinstance(given, str) else given:
            try:
                re.compile(one)
            except re.error as error:
                raise ValueError(f"{one!r} is no regular expression: {error}") from None
        return given


def recipe_parser(description: str | None, *, output: str, prog: str | None = None) -> ArgumentParser:
    """Return a parser with the flags of every training stage; `output` is the default of `--output`."""
    parser = ArgumentParser(prog, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML)")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder for all results (default: {output})")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the recipe, by its dotted path (loss.beta=0.01, data.0.limit=100); can be repeated",
    )
    parser.add_argument(
        "--skip-bad",
        dest="overrides",
        action="append_const",
        const=_SKIP_BAD,
        help="leave out rows of the data that cannot be used, and say which, instead of stopping at them",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and its cost, then stop")
    return parser


def read_recipe(path: Path, kind: type[_Recipe], *, overrides: Sequence[str] = (), **changes: Any) -> _Recipe:
    """Read a recipe.

    Args:
        overrides: Keys to set after reading, as `KEY=VALUE` with a dotted key and a value in YAML or JSON.
        changes: Top-level keys that replace those of the file.

    Raises:
        ConfigError: The file is missing or is not YAML, or the recipe has unknown keys or values that are not allowed.
    """
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the recipe {path}: {error.strerror}. Give the path of a YAML file.") from error
    except ValueError as error:
        raise ConfigError(f"The recipe {path} is not YAML in UTF-8: {error}") from None
    if isinstance(data, dict):
        data = with_new_names(data, kind, warn=True) | changes
        for override in overrides:
            if override == _SKIP_BAD:
                _skip_bad(data)
                continue
            key, equals, value = override.partition("=")
            if not key or not equals:
                raise ConfigError(f"--set {override!r} is not KEY=VALUE. Write, for example, --set seed=1.")
            set_key(data, key, _parsed(value), kind=kind)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"The recipe {path} is not valid: {_explain(error, kind)}") from None
    except ConfigError as error:
        raise ConfigError(f"The recipe {path} is not valid: {error}") from None


def _skip_bad(data: dict[str, Any]) -> None:
    """Set `skip_bad` of every source of questions in a recipe."""
    for key, held in data.items():
        if isinstance(held, dict):
            _skip_bad(held)
        elif key in ("data", "held_out") and isinstance(held, list):
            for source in held:
                if isinstance(source, dict):
                    source["skip_bad"] = True


def set_key(data: dict[str, Any], key: str, value: Any, *, kind: type[BaseModel]) -> None:
    """Set one key of a recipe in place. A section that the recipe leaves out starts from its defaults.

    Args:
        data: The recipe, as read from YAML.
        key: The path of the key, with dots; items of lists are counted from 0 (`data.0.limit`).
        value: The new value; it is not checked here.

    Raises:
        ConfigError: The recipe has no such key; the message names those that come close.
    """
    place: Any = data
    annotation: Any = kind
    names = key.split(".")
    for depth, name in enumerate(names):
        above, index, default = ".".join(names[:depth]), name, None
        models = list(_models(annotation))
        if isinstance(place, list):
            if not name.isdecimal() or int(name) >= len(place):
                raise ConfigError(f"--set {key}: {above} is a list of {len(place)}, which has no item {name!r}.")
            annotation = next((get_args(one)[0] for one in _members(annotation) if get_args(one)), Any)
        elif not isinstance(place, dict):
            raise ConfigError(f"--set {key}: {above} is {place!r}, which has no keys. Set {above} as a whole.")
        elif models:
            (index,) = with_new_names({name: None}, annotation, warn=True)
            fields = {field: info for model in models for field, info in model.model_fields.items()}
            if index not in fields:
                raise ConfigError(_unknown(key, kind))
            annotation, default = fields[index].annotation, fields[index].get_default(call_default_factory=True)
        else:
            annotation = Any
        slot: Any = int(name) if isinstance(place, list) else index
        if depth == len(names) - 1:
            place[slot] = value
            return
        if isinstance(place, dict) and place.get(slot) is None:
            undefined = default in (None, PydanticUndefined)
            place[slot] = {} if undefined else _ANY.dump_python(default, mode="json", exclude_unset=True)
        place[slot] = copy(place[slot])  # where YAML names a value twice (&name, *name), both are one object
        place = place[slot]


def with_new_names(data: Any, kind: Any, *, warn: bool = False) -> Any:
    """Return a recipe, or the settings of a saved run, with the names that the keys of `kind` have today.

    Args:
        data: A recipe, or some of its keys, as read from JSON or YAML.
        kind: The model of the recipe, or the annotation of a field.
        warn: Warn of each old name.
    """
    if isinstance(data, list):
        inner = next((get_args(one)[0] for one in _members(kind) if get_origin(one) is list), Any)
        return [with_new_names(one, inner, warn=warn) for one in data]
    if not isinstance(data, dict):
        return data
    for model in _models(kind):
        renamed: Mapping[str, str] = getattr(model, "renamed", {})
        for old in sorted(renamed.keys() & data.keys()):
            if renamed[old] in data:
                raise ConfigError(f"`{old}` is the old name of `{renamed[old]}`, and both are given. Keep the new one.")
            if warn:  # shows no line of this code
                message = f"The recipe key `{old}` is now called `{renamed[old]}`."
                warnings.warn_explicit(message, FutureWarning, "recipe", 0, registry=_WARNED)
        named = {renamed.get(key, key): value for key, value in data.items()}
        fields = {key: info.annotation for key, info in model.model_fields.items()}
        data = {k: with_new_names(one, fields[k], warn=warn) if k in fields else one for k, one in named.items()}
    return data


def as_yaml(recipe: BaseModel) -> str:
    """Return a resolved recipe as YAML, for people to read: without its tokens for the hub."""
    return safe_dump(_without_token(recipe.model_dump(mode="json", fallback=reference)), sort_keys=False)


def _without_token(value: JsonValue) -> JsonValue:
    if not isinstance(value, dict):
        return value
    return {key: _without_token(one) for key, one in value.items() if key != "hub_token"}


def keep_recipe(recipe: BaseModel, folder: Path) -> None:
    """Write a resolved recipe into the folder of a run, which is made if needed; ConfigError if it cannot be."""
    write_text(require_folder(folder) / "recipe.yaml", as_yaml(recipe))


def writing(output: Path, processes: PartialState) -> AbstractContextManager[None]:
    """Keep other runs than that of these processes from writing into an output folder. Raises ConfigError if one does.

    Two runs of two recipes would take each other's parts, and a result would stand beside the settings of the other.
    """
    return sole_writer(output, flag="--output") if processes.is_main_process else nullcontext()


def require_same(
    stored: Path, settings: Mapping[str, JsonValue], *, made: Path, kind: type[BaseModel] | None = None
) -> None:
    """Check that the settings in a file, if there is one, are these.

    Args:
        settings: All or some of the settings that `made` would be made with now; `contents` (`training.contents`)
            count where they were stored.
        made: The result that the settings belong to, for the message.
        kind: Model of the settings, whose keys may be stored under their old names.

    Raises:
        ConfigError: They differ; the message shows the keys that do.
    """
    if not stored.exists():
        return
    before = read_json(stored, dict[str, Any], "Delete the folder it is in, or choose another --output.")
    before = before if kind is None else with_new_names(before, kind)
    if "contents" in settings and "contents" not in before:
        message = (
            f"{made} was begun by an earlier version, which kept no digest of data and weights: whether they have "
            "changed since, as those of a model in the package do with its version, is not checked."
        )
        warnings.warn_explicit(message, UserWarning, str(stored), 0)  # shows no line of this code
    was, now = dict(_leaves(before)), dict(_leaves({**before, **json.loads(json.dumps(settings))}))
    differ = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    both = was.keys() & now.keys()  # of another path the name differs; older runs stored no contents
    differ = [key for key in differ if not key.startswith("contents.") or key in both]
    if differ:
        listed = "; ".join(f"{key}: {was.get(key)!r:.80}, now {now.get(key)!r:.80}" for key in differ)
        what = "data or weights" if all(key.startswith("contents.") for key in differ) else "settings"
        raise ConfigError(
            f"{made} was begun with other {what} ({listed}), so it can be neither resumed nor taken for a result of "
            "these. To resume it, give them as they were: an earlier version of the package may have had others. "
            "Delete it, or choose another --output, to begin anew."
        )


def begin(
    stored: Path,
    settings: Mapping[str, JsonValue],
    *,
    made: Path,
    processes: PartialState,
    kind: type[BaseModel] | None = None,
) -> None:
    """Store all settings that decide a result, which is about to be made or resumed; see `require_same`.

    The main one of the `processes` writes. Once `made` is deleted it may be made with other settings.
    """
    if made.exists():
        require_same(stored, settings, made=made, kind=kind)
    processes.wait_for_everyone()  # so that none of them reads settings that another one has just written
    if processes.is_main_process:
        kept = dict(settings)
        if made.exists() and stored.exists() and "contents" not in read_json(stored, dict[str, Any], "Delete it."):
            kept.pop("contents", None)  # today's are not those of then
        write_text(stored, json.dumps(kept, sort_keys=True, indent=1))


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over all values by their dotted keys; those of records in a list have its places, as in `--set`."""
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            yield from _leaves({str(at): one for at, one in enumerate(value)}, f"{above}{key}.")
        elif isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def _members(annotation: Any) -> Iterator[Any]:
    """Iterate over the types that an annotation allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for one in get_args(annotation):
            yield from _members(one)
    else:
        yield annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Iterate over the sections that an annotation allows, except abstract ones, whose keys are not known here."""
    for one in _members(annotation):
        if isinstance(one, type) and issubclass(one, BaseModel) and not isabstract(one):
            yield one


def _parsed(text: str) -> Any:
    with suppress(ValueError):
        return json.loads(text)  # before YAML, which takes 1e-6 for a word
    try:
        return read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set: the value {text!r} is neither JSON nor YAML: {error}") from None


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """Return the faults that pydantic found as sentences, those of unknown keys as one."""
    faults = error.errors()
    told = [_explain_value(one) for one in faults if one["type"] != "extra_forbidden"]
    if unknown := [_key(one) for one in faults if one["type"] == "extra_forbidden"]:
        told.append(_unknown(unknown[0], kind))
        if unknown[1:]:
            told.append(f"Nor has it {', '.join(unknown[1:])}.")
    return " ".join(told)


def _key(error: ErrorDetails) -> str:
    """Return the dotted key of a fault, without the names that pydantic adds, such as those of the types of a union."""
    *above, last = error["loc"] or ("",)
    own = [part for part in above if isinstance(part, int) or re.fullmatch(r"[\w-]+", part)]
    if error["type"] == "extra_forbidden" or isinstance(last, int) or re.fullmatch(r"[\w-]+", last):
        own.append(last)  # an unknown key is shown as it was given
    return ".".join(map(str, own))


def _explain_value(error: ErrorDetails) -> str:
    """Return one fault as a sentence: the key, what is wrong, the value."""
    key, told = _key(error), error["msg"].removeprefix("Value error, ").rstrip(".")
    if error["type"] == "missing":
        return f"it lacks the key '{key}'."
    if error["type"] == "value_error":
        return f"{key}: {told}." if key else f"{told}."
    where = f"bad value for '{key}'" if key else "it is no mapping of keys to values"
    return f"{where}: {told}; got {error['input']!r:.80}."


def _unknown(key: str, kind: type[BaseModel]) -> str:
    paths = list(_paths(kind))
    last = key.rpartition(".")[2]
    close = [path for path in paths if path.rpartition(".")[2] == last] or get_close_matches(key, paths)
    meant = f"Did you mean {', '.join(close[:3])}?" if close else f"Its keys are: {', '.join(kind.model_fields)}."
    return f"The recipe has no key '{key}'. {meant}"


def _paths(annotation: Any, above: str = "") -> Iterator[str]:
    """Iterate over the dotted paths of all keys; of lists, those of the first item."""
    for one in _members(annotation):
        if get_origin(one) is list:
            yield from _paths(get_args(one)[0], f"{above}0.")
    for model in _models(annotation):
        for name, field in model.model_fields.items():
            yield above + name
            yield from _paths(field.annotation, f"{above}{name}.")
