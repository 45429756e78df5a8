"""Places that people have: read-only caches, names of other alphabets, moved caches, homes that can't be written to."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.place import Place
from support.tiny import DRAFTER, EXTRACT, TRAIN, run_vpd, snapshot, vpd
from vpd.data.cache.cache import Cache
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.storage.places import open_storage
from vpd.data.cache.target_files import user_cache
from vpd.data.errors import ConfigError
from vpd.stages.extract import target
from vpd.stages.train.checkpoints import find_drafter

RUN = {**DRAFTER, **TRAIN, "max_steps": 1}
read_only: list[Path] = []
"""Folders that nobody may write to."""


def refuse_changes(event: str, arguments: tuple[Any, ...]) -> None:
    """Acts as a read-only mount, for all that Python's own functions do."""
    if not read_only:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.utime", "os.chmod"}:
        for path in arguments[: 1 if writes else 2]:
            if isinstance(path, str | os.PathLike) and any(Path(path).is_relative_to(folder) for folder in read_only):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.fixture(scope="session")
def mounts() -> None:
    sys.addaudithook(refuse_changes)  # which stays for good; it does nothing without a folder


@pytest.fixture
def frozen(mounts: None, drafted_cache: Path, tmp_path: Path) -> Iterator[Path]:
    """A cache with first drafts that can't be written to."""
    folder = shutil.copytree(drafted_cache, tmp_path / "frozen")
    read_only.append(folder)
    yield folder
    read_only.clear()


def test_the_emulation_refuses_writes_and_nothing_else(frozen: Path, tmp_path: Path):
    assert (frozen / "dataset.json").read_bytes()
    changes: list[Callable[[], object]] = [
        lambda: (frozen / "x").write_text(""),
        lambda: (frozen / "x").mkdir(),
        lambda: (frozen / "dataset.json").unlink(),
        lambda: (frozen / "dataset.json").rename(tmp_path / "x"),
        lambda: (tmp_path / "y").rename(frozen / "x"),
    ]
    (tmp_path / "y").touch()
    for change in changes:
        with pytest.raises(OSError, match="Read-only"):
            change()


READERS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "inspect": lambda cache, first, out: ["inspect", cache],
    "verify": lambda cache, first, out: ["verify", cache],
    "eval": lambda cache, first, out: ["eval", cache, "--first-drafter", first, "--holdout", 1],
    "draft": lambda cache, first, out: ["draft", cache, "--first-drafter", first],
    "merge": lambda cache, first, out: ["merge", cache, "--out", out],
    "recode": lambda cache, first, out: ["recode", cache, out, "--codec", "fp8"],
}


@pytest.mark.parametrize("name", READERS)
def test_a_read_only_cache_is_read_as_any_other(
    name: str, frozen: Path, drafted_cache: Path, first_run: Path, tmp_path: Path
):
    found, expected = (
        vpd(*READERS[name](cache, first_run, tmp_path / out)) for cache, out in ((frozen, "a"), (drafted_cache, "b"))
    )
    for place in ("cache", "first_drafters"):
        found.pop(place, None)
        expected.pop(place, None)
    assert found == expected


def test_training_from_a_read_only_cache(frozen: Path, tmp_path: Path):
    vpd("train", frozen, "--out", tmp_path / "run", **RUN)


def test_a_read_only_cache_takes_first_drafts_through_a_folder_of_links(
    frozen: Path, first_run: Path, drafted_cache: Path, tmp_path: Path
):
    links = tmp_path / "links"
    links.mkdir()
    for path in frozen.iterdir():
        if path.name != "drafts":
            (links / path.name).symlink_to(path)
    before = snapshot(frozen)
    found = vpd("draft", links, "--first-drafter", first_run)
    assert found["accept_lengths"] == vpd("draft", drafted_cache, "--first-drafter", first_run)["accept_lengths"]
    vpd("train", links, "--out", tmp_path / "run", **RUN)
    assert vpd("verify", links)["problems"] == []
    assert snapshot(frozen) == before


@pytest.mark.parametrize("command", ["draft", "train", "extract"])
def test_writing_to_a_read_only_cache_is_one_paragraph(command: str, frozen: Path, place: Place, tmp_path: Path):
    read_only.clear()
    shutil.rmtree(frozen / "drafts")
    read_only.append(frozen)
    arguments: dict[str, list[object]] = {
        "draft": ["draft", frozen, "--first-drafter", place.first_run],
        "train": ["train", frozen, "--out", frozen / "run", "--objective", "dflash"],
        "extract": ["extract", place.llama, write_other_prompts(tmp_path), "--out", frozen],
    }
    flags = EXTRACT if command == "extract" else {"max_steps": 1} if command == "train" else {}
    found = run_vpd(*arguments[command], **flags)
    assert found.code == 1
    assert "Read-only file system" in found.message
    assert str(frozen) in found.message


def write_other_prompts(folder: Path) -> Path:
    path = folder / "others.jsonl"
    path.write_text('{"prompt": "one more"}\n')
    return path


def test_names_with_spaces_and_of_other_alphabets(
    tiny_llama: Path, tiny_prompts: Path, first_run: Path, tiny_cache: Path, tmp_path: Path
):
    root = tmp_path / "ä 缓存 100% #1? [x] 'q' {y}"
    target = shutil.copytree(tiny_llama, root / "ziel tärget")
    prompts = shutil.copy(tiny_prompts, root / "fragen #1.jsonl")
    vpd("extract", target, prompts, "--out", root / "cache %20", **EXTRACT)
    cache = f"file://{quote(str(root / 'cache %20'))}"
    assert len(Cache.open(cache)) == len(Cache.open(tiny_cache))
    first = shutil.copytree(first_run, root / "erster läufer")
    vpd("draft", cache, "--first-drafter", first)
    vpd("train", root / "cache %20", "--out", root / "run ?", "--init", first, "--first-drafter", first, **RUN)
    assert vpd("verify", cache)["problems"] == []
    vpd("eval", cache, "--first-drafter", first, "--drafter", root / "run ?", "--out", root / "r%.json", "--holdout", 1)
    moved = (root / "cache %20").rename(root / "moved")
    vpd("train", moved, "--out", root / "run ?", "--init", first, "--first-drafter", first, **RUN)
    assert sorted(path.name for path in root.iterdir()) == sorted(
        ["ziel tärget", "fragen #1.jsonl", "moved", "erster läufer", "run ?", "r%.json"]
    )


@pytest.mark.parametrize("place", ["file:///data/a#b", "file:///data/a?b", "s3://bucket/a#b", "s3://bucket/a?"])
def test_a_url_that_would_mean_another_place_is_refused(place: str):
    with pytest.raises(ConfigError, match="%23"):
        open_storage(place)


def test_a_drafter_that_does_not_load_leaves_nothing_in_the_cache(tiny_cache: Path, first_run: Path, tmp_path: Path):
    """Else the cache would have first drafts without parts, and training would not know which drafter to read."""
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    drafter = shutil.copytree(find_drafter(first_run), tmp_path / "drafter")
    weights = load_file(drafter / "model.safetensors")
    head = torch.zeros(320, weights["norm.weight"].shape[0])
    save_file({**weights, "lm_head.weight": head}, drafter / "model.safetensors")
    before = snapshot(cache)
    found = run_vpd("draft", cache, "--first-drafter", drafter)
    assert (found.code, "lm_head.weight: expected a copy" in found.message) == (1, True)
    assert snapshot(cache) == before


def test_files_of_other_programs_are_left_alone(drafted_cache: Path, tmp_path: Path):
    cache = shutil.copytree(drafted_cache, tmp_path / "cache")
    for name in ("notes.txt", "parts/Thumbs.db", "index/Thumbs.db", "work/x.txt", "drafts/README", "target/.nfs01"):
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_text("x")
    before = snapshot(cache)
    assert vpd("verify", cache)["problems"] == []
    assert len(vpd("inspect", cache)["first_drafters"]) == 1
    assert snapshot(cache) == before


def test_facts_of_another_target_are_not_read(tiny_cache: Path, tmp_path: Path):
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    (cache / "target/pieces.json").write_text('{"embedding_multiplier": 2.0}')
    for found in (run_vpd("train", cache, out=tmp_path / "run", **RUN), run_vpd("inspect", cache)):
        assert (found.code, "pieces.json is not what was written" in found.message) == (1, True)


def test_a_file_in_place_of_a_folder_is_a_problem(tiny_cache: Path, tmp_path: Path):
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    shutil.rmtree(cache / "parts")
    (cache / "parts").write_text("x")
    found = run_vpd("verify", cache, "--json")
    assert (found.code, bool(found.result["problems"])) == (1, True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("No space left")])
def test_a_disk_without_room_for_the_pieces_is_named(
    error: Exception, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(target, "save_file", refuse)
    found = run_vpd("extract", place.llama, place.prompts, out=tmp_path / "new", **EXTRACT)
    assert (found.code, "No space left" in found.message, "room" in found.message) == (1, True, True)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_file_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    for write in (LocalStorage(tmp_path).write, LocalStorage(tmp_path).create):
        with pytest.raises(OSError, match="No space"):
            write("record.json", b"content")
    assert not list(tmp_path.iterdir())


def test_a_user_without_an_account_has_a_place_for_copies(monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache().parent.is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/place")
    assert user_cache() == Path("/some/place")
