"""A codec from outside: a registered class is enough to write, read, check, recode and merge caches with it."""

# T tokens, K layers, H hidden width
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from support.tiny import append, chunk_bytes, fill_cache, make_manifest, make_sequence, same_bits
from torch import Tensor
from vpd.data.cache.array_spec import ArraySpec
from vpd.data.cache.cache import Cache
from vpd.data.cache.codecs import CODECS, COMPRESSION, HIDDEN, Codec, codec
from vpd.data.cache.maintenance.repair import repair
from vpd.data.cache.maintenance.transfer import merge, recode
from vpd.data.cache.maintenance.verify import verify
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.target_files import store_target_files
from vpd.data.cache.writer import StateWriter
from vpd.data.errors import ConfigError
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.extract.estimate import measure_share

K, H = 2, 40
LENGTHS = {"a": 40, "b": 70, "c": 64}
STEPS = 100


class TopByte(Codec):
    """The upper 8 of bfloat16's 16 bits."""

    def spec(self, num_layers: int, hidden_size: int, chunk_tokens: int) -> ArraySpec:
        return ArraySpec(HIDDEN, (num_layers, hidden_size), "uint8", chunk_tokens)

    def encode_block(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> Tensor:
        return (hidden_TKH.view(torch.int16) >> 8).to(torch.uint8)

    def decode_block(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None = None) -> Tensor:
        return (rows_TKW.to(torch.int16) << 8).view(torch.bfloat16)


class Steps(Codec):
    """Whole hundredths of a channel's scale, compressed."""

    needs_channel_scale = True

    def spec(self, num_layers: int, hidden_size: int, chunk_tokens: int) -> ArraySpec:
        return ArraySpec(HIDDEN, (num_layers, hidden_size), "int16", chunk_tokens, COMPRESSION)

    def encode_block(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> Tensor:
        assert channel_scale_KH is not None
        return (hidden_TKH.float() / channel_scale_KH * STEPS).round().to(torch.int16)

    def decode_block(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None = None) -> Tensor:
        assert channel_scale_KH is not None
        return (rows_TKW.float() / STEPS * channel_scale_KH).bfloat16()


@pytest.fixture(params=[TopByte, Steps], ids=["top-byte", "steps"])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a codec that is registered for one test."""
    codec("outside")(request.param)
    yield "outside"
    del CODECS._entries["outside"]


def slow_decoded(states_TKH: Tensor, first_TKH: Tensor, name: str) -> Tensor:
    """What the codec gives back, value by value; `first_TKH` are the states of the part's first sequence."""
    words = states_TKH.view(torch.int16).numpy().view(np.uint16)
    if isinstance(CODECS[name], TopByte):
        kept = [word & 0xFF00 for word in words.flatten().tolist()]
        return torch.tensor(kept, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(states_TKH.shape)
    decoded = torch.empty_like(states_TKH)
    for k in range(K):
        channels = first_TKH[:, k].double().numpy()
        sizes = [float(np.sqrt(np.mean(channels[:, h] ** 2))) for h in range(H)]
        floor = sorted(sizes)[(H - 1) // 2] * 0.1
        for h in range(H):
            scale = max(sizes[h], floor)
            for t, value in enumerate(states_TKH[:, k, h].tolist()):
                decoded[t, k, h] = round(value / scale * STEPS) / STEPS * scale
    return decoded


def sequence(seq_id: str) -> dict[str, Any]:
    return make_sequence(seq_id, LENGTHS[seq_id], K, H)


def make_cache(folder: Path, codec: str, seq_ids: str = "abc") -> Cache:
    """A cache whose first part holds a and b."""
    fill_cache(folder, [sequence(seq_id) for seq_id in seq_ids], 1 << 20, hidden_size=H, codec=codec)
    cache, pieces = Cache.open(folder), folder.with_name(f"{folder.name}-pieces")
    pieces.mkdir()
    (pieces / "config.json").write_text("{}")
    store_target_files(cache.storage, pieces)
    return cache


def check_states(cache: Cache, name: str) -> None:
    """The states are those that the slow reference gives."""
    first = {row.part: row.seq_id for row in cache.rows if row.first_row == 0}
    with closing(read_ahead(cache.states, map(Request, cache.rows))) as found:
        for read in found:
            original, of_first = (sequence(seq_id)["hidden_TKH"] for seq_id in (read.row.seq_id, first[read.row.part]))
            expected, states = slow_decoded(original, of_first, name), read.hidden_TKH
            # The reference computes in double precision: a value on the border between two steps may differ.
            is_close = (states.float() - expected.float()).abs() <= 1e-5 + expected.float().abs() / 100
            assert is_close.float().mean() > 0.99
            assert same_bits(states, expected) or isinstance(CODECS[name], Steps)


def test_a_codec_from_outside_writes_and_reads(name: str, tmp_path: Path):
    cache = make_cache(tmp_path / "cache", name)
    check_states(cache, name)
    assert verify(cache.storage).problems == []
    for part in cache.parts:
        array = zarr.open_group(tmp_path / f"cache/parts/{part}.zarr", mode="r")[HIDDEN]
        assert isinstance(array, zarr.Array)
        for row in cache.rows_of_part(part):
            rows = np.asarray(array[row.first_row : row.first_row + row.num_tokens])
            assert rows.tobytes() == cache.read(row).stored_TKW.numpy().tobytes()


def test_damage_is_found_and_repaired_with_a_codec_from_outside(name: str, tmp_path: Path):
    cache = make_cache(tmp_path / "cache", name)
    row = next(row for row in cache.rows if row.seq_id == "b")
    path = tmp_path / "cache/parts" / f"{row.part}.zarr" / cache.specs[HIDDEN].shard_name
    content = bytearray(path.read_bytes())
    content[row.hidden_offset + 9] ^= 1
    path.write_bytes(content)
    found = verify(cache.storage)
    assert {seq_id for problem in found.problems for seq_id in problem.sequences} == {"b"}
    assert repair(cache.storage, found).lost == ["b"]
    repaired = Cache.open(tmp_path / "cache")
    assert sorted(repaired.rows.strings("seq_id")) == ["a", "c"]
    assert verify(repaired.storage).problems == []


def test_caches_are_recoded_to_and_from_a_codec_from_outside(name: str, tmp_path: Path):
    source = make_cache(tmp_path / "source", "raw")
    report = recode(source, tmp_path / "outside", name, 1 << 20)
    assert report.num_copied == len(LENGTHS)
    assert report.cosine_mean is not None
    assert report.cosine_mean > 0.9
    outside = Cache.open(tmp_path / "outside")
    check_states(outside, name)
    recode(outside, tmp_path / "back", "lossless", 1 << 20)
    back = {row.seq_id: row for row in Cache.open(tmp_path / "back").rows}
    for row in outside.rows:
        assert same_bits(Cache.open(tmp_path / "back").read(back[row.seq_id]).hidden_TKH, outside.read(row).hidden_TKH)


def test_caches_with_a_codec_from_outside_are_merged(name: str, tmp_path: Path):
    one, two = make_cache(tmp_path / "one", name, "ab"), make_cache(tmp_path / "two", name, "c")
    assert merge([one, two], tmp_path / "merged").num_copied == 3
    merged = Cache.open(tmp_path / "merged")
    check_states(merged, name)
    assert verify(merged.storage).problems == []


def test_settings_and_estimates_know_a_codec_from_outside(name: str, tmp_path: Path):
    assert ExtractConfig(codec=name).codec == name
    cache = make_cache(tmp_path / "cache", "raw")
    share = measure_share(cache, name)
    assert 0 < share <= 1
    assert (share == 1) == (CODECS[name].spec(K, H, 64).compression is None)


def test_an_unknown_codec_is_refused(tmp_path: Path):
    for refused in (lambda: make_manifest(codec="outside"), lambda: ExtractConfig(codec="outside")):
        with pytest.raises(ValueError, match=r"raw.*int4"):
            refused()
    source = make_cache(tmp_path / "source", "raw")
    with pytest.raises(ConfigError, match=r"expected a codec .*, found 'outside'"):
        recode(source, tmp_path / "out", "outside", chunk_bytes(K, H))
    assert not (tmp_path / "out").exists()


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match="raw, which is taken"):
        codec("raw")(TopByte)
    assert CODECS["raw"].is_exact


def test_a_part_that_needs_a_scale_measures_its_first_sequence(tmp_path: Path):
    writer = StateWriter(Cache.create_or_open(tmp_path, make_manifest(hidden_size=H, codec="int4")), 1 << 20, {})
    for seq_id in LENGTHS:
        append(writer, **sequence(seq_id))
    writer.finish()
    cache = Cache.open(tmp_path)
    scale_KH = cache.read(cache.rows[0]).channel_scale_KH
    assert scale_KH is not None
    expected = sequence("a")["hidden_TKH"].double().square().mean(dim=0).sqrt()
    torch.testing.assert_close(scale_KH.double(), expected, rtol=1e-5, atol=0)


def test_the_registry_is_imported_without_heavy_packages():
    script = "import sys, vpd.data.cache.codecs; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "numcodecs", "pyarrow", "zarr"} & {*found}
