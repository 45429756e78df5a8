"""Records: a reader gets what was written, or an error."""

import json
import pickle
from typing import Any

import pytest
from crc32c import crc32c
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vpd.data.cache.records import CHECKSUM, checksum, describe, dump_record, parse_record
from vpd.data.errors import CacheCorruptError

Record = dict[str, Any]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
RECORDS = st.dictionaries(st.text(max_size=5).filter(lambda key: key != CHECKSUM), VALUES, max_size=4)
SMALL: Record = {"part": "part-é", "num_rows": 64, "lr": 1e-06, "files": {"x/c/0": {"bytes": 4, "crc32c": "0a"}}}


def parse(content: bytes) -> Record:
    return parse_record(content, "the/place", "a test's record")


def test_the_checksum_is_crc32c():
    assert checksum(b"123456789") == 0xE3069283  # CRC-32C's check value
    assert checksum(memoryview(b"6789"), checksum(b"12345")) == 0xE3069283
    assert checksum(b"123456789") == 0xE3069283  # CRC-32C's check value
    assert describe(b"") == {"bytes": 0, "xxh3": "2d06800538d394c2"}  # XXH3's


def test_files_of_chunks_with_checksums_have_different_hashes():
    """Content followed by its CRC-32C always has the same CRC-32C."""
    files = [content + checksum(content).to_bytes(4, "little") for content in (b"states", b"others")]
    assert checksum(files[0]) == checksum(files[1])
    assert describe(files[0]) != describe(files[1])


@given(RECORDS)
@settings(deadline=None)
def test_a_record_comes_back(record: Record):
    assert parse(dump_record(record)) == record


@given(RECORDS)
@settings(deadline=None)
def test_the_checksum_is_that_of_the_other_keys_in_canonical_form(record: Record):
    stored = json.loads(dump_record(record))
    assert list(stored)[-1] == CHECKSUM
    found = stored.pop(CHECKSUM)
    canonical = json.dumps(stored, sort_keys=True, separators=(",", ":"))
    assert found == f"{crc32c(canonical.encode()):08x}"


@pytest.mark.parametrize("record", [SMALL, {}], ids=["some-keys", "empty"])
def test_every_flipped_bit_is_an_error_that_names_the_place_and_the_kind(record: Record):
    content = dump_record(record)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheCorruptError, match="the/place is not a test's record as it was written"):
            parse(bytes(damaged))


def test_every_cut_and_every_addition_is_an_error():
    content = dump_record(SMALL)
    for damaged in [*(content[:end] for end in range(len(content))), content + b" ", b"\n" + content, content * 2]:
        with pytest.raises(CacheCorruptError, match="the/place"):
            parse(damaged)


@given(RECORDS, RECORDS)
@settings(deadline=None)
def test_the_checksum_of_another_record_does_not_do(record: Record, other: Record):
    assume(other != record)
    content = json.loads(dump_record(record)) | {CHECKSUM: json.loads(dump_record(other))[CHECKSUM]}
    with pytest.raises(CacheCorruptError):
        parse((json.dumps(content, indent=1) + "\n").encode())


@pytest.mark.parametrize("content", ["", "[]", "1", "null", '"x"', "{}", '{"part": "a"}', "[" * 9999])
def test_other_json_is_no_record(content: str):
    with pytest.raises(CacheCorruptError):
        parse(content.encode())


def test_an_error_is_the_same_in_another_process():
    for error in (CacheCorruptError("a is damaged."), CacheCorruptError("a is damaged.", "Copy it again.")):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.what, copy.advice) == (str(error), "a is damaged.", error.advice)
