"""Repair: whole sequences stay, damaged sequences go, and the commands make only the latter again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.tiny import EXTRACT, run_vpd, vpd
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.maintenance.quarantine import LISTS, read_quarantined
from vpd.pipeline.cache_facts import count_quarantined


def contents(folder: Path) -> dict[str, tuple[bytes, list[int]]]:
    cache = Cache.open(folder)
    read = {row.seq_id: cache.read(row) for row in cache.rows}
    return {name: (found.stored_TKW.numpy().tobytes(), found.token_ids_S.tolist()) for name, found in read.items()}


def part_file(folder: Path, number: int, name: str) -> Path:
    row = Cache.open(folder).rows[number]
    return folder / "parts" / f"{row.part}.zarr" / name


def flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


class Case(NamedTuple):
    id: str
    damage: Callable[[Path], None]
    num_lost: int | None
    """Number of sequences lost; None = at least one, but not all."""


CASES = [
    Case("a-state", lambda cache: flip(part_file(cache, 2, "hidden/c/0/0/0"), 0.4), 1),
    Case("a-token", lambda cache: flip(part_file(cache, 2, "token_ids/c/0"), 0.4), 1),
    Case("cut-states", lambda cache: cut(part_file(cache, 2, "hidden/c/0/0/0"), 0.5), None),
    Case("chunk-index", lambda cache: flip(part_file(cache, 0, "hidden/c/0/0/0"), 0.9999), 0),
    Case("metadata", lambda cache: part_file(cache, 0, "hidden/zarr.json").unlink(), 0),
    Case("commit-record", lambda cache: cut(next((cache / "commits").iterdir()), 0.5), 0),
    Case("part-index", lambda cache: next((cache / "index").glob("part-*")).unlink(), 0),
    Case("snapshot", lambda cache: flip(next((cache / "index").glob("all-*")), 0.5), 0),
    Case("lost-folder", lambda cache: shutil.rmtree(part_file(cache, 0, ".")), 12),
    Case("target", lambda cache: flip(cache / "target" / "pieces.safetensors", 0.5), 0),
    Case("drafts", lambda cache: flip(next(cache.glob("drafts/*/parts/*/tokens/c/0/0/0")), 0.5), 0),
    Case("drafter", lambda cache: next(cache.glob("drafts/*/drafter.json")).unlink(), 0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_is_lost_is_made_again_and_nothing_else(
    case: Case, drafted_cache: Path, first_run: Path, tiny_llama: Path, tiny_prompts: Path, tmp_path: Path
):
    folder = shutil.copytree(drafted_cache, tmp_path / "cache")
    before, drafts_before = contents(folder), accept_lengths(folder)
    case.damage(folder)

    outcome = run_vpd("verify", folder, "--repair", "--json")
    assert outcome.code == 1
    lost = outcome.result["repair"]["lost"]
    assert len(lost) == case.num_lost if case.num_lost is not None else 0 < len(lost) < len(before)
    listed = read_quarantined(Cache.open(folder, allow_empty=True).storage)
    assert sorted(entry["seq_id"] for entry in listed) == sorted(lost)

    assert sum(count_quarantined(Cache.open(folder, allow_empty=True)).values()) == len(listed)

    again = vpd("extract", tiny_llama, tiny_prompts, "--out", folder, **EXTRACT)
    assert vpd("inspect", folder)["quarantined"] == {}
    assert (again["num_written"], again["num_present"]) == (len(lost), len(before) - len(lost))
    assert contents(folder) == before
    vpd("draft", folder, "--first-drafter", first_run)
    assert accept_lengths(folder) == drafts_before
    assert vpd("verify", folder)["problems"] == []


def accept_lengths(folder: Path) -> dict[str, list[int]]:
    cache = Cache.open(folder)
    drafts = FirstDrafts.open(cache)
    return {row.seq_id: drafts.accept_lengths(row).tolist() for row in cache.rows}


def test_repair_leaves_an_intact_cache_alone(drafted_cache: Path, tmp_path: Path):
    folder = shutil.copytree(drafted_cache, tmp_path / "cache")
    before = contents(folder)
    found = vpd("verify", folder, "--repair")
    assert "repair" not in found
    assert contents(folder) == before
    assert not (folder / "quarantine").exists()


def test_a_damaged_manifest_can_not_be_repaired(drafted_cache: Path, tmp_path: Path):
    folder = shutil.copytree(drafted_cache, tmp_path / "cache")
    cut(folder / "dataset.json", 0.5)
    outcome = run_vpd("verify", folder, "--repair")
    assert outcome.code == 1
    assert "dataset.json" in outcome.message
    assert len(list((folder / "parts").iterdir())) == len(list((drafted_cache / "parts").iterdir()))


def test_a_part_of_unknown_sequences_is_made_again_as_a_whole(
    drafted_cache: Path, tiny_llama: Path, tiny_prompts: Path, tmp_path: Path
):
    folder = shutil.copytree(drafted_cache, tmp_path / "cache")
    before = contents(folder)
    for path in (folder / "index").iterdir():
        flip(path, 0.5)
    outcome = run_vpd("verify", folder, "--repair")
    assert outcome.code == 1
    for words in ("1 parts put into quarantine", "which sequences 1 of these parts held is not known", "vpd extract"):
        assert words in outcome.out
    assert not (folder / LISTS).exists()
    assert vpd("extract", tiny_llama, tiny_prompts, "--out", folder, **EXTRACT)["num_written"] == len(before)
    assert contents(folder) == before


def test_nothing_lost_leaves_no_list_of_what_is_lost(drafted_cache: Path, tmp_path: Path):
    folder = shutil.copytree(drafted_cache, tmp_path / "cache")
    part_file(folder, 0, "hidden/zarr.json").unlink()
    assert run_vpd("verify", folder, "--repair", "--json").result["repair"]["lost"] == []
    assert not (folder / LISTS).exists()
