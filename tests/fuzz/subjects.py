"""What is damaged, and the commands that meet the damage.

Each subject starts from files that are right. The subject damages one of them, runs commands on the result, and says
what came of it. Damage that leaves the files right is no fault.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz.mutations import dump_json, mutate_bytes, mutate_text, mutate_value
from fuzz.records import RECORDS
from support.tiny import DRAFTER, EXTRACT, TRAIN, Outcome, as_flags, run_vpd, write_jsonl
from vpd.data.cache.cache import Cache
from vpd.data.errors import VpdError
from vpd.pipeline.config import VpdConfig

SECONDS = 60
"""A command that takes longer hangs: each takes less than a second on files that are right."""
RIGHT, REFUSED = "right", "refused"


class Fault(AssertionError):
    """What must not happen: a traceback, a hang, a wrong result."""


@dataclass(frozen=True, slots=True)
class Start:
    """The files that are right, which every subject copies before it damages them."""

    target: Path
    cache: Path
    """`target` over a few prompts, with the first drafts of `drafter`."""
    drafter: Path


@dataclass(frozen=True, slots=True)
class Case:
    """One damage of a subject."""

    random: Random
    folder: Path
    """An empty folder."""
    start: Start
    notes: list[str] = field(default_factory=list)
    """What was damaged."""


Subject = Callable[[Case], str]
"""Damages something and runs commands; returns `RIGHT` or `REFUSED`, or raises `Fault`."""


def run(*arguments: object) -> Outcome:
    """A command in this process, which must end in a result or in one paragraph of an error."""
    try:
        with limited():
            found = run_vpd(*arguments)
    except Exception as error:
        raise Fault(f"{' '.join(map(str, arguments))}: {type(error).__name__}: {error}") from error
    if "Traceback" in found.err:
        raise Fault(found.err)
    if found.code not in (0, 1, 2):
        raise Fault(f"exit code {found.code}: {found.err}")
    return found


@contextmanager
def limited() -> Iterator[None]:
    """
    Raises:
        Fault: the block takes longer than `SECONDS`.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Fault(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(found: Outcome) -> bool:
    """Whether a command has failed with one paragraph."""
    if found.code == 0:
        return False
    message = found.err.rpartition("vpd: error: ")[2].strip() if "vpd: error: " in found.err else ""
    if not message and "Error: " not in found.err:
        raise Fault(f"exit code {found.code} without an error: {found.err}")
    if "\n\n" in message:
        raise Fault(f"more than one paragraph: {message}")
    return True


def extract_and_verify(case: Case, target: Path, prompts: Path, **flags: Any) -> str:
    """Extracts; what was written must be sound, and each record must be written or counted."""
    out = case.folder / "out"
    arguments = as_flags({**EXTRACT, "max_new_tokens": 4, **flags})
    found = run("extract", target, prompts, "--out", out, "--json", *arguments)
    if refused(found):
        return REFUSED
    counted = found.result["num_sequences"] + sum(found.result["skipped"].values())
    if "skip_bad" in flags and case.notes[0].startswith("line") and counted != len(RECORDS):
        raise Fault(f"{counted} records of {len(RECORDS)} are written or counted: {found.result}")
    check_sound(out)
    return RIGHT


def check_sound(cache: Path) -> None:
    found = run("verify", cache)
    if found.code:
        raise Fault(f"the cache that was just written is damaged: {found.out}{found.err}")


def records(case: Case) -> str:
    """Damaged records, and the files of every format that hold them."""
    lines = [dump_json(record) for record in RECORDS]
    if case.random.random() < 0.7:
        i = case.random.randrange(len(lines))
        lines[i] = dump_json(mutate_value(case.random, RECORDS[i]))
        case.notes.append(f"line {i + 1}: {lines[i][:2000]!r}")
        path = case.folder / "records.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path, content = _write_file(case, lines)
        path.write_bytes(mutate_bytes(case.random, content))
        case.notes.append(f"bytes of {path.name}")
    flags: dict[str, Any] = {"mode": case.random.choice(("given", "generate"))}
    if case.random.random() < 0.7:
        flags["skip_bad"] = True
    return extract_and_verify(case, case.start.target, path, **flags)


def _write_file(case: Case, lines: list[bytes]) -> tuple[Path, bytes]:
    text = b"\n".join(lines)
    compress: dict[str, Callable[[bytes], bytes]] = {
        "records.jsonl": bytes,
        "records.json": lambda text: b"[" + text.replace(b"\n", b",") + b"]",
        "records.jsonl.gz": gzip.compress,
        "records.jsonl.bz2": bz2.compress,
        "records.jsonl.xz": lzma.compress,
        "records.jsonl.zst": lambda text: pa.compress(text, "zstd", asbytes=True),
    }
    name = case.random.choice([*compress, "records.parquet"])
    path = case.folder / name
    if name != "records.parquet":
        return path, compress[name](text)
    simple = [{"messages": json.dumps(each["messages"])} for each in RECORDS if "messages" in each]
    pq.write_table(pa.Table.from_pylist(simple), path)
    return path, path.read_bytes()


def template(case: Case) -> str:
    """A damaged chat template."""
    text = (case.start.target / "chat_template.jinja").read_text()
    for _ in range(case.random.randrange(1, 4)):
        text = mutate_text(case.random, text)
    case.notes.append(f"template: {text}")
    path = case.folder / "template.jinja"
    path.write_text(text)
    prompts = write_jsonl(case.folder / "prompts.jsonl", RECORDS)
    flags: dict[str, Any] = {"mode": case.random.choice(("given", "generate")), "chat_template": path}
    if case.random.random() < 0.5:
        flags["skip_bad"] = True
    return extract_and_verify(case, case.start.target, prompts, **flags)


def target(case: Case) -> str:
    """A target's damaged file: config, tokenizer, weights."""
    folder = shutil.copytree(case.start.target, case.folder / "target")
    _damage_a_file(case, folder)
    prompts = write_jsonl(case.folder / "prompts.jsonl", [{"prompt": "why?", "response": "the fox."}])
    return extract_and_verify(case, folder, prompts, mode=case.random.choice(("given", "generate")))


def drafter(case: Case) -> str:
    """A first drafter's damaged file."""
    folder = shutil.copytree(case.start.drafter, case.folder / "drafter")
    _damage_a_file(case, folder)
    cache = shutil.copytree(case.start.cache, case.folder / "cache")
    if refused(run("draft", cache, "--first-drafter", folder)):
        check_sound(cache)
        return REFUSED
    check_sound(cache)
    return RIGHT


def cache(case: Case) -> str:
    """A cache's damaged file: `verify` finds the damage, or everything reads as before."""
    folder = shutil.copytree(case.start.cache, case.folder / "cache")
    _damage_a_file(case, folder)
    found = run("verify", folder)
    for command in (["inspect", folder], _train(case, folder)):
        refused(run(*command))
    if found.code:
        return REFUSED
    if _content(folder) != _content(case.start.cache):
        raise Fault("verify calls a cache sound that reads otherwise")
    return RIGHT


def settings(case: Case) -> str:
    """A recipe with damaged settings."""
    values = VpdConfig().model_dump(mode="json")
    damaged = mutate_value(case.random, values)
    path = case.folder / "recipe.yaml"
    path.write_bytes(dump_json(damaged))
    case.notes.append(f"recipe: {path.read_bytes()!r:.6000}")
    found = run(*_train(case, case.start.cache, "--config", path))
    return REFUSED if refused(found) else RIGHT


SUBJECTS: dict[str, Subject] = {
    "records": records,
    "template": template,
    "target": target,
    "drafter": drafter,
    "cache": cache,
    "settings": settings,
}


def _damage_a_file(case: Case, folder: Path) -> None:
    path = case.random.choice(sorted(each for each in folder.rglob("*") if each.is_file() and not each.is_symlink()))
    name = str(path.relative_to(folder))
    content = path.read_bytes()
    is_json = path.suffix == ".json" and case.random.random() < 0.7
    if case.random.random() < 0.05:
        path.unlink()
        case.notes.append(f"{name} removed")
    elif is_json:
        path.write_bytes(dump_json(mutate_value(case.random, json.loads(content))))
        case.notes.append(f"{name}: {path.read_bytes()[:3000]!r}")
    else:
        path.write_bytes(mutate_bytes(case.random, content))
        case.notes.append(f"{name}: bytes")


def _train(case: Case, cache: Path, *more: object) -> list[object]:
    flags = as_flags({**DRAFTER, **TRAIN, "max_steps": 1, "objective": "dflash"})
    return ["train", cache, "--out", case.folder / "run", *flags, *more]


def _content(folder: Path) -> dict[str, list[bytes]]:
    """All that a reader gets of a cache's sequences; a sequence that can't be read is an error of vpd."""
    found: dict[str, list[bytes]] = {}
    try:
        cache = Cache.open(folder, allow_empty=True)
        for row in cache.rows:
            sequence = cache.read(row)
            arrays = (sequence.token_ids_S, sequence.loss_mask_S, sequence.target_argmax_T, sequence.hidden_TKH)
            found[row.seq_id] = [each.contiguous().view(torch.uint8).numpy().tobytes() for each in arrays]
    except VpdError as error:
        raise Fault(f"verify calls a cache sound that can't be read: {error}") from error
    return found
