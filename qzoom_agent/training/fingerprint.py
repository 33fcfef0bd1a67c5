"""What something was made with, kept beside it, so that it is not gone on with, or passed off, under other settings."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import BaseModel, JsonValue

from qzoom_agent.errors import ConfigError
from qzoom_agent.training.recipe_io import with_new_names


def require_same(
    stated: Path, settings: Mapping[str, JsonValue], *, made: Path, kind: type[BaseModel] | None = None
) -> None:
    """Nothing where `stated` says these settings, or is not there.

    Args:
        settings: what `made` would be made with now, or some of it.
        kind: the recipe whose keys these are; keys that it has renamed are read by their old names.
    Raises:
        ConfigError: it says others; the message shows those that differ.
    """
    if not stated.exists():
        return
    before = json.loads(stated.read_text(encoding="utf-8"))
    if kind is not None:
        before = with_new_names(before, kind)
    was, now = dict(_leaves(before)), dict(_leaves({**before, **json.loads(json.dumps(settings))}))
    differ = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if differ:
        said = "; ".join(f"{key}: {was.get(key)!r:.80}, now {now.get(key)!r:.80}" for key in differ)
        raise ConfigError(
            f"{made} was begun with other settings ({said}), and what comes of one is not to be reported as another's. "
            "Delete it, or choose another --output."
        )


def begin(
    stated: Path,
    settings: Mapping[str, JsonValue],
    *,
    made: Path,
    processes: PartialState,
    kind: type[BaseModel] | None = None,
) -> None:
    """Keep the settings of what is about to be made, or gone on with.

    Args:
        made: the folder or file that comes of it; one that was deleted may be made otherwise.
        kind: see `require_same`.
    Raises:
        ConfigError: it was begun with others.
    """
    if made.exists():
        require_same(stated, settings, made=made, kind=kind)
    processes.wait_for_everyone()  # so that none of them judges what another has just begun
    if processes.is_main_process:
        stated.parent.mkdir(parents=True, exist_ok=True)
        writing = stated.with_suffix(".part")
        writing.write_text(json.dumps(settings, sort_keys=True, indent=1), encoding="utf-8")
        writing.rename(stated)


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """All values by their dotted keys."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
