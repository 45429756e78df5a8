"""Planning: finding the rows of a large prompt file, and tokenizing the units that a worker claims."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

from report import Figure, interleave, median_ratio
from support.tiny import CHATML, make_tokenizer, save_target
from vpd.data.chat import ChatFormat
from vpd.data.encoding import TextEncoder
from vpd.data.prompts.records import PromptRecord, PromptSource
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.extract.left_out import LeftOut
from vpd.stages.extract.plan import TOKENIZED_AT_ONCE, start_conversations
from vpd.stages.extract.target import load_target

NAME = "plan"
DATA, MANY = "200,000 records", "1,000,000 records"
ROUNDS = 5
BLOCK_BYTES = 1 << 20
PEAK = """
import resource, sys, time
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.extract.inputs import plan_prompts
from vpd.stages.extract.plan import plan_extraction
started = time.perf_counter()
slices = plan_prompts([sys.argv[1]], ExtractConfig(mode="given")).slices()
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(slices))
"""
"""Prints the seconds, the process's greatest memory in MiB, and the number of units."""


def bench_plan(folder: Path) -> list[Figure]:
    """A bare read gives the lines of the file, one after the other. Ratios are medians of interleaved rounds."""
    file = write_records(folder / "some.jsonl", 200_000)
    runs = {"plan": partial(timed, plan, file), "lines": partial(timed, read_lines, file)}
    seconds = interleave({**runs, "blocks": partial(timed, read_blocks, file)}, ROUNDS)
    many = write_records(folder / "many.jsonl", 1_000_000)
    found = subprocess.run(
        [sys.executable, "-c", PEAK, many], check=True, capture_output=True, text=True
    ).stdout.split()
    of = partial(Figure, benchmark=NAME, less_is_better=True)
    return [
        of(name="planning", data=DATA, value=median(seconds["plan"]), unit="s"),
        of(
            name="planning / a bare read, line by line",
            data=DATA,
            value=median_ratio(seconds["plan"], seconds["lines"]),
            target=1.0,
        ),
        of(
            name="planning / a bare read, in blocks",
            data=DATA,
            value=median_ratio(seconds["plan"], seconds["blocks"]),
        ),
        of(name="planning", data=MANY, value=float(found[0]), unit="s"),
        of(name="memory of a process that plans", data=MANY, value=float(found[1]), unit="MiB", target=1024),
        *bench_tokenization(file, folder / "target"),
    ]


def bench_tokenization(file: Path, folder: Path) -> list[Figure]:
    """Units of 256 records, and the tokenizer's own call on the rendered texts of a unit."""
    save_target("llama", folder, tokenizer := make_tokenizer())
    target, config = load_target(str(folder), weights=False), ExtractConfig(mode="given", max_len=4096)
    chat, encoder = ChatFormat(tokenizer, eos_token_ids={0}, template=CHATML), TextEncoder(tokenizer)
    records = [each for each in PromptSource([file]).read(range(1024)) if isinstance(each, PromptRecord)]
    units = [records[start : start + 256] for start in range(0, len(records), 256)]
    texts = [[chat.render(record.messages, False) for record in unit] for unit in units]

    def prepare() -> None:
        for unit in units:
            for _ in start_conversations(unit, chat, target, config, LeftOut()):
                pass

    def tokenize() -> None:
        for unit in texts:
            for start in range(0, len(unit), TOKENIZED_AT_ONCE):
                chunk = unit[start : start + TOKENIZED_AT_ONCE]
                encoder.announce(chunk)
                for text in chunk:
                    encoder.encode(text)

    def call() -> None:
        for unit in texts:
            tokenizer(unit, add_special_tokens=False, return_offsets_mapping=True)

    runs = {"tokenize": tokenize, "prepare": prepare, "call": call}
    seconds = interleave({name: partial(timed, run) for name, run in runs.items()}, ROUNDS)
    of = partial(Figure, benchmark=NAME, data=DATA)
    ratio = partial(median_ratio, seconds["call"])
    return [
        of(name="tokenizing a unit / the tokenizer's batch call", value=ratio(seconds["tokenize"]), target=0.8),
        of(name="the same with rendering, checks and loss masks", value=ratio(seconds["prepare"])),
    ]


def plan(file: Path) -> None:
    PromptSource([file]).slices()


def read_lines(file: Path) -> None:
    with file.open("rb") as lines:
        for _ in lines:
            pass


def read_blocks(file: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    with file.open("rb", buffering=0) as content:
        while content.readinto(block):
            pass


def timed(run: object, *arguments: object) -> float:
    assert callable(run)
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def write_records(path: Path, number: int) -> Path:
    """Conversations of one turn; the answers have 40 to 400 words."""
    words, draw = [f"word{i}" for i in range(2000)], random.Random(0)
    answers = [" ".join(draw.choices(words, k=draw.randint(40, 400))) for _ in range(500)]
    with path.open("w") as file:
        for i in range(number):
            turns = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answers[i % 500]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path
