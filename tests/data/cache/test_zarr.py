"""Parts of every codec, as zarr-python, zarrs and tensorstore read them."""

# K layers, H hidden width
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from support.tiny import fill_cache, make_sequence
from vpd.data.cache.cache import Cache
from vpd.data.cache.codecs import CHANNEL_SCALE, CODECS, HIDDEN
from vpd.data.cache.reader import Request, read_ahead

K, H = 3, 40
LENGTHS = [40, 1, 64, 200, 65]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=[*CODECS])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of several parts."""
    folder = tmp_path_factory.mktemp(request.param) / "cache"
    sequences = [make_sequence(f"s{i}", length, K, H) for i, length in enumerate(LENGTHS)]
    parts = fill_cache(folder, sequences, 16_000, layer_ids=(0, 1, 2), hidden_size=H, codec=request.param)
    assert 1 < len(parts) < len(LENGTHS)
    return Cache.open(folder)


def read_ours(cache: Cache, part: str) -> Arrays:
    """Every array of a part, whole; rows of no sequence are zero."""
    opened, spec = cache.states.open(part, verify=True), cache.specs[HIDDEN]
    hidden = np.zeros((opened.num_rows, *spec.row_shape), spec.dtype)
    for sequence in read_ahead(cache.states, map(Request, cache.rows_of_part(part))):
        first_row = sequence.row.first_row
        hidden[first_row : first_row + sequence.row.num_tokens] = sequence.stored_TKW.numpy()
    return {HIDDEN: hidden, **opened.resident}


def read_zarr(folder: Path) -> Arrays:
    group = zarr.open_group(folder, mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


def read_zarrs(folder: Path) -> Arrays:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        arrays: dict[str, zarr.Array[Any]] = dict(zarr.open_group(folder, mode="r").arrays())
        assert {type(array.async_array.codec_pipeline).__name__ for array in arrays.values()} == {"ZarrsCodecPipeline"}
        return {name: np.asarray(array[:]) for name, array in arrays.items()}


def read_tensorstore(folder: Path) -> Arrays:
    found = {}
    for path in folder.glob("*/zarr.json"):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path.parent}/"}}
        found[path.parent.name] = tensorstore.open(spec, open=True, read=True).result().read().result()
    return found


@pytest.mark.parametrize("read", [read_zarr, read_zarrs, read_tensorstore], ids=lambda read: read.__name__)
def test_other_libraries_read_the_same_bytes(read: Callable[[Path], Arrays], cache: Cache):
    for part in cache.parts:
        expected, found = read_ours(cache, part), read(Path(cache.place) / "parts" / f"{part}.zarr")
        assert found.keys() == expected.keys()
        assert found.keys() == {*cache.specs, *([CHANNEL_SCALE] if cache.codec.needs_channel_scale else [])}
        for name, array in expected.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("read", [read_zarr, read_zarrs, read_tensorstore], ids=lambda read: read.__name__)
def test_other_libraries_find_a_flipped_bit_too(read: Callable[[Path], Arrays], tmp_path: Path):
    (part,) = fill_cache(tmp_path, [make_sequence("a", 70, K, H)], layer_ids=(0, 1, 2), hidden_size=H)
    folder = tmp_path / "parts" / f"{part}.zarr"
    read(folder)
    path = folder / "hidden/c/0/0/0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises((ValueError, RuntimeError)):
        read(folder)
