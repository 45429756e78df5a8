"""Values and gradients of the loss against both published forms, written out with dense masks and all logits."""

# S tokens of a sequence, N blocks, G block size, V vocabulary, D context features
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.plain_drafter import plain_drafter, random_drafter, relative_error
from support.recorded import make_config, pack_all
from support.tiny import SHAPE, make_cached, make_row
from torch import Tensor
from vpd.data.cache.reader import CachedSequence
from vpd.stages.train.config import TrainConfig
from vpd.stages.train.objective import HeadRows, block_loss
from vpd.stages.train.samples import SequenceBlocks, TrainingBlocks, draw_blocks

G, V, H, K = SHAPE.block_size, SHAPE.vocab_size, SHAPE.hidden_size, len(SHAPE.target_layer_ids)
MASK = SHAPE.mask_token_id
TURNS = ["..aaaaaaaaaaaa", "...aaaa.aaaaaaaaa", ".aaa"]
FORMS: dict[str, dict[str, Any]] = {
    "public-code": {"prefix": {"sampler": "visible-geometric", "beta": 0.9}, "normalize": "batch", "tau": 7.0},
    "paper": {"prefix": {"sampler": "geometric", "beta": 0.9}, "normalize": "block", "tau": 7.0},
}


def make_sequences() -> list[CachedSequence]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, turns in enumerate(TURNS):
        T, mask = len(turns), [letter == "a" for letter in turns]
        hidden_TKH = torch.randn(T, K, H, generator=generator).bfloat16()
        tokens = torch.randint(V - 1, (T,), generator=generator).tolist()
        row = make_row(f"s{i}", T, num_supervised=sum(mask))
        found.append(make_cached(row, hidden_TKH, tokens, mask, tokens))
    return found


def draw(config: TrainConfig) -> tuple[list[CachedSequence], list[SequenceBlocks], TrainingBlocks]:
    sequences = make_sequences()
    drawn = [draw_blocks(sequence, None, config, G, 0) for sequence in sequences]
    kept = [each for each in drawn if each is not None]
    assert len(kept) == len(sequences)
    return sequences, kept, pack_all(sequences, kept, config, G, MASK)


def written_out(
    weights: Mapping[str, Tensor],
    embed_VH: Tensor,
    head_VH: Tensor,
    sequences: list[CachedSequence],
    drawn: list[SequenceBlocks],
    prefixes: list[list[int]],
    form: str,
) -> Tensor:
    """The loss of the micro-batch from anchors and prefix lengths: all logits, and a loop over positions."""
    weighted, total_weight, means = torch.zeros(()), 0.0, []
    for sequence, blocks, lengths in zip(sequences, drawn, prefixes, strict=True):
        tokens, mask = sequence.token_ids_S.tolist(), sequence.loss_mask_S.tolist()
        anchors = blocks.anchors_N.tolist()
        pairs = zip(anchors, lengths, strict=True)
        ids = [[tokens[anchor + k] if k <= length else MASK for k in range(G)] for anchor, length in pairs]
        features_TD = sequence.hidden_TKH.flatten(1).double()
        states_NGH = plain_drafter(weights, SHAPE, features_TD, embed_VH[torch.tensor(ids)], anchors)
        logits_NGV = states_NGH @ head_VH.T
        for n, (anchor, length) in enumerate(zip(anchors, lengths, strict=True)):
            block_sum, block_weight = torch.zeros(()), 0.0
            for k in range(1, G):
                if anchor + k >= len(tokens) or not mask[anchor + k]:
                    break
                if k > length:
                    weight = float(torch.exp(torch.tensor(-(k - length - 1) / 7.0)))
                    loss = logits_NGV[n, k].logsumexp(dim=0) - logits_NGV[n, k, tokens[anchor + k]]
                    block_sum, block_weight = block_sum + weight * loss, block_weight + weight
            weighted, total_weight = weighted + block_sum, total_weight + block_weight
            means.append(block_sum / block_weight)
    return weighted / (total_weight + 1e-6) if form == "public-code" else torch.stack(means).mean()


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_the_published_form(form: str):
    config = make_config(**FORMS[form])
    sequences, drawn, blocks = draw(config)
    generator = torch.Generator().manual_seed(1)
    embed_VH, head_VH = torch.randn(V, H, generator=generator), torch.randn(V, H, generator=generator)
    drafter = random_drafter(SHAPE, seed=3)

    context = drafter.context(blocks.features_TD.float(), blocks.num_tokens)
    embedded_NGH = embed_VH[blocks.block_ids_NG]
    states_PH = drafter(embedded_NGH, blocks.anchors_N, context, blocks.num_blocks, blocks.labels.predicted_P)
    parts = block_loss(states_PH, blocks.labels, HeadRows(head_VH, None, None), config)
    found = parts.loss_sum / parts.denominator
    found_gradients = torch.autograd.grad(found, [*drafter.parameters()])

    visible = [sum(token != MASK for token in ids) - 1 for ids in blocks.block_ids_NG.tolist()]
    prefixes = [lengths.tolist() for lengths in torch.tensor(visible).split(blocks.num_blocks)]
    if form == "public-code":
        assert min(visible) == 0  # only where a turn leaves a single label
        labeled_N = torch.cat([each.labeled_NG.sum(dim=1) for each in drawn])
        assert all((length == 0) == (labels == 1) for length, labels in zip(visible, labeled_N.tolist(), strict=True))
    # The reference is in float64, so the difference is rounding in float32.
    weights = {name: value.detach().double().requires_grad_() for name, value in drafter.named_parameters()}
    expected = written_out(weights, embed_VH.double(), head_VH.double(), sequences, drawn, prefixes, form)
    expected_gradients = torch.autograd.grad(expected, [*weights.values()])
    errors = {"loss": relative_error(found.double(), expected)}
    for name, ours, theirs in zip(weights, found_gradients, expected_gradients, strict=True):
        errors[name] = relative_error(ours.double(), theirs)
    worst = max(errors, key=lambda name: errors[name])
    print(f"{form}: loss {errors['loss']:.1e}, worst gradient {worst} {errors[worst]:.1e}")
    assert errors[worst] < 1e-5, (worst, errors[worst])
