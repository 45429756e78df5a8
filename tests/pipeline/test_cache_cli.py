"""The commands that look after caches: what they say when all is well, and when something is wrong."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.tiny import EXTRACT, PROMPTS, as_flags, run_vpd, snapshot, vpd, write_jsonl
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts

TRANSFERRED = {
    *("cache", "num_sequences", "num_tokens", "num_bytes", "num_copied", "num_present", "num_same_content"),
    *("num_drafts_parts", "num_drafts_missing"),
}


class Place(NamedTuple):
    """What a case may use; `cache` is a copy of its own, with first drafts."""

    folder: Path
    llama: Path
    prompts: Path
    cache: Path

    def write(self, *lines: str) -> Path:
        path = self.folder / "some.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def copy(self, **changes: Any) -> Path:
        """Another cache, with another manifest."""
        folder = shutil.copytree(self.cache, self.folder / "other")
        cache = Cache.open(folder)
        cache.manifest.model_copy(update=changes).write(cache.storage)
        return folder

    def damage(self, pattern: str, name: str = "other") -> Path:
        """A copy of the cache with one bit flipped in the middle of a file."""
        folder = shutil.copytree(self.cache, self.folder / name)
        (path,) = folder.glob(pattern)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return folder

    def recode(self, cache: object, out: object, codec: str = "fp8") -> list[object]:
        return ["recode", cache, out, "--codec", codec]

    def estimate(self, prompts: Path, *more: object, target: object = None, **changes: Any) -> list[object]:
        target = self.llama if target is None else target
        return ["estimate", target, prompts, *more, *as_flags({**EXTRACT, **changes})]


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path, tiny_prompts: Path, drafted_cache: Path) -> Place:
    return Place(tmp_path, tiny_llama, tiny_prompts, shutil.copytree(drafted_cache, tmp_path / "cache"))


# All is well


def test_recode_says_what_it_copied(place: Place):
    found = vpd(*place.recode(place.cache, place.folder / "new", "round4"))
    cache, recoded = Cache.open(place.cache), Cache.open(place.folder / "new")
    assert found.keys() == TRANSFERRED | {"codec", "num_bytes_before", "cosine_mean", "cosine_worst"}
    assert (found["codec"], recoded.manifest.codec) == ("round4", "round4")
    assert found["num_sequences"] == found["num_copied"] == len(recoded) == len(PROMPTS)
    assert (found["num_tokens"], found["num_bytes"]) == (cache.num_tokens, recoded.num_bytes)
    assert found["num_bytes_before"] == cache.num_bytes > recoded.num_bytes
    assert 0.99 < found["cosine_worst"] < found["cosine_mean"] < 1
    assert (found["num_drafts_parts"], found["num_drafts_missing"]) == (1, 0)
    assert FirstDrafts.open(recoded).missing_parts() == []
    again = run_vpd(*place.recode(place.cache, place.folder / "new", "round4"))
    assert again.code == 0
    assert f"{len(PROMPTS)} sequences, 0 of them copied now, {cache.num_tokens} tokens as round4" in again.out
    assert f"mean {found['cosine_mean']:.5f}, " in again.out
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in again.err


def test_merge_says_what_it_copied(place: Place, tiny_cache: Path):
    half = write_jsonl(place.folder / "half.jsonl", [*PROMPTS[:3], {"prompt": "one more fox"}])
    vpd("extract", place.llama, half, "--out", place.folder / "half", **EXTRACT)
    outcome = run_vpd("merge", place.cache, tiny_cache, place.folder / "half", "--out", place.folder / "new", "--json")
    merged = Cache.open(place.folder / "new")
    assert outcome.result.keys() == TRANSFERRED
    expected = {"num_copied": len(PROMPTS) + 1, "num_present": len(PROMPTS) + 3, "num_same_content": 0}
    assert outcome.result.items() >= expected.items()
    assert (outcome.result["num_drafts_parts"], outcome.result["num_drafts_missing"]) == (1, 1)
    assert outcome.result["num_sequences"] == len(merged) == len(PROMPTS) + 1
    total = 2 * len(PROMPTS) + 4
    assert f"{total}/{total}" in outcome.err
    again = run_vpd("merge", place.cache, "--out", place.folder / "new")
    assert f"{len(PROMPTS) + 1} sequences, 0 of them copied now" in again.out
    assert "1 missing: complete them with vpd draft" in again.out
    assert vpd("extract", place.llama, half, "--out", place.folder / "new", **EXTRACT)["num_present"] == 4


# Something is wrong


class Wrong(NamedTuple):
    id: str
    arguments: Callable[[Place], list[object]]
    words: list[str]
    code: int = 1
    begun: bool = False
    """Whether the new cache keeps what was whole."""


WRONG = [
    # Caches
    Wrong("inspect-nothing", lambda place: ["inspect", place.folder / "no"], ["expected a cache at", "vpd extract"]),
    Wrong("inspect-a-file", lambda place: ["inspect", place.prompts], ["prompts.jsonl", "no dataset.json"]),
    Wrong(
        "inspect-an-empty-cache",
        lambda place: ["inspect", Cache.create_or_open(place.folder / "new", Cache.open(place.cache).manifest).place],
        ["expected committed sequences in", "found none", "vpd extract"],
    ),
    Wrong("inspect-another-scheme", lambda place: ["inspect", "ftp://a/b"], ["s3://", "found ftp://a/b"], code=2),
    Wrong("inspect-no-bucket", lambda place: ["inspect", "s3://"], ["s3://", "can't be opened"]),
    Wrong(
        "inspect-a-damaged-index",
        lambda place: ["inspect", place.damage("commits/*.json")],
        ["commits/part-", "checksum does not hold", "vpd verify --repair"],
    ),
    Wrong(
        "inspect-a-damaged-tokenizer",
        lambda place: ["inspect", place.damage("target/tokenizer.json")],
        ["target/tokenizer.json is not what was written", "vpd extract"],
    ),
    # Recoding
    Wrong("recode-nothing", lambda place: place.recode(place.folder / "no", "new"), ["expected a cache at", "no,"]),
    Wrong("recode-to-another-scheme", lambda place: place.recode(place.cache, "ftp://a"), ["found ftp://a"], code=2),
    Wrong(
        "recode-onto-itself",
        lambda place: place.recode(place.cache, place.folder / "x" / ".." / "cache", "raw"),
        ["expected each cache once", "another place at --out", "cache twice"],
        code=2,
    ),
    Wrong(
        "recode-onto-a-file",
        lambda place: place.recode(place.cache, place.write("text")),
        ["expected a folder", "some.txt, found a file", "--out"],
        code=2,
    ),
    Wrong(
        "recode-onto-another-codec",
        lambda place: place.recode(place.cache, place.copy(codec="int4")),
        ["codec: the cache has int4, this run has fp8", "nothing was added", "another output folder"],
    ),
    Wrong(
        "recode-damaged-states",
        lambda place: place.recode(place.damage("parts/*/hidden/c/0/0/0"), place.folder / "new"),
        ["checksum of rows", "does not hold", "vpd verify --repair"],
        begun=True,
    ),
    # Merging
    Wrong(
        "merge-nothing",
        lambda place: ["merge", place.cache, place.folder / "no", "--out", "new"],
        ["a cache at", "no,"],
    ),
    Wrong(
        "merge-with-itself",
        lambda place: ["merge", place.cache, f"{place.cache}/", "--out", place.folder / "new"],
        ["expected each cache once", "cache/ twice"],
        code=2,
    ),
    Wrong(
        "merge-into-itself",
        lambda place: ["merge", place.cache, "--out", f"file://{place.cache}"],
        ["another place at --out", "twice"],
        code=2,
    ),
    Wrong(
        "merge-two-of-one-bucket",
        lambda place: ["merge", "s3://bucket/a", "s3://bucket/a/", "--out", place.folder / "new"],
        ["found s3://bucket/a/ twice"],
        code=2,
    ),
    Wrong(
        "merge-other-origins",
        lambda place: ["merge", place.cache, place.copy(target_fingerprint="ffff"), "--out", place.folder / "new"],
        ["expected caches of one origin", "/cache and ", "/other differ in target_fingerprint: ", "and ffff"],
    ),
    Wrong(
        "merge-other-codecs",
        lambda place: ["merge", place.cache, place.copy(codec="lossless"), "--out", place.folder / "new"],
        ["codec: raw and lossless", "vpd recode"],
    ),
    Wrong(
        "merge-a-damaged-part",
        lambda place: ["merge", place.damage("parts/*/token_ids/c/0"), "--out", place.folder / "new"],
        ["token_ids", "vpd verify --repair"],
        begun=True,
    ),
    # Estimates
    Wrong(
        "estimate-without-prompts",
        lambda place: place.estimate(place.folder / "nowhere.jsonl"),
        ["nowhere.jsonl does not exist", "check the path"],
    ),
    Wrong(
        "estimate-a-bad-record",
        lambda place: place.estimate(place.write('{"prompt": "why?"}', "{broken")),
        ["some.txt:2:", "not JSON", "expected one JSON object per line"],
    ),
    Wrong(
        "estimate-without-answers",
        lambda place: place.estimate(place.write('{"prompt": "why?"}'), mode="given"),
        ["some.txt, row 1:", "nothing to supervise", "assistant message"],
    ),
    Wrong(
        "estimate-without-a-target",
        lambda place: place.estimate(place.prompts, target=place.folder),
        ["expected a model in", "no config.json"],
    ),
    Wrong(
        "estimate-where-a-file-is",
        lambda place: place.estimate(place.prompts, "--out", place.write("text")),
        ["some.txt, found a file", "--out"],
        code=2,
    ),
    Wrong(
        "estimate-into-another-cache",
        lambda place: place.estimate(place.prompts, "--out", place.cache, num_draft_layers=1),
        ["layer_ids", "was made with other settings"],
    ),
    Wrong(
        "estimate-a-negative-pilot",
        lambda place: place.estimate(place.prompts, pilot=-1),
        ["estimate.pilot", "greater than or equal to 0", "found -1"],
        code=2,
    ),
    Wrong(
        "estimate-no-sample",
        lambda place: place.estimate(place.prompts, sample=0),
        ["estimate.sample", "greater than or equal to 1", "found 0"],
        code=2,
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_errors_say_what_to_do(case: Wrong, place: Place):
    arguments = case.arguments(place)
    before = snapshot(place.folder)
    outcome = run_vpd(*arguments)
    assert outcome.code == case.code, outcome.err
    assert outcome.out == ""
    for word in case.words:
        assert word in outcome.message
    added = snapshot(place.folder).items() - before.items()
    assert snapshot(place.folder).items() >= before.items()
    assert bool(added) == case.begun
    assert all(name.startswith("new/") for name, _ in added)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recode", "cache", "new", "--codec", "zip"], ["--codec", "'zip'", "'raw', 'lossless'", "'int4'"]),
        (["recode", "cache", "new"], ["Missing option '--codec'", "lossless"]),
        (["recode", "cache", "--codec", "fp8"], ["Missing argument 'OUT'"]),
        (["recode", "cache", "new", "--codec", "fp8", "--part-mib", "0"], ["--part-mib", "x>=1"]),
        (["merge", "--out", "new"], ["Missing argument 'CACHES...'"]),
        (["merge", "cache"], ["Missing option '--out'"]),
        (["inspect"], ["Missing argument 'CACHE'"]),
        (["estimate", "target"], ["Missing argument 'PROMPTS...'"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_usage_is_explained(arguments: list[str], words: list[str]):
    outcome = run_vpd(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage: " in outcome.err
    for word in words:
        assert word in outcome.err


def test_a_place_that_the_machine_refuses_is_no_traceback(place: Place, monkeypatch: pytest.MonkeyPatch):
    def refuse(code: int) -> None:
        def write(path: Path, content: bytes) -> None:
            raise OSError(code, "what the system says", str(path))

        monkeypatch.setattr("vpd.data.cache.storage.local.write_bytes_durably", write)

    arguments = ["merge", place.cache, "--out", place.folder / "new"]
    for code in (errno.EROFS, errno.EACCES, errno.ENOSPC):
        refuse(code)
        outcome = run_vpd(*arguments)
        assert outcome.code == 1
        assert f"{place.folder}/new/dataset.json: what the system says. " in outcome.message
        with pytest.raises(OSError, match="what the system says"):
            run_vpd(*arguments, "--debug")
    refuse(errno.EBADF)
    with pytest.raises(OSError, match="what the system says"):
        run_vpd(*arguments)
