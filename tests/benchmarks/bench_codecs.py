"""Codecs: speed on one core of a CPU, and, on states of a real model, size and quality."""

# T tokens, K layers, H hidden width
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numcodecs.blosc
import numpy as np
import torch
from report import Figure
from support.prompts import read_prompts
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
from vpd.data.cache.array_spec import ArraySpec
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.codecs import CODECS, Codec, measure_channels, whitened_cosine
from vpd.data.cache.reader import decompress
from vpd.data.chat import ChatFormat
from vpd.data.errors import CacheCorruptError, CacheNotFoundError
from vpd.pipeline.demo import PROMPTS, make_target
from vpd.stages.extract.target import context_layers, load_target
from workload import QWEN3

NAME = "codecs"
DEMO = Path("runs/demo")
MAX_TOKENS = 8192
NUM_LAYERS = 5
ROUNDS = 3
WORST_SHARE = 0.001
Result = TypeVar("Result")


def bench_codecs(folder: Path) -> list[Figure]:
    """The best of the rounds. Random states have no size worth telling: they are here for their shape."""
    threads = torch.get_num_threads(), numcodecs.blosc.use_threads
    torch.set_num_threads(1)
    numcodecs.blosc.use_threads = False
    try:
        synthetic = next(QWEN3.sequences())["hidden_TKH"]
        data, sequences = real_states(folder)
        found: list[Figure] = []
        for codec in CODECS.values():
            found += measure(codec, QWEN3.name, [synthetic], is_real=False)
            found += measure(codec, data, sequences, is_real=True)
        return found
    finally:
        torch.set_num_threads(threads[0])
        numcodecs.blosc.use_threads = threads[1]


def measure(codec: Codec, data: str, sequences: list[Tensor], is_real: bool) -> list[Figure]:
    """Channels are measured on the first sequence, as they are for a part of a cache."""
    hidden_TKH, scale_KH = torch.cat(sequences), measure_channels(sequences[0])
    num_tokens, num_layers, hidden_size = hidden_TKH.shape
    spec = codec.spec(num_layers, hidden_size, CHUNK_TOKENS)
    memory = torch.empty(spec.num_chunks(num_tokens) * spec.chunk_bytes, dtype=torch.uint8)

    def encode() -> tuple[np.ndarray, list[memoryview]]:
        rows = codec.encode(hidden_TKH, scale_KH)
        return rows, compress(spec, rows)

    (rows, chunks), encode_seconds = fastest(encode)

    def decode() -> Tensor:
        stored = expand(spec, chunks, memory)[:num_tokens] if chunks else torch.from_numpy(rows)
        return codec.decode(stored, hidden_size, scale_KH)

    decoded_TKH, decode_seconds = fastest(decode)

    def figure(name: str, value: float, unit: str, digits: int | None = None) -> Figure:
        name = f"{codec.name}: {name}"
        return Figure(benchmark=NAME, name=name, data=data, value=value, unit=unit, digits=digits)

    found: list[Figure] = []
    if codec.name != "raw":  # which is a view
        found.append(figure("encode", hidden_TKH.nbytes / encode_seconds / 1e9, "GB/s"))
        found.append(figure("decode", hidden_TKH.nbytes / decode_seconds / 1e9, "GB/s"))
    if is_real:
        share = (sum(map(len, chunks)) or rows.nbytes) / hidden_TKH.nbytes
        found.append(figure("share of raw's bytes", 100 * share, "%", 1))
    if codec.is_exact:
        assert torch.equal(decoded_TKH.view(torch.int16), hidden_TKH.view(torch.int16))
    elif is_real:
        cosines = whitened_cosine(hidden_TKH, decoded_TKH).flatten()
        found.append(figure("whitened cosine, mean", float(cosines.mean()), "", 5))
        found.append(figure("whitened cosine, worst 0.1 %", float(torch.quantile(cosines, WORST_SHARE)), "", 5))
    return found


def fastest(run: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and the seconds of the fastest of some rounds."""
    seconds: list[float] = []
    for _ in range(ROUNDS - 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    result = run()
    return result, min(*seconds, time.perf_counter() - started)


def compress(spec: ArraySpec, rows: np.ndarray) -> list[memoryview]:
    """Chunks as a shard holds them, without padding and checksums; none if they are not compressed."""
    if spec.compression is None:
        return []
    compressor = spec.compression.compressor()
    starts = range(0, len(rows), spec.chunk_tokens)
    return [memoryview(compressor.encode(rows[start : start + spec.chunk_tokens])) for start in starts]


def expand(spec: ArraySpec, chunks: list[memoryview], memory: Tensor) -> Tensor:
    """The rows of compressed chunks, in memory that is reused, as the reader's is."""
    decompress(chunks, memory.numpy().data, spec.chunk_bytes, NAME)
    return memory.view(getattr(torch, spec.dtype)).view(-1, *spec.row_shape)


def real_states(folder: Path) -> tuple[str, list[Tensor]]:
    """What they are, and states [T, K, H]: the demo's if it has run, else of its prompts alone."""
    try:
        cache = Cache.open(DEMO / "cache")
    except (CacheNotFoundError, CacheCorruptError):
        cache = None
    if cache is None or not cache.codec.is_exact:
        return "SmolLM2 (prompts)", compute_states(folder)
    found: list[Tensor] = []
    for row in cache.rows:
        found.append(cache.read(row).hidden_TKH)
        if sum(map(len, found)) >= MAX_TOKENS:
            break
    return "SmolLM2 (demo)", found


@torch.no_grad()
def compute_states(folder: Path) -> list[Tensor]:
    disable_progress_bar()
    make_target(folder / "target")
    target = load_target(str(folder / "target"))
    model = AutoModelForCausalLM.from_pretrained(target.folder, dtype=torch.float32)
    chat = ChatFormat(target.tokenizer, eos_token_ids=target.eos_token_ids)
    layers = context_layers(target.num_layers, NUM_LAYERS)
    found: list[Tensor] = []
    for record in read_prompts([PROMPTS]).records:
        token_ids = torch.tensor([chat.prompt_ids(record.messages)])
        states = model(token_ids, output_hidden_states=True).hidden_states
        found.append(torch.stack([states[layer + 1][0] for layer in layers], dim=1).bfloat16())
    return found
