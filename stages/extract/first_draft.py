"""First drafts over a cache: drafts at every anchor from the stored states, without the target."""

# S tokens of a sequence, T with a state, N blocks, G block size, A alternatives
from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from ...data.cache.drafts import ACCEPT_LEN, NOT_DRAFTED, NUM_ALTERNATIVES, FirstDrafts, draft_specs, empty_drafts
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ...data.cache.store import CHUNK_TOKENS, Cache
from ...data.errors import DrafterError
from ..config import DraftConfig, ReadConfig
from ..devices import choose_device
from ..drafter.blocks import accept_lengths, anchors_of, block_tokens, show_prefix
from ..drafter.checkpoint import check_fits, drafter_fingerprint, load_drafter, load_shape
from ..drafter.drafting import fill_blocks
from ..drafter.model import Drafter
from ..drafter.target_pieces import TargetPieces


def open_first_drafts(cache: Cache, folder: Path, config: DraftConfig) -> FirstDrafts:
    """The place of a first drafter's drafts in a cache, made if it is new.

    Raises:
        DrafterError: the drafter does not fit the cache, or its drafts are there with another stride.
    """
    shape = load_shape(folder)
    check_fits(shape, cache.manifest, folder)
    facts = {
        "block_size": shape.block_size,
        "judged_against": "recorded tokens",
        "mask_token_id": shape.mask_token_id,
        "name": str(folder),
        "num_alternatives": NUM_ALTERNATIVES,
        "stride": config.stride,
    }
    drafts = FirstDrafts.create_or_open(cache, drafter_fingerprint(folder), facts)
    if drafts.facts["stride"] != config.stride:
        raise DrafterError(
            f"{drafts.place} holds this drafter's drafts at stride {drafts.facts['stride']}, this run asks for "
            f"{config.stride}. Use the same stride, or remove that folder."
        )
    return drafts


def draft_cache(
    cache: Cache,
    folder: Path,
    config: DraftConfig,
    read: ReadConfig | None = None,
    on_sequence: Callable[[int], None] = lambda num_anchors: None,
) -> FirstDrafts:
    """Drafts whatever part of the cache this drafter has not drafted yet; part by part, each committed as a whole.

    Args:
        on_sequence: called after each sequence with its number of anchors.
    """
    drafts = open_first_drafts(cache, folder, config)
    missing = drafts.missing_parts()
    if not missing:
        return drafts
    read = read or ReadConfig()
    device = choose_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    drafter = load_drafter(folder, device=device, dtype=dtype)
    pieces = TargetPieces.load(cache.target_folder, device=device, dtype=dtype)
    for part in missing:
        num_anchors = 0
        requests = map(Request, cache.rows_of_part(part))
        with (
            drafts.writer(part) as writer,
            closing(read_ahead(cache, requests, read.num_threads, read.num_buffers)) as sequences,
        ):
            for sequence in sequences:
                arrays = draft_sequence(sequence, drafter, pieces, config)
                writer.append(arrays)
                count = int((arrays[ACCEPT_LEN] != NOT_DRAFTED).sum())
                num_anchors += count
                on_sequence(count)
            writer.commit({"num_anchors": num_anchors})
        drafts.parts[part] = writer.name
    return drafts


@torch.inference_mode()
def draft_sequence(
    sequence: CachedSequence, drafter: Drafter, pieces: TargetPieces, config: DraftConfig
) -> dict[str, np.ndarray]:
    """Rows of the drafts' arrays for one sequence; anchors that are not drafted keep `NOT_DRAFTED`."""
    device, G = pieces.embed_VH.device, drafter.shape.block_size
    T = sequence.row.num_tokens
    arrays = empty_drafts(T, draft_specs(G, CHUNK_TOKENS))
    token_ids_S, loss_mask_S = sequence.token_ids_S.to(device), sequence.loss_mask_S.to(device)
    context = drafter.context(sequence.hidden(device).flatten(1).to(pieces.embed_VH.dtype))
    anchors = anchors_of(loss_mask_S, T)[:: config.stride]
    for anchors_N in anchors.split(config.anchors_per_pass):
        tokens_NG, labelled_NG = block_tokens(token_ids_S, loss_mask_S, anchors_N, G)
        masked_NG = show_prefix(tokens_NG, torch.zeros_like(anchors_N), drafter.shape.mask_token_id)
        wanted_NG = torch.ones_like(masked_NG, dtype=torch.bool)
        wanted_NG[:, 0] = False
        found_NGA, probs_NGA = fill_blocks(drafter, pieces, context, masked_NG, anchors_N, wanted_NG, NUM_ALTERNATIVES)
        rows = anchors_N.cpu().numpy()
        accepted_N = accept_lengths(found_NGA[..., 0], tokens_NG, labelled_NG)
        arrays["accept_len"][rows] = accepted_N.to(torch.uint8).cpu().numpy()
        arrays["tokens"][rows] = found_NGA[:, 1:].to(torch.int32).cpu().numpy()
        arrays["probs"][rows] = probs_NGA[:, 1:].to(torch.float16).cpu().numpy()
    return arrays
