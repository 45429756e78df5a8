"""`vpd inspect` says what is in a cache: every figure against a slow count over its files."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from support.tiny import EXTRACT, HIDDEN, MULTI_TURN_ROW, PROMPTS, append, make_sequence, run_vpd, vpd
from transformers import PreTrainedTokenizerFast
from vpd.data.cache.arrays import NOT_DRAFTED
from vpd.data.cache.cache import Cache
from vpd.data.cache.target_files import store_target_files
from vpd.data.cache.writer import StateWriter
from vpd.pipeline.cache_facts import MAX_BINS, SAMPLE_TOKENS, length_histogram, mark_sample
from vpd.pipeline.output import format_bytes
from vpd.stages.drafter.target_pieces import PIECES

NUM_LAYERS = EXTRACT["num_draft_layers"]
KEYS = {
    *("cache", "schema_version", "fingerprint", "target", "target_fingerprint", "tokenizer_hash", "template_hash"),
    *("layer_ids", "vllm_layer_ids", "num_target_layers", "hidden_size", "vocab_size", "chunk_tokens", "codec"),
    *("generation", "engine", "versions", "audits", "quarantined"),
    *("num_parts", "num_sequences", "num_tokens", "num_supervised", "num_bytes"),
    *("bytes_per_token", "bytes_by_array", "finish_reasons", "lengths", "first_drafters", "sample", "first_record"),
}


class Recorded(NamedTuple):
    """A sequence as pyarrow and zarr read it."""

    row: dict[str, Any]
    token_ids: list[int]
    loss_mask: list[int]


def read_slowly(folder: Path) -> Iterator[Recorded]:
    for path in sorted((folder / "index").glob("part-*.parquet")):
        part = folder / "parts" / f"{path.stem}.zarr"
        stored = [zarr.open_array(part / name, mode="r") for name in ("token_ids", "loss_mask")]
        for row in pq.read_table(path).to_pylist():
            tokens = slice(row["first_row"], row["first_row"] + row["num_tokens"])
            final = [row["final_token_id"]] if row["final_token_id"] is not None else []
            arrays = [np.asarray(array[tokens]).tolist() for array in stored]
            yield Recorded(row, arrays[0] + final, arrays[1] + [1] * len(final))


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of the parts' files by array, from the file system."""
    sizes: Counter[str] = Counter(index=sum(path.stat().st_size for path in folder.glob("index/part-*.parquet")))
    for part in folder.glob("parts/*.zarr"):
        for path in (path for path in part.rglob("*") if path.is_file()):
            names = path.relative_to(part).parts
            sizes[names[0] if len(names) > 1 else "other"] += path.stat().st_size
    return dict(sizes)


def add_sequences(cache: Cache, **lengths: int) -> None:
    writer = StateWriter(cache, 1 << 20, {})
    for name, length in lengths.items():
        append(writer, **make_sequence(name, length, NUM_LAYERS, HIDDEN))
    writer.finish()


@pytest.fixture(scope="module")
def grown_cache(tmp_path_factory: pytest.TempPathFactory, drafted_cache: Path) -> Path:
    """A drafted cache with a second part that is not drafted."""
    folder = tmp_path_factory.mktemp("grown") / "cache"
    shutil.copytree(drafted_cache, folder)
    add_sequences(Cache.open(folder), short=10, long=SAMPLE_TOKENS + 50)
    return folder


@pytest.fixture(params=["tiny_cache", "drafted_cache", "grown_cache"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_the_figures_are_those_of_the_files(folder: Path):
    found, recorded = vpd("inspect", folder), list(read_slowly(folder))
    assert found.keys() == KEYS
    lengths = [sequence.row["num_tokens"] for sequence in recorded]
    assert found["num_parts"] == len(list(folder.glob("commits/*.json")))
    assert found["num_sequences"] == len(recorded)
    assert found["num_tokens"] == sum(lengths)
    assert found["num_supervised"] == sum(sum(sequence.loss_mask) for sequence in recorded)
    assert found["finish_reasons"] == Counter(sequence.row["finish_reason"] for sequence in recorded)
    assert found["bytes_by_array"] == sizes_of(folder)
    assert found["num_bytes"] == sum(sizes_of(folder).values()) == Cache.open(folder).num_bytes
    assert found["bytes_per_token"] == pytest.approx(found["num_bytes"] / sum(lengths))
    for entry in found["lengths"]:
        assert entry["sequences"] == sum(entry["from"] <= length <= entry["to"] for length in lengths)
    assert sum(entry["sequences"] for entry in found["lengths"]) == len(lengths)
    manifest = Cache.open(folder).manifest.model_dump(mode="json", exclude={"rendered_sample"})
    assert found.items() >= manifest.items()


def test_the_figures_of_first_drafts_are_those_of_the_files(folder: Path):
    drafters = vpd("inspect", folder)["first_drafters"]
    assert [drafter["fingerprint"] for drafter in drafters] == sorted(path.name for path in folder.glob("drafts/*"))
    for drafter in drafters:
        root = folder / "drafts" / drafter["fingerprint"]
        parts = {path.name.partition(".")[0]: path for path in root.glob("parts/*.zarr")}
        arrays = {name: np.asarray(zarr.open_group(path, mode="r")["accept_len"]) for name, path in parts.items()}
        rows = [sequence.row for sequence in read_slowly(folder) if sequence.row["part"] in parts]
        found = [arrays[row["part"]][row["first_row"] :][: row["num_tokens"]].tolist() for row in rows]
        lengths = [length for sequence in found for length in sequence if length != NOT_DRAFTED]
        counts = {str(length): count for length, count in sorted(Counter(lengths).items())}
        assert drafter["accept_lengths"] == counts
        assert drafter["num_anchors"] == len(lengths) > 0
        assert drafter["mean_accept_length"] == pytest.approx(sum(lengths) / len(lengths))
        assert drafter["num_parts_missing"] == len(list(folder.glob("parts/*.zarr"))) - len(parts)
        files = (path for part in parts.values() for path in part.rglob("*") if path.is_file())
        assert drafter["num_bytes"] == sum(path.stat().st_size for path in files)
        assert (drafter["block_size"], drafter["stride"]) == (4, 1)


def test_a_sample_shows_what_is_supervised(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast):
    cache, recorded = Cache.open(folder), {sequence.row["seq_id"]: sequence for sequence in read_slowly(folder)}
    for row in cache.rows:
        runs = mark_sample(cache, row)
        ids, mask = (values[:SAMPLE_TOKENS] for values in recorded[row.seq_id][1:])
        assert "".join(text for text, _ in runs) == tiny_tokenizer.decode(ids)
        starts = [i for i in range(len(ids)) if i == 0 or mask[i] != mask[i - 1]]
        assert [supervised for _, supervised in runs] == [bool(mask[start]) for start in starts]
        shown = ""
        for start, (text, _) in zip(starts, runs, strict=True):
            assert shown == str(tiny_tokenizer.decode(ids[:start])).rstrip("\ufffd")
            shown += text
    first = cache.rows[0]
    sample = vpd("inspect", folder)["sample"]
    assert [(run["text"], run["supervised"]) for run in sample["runs"]] == mark_sample(cache, first)
    assert (sample["seq_id"], sample["num_tokens"]) == (first.seq_id, len(recorded[first.seq_id].token_ids))
    assert sample["num_shown"] == min(sample["num_tokens"], SAMPLE_TOKENS)


def test_a_sample_of_several_turns_has_several_runs(tiny_cache: Path):
    cache = Cache.open(tiny_cache)
    (row,) = [row for row in cache.rows if row.source_row == MULTI_TURN_ROW]
    runs = mark_sample(cache, row)
    assert [supervised for _, supervised in runs] == [False, True, False, True]
    for turn, (text, _) in zip(PROMPTS[MULTI_TURN_ROW - 1]["turns"], runs[::2], strict=True):
        assert turn in text


def test_people_see_the_same(grown_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    cache = shutil.copytree(grown_cache, tmp_path / "[bold]cache :smile:")
    found, outcome = vpd("inspect", cache), run_vpd("inspect", cache)
    assert (outcome.code, outcome.err) == (0, "")
    (drafter,) = found["first_drafters"]
    for text in (
        *("[bold]cache :smile:", found["fingerprint"], drafter["fingerprint"], drafter["name"], "codec raw"),
        *(f"{found['num_tokens']} with states", f"{found['num_supervised']} supervised", "parts missing"),
        *(str(drafter["num_anchors"]), f"{drafter['mean_accept_length']:.3f}", str(found["layer_ids"])),
    ):
        assert text in outcome.out
    for run in found["sample"]["runs"]:
        assert (f"[{run['text']}]" if run["supervised"] else run["text"]) in outcome.out


def test_a_cut_sample_says_so(tiny_cache: Path, tmp_path: Path):
    like = Cache.open(tiny_cache)
    cache = Cache.create_or_open(tmp_path / "cache", like.manifest)
    store_target_files(cache.storage, like.target_folder)
    add_sequences(cache, long=SAMPLE_TOKENS + 50)
    shown = run_vpd("inspect", tmp_path / "cache").out
    assert f"sample long, the first {SAMPLE_TOKENS} of {SAMPLE_TOKENS + 51} tokens" in shown


def test_the_weights_of_the_target_are_not_needed(tiny_cache: Path, tmp_path: Path):
    """Of a bucket they would be downloaded."""
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    (cache / "target" / PIECES).unlink()
    assert vpd("inspect", cache)["num_sequences"] == len(PROMPTS)


@pytest.mark.parametrize(
    ("lengths", "edges"),
    [
        ([7], [(7, 7)]),
        ([1, 10], [(i, i) for i in range(1, 11)]),
        ([0, 10], [(i, i + 1) for i in range(0, 12, 2)]),
        ([40, 48], [(i, i) for i in range(40, 49)]),
        ([1900, 2100], [(i, i + 49) for i in range(1900, 2150, 50)]),
        ([3, 3071], [(i, i + 499) for i in range(0, 3500, 500)]),
    ],
    ids=str,
)
def test_bins_of_lengths_are_round_and_few(lengths: list[int], edges: list[tuple[int, int]]):
    found = length_histogram(np.array(lengths))
    assert [(entry["from"], entry["to"]) for entry in found] == edges
    assert len(found) <= MAX_BINS
    assert [entry["sequences"] for entry in found if entry["sequences"]] == [1] * len(lengths)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (45_088_768, "43.0 MiB"), (9 << 40, "9.0 TiB")],
)
def test_sizes_have_few_digits(number: int, text: str):
    assert format_bytes(number) == text
