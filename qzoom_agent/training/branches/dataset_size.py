"""How many rows a source has, without reading them: what a plan counts with."""

import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_from_disk
from pyarrow.parquet import read_metadata

from qzoom_agent.errors import ConfigError
from qzoom_agent.training.branches.dataset import DatasetSpec


def rows_of(sources: Sequence[DatasetSpec]) -> int | None:
    """Rows of some sources, at most; None where one is taken whole from the hub.

    Raises:
        ConfigError: a file or folder is not there, or is not what it says it is.
    """
    counts = [_rows(one) for one in sources]
    return None if None in counts else sum(count or 0 for count in counts)


def _rows(source: DatasetSpec) -> int | None:
    if source.path == "needle":
        return source.limit or 1000
    try:
        count = _stored(source)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The rows of {source.path} cannot be counted: {error}.") from None
    return min((known for known in (count, source.limit) if known is not None), default=None)


def _stored(source: DatasetSpec) -> int | None:
    """Rows of a local file or folder; None for the hub's."""
    where = Path(source.path).expanduser()
    if (where / "dataset_info.json").is_file():
        return len(Dataset.load_from_disk(str(where)))
    if (where / "dataset_dict.json").is_file():
        return len(load_from_disk(str(where))[source.split])
    if where.is_file():
        if where.suffix == ".parquet":
            return int(read_metadata(where).num_rows)
        with where.open(encoding="utf-8") as file:
            is_list = file.read(1) == "["
            file.seek(0)
            return len(json.load(file)) if is_list else sum(bool(line.strip()) for line in file)
    if source.path.startswith(("/", ".", "~")):
        raise FileNotFoundError("there is no such file or folder")
    return None
