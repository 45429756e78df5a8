"""Where prompts come from: files, patterns of files, saved data sets and data sets of the hub, as streams of rows."""

import glob
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, PromptError
from .readers import BATCH_ROWS, Row, Wanted, batch_rows, choose_columns, file_rows

HUB = "hf://"
SAVED_TABLE, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files of a folder that the package datasets saved: of a single table, and of several splits."""


@dataclass(frozen=True, slots=True)
class HubPart:
    """Which rows of a data set are read, if it has several splits or subsets."""

    split: str = "train"
    subset: str | None = None


def find_places(places: Sequence[str | Path]) -> list[str]:
    """Files and data sets, in the order given; a pattern such as `data/*.jsonl` gives its files, sorted by name.

    Raises:
        PromptError: a file does not exist, or no file fits a pattern.
    """
    found: list[str] = []
    for place in map(str, places):
        files = [place]
        if not place.startswith(HUB) and not Path(place).exists() and glob.has_magic(place):
            files = sorted(file for file in glob.glob(place, recursive=True) if Path(file).is_file())
            if not files:
                raise PromptError(f"no file fits {place}; check the pattern")
        for file in files:
            if not file.startswith(HUB) and not Path(file).is_file() and not is_saved(Path(file)):
                raise PromptError(
                    f"prompt file {file} does not exist or is not a file; check the path. A folder must be one that "
                    f"datasets saved; for the files of another folder give a pattern, such as '{file}/*.parquet'"
                )
        found += files
    return found


def is_saved(path: Path) -> bool:
    """Whether the package datasets saved this folder to disk."""
    return any((path / name).is_file() for name in (SAVED_TABLE, SAVED_SPLITS))


def rows_of_places(
    places: Sequence[str], wanted: Wanted, hub: HubPart
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """All rows: place, number within the place, and a call that loads the row.

    Args:
        wanted: whether a column of this name is read from tables and data sets.

    Raises:
        PromptError: a place can't be read, holds no row, or has none of the wanted columns.
        ConfigError: a data set is asked for, and the package datasets is not installed.
    """
    for place in places:
        row = 0
        for row, load in _rows(place, wanted, hub):
            yield place, row, load
        if not row:
            raise PromptError(f"no prompts in {place}: there is no record; remove it from the list")


def _rows(place: str, wanted: Wanted, hub: HubPart) -> Iterator[Row]:
    if place.startswith(HUB):
        return _hub_rows(place, wanted, hub)
    return _saved_rows(Path(place), wanted, hub) if Path(place).is_dir() else file_rows(Path(place), wanted)


def _saved_rows(folder: Path, wanted: Wanted, hub: HubPart) -> Iterator[Row]:
    """The rows of a folder that the package datasets saved, shard after shard."""
    if (folder / SAVED_SPLITS).is_file():
        splits = _read_json(folder / SAVED_SPLITS, "splits")
        if hub.split not in splits:
            raise PromptError(f"{folder} has the splits {splits}, and no {hub.split}; choose one with extract.split")
        folder = folder / hub.split
    row = 0
    for shard in _read_json(folder / SAVED_TABLE, "_data_files"):
        for _, load in file_rows(folder / shard["filename"], wanted):
            row += 1
            yield row, load


def _read_json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromptError(f"{path} can't be read: {error}; have the data set saved again") from error


def _hub_rows(place: str, wanted: Wanted, hub: HubPart) -> Iterator[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(f"{place} needs the package datasets, which is not installed: pip install 'vpd[hub]'.")
    import datasets

    name = place.removeprefix(HUB)
    try:
        data: Any = datasets.load_dataset(name, hub.subset, split=hub.split)
    except Exception as error:  # the library passes on all errors of its readers and of the network
        raise PromptError(
            f"the data set {name} (subset {hub.subset or 'none'}, split {hub.split}) can't be loaded: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Check the name, extract.subset, "
            "extract.split and the network."
        ) from error
    columns = choose_columns(place, data.column_names, wanted)
    row = 0
    for table in data.select_columns(columns).with_format("arrow").iter(BATCH_ROWS):
        for load in batch_rows(table, data.column_names):
            row += 1
            yield row, load
