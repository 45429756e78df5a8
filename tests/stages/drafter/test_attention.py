"""The three attentions against the plain drafter, and their plans against masks written out by loops."""

# N blocks, G block size, Q = N * G block positions, T context tokens, K = T + Q keys, H hidden width
import random
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plain_drafter import plain_drafter, random_drafter, relative_error
from support.tracing import trace_compiled_modules
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vpd.stages.drafter import attention as attention_module
from vpd.stages.drafter.attention import BLOCKS_PER_GROUP, Layout, group_blocks, make_block_mask, make_layout
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape

# Softmax and rotary angles are float32, everything else is float64: errors are at most 5e-6, largest in gradients.
# A missing context row changes a block by more than 1e-2 at the sizes below.
TOLERANCE = 5e-5
# On a GPU everything is float32, and kernels add in another order.
CUDA_TOLERANCE = 1e-3

SHAPE = DrafterShape(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=10,
    rms_norm_eps=1e-3,
    rope_theta=50.0,
    max_position_embeddings=512,
    vocab_size=20,
    block_size=7,
    mask_token_id=19,
    target_layer_ids=(0,),
    num_target_layers=8,
)


class Packing(NamedTuple):
    """Sequences one after another, each with the anchors of its blocks."""

    num_tokens: list[int]
    anchors: list[list[int]]
    block_size: int

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """For each block its sequence, the sequence's first context row, and the anchor."""
        firsts = [0, *accumulate(self.num_tokens)]
        return [(s, firsts[s], anchor) for s, anchors in enumerate(self.anchors) for anchor in anchors]

    @property
    def num_blocks(self) -> list[int]:
        return [len(anchors) for anchors in self.anchors]

    @property
    def anchors_N(self) -> Tensor:
        return torch.tensor([anchor for _, _, anchor in self.blocks])

    @property
    def layout(self) -> Layout:
        return make_layout(self.anchors_N, self.num_tokens, self.num_blocks, self.block_size)


def random_packing(num_tokens: list[int], num_blocks: list[int], block_size: int) -> Packing:
    """Anchors in any order, which include the first and last positions of sequences."""
    chance = random.Random(0)
    counts = zip(num_tokens, num_blocks, strict=True)
    anchors = [[end, 0, *(chance.randint(0, end) for _ in range(count))][:count] for end, count in counts]
    return Packing(num_tokens, [chance.sample(each, len(each)) for each in anchors], block_size)


@st.composite
def packings(draw: st.DrawFn, max_blocks: int, max_block_size: int = 40) -> Packing:
    num_tokens = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    anchors = [draw(st.lists(st.integers(0, end), max_size=max_blocks)) for end in num_tokens]
    anchors[0] = anchors[0] or [num_tokens[0]] * (not any(anchors))
    return Packing(num_tokens, anchors, draw(st.integers(2, max_block_size)))


def random_inputs(packing: Packing, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Features, blocks, and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(1)
    T, N, G = sum(packing.num_tokens), sum(packing.num_blocks), packing.block_size
    features_TH = torch.randn(T, 12, generator=generator).double().requires_grad_(with_gradients)
    blocks_NGH, direction_NGH = torch.randn(2, N, G, 12, generator=generator).double()
    return features_TH, blocks_NGH.requires_grad_(with_gradients), direction_NGH


def run(drafter: Drafter, packing: Packing, with_gradients: bool) -> list[Tensor]:
    """Outputs, then the gradients of all parameters, of features and of blocks."""
    inputs = random_inputs(packing, with_gradients)
    weight = drafter.norm.weight
    features_TH, blocks_NGH, direction_NGH = (x.to(weight.device, weight.dtype) for x in inputs)
    with torch.set_grad_enabled(with_gradients):
        context = drafter.context(features_TH, packing.num_tokens)
        output_NGH = drafter(blocks_NGH, packing.anchors_N.to(weight.device), context, packing.num_blocks)
    wanted = [*drafter.parameters(), *inputs[:2]] if with_gradients else []
    return [output_NGH, *(torch.autograd.grad(output_NGH, wanted, direction_NGH) if wanted else [])]


def run_plainly(packing: Packing) -> list[Tensor]:
    """The same, one sequence at a time."""
    weights = dict(random_drafter(SHAPE).double().named_parameters())
    features_TH, blocks_NGH, direction_NGH = random_inputs(packing, with_gradients=True)
    features, blocks = features_TH.split(packing.num_tokens), blocks_NGH.split(packing.num_blocks)
    sequences = [each for each in zip(features, blocks, packing.anchors, strict=True) if each[2]]
    output_NGH = torch.cat([plain_drafter(weights, SHAPE, *each) for each in sequences])
    wanted = [*weights.values(), features_TH, blocks_NGH]
    return [output_NGH, *torch.autograd.grad(output_NGH, wanted, direction_NGH)]


def assert_like_the_plain_drafter(attention: str, device: str, packing: Packing) -> None:
    with_gradients = (attention, device) != ("flex", "cpu")
    dtype, tolerance = (torch.float64, TOLERANCE) if device == "cpu" else (torch.float32, CUDA_TOLERANCE)
    drafter = random_drafter(SHAPE).to(device, dtype)
    drafter.attention = attention
    all_found, all_expected = run(drafter, packing, with_gradients), run_plainly(packing)
    for n, block in enumerate(packing.blocks):
        assert relative_error(all_found[0][n].cpu(), all_expected[0][n]) < tolerance, block
    names = [*dict(drafter.named_parameters()), "features", "blocks"]
    for name, found, expected in zip(names, all_found[1:], all_expected[1:], strict=with_gradients):
        # Where no block has context, the context's gradients are zero.
        assert (found.cpu() - expected).abs().max() <= tolerance * expected.abs().max(), name


quiet_flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
on_cuda = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward pass on a CPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
FLEX = [pytest.param("flex", "cpu", marks=quiet_flex), pytest.param("flex", "cuda", marks=on_cuda)]
PACKINGS = [
    pytest.param(random_packing([150, 4, 33], [20, 0, 5], 7), id="a-sequence-without-blocks"),
    pytest.param(random_packing([40, 130], [2 * BLOCKS_PER_GROUP + 5, BLOCKS_PER_GROUP], 3), id="several-groups"),
    pytest.param(random_packing([200, 1, 9], [2, 1, 1], 130), id="blocks-wider-than-a-tile"),
    pytest.param(Packing([5, 170], [[0, 0], [170] * 18], 16), id="no-context-and-all-of-it"),
]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("attention", "device"), [("eager", "cpu"), ("structured", "cpu"), *FLEX])
def test_packed_sequences_equal_plain_ones(attention: str, device: str, packing: Packing):
    assert_like_the_plain_drafter(attention, device, packing)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(["eager", "structured"]), packings(max_blocks=20, max_block_size=9))
def test_any_packed_sequences_equal_plain_ones(attention: str, packing: Packing):
    assert_like_the_plain_drafter(attention, "cpu", packing)


def dense_mask(packing: Packing) -> Tensor:
    """Whether each of the Q block positions sees each of the K keys: context rows, then block positions."""
    T, N, G = sum(packing.num_tokens), sum(packing.num_blocks), packing.block_size
    rows = []
    for n, (_, first, anchor) in enumerate(packing.blocks):
        row = [first <= t < first + anchor for t in range(T)] + [other == n for other in range(N) for _ in range(G)]
        rows += [row] * G
    return torch.tensor(rows)


@settings(deadline=None, max_examples=40)
@given(packings(max_blocks=8), st.sampled_from([4, 8, 16]))
def test_the_listed_tiles_are_those_that_hold_anything_to_see(packing: Packing, tile: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "TILE", tile)
        mask = make_block_mask(packing.layout)
    seen_QK = dense_mask(packing)
    (Q, K), zero, sees = seen_QK.shape, torch.tensor(0), mask.mask_mod
    assert torch.equal(sees(zero, zero, torch.arange(Q)[:, None], torch.arange(K)), seen_QK)
    parts: tuple[Any, ...] = mask.as_tuple()
    num_partial, partial_columns, num_full, full_columns = parts[2:6]
    row_starts, column_starts = range(0, Q, tile), range(0, K, tile)
    assert num_partial.shape == num_full.shape == (1, 1, len(row_starts))
    for i, row in enumerate(row_starts):
        tiles = [seen_QK[row : row + tile, column : column + tile] for column in column_starts]
        partial = partial_columns[0, 0, i, : num_partial[0, 0, i]].tolist()
        full = full_columns[0, 0, i, : num_full[0, 0, i]].tolist()
        assert sorted(partial + full) == [j for j, each in enumerate(tiles) if each.any()]
        # A full tile masks nothing. All full tiles of the context are listed; those of a wide block may be missing.
        whole = {j for j, each in enumerate(tiles) if each.all()}
        assert {j for j in whole if column_starts[j] + tile <= sum(packing.num_tokens)} <= set(full) <= whole


@settings(deadline=None, max_examples=60)
@given(packings(max_blocks=8), st.sampled_from([1, 2, 3, BLOCKS_PER_GROUP]))
def test_a_group_is_of_one_sequence_and_ends_at_its_largest_anchor(packing: Packing, most: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "BLOCKS_PER_GROUP", most)
        groups = list(group_blocks(packing.layout, torch.float32))
    members = [packing.blocks[group.blocks] for group in groups]
    assert list(chain(*members)) == packing.blocks
    for group, blocks in zip(groups, members, strict=True):
        assert 0 < len(blocks) <= most
        ((_, first),) = {block[:2] for block in blocks}
        anchors = [anchor for _, _, anchor in blocks]
        assert group.rows == slice(first, first + max(anchors))
        expected = [[0.0 if t < anchor else float("-inf") for t in range(max(anchors))] for anchor in anchors]
        assert group.bias_NT.tolist() == expected


class ScoreCounter(TorchDispatchMode):
    """Number of scores: all inputs of softmaxes."""

    num_scores = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_scores += args[0].numel() if func is torch.ops.aten._softmax.default else 0
        return func(*args, **(kwargs or {}))


def test_the_cost_of_structured_attention_is_that_of_the_context_before_the_blocks():
    def count_scores(num_tokens: list[int], anchors: list[list[int]]) -> int:
        with ScoreCounter() as counter:
            run(random_drafter(SHAPE), Packing(num_tokens, anchors, G), with_gradients=False)
        return counter.num_scores // (SHAPE.num_layers * SHAPE.num_attention_heads)

    G, anchors = 7, list(range(0, 10 * 4 * BLOCKS_PER_GROUP, 10))
    largest = anchors[BLOCKS_PER_GROUP - 1 :: BLOCKS_PER_GROUP]
    expected = sum(BLOCKS_PER_GROUP * G * (anchor + G) for anchor in largest)
    assert count_scores([640], [anchors]) == count_scores([3000], [anchors]) == expected
    assert count_scores([3000, 640, 9], [[], anchors, [9]]) == expected + G * (9 + G)


# PyTorch reads the gradients of the tensors that it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("attention", ["eager", "flex"])
def test_compiled_layers_serve_all_layouts(attention: str, monkeypatch: pytest.MonkeyPatch):
    packed = [([90, 110], [30, 10]), ([50, 300, 8], [9, 50, 0]), ([250], [47]), ([20, 30], [51, 30])]
    packed += [([300], [1]), ([40], [2]), ([1], [40]), ([1], [1]), ([130], [18]), ([300], [19])]
    layouts = [random_packing(*counts, block_size=7) for counts in packed]
    drafter = random_drafter(SHAPE).double()
    drafter.attention = "eager"
    expected = [run(drafter, layout, with_gradients=True) for layout in layouts]
    drafter.attention = attention
    graphs = trace_compiled_modules(monkeypatch)
    drafter.compile_layers()
    found = [run(drafter, layout, with_gradients=True) for layout in layouts]
    for tensors in zip(chain(*found), chain(*expected), strict=True):
        assert relative_error(*tensors) < TOLERANCE
    assert len(graphs) == 2  # of the first layer, and of the others


def test_drafters_of_many_shapes_are_compiled_in_one_process(monkeypatch: pytest.MonkeyPatch):
    layout = random_packing([90, 110], [30, 10], block_size=7)
    graphs = trace_compiled_modules(monkeypatch)
    for intermediate_size in range(4, 13):
        drafter = random_drafter(replace(SHAPE, num_layers=1, intermediate_size=intermediate_size)).double()
        drafter.attention = "eager"
        (expected,) = run(drafter, layout, with_gradients=False)
        drafter.compile_layers()
        (found,) = run(drafter, layout, with_gradients=False)
        assert relative_error(found, expected) < TOLERANCE
    assert len(graphs) == 9  # PyTorch's own limit is 8
