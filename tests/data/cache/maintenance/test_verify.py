"""Damage: whatever happens to a file of a cache, `verify` reports it, and no reader returns damaged data."""

import os
import random
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import Damage, fill_cache, make_sequence, run_vpd, vpd
from vpd.data.cache.arrays import NO_CHOICE
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.maintenance.verify import verify
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.work import AUDITS, PROBE, WORK
from vpd.data.errors import VpdError

NUM_FLIPS = 200
SNAPSHOT = "index/all-"


def read_everything(folder: Path) -> list[bytes]:
    """All that a training run reads, and all first drafts; one item for each sequence."""
    cache = Cache.open(folder)
    assert (cache.target_folder / "config.json").is_file()
    drafts = FirstDrafts.open(cache)
    found: list[bytes] = []
    with closing(read_ahead(cache.states, map(Request, cache.rows))) as sequences:
        for sequence in sequences:
            drafted = drafts.read(sequence.row)
            tensors = [sequence.stored_TKW, sequence.token_ids_S, sequence.loss_mask_S, sequence.target_argmax_T]
            tensors += [drafted.accept_len_T, drafted.tokens_TGA, drafted.probs_TGA]
            found.append(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors))
    return found


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_is_noticed(folder: Path, file: str, intact: list[bytes]) -> None:
    """The damage is reported, and nothing damaged is read.

    A lost snapshot costs no data, only speed. Notes of the extraction are no data either, and may be missing.
    """
    is_note, is_gone = file.startswith((WORK, AUDITS, PROBE)), not (folder / file).exists()
    assert (is_note and is_gone) or verify(LocalStorage(folder)).problems, file
    if is_note or (file.startswith(SNAPSHOT) and is_gone):
        assert read_everything(folder) == intact
    else:
        with pytest.raises(VpdError):
            read_everything(folder)


def test_few_files_are_open_at_once(tmp_path: Path):
    fill_cache(tmp_path, [make_sequence(f"s{i}", 5, 2, 8) for i in range(40)], 1)
    before = len(os.listdir("/proc/self/fd"))
    counts: list[int] = []
    report = verify(LocalStorage(tmp_path), on_part=lambda _: counts.append(len(os.listdir("/proc/self/fd"))))
    assert (report.num_parts, len(counts)) == (40, 40)
    assert max(counts) <= before + 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, drafted_cache: Path) -> Path:
    return shutil.copytree(drafted_cache, tmp_path_factory.mktemp("damage") / "cache")


@pytest.fixture(scope="module")
def intact(whole: Path) -> list[bytes]:
    return read_everything(whole)


def test_an_intact_cache_has_no_problems(whole: Path):
    found = vpd("verify", whole)
    cache = Cache.open(whole)
    assert (found["problems"], found["num_sequences"], found["num_parts"]) == ([], len(cache), len(cache.parts))
    assert found["num_bytes"] == cache.num_bytes


def test_every_flipped_bit_is_noticed(whole: Path, intact: list[bytes]):
    files, chance = files_of(whole), random.Random(4)
    for number in range(NUM_FLIPS):
        file = files[number % len(files)]
        content = (whole / file).read_bytes()
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (whole / file).write_bytes(damaged)
        check_is_noticed(whole, file, intact)
        (whole / file).write_bytes(content)
    assert read_everything(whole) == intact


@pytest.mark.parametrize(
    "damage",
    [Damage("gone", None), Damage("empty", 0.0, True), Damage("half", 0.5, True), Damage("last-byte", 1.0, True)],
    ids=lambda damage: damage.id,
)
def test_every_truncation_and_deletion_is_noticed(whole: Path, intact: list[bytes], damage: Damage):
    for file in files_of(whole):
        content = (whole / file).read_bytes()
        if damage.id == "last-byte":
            (whole / file).write_bytes(content[:-1])
        else:
            damage.apply(whole / file)
        check_is_noticed(whole, file, intact)
        (whole / file).write_bytes(content)
    assert read_everything(whole) == intact


def test_a_part_deleted_by_hand_is_named(whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "cache")
    (part, *_) = Cache.open(folder).parts
    for path in (folder / "parts" / f"{part}.zarr", folder / "commits" / f"{part}.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    outcome = run_vpd("verify", folder)
    assert outcome.code == 1
    assert f"the commit record of {part} is missing" in outcome.out
    trained = run_vpd("train", folder, "--out", tmp_path / "run")
    assert trained.code == 1
    assert part in trained.message


def test_the_bad_sequence_is_named_and_no_other(whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "cache")
    row = Cache.open(folder).rows[3]
    shard = folder / "parts" / f"{row.part}.zarr" / "hidden/c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[row.hidden_offset + row.hidden_length // 2] ^= 1
    shard.write_bytes(content)
    outcome = run_vpd("verify", folder, "--json")
    assert outcome.code == 1
    (problem,) = outcome.result["problems"]
    assert (problem["part"], problem["sequences"]) == (row.part, [row.seq_id])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"token_ids": [3] * 9 + [50]}, "outside the vocabulary of 50"),
        ({"target_argmax": [3] * 9 + [50]}, "outside the vocabulary of 50"),
        ({"target_argmax": [3] * 9 + [-2]}, "outside the vocabulary of 50"),
        ({"target_argmax": [3] * 4 + [NO_CHOICE] + [3] * 5}, "choice is missing"),
        ({"target_argmax": [3] * 9 + [NO_CHOICE]}, "choice is missing"),
        ({"target_argmax": [3] * 9 + [NO_CHOICE], "final_token_id": None}, None),
        ({"target_argmax": [NO_CHOICE] * 4 + [3] * 6}, None),
    ],
)
def test_token_ids_that_mean_nothing_are_reported(changes: dict[str, Any], what: str | None, tmp_path: Path):
    """The sequence has ten tokens. The last five are supervised, and so is the final token, which has no state."""
    fill_cache(tmp_path / "cache", [make_sequence("a", 10, 2, 8, **changes)])
    found = [problem.what for problem in verify(LocalStorage(tmp_path / "cache")).problems if problem.part is not None]
    assert len(found) == (what is not None)
    assert what is None or what in found[0]


def test_states_that_are_not_finite_are_reported(tmp_path: Path):
    sequences = [make_sequence(name, 70, 2, 8) for name in "abc"]
    sequences[1]["hidden_TKH"][66, 1, 3] = torch.nan
    (part,) = fill_cache(tmp_path / "cache", sequences)
    found = [problem for problem in verify(LocalStorage(tmp_path / "cache")).problems if problem.part is not None]
    assert [(problem.part, problem.sequences) for problem in found] == [(part, ("b",))]
    assert "not finite" in found[0].what
