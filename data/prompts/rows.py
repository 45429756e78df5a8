"""Where prompts come from: files, patterns of files and data sets of the hub, each read as a stream of rows."""

import glob
import gzip
import importlib.util
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ConfigError, PromptError

HUB = "hf://"
PARQUET_MAGIC = b"PAR1"
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_BATCH_ROWS = 1024

Row = tuple[int, Callable[[], object]]
"""A row's number, from 1, and a call that loads the row. The call raises for a bad row, which can then be skipped."""


@dataclass(frozen=True, slots=True)
class HubPart:
    """Which rows of a data set of the hub are read."""

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
            if not file.startswith(HUB) and not Path(file).is_file():
                raise PromptError(f"prompt file {file} does not exist or is not a file; check the path")
        found += files
    return found


def rows_of_places(
    places: Sequence[str], wanted: Collection[str], hub: HubPart
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """All rows: place, number within the place, and a call that loads the row.

    Args:
        wanted: names of the columns that are read from Parquet files and data sets.

    Raises:
        PromptError: a place can't be read, holds no row, or has none of the wanted columns.
        ConfigError: a data set is asked for, and the package datasets is not installed.
    """
    for place in places:
        row = 0
        for row, load in _hub_rows(place, wanted, hub) if place.startswith(HUB) else _rows(Path(place), wanted):
            yield place, row, load
        if not row:
            raise PromptError(f"no prompts in {place}: there is no record; remove it from the list")


def _hub_rows(place: str, wanted: Collection[str], hub: HubPart) -> Iterator[Row]:
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
    columns = [column for column in data.column_names if column in wanted]
    if not columns:
        raise PromptError(f"{place}: no known form among the columns {data.column_names}; set extract.columns")
    for row, record in enumerate(data.select_columns(columns), start=1):
        yield row, lambda record=record: dict(record)


def _rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if not magic:
            return
        if magic == PARQUET_MAGIC or path.suffix == ".parquet":
            yield from _parquet_rows(path, wanted)
        elif magic.startswith(GZIP_MAGIC) or path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield from _json_rows(file)
        else:
            with path.open("rb") as file:
                yield from _json_rows(file)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowException) as error:
        raise PromptError(f"prompt file {path} can't be read; its bytes may be damaged: {error}") from error


def _json_rows(lines: Iterator[bytes] | gzip.GzipFile) -> Iterator[Row]:
    for row, line in enumerate(lines, start=1):
        if line.strip():
            yield row, lambda line=line: _load_json(line)


def _load_json(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not JSON ({error}); expected one JSON object per line") from error


def _parquet_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        found = file.schema_arrow.names
        columns = [name for name in found if name in wanted]
        if not columns:
            raise PromptError(f"{path}: no known form among the columns {found}; expected one of {sorted(wanted)}")
        row = 0
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield row, lambda record=record: record
