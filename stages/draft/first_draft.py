"""First drafts over a cache: drafts at every anchor from the stored states, without the target."""

# S tokens of a sequence, T with a state, D context features, N anchors, G block size, J = G - 1, A alternatives
from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.cache.arrays import ACCEPT_LEN, NOT_DRAFTED, NUM_ALTERNATIVES, draft_specs, empty_drafts
from ...data.cache.cache import CHUNK_TOKENS, Cache
from ...data.cache.drafts import FirstDrafts, list_drafts
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ...data.errors import DrafterError
from ..config import ReadConfig
from ..devices import choose_device, choose_dtype
from ..drafter.blocks import accept_lengths, anchors_of, block_tokens
from ..drafter.checkpoint import check_drafter, drafter_fingerprint, load_drafter
from ..drafter.model import Drafter
from ..drafter.target_pieces import TargetPieces
from .config import DraftConfig
from .passes import draft_all

ANCHORS_PER_PASS = 256
"""Blocks drafted in one forward pass; sequences are packed until they have as many anchors."""


def open_first_drafts(
    cache: Cache, folder: Path, config: DraftConfig, before_new: Callable[[], object] = lambda: None
) -> FirstDrafts:
    """The place of a first drafter's drafts in a cache, made if it is new.

    Args:
        before_new: called before a new place is made; nothing is made if it raises an error.

    Raises:
        DrafterError: the drafter does not fit the cache, or its drafts are there with another stride.
    """
    shape = check_drafter(folder, cache.manifest)
    facts = {
        "block_size": shape.block_size,
        "judged_against": "recorded tokens",
        "mask_token_id": shape.mask_token_id,
        "name": str(folder),
        "num_alternatives": NUM_ALTERNATIVES,
        "stride": config.stride,
    }
    fingerprint = drafter_fingerprint(folder, cache.target_folder)
    if fingerprint not in list_drafts(cache.storage):
        before_new()
    drafts = FirstDrafts.create_or_open(cache, fingerprint, facts)
    if drafts.facts["stride"] != config.stride:
        raise DrafterError(
            f"{drafts.place} holds this drafter's drafts at stride {drafts.facts['stride']}, this run asks for "
            f"{config.stride}. Use the same stride, or remove that folder."
        )
    return drafts


class FirstDrafting:
    """A first drafter at work on a cache that may still grow: each call drafts what it has not drafted yet."""

    def __init__(self, folder: Path, config: DraftConfig, read: ReadConfig | None = None):
        self._folder, self._config, self._read = folder, config, read or ReadConfig()
        self._device = choose_device(config.device)
        self._dtype = choose_dtype(config.dtype, self._device)
        self._loaded: tuple[Drafter, TargetPieces] | None = None

    def run(
        self,
        cache: Cache,
        on_sequence: Callable[[int], None] = lambda num_anchors: None,
        must_stop: Callable[[], bool] = lambda: False,
    ) -> FirstDrafts:
        """Drafts the parts that are missing, each committed as a whole.

        The order of the parts is random, so that several processes that draft one cache rarely draft the same part. A
        part that another process has drafted meanwhile is left out.

        Args:
            on_sequence: called after each sequence with its number of anchors.
            must_stop: once this is true, the current part is given up and the call ends.
        """
        # The drafter is loaded before its drafts get a place, so that nothing stays of a drafter that does not load.
        drafts = open_first_drafts(cache, self._folder, self._config, lambda: self._models(cache))
        missing = drafts.missing_parts()
        for part in random.sample(missing, len(missing)):
            if not drafts.is_drafted(part) and not self._draft_part(cache, drafts, part, on_sequence, must_stop):
                break
        return drafts

    def _models(self, cache: Cache) -> tuple[Drafter, TargetPieces]:
        if self._loaded is None:
            where = {"device": self._device, "dtype": self._dtype}
            drafter = load_drafter(self._folder, target_folder=cache.target_folder, **where)
            pieces = TargetPieces.load(cache.target_folder, **where)
            self._loaded = drafter, pieces
        return self._loaded

    def _draft_part(
        self,
        cache: Cache,
        drafts: FirstDrafts,
        part: str,
        on_sequence: Callable[[int], None],
        must_stop: Callable[[], bool],
    ) -> bool:
        """Returns whether the part is drafted."""
        drafter, pieces = self._models(cache)
        num_anchors = 0
        requests = map(Request, cache.rows_of_part(part))
        with (
            drafts.writer(part) as writer,
            closing(read_ahead(cache.states, requests, self._read.num_threads)) as sequences,
        ):
            for packed in pack_sequences(sequences, self._config, pieces):
                for arrays in draft_sequences(packed, drafter, pieces):
                    if must_stop():
                        return False
                    writer.append(arrays)
                    count = int((arrays[ACCEPT_LEN] != NOT_DRAFTED).sum())
                    num_anchors += count
                    on_sequence(count)
            writer.commit({"num_anchors": num_anchors})
        drafts.parts[part] = writer.name
        return True


class Undrafted(NamedTuple):
    """What drafting needs of a sequence."""

    features_TD: Tensor
    token_ids_S: Tensor
    loss_mask_S: Tensor
    anchors_N: Tensor


def pack_sequences(
    sequences: Iterable[CachedSequence], config: DraftConfig, pieces: TargetPieces
) -> Iterator[list[Undrafted]]:
    """Sequences that are drafted together, on the device: as many as fill a pass with anchors."""
    packed: list[Undrafted] = []
    device, dtype = pieces.embed_VH.device, pieces.embed_VH.dtype
    for sequence in sequences:
        token_ids_S, loss_mask_S = sequence.token_ids_S.to(device), sequence.loss_mask_S.to(device)
        anchors_N = anchors_of(loss_mask_S, sequence.row.num_tokens)[:: config.stride]
        # A copy, since the reader fills its buffer again with the next sequence.
        features_TD = sequence.hidden(device).flatten(1).to(dtype, copy=True)
        packed.append(Undrafted(features_TD, token_ids_S, loss_mask_S, anchors_N))
        if sum(len(each.anchors_N) for each in packed) >= ANCHORS_PER_PASS:
            yield packed
            packed = []
    if packed:
        yield packed


@torch.inference_mode()
def draft_sequences(packed: list[Undrafted], drafter: Drafter, pieces: TargetPieces) -> list[dict[str, np.ndarray]]:
    """Rows of the drafts' arrays for each sequence; anchors that are not drafted keep `NOT_DRAFTED`."""
    G = drafter.shape.block_size
    num_anchors = [len(each.anchors_N) for each in packed]
    context = drafter.context(
        torch.cat([each.features_TD for each in packed]), [len(each.features_TD) for each in packed]
    )
    blocks = [block_tokens(each.token_ids_S, each.loss_mask_S, each.anchors_N, G) for each in packed]
    tokens_NG, labeled_NG = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    anchors_N = torch.cat([each.anchors_N for each in packed])
    sequence_N = torch.arange(len(packed)).repeat_interleave(torch.tensor(num_anchors))
    drafted_NJA, probs_NJA = draft_all(
        drafter, pieces, context, sequence_N, anchors_N, tokens_NG[:, 0], ANCHORS_PER_PASS
    )
    columns = {
        "accept_len": accept_lengths(drafted_NJA[..., 0], tokens_NG, labeled_NG).to(torch.uint8),
        "tokens": drafted_NJA.to(torch.int32),
        "probs": probs_NJA.to(torch.float16),
    }
    found = [empty_drafts(len(each.features_TD), draft_specs(G, CHUNK_TOKENS)) for each in packed]
    for name, values in columns.items():
        for arrays, each, rows in zip(found, packed, values.cpu().split(num_anchors), strict=True):
            arrays[name][each.anchors_N.cpu().numpy()] = rows.numpy()
    return found
