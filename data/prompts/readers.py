"""Files of records: JSON Lines, lists of JSON, Parquet and Arrow, each told by its first bytes, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import PromptError
from .values import unique_pairs

BATCH_ROWS = 1024
BLOCK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[\[\]{},]', re.DOTALL)
"""A string, whose end may be missing, or a sign that begins, ends or divides values of JSON."""
DAMAGE = (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError, pa.ArrowException)

Row = tuple[int, Callable[[], object]]
"""A row's number, from 1, and a call that loads the row. The call raises for a bad row, which can then be skipped."""
Wanted = Callable[[str], bool]
"""Whether the values of a column of this name are read."""


class Compression(NamedTuple):
    """A way to compress a file."""

    magic: bytes
    """The first bytes of such a file."""
    open: Callable[[Path], Any]


def _open_with_arrow(codec: str) -> Callable[[Path], Any]:
    return lambda path: io.BufferedReader(pa.CompressedInputStream(str(path), codec), BLOCK_BYTES)  # pyright: ignore[reportArgumentType]


COMPRESSIONS = {
    "gzip": Compression(b"\x1f\x8b", gzip.open),
    "zstd": Compression(b"\x28\xb5\x2f\xfd", _open_with_arrow("zstd")),
    "bzip2": Compression(b"BZh", bz2.open),
    "xz": Compression(b"\xfd7zXZ\x00", lzma.open),
    "lz4": Compression(b"\x04\x22\x4d\x18", _open_with_arrow("lz4")),
    "pzstd": Compression(b"\x50\x2a\x4d\x18", _open_with_arrow("zstd")),
}
EXPECTED = "expected JSON Lines, a list of JSON objects, Parquet or Arrow"
REFUSED = (
    (b"version ", "a pointer of Git LFS, whose file has not been downloaded"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf", "an archive of 7-Zip"),
    (b"\xff\xfe", "text in UTF-16 or UTF-32"),
    (b"\xfe\xff", "text in UTF-16"),
    (b"{\x00", "text in UTF-16 or UTF-32"),
    (b"[\x00", "text in UTF-16 or UTF-32"),
    (b"\x80\x04", "a pickle"),
)
"""First bytes and kind of files that are often met and that vpd does not read."""


def file_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """The rows of a file, whatever its name says.

    Raises:
        PromptError: the file can't be read, or has no column that is read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(8)
        refused = next((kind for first, kind in REFUSED if magic.startswith(first)), None)
        if refused is not None:
            raise PromptError(f"prompt file {path} is {refused}; {EXPECTED}")
        found = next((each for each in COMPRESSIONS.values() if magic.startswith(each.magic)), None)
        if magic.startswith(tuple(TABLES)):
            yield from table_rows(path, wanted)
        else:
            with path.open("rb") if found is None else found.open(path) as stream:
                yield from _json_rows(stream, path)
    except DAMAGE as error:
        raise PromptError(f"prompt file {path} can't be read; its bytes may be damaged: {error}") from error


def load_json(line: bytes) -> object:
    """
    Raises:
        PromptError: the line is not JSON, or an object has two values for a key.
    """
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not JSON ({error}); expected one JSON object per line, or a list of objects") from error


def _json_rows(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """Rows of JSON Lines, or of a list."""
    lines = iter(stream)
    number, first = 1, next(lines, b"")
    while first and not first.removeprefix(BOM).strip():
        number, first = number + 1, next(lines, b"")
    if first.startswith(tuple(TABLES)) or any(first.startswith(each.magic) for each in COMPRESSIONS.values()):
        raise PromptError(f"prompt file {path} holds a file of another kind, compressed; unpack it first")
    if first.removeprefix(BOM).lstrip().startswith(b"["):
        for row, item in enumerate(_list_items(first.removeprefix(BOM), stream, path), start=1):
            yield row, lambda item=item: load_json(item)
    elif first and not first.removeprefix(BOM).lstrip().startswith(b"{"):
        raise PromptError(f"prompt file {path} begins with {first[:40]!r}; {EXPECTED}")
    elif first:
        yield number, lambda: load_json(first)
        for row, line in enumerate(lines, start=number + 1):
            if line.strip():
                yield row, lambda line=line: load_json(line)


def _list_items(first: bytes, stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """The values of a list of JSON, undecoded. Only the value that is being read is in memory.

    Args:
        first: the bytes of the stream that were read before.
    """
    data, position, begin, depth, number = first, 0, 0, 0, 0
    while True:
        is_cut = False
        for token in TOKEN.finditer(data, position):
            sign = token[0][:1]
            if sign == b'"':
                if not token[1]:  # The string goes on in the next block.
                    position, is_cut = token.start(), True
                    break
            elif sign in b"[{":
                depth += 1
                begin = token.end() if depth == 1 else begin
            elif depth == 1:
                number += 1
                if sign == b"," or data[begin : token.start()].strip() or number > 1:
                    yield data[begin : token.start()]
                begin = token.end()
                if sign != b",":
                    rest = data[begin:] + stream.read()
                    if rest.strip():
                        raise PromptError(f"prompt file {path} has more text after its list: {rest.strip()[:40]!r}")
                    return
            elif sign != b",":
                depth -= 1
        else:
            position = len(data)
        # The block grows with the value, so that a long value is not scanned again and again.
        block = stream.read(max(BLOCK_BYTES, len(data) - begin))
        if not block:
            what = "a text" if is_cut else "the list"
            raise PromptError(f"prompt file {path} ends after {number} rows, before {what} ends; the file may be cut")
        data, position, begin = data[begin:] + block, position - begin, 0


def table_rows(path: Path, wanted: Wanted) -> Iterator[Row]:
    """The rows of a Parquet or Arrow file.

    Raises:
        PromptError: the table has no column that is read.
    """
    with path.open("rb") as file:
        magic = file.read(8)
    read = next(read for first, read in TABLES.items() if magic.startswith(first))
    row = 0
    for names, batch in read(path, wanted):
        for record in batch_rows(batch, names):
            row += 1
            yield row, record


def choose_columns(place: object, names: list[str], wanted: Wanted) -> list[str]:
    """The columns whose values are read.

    Raises:
        PromptError: there is none, or two columns have one name.
    """
    if len(set(names)) < len(names):
        raise PromptError(f"{place} has two columns of one name among {names}; rename one of them")
    chosen = [name for name in names if wanted(name)]
    if not chosen:
        raise PromptError(f"{place}: no known form among the columns {names}; say what they are with extract.columns")
    return chosen


def batch_rows(batch: pa.RecordBatch | pa.Table, names: list[str]) -> Iterator[Callable[[], object]]:
    """A call for each row, which gives the row as an object with all names; a column that is not read has a null."""
    unread = dict.fromkeys(names)
    try:
        records = batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError, pa.ArrowException):
        for i in range(batch.num_rows):
            yield lambda i=i: _load_row(batch, i, unread)
        return
    for record in records:
        yield lambda record=record: unread | record


def _load_row(batch: pa.RecordBatch | pa.Table, i: int, unread: dict[str, Any]) -> object:
    try:
        return unread | batch.slice(i, 1).to_pylist(maps_as_pydicts="strict")[0]
    except (ValueError, KeyError, OverflowError, pa.ArrowException) as error:
        raise PromptError(f"a value of the row has no counterpart in JSON: {error}") from error


Batches = Iterator[tuple[list[str], pa.RecordBatch]]
"""Names of all columns of a table, and some rows of those that are read."""


def _parquet_batches(path: Path, wanted: Wanted) -> Batches:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for batch in file.iter_batches(BATCH_ROWS, columns=choose_columns(path, names, wanted)):
            yield names, batch


def _arrow_stream_batches(path: Path, wanted: Wanted) -> Batches:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        names = reader.schema.names
        columns = choose_columns(path, names, wanted)
        for batch in reader:
            yield names, batch.select(columns)


def _arrow_file_batches(path: Path, wanted: Wanted) -> Batches:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        names = reader.schema.names
        columns = choose_columns(path, names, wanted)
        for i in range(reader.num_record_batches):
            yield names, reader.get_batch(i).select(columns)


TABLES: dict[bytes, Callable[[Path, Wanted], Batches]] = {
    b"PAR1": _parquet_batches,
    b"ARROW1": _arrow_file_batches,
    b"\xff\xff\xff\xff": _arrow_stream_batches,
}
"""First bytes of a file of a table -> how the file is read."""
