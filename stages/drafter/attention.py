"""Attention of blocks: to the context before their anchors and, in both directions, within each block.

Blocks do not see each other, nor the context of other sequences. Three implementations give the same values and
gradients: eager (the reference), structured and flex.
"""

# T context tokens, N blocks, G block size, Q = N * G block positions, R = G * r rows of a block
# h query heads, k key-value heads, r = h / k, d head width
# Y rows and X columns of tiles of flex attention's block mask
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .compiling import set_up_compiler

BLOCKS_PER_GROUP = 16
"""Blocks that structured attention computes together."""
TILE = 128
"""Rows and columns of a tile of flex attention's block mask."""
KERNEL_OPTIONS: Any = {"BACKEND": "TRITON"}
"""Without this, flex attention takes a decoding kernel for few positions, which does not support every mask."""


class LayerContext(NamedTuple):
    """A layer's keys and values of the context states, computed once per sequence."""

    key_kTd: Tensor
    value_kTd: Tensor


class Layout(NamedTuple):
    """Which rows of the packed context each block sees: starts_N[n] up to ends_N[n], which is not included."""

    starts_N: Tensor
    ends_N: Tensor
    num_tokens: int
    block_size: int

    @property
    def is_small(self) -> bool:
        """Whether PyTorch would compile this layout separately: a size is one, or a tile holds all block positions."""
        return min(len(self.starts_N), self.num_tokens) < 2 or len(self.starts_N) * self.block_size <= TILE


Attend = Callable[[Tensor, Tensor, Tensor, LayerContext], Tensor]
"""Maps the blocks' query [N, G, h, d], key and value [N, G, k, d], and the context to the mixed values [N, G, h, d]."""


def make_layout(anchors_N: Tensor, num_tokens: Sequence[int], num_blocks: Sequence[int], block_size: int) -> Layout:
    """The layout of sequences packed one after another.

    Args:
        anchors_N: int64, positions in their sequences.
        num_tokens: context tokens of each sequence.
        num_blocks: blocks of each sequence, one sequence after another.
    """
    first_rows = torch.tensor([0, *accumulate(num_tokens)][:-1])
    starts_N = first_rows.repeat_interleave(torch.tensor(num_blocks)).to(anchors_N.device)
    return Layout(starts_N, starts_N + anchors_N, sum(num_tokens), block_size)


class EagerAttention:
    """The reference: one softmax over a dense mask of all block positions and everything that they might see."""

    def __init__(self, layout: Layout):
        N, G = len(layout.starts_N), layout.block_size
        block_Q = torch.arange(N, device=layout.starts_N.device).repeat_interleave(G)
        rows_T = torch.arange(layout.num_tokens, device=block_Q.device)
        in_context_QT = (rows_T >= layout.starts_N[block_Q, None]) & (rows_T < layout.ends_N[block_Q, None])
        self.hidden = torch.cat([in_context_QT, block_Q[:, None] == block_Q], dim=1).logical_not()

    def __call__(self, query_NGhd: Tensor, key_NGkd: Tensor, value_NGkd: Tensor, context: LayerContext) -> Tensor:
        query, key, value = packed_heads(query_NGhd, key_NGkd, value_NGkd, context)
        r = len(query) // len(key)
        scores = query @ key.repeat_interleave(r, dim=0).transpose(1, 2) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(self.hidden, float("-inf")).softmax(dim=-1, dtype=torch.float32)
        mixed_hQd = weights.to(value.dtype) @ value.repeat_interleave(r, dim=0)
        return mixed_hQd.transpose(0, 1).reshape(query_NGhd.shape)


class Group(NamedTuple):
    """Blocks of one sequence, and the context rows that at least one of them sees."""

    blocks: slice
    rows: slice
    bias_NT: Tensor
    """0 where a block sees a row, -inf elsewhere."""


class StructuredAttention:
    """Computes a few neighboring blocks at a time, without a mask over all positions.

    The cost grows with the number of blocks times the context before them. It is lowest if the blocks come in the
    order of their anchors.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype):
        self.groups = list(group_blocks(layout, dtype))

    def __call__(self, query_NGhd: Tensor, key_NGkd: Tensor, value_NGkd: Tensor, context: LayerContext) -> Tensor:
        N, G, h, d = query_NGhd.shape
        k = key_NGkd.shape[2]
        # The r query heads of a key-value head become rows: [k, N, R, d].
        query_kNRd = query_NGhd.view(N, G, k, h // k, d).permute(2, 0, 1, 3, 4).reshape(k, N, -1, d) * d**-0.5
        key_kNGd, value_kNGd = (x.permute(2, 0, 1, 3) for x in (key_NGkd, value_NGkd))
        mixed = [
            attend_group(
                query_kNRd[:, group.blocks],
                key_kNGd[:, group.blocks],
                value_kNGd[:, group.blocks],
                LayerContext(context.key_kTd[:, group.rows], context.value_kTd[:, group.rows]),
                group.bias_NT,
            )
            for group in self.groups
        ]
        mixed_kNRd = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)
        return mixed_kNRd.view(k, N, G, h // k, d).permute(1, 2, 0, 3, 4).reshape(N, G, h, d)


def group_blocks(layout: Layout, dtype: torch.dtype) -> Iterator[Group]:
    """Groups of neighboring blocks of one sequence, each of at most `BLOCKS_PER_GROUP` blocks."""
    starts, ends = layout.starts_N.tolist(), layout.ends_N.tolist()
    begin = 0
    while begin < len(starts):
        end = begin + 1
        while end < len(starts) and end - begin < BLOCKS_PER_GROUP and starts[end] == starts[begin]:
            end += 1
        rows = slice(starts[begin], max(ends[begin:end]))
        rows_T = torch.arange(rows.start, rows.stop, device=layout.ends_N.device)
        hidden_NT = rows_T >= layout.ends_N[begin:end, None]
        bias_NT = torch.zeros_like(hidden_NT, dtype=dtype).masked_fill_(hidden_NT, float("-inf"))
        yield Group(slice(begin, end), rows, bias_NT)
        begin = end


def attend_group(
    query_kNRd: Tensor, key_kNGd: Tensor, value_kNGd: Tensor, context: LayerContext, bias_NT: Tensor
) -> Tensor:
    """Attention [k, N, R, d] of a group's blocks to their context and to themselves."""
    k, N, R, d = query_kNRd.shape
    context_scores = (query_kNRd.flatten(1, 2) @ context.key_kTd.transpose(1, 2)).view(k, N, R, -1)
    context_scores = context_scores + bias_NT[:, None, :]
    own_scores = query_kNRd @ key_kNGd.transpose(2, 3)
    # softmax sums in float32 for every dtype. Scores in float32 would also be kept for the backward pass.
    weights = torch.cat([context_scores, own_scores], dim=-1).softmax(dim=-1)
    to_context, to_own = weights.to(value_kNGd.dtype).split([bias_NT.shape[1], key_kNGd.shape[2]], dim=-1)
    return (to_context.flatten(1, 2) @ context.value_kTd).view(k, N, R, d) + to_own @ value_kNGd


class FlexAttention:
    """PyTorch's flex attention, which skips the tiles that no block sees; meant for a GPU."""

    def __init__(self, layout: Layout):
        self.mask = make_block_mask(layout)

    def __call__(self, query_NGhd: Tensor, key_NGkd: Tensor, value_NGkd: Tensor, context: LayerContext) -> Tensor:
        query, *packed = packed_heads(query_NGhd, key_NGkd, value_NGkd, context)
        # Each query head gets a key-value head of its own. With shared ones, the backward kernel has too few programs
        # to fill a GPU.
        key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in packed)
        # On a GPU the kernel must be compiled; within a compiled layer it is compiled with the layer.
        alone = query.is_cuda and not torch.compiler.is_compiling()
        attend = compiled_flex_attention() if alone else flex_attention
        mixed = attend(query[None], key[None], value[None], block_mask=self.mask, kernel_options=KERNEL_OPTIONS)
        assert isinstance(mixed, Tensor)
        return mixed[0].transpose(0, 1).reshape(query_NGhd.shape)


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    set_up_compiler()
    return torch.compile(flex_attention, dynamic=True)


def make_block_mask(layout: Layout) -> BlockMask:
    """The tiles [Q / TILE, (T + Q) / TILE] in which a block sees something, computed from the blocks' bounds."""
    N, G, T = len(layout.starts_N), layout.block_size, layout.num_tokens
    device = layout.starts_N.device
    own_N = T + G * torch.arange(N, device=device)
    starts_N, ends_N = layout.starts_N, layout.ends_N
    tile_starts_X = TILE * torch.arange(-(-(T + N * G) // TILE), device=device)
    tile_ends_X = tile_starts_X + TILE

    def overlaps(starts_N: Tensor, ends_N: Tensor) -> Tensor:
        occupied_N1 = (starts_N < ends_N)[:, None]
        return occupied_N1 & (starts_N[:, None] < tile_ends_X) & (ends_N[:, None] > tile_starts_X)

    seen_NX = overlaps(starts_N, ends_N) | overlaps(own_N, own_N + G)
    whole_NX = (starts_N[:, None] <= tile_starts_X) & (tile_ends_X <= ends_N[:, None])
    # The first and last block with positions in each row of tiles.
    row_starts_Y = TILE * torch.arange(-(-N * G // TILE), device=device)
    first_Y = row_starts_Y // G
    last_Y = ((row_starts_Y + TILE - 1) // G).clamp(max=N - 1)

    def count(blocks_NX: Tensor) -> Tensor:
        until_NX = torch.cat([blocks_NX.new_zeros(1, blocks_NX.shape[1]), blocks_NX]).cumsum(dim=0)
        return until_NX[last_Y + 1] - until_NX[first_Y]

    full_YX = count(whole_NX) == (last_Y - first_Y + 1)[:, None]
    partial_YX = (count(seen_NX) > 0) & ~full_YX

    # Bounds by position, not by block: looking them up is cheaper for a kernel than a division for every pair.
    starts_Q, ends_Q, own_Q, own_ends_Q = (x.repeat_interleave(G) for x in (starts_N, ends_N, own_N, own_N + G))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_context = (key >= starts_Q[query]) & (key < ends_Q[query])
        return in_context | ((key >= own_Q[query]) & (key < own_ends_Q[query]))

    return BlockMask.from_kv_blocks(
        *ordered_tiles(partial_YX),
        *ordered_tiles(full_YX),
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(N * G, T + N * G),
    )


def ordered_tiles(wanted_YX: Tensor) -> tuple[Tensor, Tensor]:
    """Number [1, 1, Y] and columns [1, 1, Y, X] of the wanted tiles in each row; wanted tiles come first."""
    columns_YX = wanted_YX.int().argsort(dim=1, descending=True, stable=True)
    return wanted_YX.sum(dim=1, dtype=torch.int32)[None, None], columns_YX.int()[None, None]


def packed_heads(
    query_NGhd: Tensor, key_NGkd: Tensor, value_NGkd: Tensor, context: LayerContext
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [h, Q, d]; key and value [k, T + Q, d], of the context and then the blocks."""
    query_hQd, key_kQd, value_kQd = (x.flatten(0, 1).transpose(0, 1) for x in (query_NGhd, key_NGkd, value_NGkd))
    return (
        query_hQd,
        torch.cat([context.key_kTd, key_kQd], dim=1),
        torch.cat([context.value_kTd, value_kQd], dim=1),
    )


def plan_attention(name: str, layout: Layout, dtype: torch.dtype) -> Attend:
    """The attention that all layers of one forward pass share.

    Args:
        name: eager, structured or flex.
    """
    if name == "structured":
        return StructuredAttention(layout, dtype)
    # A small layout would make flex attention compile again, and the dense mask of a small layout is cheap.
    return EagerAttention(layout) if name == "eager" or layout.is_small else FlexAttention(layout)
