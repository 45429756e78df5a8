"""The drafter against a plain implementation, and the inputs on which a block's output may depend."""

# T context tokens, N blocks, G block size, M = N * G positions of all blocks, D context features (K layers x H)
# H hidden width, d head width
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from support.plain_drafter import plain_drafter, random_drafter, relative_error, rms_norm
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding
from vpd.stages.drafter.model import Drafter, SwiGLU
from vpd.stages.drafter.shape import DrafterShape

# The drafter runs in float64 here, except for its softmax and its rotary angles, which are float32. At positions below
# 64 the error of an angle is at most 64 * 2^-24 = 4e-6, and a few layers and their gradients multiply the error by a
# small number. A missing position, or a position that is wrong by one, changes results by more than 1e-2.
TOLERANCE = 5e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With tensors this small, several threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Case(NamedTuple):
    id: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    num_context_layers: int
    num_context: int
    block_size: int
    anchors: list[int]


CASES = [
    Case("one-block", 2, 2, 4, 1, 1, 6, 4, [3]),
    Case("first-and-last-anchor", 2, 2, 4, 2, 2, 7, 3, [1, 7]),
    Case("grouped-query", 6, 2, 4, 2, 1, 9, 4, [2, 5, 6, 9]),
    Case("one-key-value-head", 4, 1, 6, 1, 3, 5, 5, [1, 3]),
    Case("overlapping-and-equal-anchors", 4, 2, 2, 2, 1, 8, 6, [4, 4, 5]),
    Case("nothing-before-the-anchor", 2, 1, 4, 2, 1, 4, 3, [0, 2]),
    Case("block-of-two", 2, 2, 8, 3, 2, 40, 2, [1, 20, 39]),
]


def make_shape(case: Case) -> DrafterShape:
    return DrafterShape(
        num_layers=case.num_layers,
        hidden_size=12,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        intermediate_size=10,
        rms_norm_eps=1e-3,
        rope_theta=50.0,
        max_position_embeddings=64,
        vocab_size=20,
        block_size=case.block_size,
        mask_token_id=19,
        target_layer_ids=tuple(range(case.num_context_layers)),
        num_target_layers=8,
    )


def random_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features_TD = torch.randn(case.num_context, case.num_context_layers * 12, generator=generator, dtype=dtype)
    blocks_NGH = torch.randn(len(case.anchors), case.block_size, 12, generator=generator, dtype=dtype)
    return features_TD, blocks_NGH, torch.tensor(case.anchors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_and_gradients_are_those_of_the_plain_implementation(case: Case):
    shape = make_shape(case)
    drafter = random_drafter(shape).double()
    features_TD, blocks_NGH, anchors_N = random_inputs(case, torch.float64)
    direction_NGH = torch.randn(blocks_NGH.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    inputs = [features_TD.clone().requires_grad_(), blocks_NGH.clone().requires_grad_()]
    found_NGH = drafter(inputs[1], anchors_N, drafter.context(inputs[0]))
    names = [*dict(drafter.named_parameters()), "features", "blocks"]
    found_gradients = torch.autograd.grad((found_NGH * direction_NGH).sum(), [*drafter.parameters(), *inputs])

    weights = {name: value.detach().clone().requires_grad_() for name, value in drafter.named_parameters()}
    plain_inputs = [features_TD.clone().requires_grad_(), blocks_NGH.clone().requires_grad_()]
    expected_NGH = plain_drafter(weights, shape, plain_inputs[0], plain_inputs[1], case.anchors)
    expected_gradients = torch.autograd.grad((expected_NGH * direction_NGH).sum(), [*weights.values(), *plain_inputs])

    assert relative_error(found_NGH, expected_NGH) < TOLERANCE
    for name, found, expected in zip(names, found_gradients, expected_gradients, strict=True):
        assert relative_error(found, expected) < TOLERANCE, name


def test_a_block_without_context_is_a_bidirectional_qwen3_layer():
    # A third implementation, transformers' Qwen3, shows that the grouping of heads, RoPE's pairs and the places of the
    # norms are right.
    case = Case("", 4, 2, 4, 1, 1, 3, 5, [0])
    shape = make_shape(case)
    drafter = random_drafter(shape).double()
    features_TD, blocks_NGH, anchors_N = random_inputs(case, torch.float64)
    config = Qwen3Config(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        num_hidden_layers=1,
    )
    config._attn_implementation = "eager"
    layer = Qwen3DecoderLayer(config, layer_idx=0).double()
    layer.load_state_dict(drafter.layers[0].state_dict())
    positions = torch.arange(case.block_size)[None]
    expected = layer(blocks_NGH, position_embeddings=Qwen3RotaryEmbedding(config)(blocks_NGH, positions))
    expected = rms_norm(expected, drafter.norm.weight, shape.rms_norm_eps)
    found = drafter(blocks_NGH, anchors_N, drafter.context(features_TD))
    assert relative_error(found, expected) < TOLERANCE


# Inputs of an output. Masked scores give weights of exactly zero, so outputs are equal bit for bit.

SEEN = Case("", 4, 2, 4, 2, 2, 9, 4, [3, 5, 9])


class World(NamedTuple):
    """One drafter with its inputs; `run` gives the blocks' outputs [N, G, H]."""

    drafter: Drafter
    features_TD: Tensor
    blocks_NGH: Tensor
    anchors_N: Tensor

    def run(self) -> Tensor:
        with torch.no_grad():
            return self.drafter(self.blocks_NGH, self.anchors_N, self.drafter.context(self.features_TD))


@pytest.fixture
def world() -> World:
    return World(random_drafter(make_shape(SEEN)), *random_inputs(SEEN, torch.float32))


@pytest.mark.parametrize("block", range(3))
def test_states_at_and_after_the_anchor_are_never_seen(world: World, block: int):
    before = world.run()
    world.features_TD[world.anchors_N[block] :] += 3.0
    assert torch.equal(world.run()[block], before[block])


@pytest.mark.parametrize("block", range(3))
def test_every_state_before_the_anchor_is_seen_by_every_position(world: World, block: int):
    before = world.run()
    for position in range(SEEN.anchors[block]):
        changed = world.features_TD.clone()
        changed[position] += 3.0
        after = world._replace(features_TD=changed).run()
        assert (after[block] != before[block]).any(dim=1).all(), position


@pytest.mark.parametrize("block", range(3))
def test_blocks_never_see_each_other(world: World, block: int):
    before = world.run()
    world.blocks_NGH[block] += 3.0
    after = world.run()
    others = [other for other in range(3) if other != block]
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[block], before[block])


@pytest.mark.parametrize("position", range(4))
def test_a_block_sees_itself_in_both_directions(world: World, position: int):
    before = world.run()
    world.blocks_NGH[1, position] += 3.0
    assert (world.run()[1] != before[1]).any(dim=1).all()


def test_a_block_does_not_depend_on_the_company_it_is_computed_in(world: World):
    # The context is cut at the anchor and there are no other blocks, so sums have other shapes and round differently.
    together = world.run()
    for block, anchor in enumerate(SEEN.anchors):
        one = slice(block, block + 1)
        alone = World(world.drafter, world.features_TD[:anchor], world.blocks_NGH[one], world.anchors_N[one]).run()
        torch.testing.assert_close(alone[0], together[block], rtol=1e-4, atol=1e-5)


def test_drawn_weights_depend_on_the_generator_alone():
    shape = make_shape(SEEN)
    states = []
    for seed in (5, 5, 6):
        drafter = Drafter(shape)
        drafter.init_weights(torch.Generator().manual_seed(seed))
        states.append(drafter.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name, value in states[0].items():
        if value.dim() == 1:
            assert bool((value == 1).all()), name
        else:
            assert not torch.equal(value, states[2][name]), name
            # With at least 120 entries, the standard deviation of their standard deviation is below 7 %.
            assert float(value.std()) == pytest.approx(0.02, rel=0.3), name


@pytest.mark.parametrize("num_blocks", [[2, 3, 1], [3, 0, 2]], ids=["blocks-everywhere", "a-sequence-without-blocks"])
def test_packed_sequences_are_what_each_is_alone(num_blocks: list[int]):
    shape = make_shape(CASES[2])
    drafter = random_drafter(shape).double()
    generator = torch.Generator().manual_seed(5)
    num_tokens = [7, 4, 9]
    features = [torch.randn(count, 12, generator=generator, dtype=torch.float64) for count in num_tokens]
    blocks = [torch.randn(count, 4, 12, generator=generator, dtype=torch.float64) for count in num_blocks]
    anchors = [
        torch.randint(tokens + 1, (count,), generator=generator)
        for tokens, count in zip(num_tokens, num_blocks, strict=True)
    ]
    direction = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in blocks]

    context = drafter.context(torch.cat(features), num_tokens)
    packed_NGH = drafter(torch.cat(blocks), torch.cat(anchors), context, num_blocks)
    packed_gradients = torch.autograd.grad((packed_NGH * torch.cat(direction)).sum(), [*drafter.parameters()])

    total = torch.zeros((), dtype=torch.float64)
    alone = []
    for features_TD, blocks_NGH, anchors_N, direction_NGH in zip(features, blocks, anchors, direction, strict=True):
        if len(blocks_NGH):
            alone.append(drafter(blocks_NGH, anchors_N, drafter.context(features_TD)))
            total = total + (alone[-1] * direction_NGH).sum()
    assert relative_error(packed_NGH, torch.cat(alone)) < TOLERANCE
    for found, expected in zip(packed_gradients, torch.autograd.grad(total, [*drafter.parameters()]), strict=True):
        assert relative_error(found, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # PyTorch's own use
def test_the_backward_pass_keeps_no_product_of_gates_and_values():
    """The factors are kept, compiled or not, and the product, as large as each factor, is recomputed."""
    shape = make_shape(CASES[2])
    mlp = SwiGLU(shape)
    states_PH = torch.randn(50, shape.hidden_size, requires_grad=True)
    wide = (50, shape.intermediate_size)
    assert kept_shapes(mlp, states_PH).count(wide) == 2
    torch.compiler.reset()
    mlp.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    assert kept_shapes(mlp, states_PH).count(wide) == 2


def kept_shapes(module: nn.Module, inputs: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the tensors that are saved for a module's backward pass, without repetition."""
    shapes: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        shapes[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(inputs)
    del output
    return [*shapes.values()]
