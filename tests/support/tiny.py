"""Tiny targets, caches and drafters, and what tests do with them; a CPU runs each in milliseconds."""

# T tokens, K layers, H hidden width, V vocabulary
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from vpd.data.cache.arrays import TOKEN_ARRAYS
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.codecs import CODECS
from vpd.data.cache.index import SequenceIndex, SequenceRow, rows_to_table
from vpd.data.cache.manifest import CacheManifest
from vpd.data.cache.reader import CachedSequence
from vpd.data.cache.sequence import NewSequence
from vpd.data.cache.storage.base import Storage
from vpd.data.cache.work import finished_units, read_units
from vpd.data.cache.writer import StateWriter
from vpd.pipeline.cli import main
from vpd.stages.drafter.checkpoint import load_shape, save_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["the quick brown fox jumps over the lazy dog", "user assistant system", "what is the sum of two and three?"]
NUM_LAYERS, HIDDEN, VOCAB = 6, 128, 320
TARGET_SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
}
PROMPTS: list[dict[str, Any]] = [
    *({"prompt": f"what is the sum of {i} and {7 * i % 5}?"} for i in range(8)),
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "which fox jumps?"}]},
    {"turns": ["name a dog", "and another one"]},
    {"prompt": "ünïcödé, 你好"},
    {"text": "the quick brown fox"},
]
MULTI_TURN_ROW, TEXT_ROW = 10, 12
"""Line numbers of the records with two user turns and with plain text."""
EXTRACT = {"engine": "transformers", "num_draft_layers": 3, "max_new_tokens": 24, "max_len": 128, "part_mib": 1}
DRAFTER = {"block_size": 4, "num_layers": 1}
TRAIN = {"num_anchors": 32, "lr": 3e-3, "holdout": 0.3, "log_every": 1, "precision": "float32"}


# Targets


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CHATML
    return fast


def save_target(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **save_args: Any) -> Path:
    """A random target: `llama` with tied embeddings, `qwen3` with an LM head of its own."""
    end = tokenizer.get_vocab()[END]
    shape: dict[str, Any] = TARGET_SHAPE | {"eos_token_id": end}
    torch.manual_seed(2)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=False, **shape))
    with torch.no_grad():  # some answers end by themselves, and no answer has a token that the tokenizer lacks
        head = model.lm_head.weight
        head[end] *= 1.5
        head[len(tokenizer) :] *= 0.1
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder, **save_args)
    tokenizer.save_pretrained(folder)
    return folder


def render(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, str]) -> str:
    """What the target reads before it answers."""
    return str(tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True))


# Files


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def snapshot(folder: Path) -> dict[str, str]:
    """Path -> hash of the content, for every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Damage(NamedTuple):
    """One way in which a file goes bad."""

    id: str
    position: float | None
    """Share of the file's length at which a bit flips, or where the file ends if `cut`; None: it is gone."""
    cut: bool = False

    def apply(self, path: Path) -> None:
        if self.position is None:
            path.unlink()
            return
        content = bytearray(path.read_bytes())
        index = int(self.position * len(content))
        if self.cut:
            del content[index:]
        else:
            content[index] ^= 0x10
        path.write_bytes(content)


# The command line


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """What follows `vpd: error:`, which must be the last thing printed."""
        head, found, message = self.err.partition("vpd: error: ")
        assert found, self.err
        assert "Traceback" not in head
        return message.strip()


def run_vpd(*arguments: object, **flags: object) -> Outcome:
    """Runs the command in this process; an exception that it does not report goes through."""
    texts = [str(argument) for argument in arguments]
    found = CliRunner().invoke(main, texts + as_flags(flags))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Outcome(found.exit_code, found.stdout, found.stderr)


def vpd(*arguments: object, **flags: object) -> dict[str, Any]:
    """Runs the command with `--json`; returns its result."""
    outcome = run_vpd(*arguments, "--json", **flags)
    assert outcome.code == 0, outcome.err
    return outcome.result


def as_flags(flags: dict[str, Any]) -> list[str]:
    """`num_layers=1` as `--num-layers 1`, `skip_bad=True` as `--skip-bad`, a dotted name as `--set NAME=VALUE`."""
    found: list[str] = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if "." in name:
            found += ["--set", f"{name}={value}"]
        else:
            found += [flag] if value is True else [flag, str(value)]
    return found


# Drafters and caches without a target


SHAPE = DrafterShape(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=10,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    max_position_embeddings=64,
    vocab_size=20,
    block_size=5,
    mask_token_id=19,
    target_layer_ids=(1, 3, 5),
    num_target_layers=8,
)
"""A drafter's shape whose numbers all differ."""


def make_manifest(**changes: Any) -> CacheManifest:
    fields: dict[str, Any] = {
        "target_fingerprint": "aaaa",
        "tokenizer_hash": "bbbb",
        "template_hash": "cccc",
        "layer_ids": (1, 3),
        "generation": {"mode": "generate", "max_len": 512},
        "engine": {"name": "vllm"},
        "vllm_layer_ids": (2, 4),
        "target": "tiny",
        "num_target_layers": 6,
        "hidden_size": 8,
        "vocab_size": 50,
        "chunk_tokens": CHUNK_TOKENS,
        "versions": {},
        "rendered_sample": "hello",
    }
    return CacheManifest(**fields | changes)


def make_sequence(seq_id: str, num_tokens: int, num_layers: int, width: int, **changes: Any) -> dict[str, Any]:
    """Arguments of `append`: random states, and token ids that depend on `seq_id`."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seq_id} {num_tokens}".encode()))
    prompt_len = num_tokens // 2
    sequence: dict[str, Any] = {
        "seq_id": seq_id,
        "source": "prompts.jsonl",
        "source_row": 1,
        "hidden_TKH": torch.randn(num_tokens, num_layers, width, generator=generator).bfloat16(),
        "token_ids": torch.randint(50, (num_tokens,), generator=generator).tolist(),
        "loss_mask": [0] * prompt_len + [1] * (num_tokens - prompt_len),
        "target_argmax": torch.randint(50, (num_tokens,), generator=generator).tolist(),
        "prompt_len": prompt_len,
        "final_token_id": 7,
        "finish_reason": "stop",
    }
    return sequence | changes


def append(writer: StateWriter, *, hidden_TKH: Tensor, **made: Any) -> str | None:
    """Writes a sequence of `make_sequence`; returns the part's name if the part is full."""
    arrays = {name: made.pop(name) for name in TOKEN_ARRAYS}
    return writer.append(NewSequence(arrays=arrays, **made), hidden_TKH)


def chunk_bytes(num_layers: int, width: int) -> int:
    """Bytes of a stored chunk of `raw` states, its checksum included."""
    return CHUNK_TOKENS * num_layers * width * 2 + 4


def fill_cache(
    folder: Path, sequences: Sequence[dict[str, Any]], part_bytes: int = 1 << 20, **changes: Any
) -> list[str]:
    """Creates or continues a cache with these sequences; returns the names of the parts made."""
    writer = StateWriter(Cache.create_or_open(folder, make_manifest(**changes)), part_bytes, {})
    parts = [append(writer, **sequence) for sequence in sequences]
    parts.append(writer.commit())
    writer.finish()
    return [part for part in parts if part is not None]


def skipped_by_unit(storage: Storage) -> dict[str, dict[str, str]]:
    """For each finished work unit the prompts that never give a sequence, id -> reason."""
    return {name: record["skipped"] for name, record in read_units(storage, finished_units(storage)).items()}


def make_row(seq_id: str, num_tokens: int, **changes: Any) -> SequenceRow:
    """A row of the index that belongs to no cache."""
    row = SequenceRow(
        seq_id=seq_id,
        source="prompts.jsonl",
        source_row=0,
        part="part-0",
        first_row=0,
        num_tokens=num_tokens,
        prompt_len=0,
        num_supervised=num_tokens,
        final_token_id=None,
        finish_reason="given",
        hidden_offset=0,
        hidden_length=0,
        hidden_crc=0,
        content_hash="0" * 16,
    )
    return replace(row, **changes)


def make_index(rows: Iterable[SequenceRow]) -> SequenceIndex:
    return SequenceIndex.concatenate([rows_to_table([asdict(row) for row in rows])])


def make_cached(
    row: SequenceRow, hidden_TKH: Tensor, token_ids: list[int], loss_mask: list[bool], target_argmax: list[int]
) -> CachedSequence:
    """A sequence as a reader gives it, without a cache."""
    return CachedSequence(
        row=row,
        arrays={},
        token_ids_S=torch.tensor(token_ids),
        loss_mask_S=torch.tensor(loss_mask, dtype=torch.bool),
        target_argmax_T=torch.tensor(target_argmax),
        stored_TKW=hidden_TKH.view(torch.uint16),
        codec=CODECS["raw"],
        hidden_size=hidden_TKH.shape[-1],
        channel_scale_KH=None,
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality of dtype, shape and every bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


# Drafters without a training run


def save_random_drafter(folder: Path, like: Path, **changes: Any) -> Path:
    """A drafter with random weights and the shape of another one, but for `changes`."""
    drafter = Drafter(replace(load_shape(like), **changes))
    drafter.init_weights(torch.Generator().manual_seed(0))
    save_drafter(drafter.state_dict(), folder, drafter.shape.to_json(training_mode="dflash", prefix_weight_base=None))
    return folder
