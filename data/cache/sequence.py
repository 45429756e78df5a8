"""A sequence that is about to be written."""

# T tokens with a state
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .arrays import LOSS_MASK, TOKEN_IDS
from .codecs import HIDDEN
from .index import SequenceRow, hash_content
from .part import Appended


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """Everything about a sequence but the states. The fields are those of `SequenceRow`."""

    seq_id: str
    source: str
    source_row: int
    arrays: Mapping[str, ArrayLike]
    """T rows for each array of `TOKEN_ARRAYS`, by name."""
    prompt_len: int
    final_token_id: int | None
    finish_reason: str

    def row(self, part: str, where: Appended) -> SequenceRow:
        """The sequence's row in the index, once it is written."""
        token_ids, loss_mask = np.asarray(self.arrays[TOKEN_IDS]), np.asarray(self.arrays[LOSS_MASK])
        return SequenceRow(
            seq_id=self.seq_id,
            source=self.source,
            source_row=self.source_row,
            part=part,
            first_row=where.first_row,
            num_tokens=len(token_ids),
            prompt_len=self.prompt_len,
            num_supervised=int(loss_mask.sum()) + (self.final_token_id is not None),
            final_token_id=self.final_token_id,
            finish_reason=self.finish_reason,
            hidden_offset=where.offsets[HIDDEN],
            hidden_length=where.lengths[HIDDEN],
            hidden_crc=where.crcs[HIDDEN],
            content_hash=hash_content(token_ids, loss_mask, self.final_token_id),
        )
