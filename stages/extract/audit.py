"""A second look: some of the stored sequences go through an engine once more, as prompts."""

# S tokens of a sequence, T with a state, K captured layers, H hidden width
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from ...data.cache.cache import NO_CHOICE, Cache
from ...data.cache.index import SequenceRow
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ...data.errors import ExtractionError
from .compare_states import compare_states
from .engine import Completion, Engine, EngineRequest

AT_ONCE = 8
"""Sequences in memory."""


def is_audited(seq_id: str, share: float) -> bool:
    """Whether a sequence is looked at again, whatever worker extracts it."""
    digest = hashlib.sha256(f"audit {seq_id}".encode()).digest()
    return int.from_bytes(digest[:4]) < share * 2**32


def audit(engine: Engine, cache: Cache, rows: Sequence[SequenceRow]) -> dict[str, Any]:
    """Runs stored sequences through an engine, and tells how far its states are from the stored ones.

    Generated states come from decoding, token by token and beside other requests; here all of a sequence's tokens are a
    prompt. The difference is rounding, and what the codec takes away.

    Returns:
        Numbers of sequences and tokens; over all tokens and layers the worst and mean relative error and the mean
        whitened cosine; the share of the target's choices that agree; where the worst token is.

    Raises:
        ExtractionError: the engine gave nothing to compare with.
    """
    found: dict[str, Any] = {"engine": engine.facts, "num_sequences": 0, "num_tokens": 0, "worst_relative_error": 0.0}
    error_sum = cosine_sum = 0.0
    num_agreeing = num_choices = 0
    for sequence, again in look_again(engine, cache, rows):
        T = sequence.row.num_tokens
        if again.hidden_TKH is None or again.argmax_T is None or len(again.hidden_TKH) != T:
            raise ExtractionError(
                f"the audit of {sequence.row.seq_id} failed: {again.fault or 'the engine gave no states'}. The cache "
                "is as it was; run the same command again."
            )
        likeness = compare_states(sequence.hidden(torch.device("cpu")), again.hidden_TKH)
        worst = int(likeness.relative_error_TK.argmax())
        position, layer = divmod(worst, likeness.relative_error_TK.shape[1])
        error = float(likeness.relative_error_TK[position, layer])
        if error >= found["worst_relative_error"]:
            found["worst_relative_error"] = error
            layer_id = cache.manifest.layer_ids[layer]
            found["worst"] = {"seq_id": sequence.row.seq_id, "position": position, "layer": layer_id}
        error_sum += float(likeness.relative_error_TK.mean(dim=1).sum())
        cosine_sum += float(likeness.cosine_TK.mean(dim=1).sum())
        known_T = (sequence.target_argmax_T != NO_CHOICE) & (again.argmax_T != NO_CHOICE)
        num_choices += int(known_T.sum())
        num_agreeing += int((sequence.target_argmax_T.long() == again.argmax_T)[known_T].sum())
        found["num_sequences"] += 1
        found["num_tokens"] += T
    found["mean_relative_error"] = error_sum / max(1, found["num_tokens"])
    found["mean_whitened_cosine"] = cosine_sum / max(1, found["num_tokens"])
    found["argmax_agreement"] = num_agreeing / max(1, num_choices)
    return found


def look_again(
    engine: Engine, cache: Cache, rows: Sequence[SequenceRow]
) -> Iterator[tuple[CachedSequence, Completion]]:
    """Each stored sequence, and what the engine makes of its tokens."""
    for start in range(0, len(rows), AT_ONCE):
        chunk = rows[start : start + AT_ONCE]
        for row in chunk:
            tokens = cache.read_tokens(row)
            ids, mask = (values[: row.num_tokens].int().tolist() for values in (tokens.token_ids_S, tokens.loss_mask_S))
            engine.submit(
                EngineRequest(
                    key=f"audit {row.seq_id}", prompt_ids=ids, max_new_tokens=1, capture=True, supervised=mask
                )
            )
        done: dict[str, Completion] = {}
        while len(done) < len(chunk):
            done |= {completion.key: completion for completion in engine.poll()}
        with closing(read_ahead(cache, map(Request, chunk))) as sequences:
            for sequence in sequences:
                yield sequence, done.pop(f"audit {sequence.row.seq_id}")
