"""Facts about a cache, as `vpd inspect --json` gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..data.cache.arrays import ACCEPT_LEN, LOSS_MASK, NOT_DRAFTED, TOKEN_IDS
from ..data.cache.cache import Cache
from ..data.cache.drafts import FirstDrafts, list_drafts
from ..data.cache.index import SequenceRow
from ..data.cache.maintenance.quarantine import read_quarantined
from ..data.cache.part import read_commit
from ..data.cache.reader import read_rows
from ..data.cache.target_files import PIECES, target_folder
from ..data.cache.work import read_audits
from ..data.runs import marked_runs

MAX_BINS = 10
SAMPLE_TOKENS = 400
TOKENIZER = "tokenizer.json"


def cache_facts(cache: Cache) -> dict[str, Any]:
    """All that `vpd inspect` shows."""
    sizes, sample = bytes_by_array(cache), cache.rows[0]
    num_tokens = sample.num_tokens + (sample.final_token_id is not None)
    num_bytes = sum(sizes.values())
    return {
        "cache": cache.place,
        **cache.manifest.model_dump(mode="json", exclude={"rendered_sample"}),
        "fingerprint": cache.fingerprint,
        "num_parts": len(cache.parts),
        "num_sequences": len(cache),
        "num_tokens": cache.num_tokens,
        "num_supervised": int(cache.rows.column("num_supervised").sum()),
        "num_bytes": num_bytes,
        "bytes_per_token": num_bytes / cache.num_tokens,
        "bytes_by_array": sizes,
        "finish_reasons": dict(Counter(cache.rows.strings("finish_reason"))),
        "lengths": length_histogram(cache.rows.column("num_tokens")),
        "audits": read_audits(cache.storage),
        "quarantined": count_quarantined(cache),
        "first_drafters": [drafts_facts(cache, name) for name in list_drafts(cache.storage)],
        "sample": {
            "seq_id": sample.seq_id,
            "num_tokens": num_tokens,
            "num_shown": min(num_tokens, SAMPLE_TOKENS),
            "runs": [{"text": text, "supervised": supervised} for text, supervised in mark_sample(cache, sample)],
        },
    }


def drafts_facts(cache: Cache, fingerprint: str) -> dict[str, Any]:
    """Facts about the drafts of one first drafter."""
    drafts = FirstDrafts.open(cache, fingerprint)
    histogram = accept_length_histogram(cache, drafts)
    num_anchors = sum(histogram.values())
    mean = sum(length * count for length, count in histogram.items()) / num_anchors if num_anchors else None
    commits = [read_commit(cache.storage, drafts.root, name) for name in sorted(drafts.parts.values())]
    return {
        "fingerprint": fingerprint,
        **drafts.facts,
        "num_parts_missing": len(drafts.missing_parts()),
        "num_bytes": sum(file["bytes"] for record in commits for file in record["files"].values()),
        "num_anchors": num_anchors,
        "mean_accept_length": mean,
        "accept_lengths": histogram,
    }


def accept_length_histogram(cache: Cache, drafts: FirstDrafts) -> dict[int, int]:
    """Number of anchors by accept length of the first draft, in the parts that are drafted."""
    counts = np.zeros(NOT_DRAFTED + 1, np.int64)
    for row in cache.rows:
        if row.part in drafts.parts:
            counts += np.bincount(drafts.read_array(row, ACCEPT_LEN), minlength=len(counts))
    return {length: int(count) for length, count in enumerate(counts[:NOT_DRAFTED]) if count}


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Number of sequences by length in tokens, in at most MAX_BINS bins of a round width."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    widths = (w * 10**e for e in range(12) for w in (1, 2, 5))
    width = next(width for width in widths if longest // width - shortest // width < MAX_BINS)
    first = shortest // width
    counts = enumerate(np.bincount(lengths // width - first), start=first)
    return [{"from": i * width, "to": (i + 1) * width - 1, "sequences": int(n)} for i, n in counts]


def bytes_by_array(cache: Cache) -> dict[str, int]:
    """Bytes of all parts of states by array; `index` and `other` are the rest."""
    sizes: Counter[str] = Counter()
    for record in cache.commits().values():
        for file, described in record["files"].items():
            names = file.split("/")
            array = "index" if names[0] == "index" else names[2] if len(names) > 3 else "other"
            sizes[array] += described["bytes"]
    return dict(sizes.most_common())


def count_quarantined(cache: Cache) -> dict[str, int]:
    """Sequences that went into quarantine and that the cache still lacks, by reason."""
    reasons = {entry["seq_id"]: entry["reason"] for entry in read_quarantined(cache.storage)}
    present = set(cache.rows.strings("seq_id"))
    return dict(Counter(reason for seq_id, reason in reasons.items() if seq_id not in present).most_common())


def load_decoder(folder: Path) -> Callable[[list[int]], str]:
    """From token ids to text, by the tokenizer in a target's folder.

    Importing transformers takes seconds, so transformers reads only folders that have no tokenizer.json.
    """
    if (folder / TOKENIZER).is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / TOKENIZER))
        return lambda ids: fast.decode(ids, skip_special_tokens=False)
    from ..stages.drafter.target_pieces import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def read_sample(cache: Cache, row: SequenceRow) -> tuple[list[int], list[bool]]:
    """A sequence's first SAMPLE_TOKENS token ids and loss mask, without torch, whose import takes seconds."""
    part = cache.states.open(row.part, verify=True)
    ids, mask = (read_rows(part, cache.specs[name], row) for name in (TOKEN_IDS, LOSS_MASK))
    final = [] if row.final_token_id is None else [row.final_token_id]
    ids, mask = [*ids.tolist(), *final], [*mask.astype(bool).tolist(), *(True for _ in final)]
    return ids[:SAMPLE_TOKENS], mask[:SAMPLE_TOKENS]


def mark_sample(cache: Cache, row: SequenceRow) -> list[tuple[str, bool]]:
    """The text of a sequence's first SAMPLE_TOKENS tokens as runs of (text, supervised)."""
    decode = load_decoder(target_folder(cache.storage, without=PIECES))
    ids, mask = read_sample(cache, row)
    return marked_runs(decode, ids, mask)
