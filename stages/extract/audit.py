"""The audit: an engine computes some of the stored sequences again, and the states are compared."""

# S tokens of a sequence, T with a state, K captured layers, H hidden width
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from ...data.cache.arrays import NO_CHOICE
from ...data.cache.cache import Cache
from ...data.cache.index import SequenceRow
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ...data.errors import ExtractionError
from ...data.hashing import is_in_share
from .compare_states import compare_states
from .engine import Completion, Engine, EngineRequest

SEQUENCES_IN_MEMORY = 8


def is_audited(seq_id: str, share: float) -> bool:
    """Whether a sequence belongs to the audited share; the worker that extracts the sequence does not matter."""
    return is_in_share(f"audit {seq_id}", share)


def audit(engine: Engine, cache: Cache, rows: Sequence[SequenceRow]) -> dict[str, Any]:
    """Computes the states of stored sequences again, and compares them with the stored states.

    Stored states of generated tokens come from decoding, token by token and beside other requests. Here all tokens of a
    sequence are one prompt. The states differ by rounding, and by the codec's loss.

    Returns:
        The engine's facts; the numbers of sequences and tokens; over all tokens and layers, the worst and mean relative
        error and the mean whitened cosine; the share of the target's choices that agree; the place of the worst error.

    Raises:
        ExtractionError: the engine gave no states of a sequence.
    """
    found: dict[str, Any] = {"engine": engine.facts, "num_sequences": 0, "num_tokens": 0, "worst_relative_error": 0.0}
    error_sum = cosine_sum = 0.0
    num_agreeing = num_choices = 0
    for sequence, completion in recompute(engine, cache, rows):
        T = sequence.row.num_tokens
        if completion.hidden_TKH is None or completion.argmax_T is None or len(completion.hidden_TKH) != T:
            raise ExtractionError(
                f"the audit of {sequence.row.seq_id} failed: {completion.fault or 'the engine gave no states'}. The "
                "audit changed nothing in the cache; run the same command again."
            )
        likeness = compare_states(sequence.hidden(torch.device("cpu")), completion.hidden_TKH)
        worst = int(likeness.relative_error_TK.argmax())
        position, layer = divmod(worst, likeness.relative_error_TK.shape[1])
        error = float(likeness.relative_error_TK[position, layer])
        if error >= found["worst_relative_error"]:
            found["worst_relative_error"] = error
            layer_id = cache.manifest.layer_ids[layer]
            found["worst"] = {"seq_id": sequence.row.seq_id, "position": position, "layer": layer_id}
        error_sum += float(likeness.relative_error_TK.mean(dim=1).sum())
        cosine_sum += float(likeness.cosine_TK.mean(dim=1).sum())
        known_T = (sequence.target_argmax_T != NO_CHOICE) & (completion.argmax_T != NO_CHOICE)
        num_choices += int(known_T.sum())
        num_agreeing += int((sequence.target_argmax_T.long() == completion.argmax_T)[known_T].sum())
        found["num_sequences"] += 1
        found["num_tokens"] += T
    found["mean_relative_error"] = error_sum / max(1, found["num_tokens"])
    found["mean_whitened_cosine"] = cosine_sum / max(1, found["num_tokens"])
    found["argmax_agreement"] = num_agreeing / max(1, num_choices)
    return found


def recompute(engine: Engine, cache: Cache, rows: Sequence[SequenceRow]) -> Iterator[tuple[CachedSequence, Completion]]:
    """Each stored sequence, with the engine's completion of its tokens."""
    for start in range(0, len(rows), SEQUENCES_IN_MEMORY):
        chunk = rows[start : start + SEQUENCES_IN_MEMORY]
        for row in chunk:
            tokens = cache.read_tokens(row)
            engine.submit(
                EngineRequest(
                    key=f"audit {row.seq_id}",
                    prompt_ids=tokens.token_ids_S[: row.num_tokens].tolist(),
                    max_new_tokens=1,
                    capture=True,
                    supervised=tokens.loss_mask_S[: row.num_tokens].tolist(),
                )
            )
        done: dict[str, Completion] = {}
        while len(done) < len(chunk):
            done |= {completion.key: completion for completion in engine.poll()}
        with closing(read_ahead(cache.states, map(Request, chunk))) as sequences:
            for sequence in sequences:
                yield sequence, done.pop(f"audit {sequence.row.seq_id}")
