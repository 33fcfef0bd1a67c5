"""Fingerprints of settings, stored beside results so that a run is resumed only under the settings it began with."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import BaseModel, JsonValue

from qzoom_agent.errors import ConfigError
from qzoom_agent.files import atomic_write, read_json
from qzoom_agent.training.recipe_io import with_new_names


def require_same(
    stored: Path, settings: Mapping[str, JsonValue], *, made: Path, kind: type[BaseModel] | None = None
) -> None:
    """Check that the settings in a file, if there is one, are these.

    Args:
        stored: The file.
        settings: All or some of the settings that `made` would be made with now.
        made: The result that the settings belong to, for the message.
        kind: Model of the settings, whose keys may be stored under their old names.

    Raises:
        ConfigError: They differ; the message shows the keys that do.
    """
    if not stored.exists():
        return
    before = read_json(stored, dict[str, Any], "Delete the folder it is in, or choose another --output.")
    before = before if kind is None else with_new_names(before, kind)
    was, now = dict(_leaves(before)), dict(_leaves({**before, **json.loads(json.dumps(settings))}))
    differ = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if differ:
        listed = "; ".join(f"{key}: {was.get(key)!r:.80}, now {now.get(key)!r:.80}" for key in differ)
        raise ConfigError(
            f"{made} was begun with other settings ({listed}), so it can be neither resumed nor taken for a result of "
            "these. Delete it, or choose another --output."
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

    Raises:
        ConfigError: The result was begun with other settings.
    """
    if made.exists():
        require_same(stored, settings, made=made, kind=kind)
    processes.wait_for_everyone()  # so that none of them reads settings that another one has just written
    if processes.is_main_process:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(stored) as writing:
            writing.write_text(json.dumps(settings, sort_keys=True, indent=1), encoding="utf-8")


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over all values by their dotted keys; those of records in a list have its places, as in `--set`."""
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            yield from _leaves({str(at): one for at, one in enumerate(value)}, f"{above}{key}.")
        elif isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
