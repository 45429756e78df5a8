"""Extraction against bare vLLM: the same prompts and engine arguments, both engines started before the clock.

Answers have set lengths, so that both sides generate the same tokens, and differ in them, so that requests end one by
one while others wait for their place, as they do in long runs. What lies between the two sides is taken apart: the
engine with states cached but not sent, with states sent, the whole of `vpd extract`, and first drafts alone.

Both engines compute on every core. Left to itself, vLLM keeps a core free for its scheduler, and another one beside a
KV connector; of two cores that leaves none, so it gives the engine with a connector both, and the bare one but one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from report import Figure, interleave, median_ratio

NAME, DATA = "extract", "SmolLM2-135M"
ROUNDS = 3
FEWEST_TOKENS, LENGTHS, LENGTH_STEP = 24, 7, 8
"""Answers have 24, 32, ... 72 tokens."""
ASKED_AGAIN = " Answer in a few words."
SECONDS_OF_REST = 1.5
"""Between turns: for a second after its work vLLM's processes spin, waiting for more."""
LAYERS, BLOCK_SIZE, STRIDE = [1, 14, 27], 8, 4
MAX_LEN, PART_MIB = 512, 16
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 30,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 1024,
}
BARE, ALONE = "bare", "first drafts at every 4th anchor, alone"
PARTS = {
    "generate": "states cached, none sent",
    "capture": "states sent",
    "extract": "vpd extract",
    "draft": "vpd extract with a first drafter at every 4th anchor",
}
TARGETS = {"extract": 1.0, "draft": 1.25}


def bench_extract(folder: Path) -> list[Figure]:
    """Wall time over that of bare generation, medians over rounds in which all take turns."""
    from vpd.pipeline.demo import make_target

    target, prompts = folder / "target", folder / "prompts.jsonl"
    make_target(target)
    num_prompts = write_prompts(prompts)
    with serving(serve_bare, target, prompts) as bare, serving(serve_ours, target, prompts) as ours:
        runs = {BARE: partial(bare, BARE)} | {name: partial(ours, name) for name in [*PARTS, ALONE]}
        seconds = interleave(runs, ROUNDS)
        num_anchors = ours("anchors")
    num_tokens = sum(map(answer_tokens, range(num_prompts)))

    def figure(name: str, value: float, unit: str = "x", target_value: float | None = None) -> Figure:
        is_ratio = unit == "x"
        return Figure(
            benchmark=NAME, name=name, data=DATA, value=value, unit=unit, target=target_value, less_is_better=is_ratio
        )

    found = [figure("bare vLLM", num_tokens / median(seconds[BARE]), "tokens/s")]
    for name, words in PARTS.items():
        ratio = median_ratio(seconds[name], seconds[BARE])
        found.append(figure(f"{words} / bare", ratio, target_value=TARGETS.get(name)))
    found.append(figure(ALONE, num_anchors / median(seconds[ALONE]), "anchors/s"))
    found.append(figure(f"{ALONE} / bare", median_ratio(seconds[ALONE], seconds[BARE])))
    return found


def write_prompts(file: Path) -> int:
    """The demo's prompts of one turn, in two forms: those of several would be several requests, one after another."""
    from vpd.pipeline.demo import PROMPTS

    records = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    asked = [record["messages"][0]["content"] for record in records if len(record["messages"]) == 1]
    asked += [text + ASKED_AGAIN for text in asked]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    return len(asked)


def answer_tokens(index: int) -> int:
    """Tokens of the answer to a prompt, by its place in the file."""
    return FEWEST_TOKENS + LENGTH_STEP * (index % LENGTHS)


@contextmanager
def serving(serve: Callable[..., None], *arguments: Any) -> Iterator[Callable[[str], float]]:
    """A process with an engine, which runs what it is asked for and answers with the seconds that it took."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, *arguments))
    process.start()
    there.close()
    assert here.recv() == "ready"

    def run(what: str) -> float:
        time.sleep(SECONDS_OF_REST)
        here.send(what)
        return float(here.recv())

    try:
        yield run
    finally:
        here.send(None)
        process.join(30)
        process.kill()


def set_environment() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))


def serve_bare(pipe: Connection, target_folder: Path, prompts_file: Path) -> None:
    set_environment()
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        str(target_folder), dtype="float32", max_model_len=MAX_LEN + 1, enable_prefix_caching=False, **ENGINE_ARGS
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in prompt_ids(target_folder, prompts_file)]
    params = [
        SamplingParams(temperature=0, max_tokens=answer_tokens(i), ignore_eos=True, detokenize=False)
        for i in range(len(prompts))
    ]
    try:
        engine.generate(prompts, params, use_tqdm=False)
        pipe.send("ready")
        while pipe.recv() is not None:
            started = time.perf_counter()
            engine.generate(prompts, params, use_tqdm=False)
            pipe.send(time.perf_counter() - started)
    finally:
        engine.llm_engine.engine_core.shutdown()


def serve_ours(pipe: Connection, target_folder: Path, prompts_file: Path) -> None:
    set_environment()
    extraction = Extraction(target_folder, prompts_file)
    try:
        extraction.run_requests(capture=True)
        extraction.run(with_drafts=True)
        pipe.send("ready")
        while (what := pipe.recv()) is not None:
            pipe.send(extraction.measure(what))
    finally:
        extraction.engine.close()


def prompt_ids(target_folder: Path, prompts_file: Path) -> list[list[int]]:
    from support.prompts import read_prompts
    from vpd.stages.extract.inputs import make_chat
    from vpd.stages.extract.target import load_target

    config = make_config()
    chat = make_chat(load_target(str(target_folder)), config)
    return [chat.prompt_ids(record.messages) for record in read_prompts([prompts_file], keep_duplicates=False).records]


def make_config() -> Any:
    from vpd.stages.extract.config import ExtractConfig

    return ExtractConfig(
        dtype="float32",
        layer_ids=LAYERS,
        max_len=MAX_LEN,
        max_new_tokens=answer_tokens(LENGTHS - 1),
        part_mib=PART_MIB,
        audit=0,
        engine_args=ENGINE_ARGS,
    )


def draft_config() -> Any:
    """In bfloat16 where the processor computes with it; elsewhere that takes ten times as long as float32."""
    import torch
    from vpd.stages.draft.config import DraftConfig

    has_bfloat16 = torch.cpu.get_capabilities()["avx512_bf16"]
    return DraftConfig(stride=STRIDE, dtype="bfloat16" if has_bfloat16 else "float32")


class Extraction:
    """`vpd extract` with an engine and a first drafter that stay, and answers that never end by themselves."""

    def __init__(self, target_folder: Path, prompts_file: Path):
        from vpd.stages.extract.engines import make_engine
        from vpd.stages.extract.target import load_target

        self.target, self.prompts_file, self.config = load_target(str(target_folder)), prompts_file, make_config()
        self.engine: Any = make_engine(self.target, tuple(LAYERS), self.config)
        self.engine._eos_token_ids = set()
        self.prompts = prompt_ids(target_folder, prompts_file)
        self.drafting: Any = None
        self.num_caches = 0
        self.last_cache = ""

    def measure(self, what: str) -> float:
        """Seconds; or the number of anchors that the last run drafted at."""
        if what == "anchors":
            return self.num_anchors()
        if what == ALONE:
            return self.draft_alone()
        if what in ("generate", "capture"):
            return self.run_requests(capture=what == "capture")
        return self.run(with_drafts=what == "draft")

    def run_requests(self, capture: bool) -> float:
        from vpd.stages.extract.engine import EngineRequest

        started = time.perf_counter()
        for i, ids in enumerate(self.prompts):
            request = EngineRequest(key=str(i), prompt_ids=ids, max_new_tokens=answer_tokens(i), capture=capture)
            self.engine.submit(request)
        num_done = 0
        while num_done < len(self.prompts):
            num_done += len(self.engine.poll())
        return time.perf_counter() - started

    def run(self, with_drafts: bool) -> float:
        """The whole way into a new cache, first drafts included; the clock starts where a first request could."""
        from vpd.data.cache.cache import Cache
        from vpd.pipeline.extraction import ExtractJob, can_draft_beside, drafting_beside, prepare
        from vpd.stages.extract.manifest import open_cache
        from vpd.stages.extract.run import extract

        self.num_caches += 1
        self.last_cache = out = str(self.prompts_file.parent / f"cache-{self.num_caches}")
        prepared = prepare(ExtractJob(str(self.target.folder), (str(self.prompts_file),), out, self.config))
        cache = open_cache(out, prepared.manifest, prepared.target)
        self.drafting = self.drafting or self.make_drafting(cache)
        factory = partial(Kept, self.engine)
        started = time.perf_counter()
        is_beside = with_drafts and can_draft_beside(is_engine_elsewhere=False)
        with drafting_beside(out, self.drafting, lambda: False) if is_beside else nullcontext():
            extract(factory, cache, prepared.plan, self.config)
        if with_drafts:
            self.drafting.run(Cache.open(out))
        return time.perf_counter() - started

    def draft_alone(self) -> float:
        """Drafts the last run's cache once more."""
        import shutil

        from vpd.data.cache.cache import Cache

        shutil.rmtree(Path(self.last_cache) / "drafts", ignore_errors=True)
        cache = Cache.open(self.last_cache)
        started = time.perf_counter()
        self.drafting.run(cache)
        return time.perf_counter() - started

    def num_anchors(self) -> int:
        from vpd.data.cache.arrays import NOT_DRAFTED
        from vpd.data.cache.cache import Cache
        from vpd.stages.draft.first_draft import open_first_drafts

        cache = Cache.open(self.last_cache)
        drafts = open_first_drafts(cache, self.drafter(cache), draft_config())
        return sum(int((drafts.accept_lengths(row) != NOT_DRAFTED).sum()) for row in cache.rows)

    def make_drafting(self, cache: Any) -> Any:
        from vpd.stages.draft.first_draft import FirstDrafting

        return FirstDrafting(self.drafter(cache), draft_config())

    def drafter(self, cache: Any) -> Path:
        """A first drafter with random weights."""
        import torch
        from vpd.stages.drafter.checkpoint import save_drafter
        from vpd.stages.drafter.model import Drafter
        from vpd.stages.train.config import DrafterSection
        from vpd.stages.train.plan import plan_shape

        folder = self.prompts_file.parent / "first"
        if not folder.exists():
            shape = plan_shape(cache, DrafterSection(num_layers=3, block_size=BLOCK_SIZE, mask_token_id=3))
            drafter = Drafter(shape)
            drafter.init_weights(torch.Generator().manual_seed(0))
            config = shape.to_json(training_mode="dflash", prefix_weight_base=None)
            save_drafter(drafter.state_dict(), folder, config)
        return folder


class Kept:
    """An engine that outlives an extraction, and gives its answers their set lengths."""

    def __init__(self, engine: Any):
        self.engine, self.facts, self.poll = engine, engine.facts, engine.poll
        self.num_submitted = 0

    @property
    def num_in_flight(self) -> int:
        return self.engine.num_in_flight

    def submit(self, request: Any) -> None:
        self.engine.submit(replace(request, max_new_tokens=answer_tokens(self.num_submitted)))
        self.num_submitted += 1

    def close(self) -> None:
        pass
