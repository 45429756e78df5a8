"""A training step (forward, loss, backward): the project's form against the straightforward one.

The straightforward form is that of the public DFlash and VP-Drafter code: keys and values of context and blocks
computed together and concatenated in every layer, one dense boolean mask over all of them, norms and MLP as in
transformers' Qwen3, logits of the whole vocabulary for all block positions, and a weighted cross-entropy. Both forms
have the same weights and give the same loss.
"""

# T context tokens, N blocks, G block size, Q = N * G block positions, D context features, H hidden width
# V vocabulary, h query heads, k key-value heads, d head width
from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple, cast

import torch
from bench_write import measure_peak
from report import Figure, interleave, median_ratio
from torch import Tensor
from torch.nn import functional as F
from vpd.stages.drafter.blocks import show_prefix
from vpd.stages.drafter.model import Drafter, DrafterLayer, RMSNorm, SwiGLU, rotary, rotate
from vpd.stages.drafter.shape import DrafterShape
from vpd.stages.train.anchors import AnchorCandidates, choose_anchors
from vpd.stages.train.config import AnchorConfig, PrefixConfig, TrainConfig
from vpd.stages.train.cost import training_flops
from vpd.stages.train.objective import BlockLabels, HeadRows, block_loss, position_weights
from vpd.stages.train.prefix import BlockFacts, draw_prefixes
from workload import MIB, QWEN3, SMOLLM2

NAME = "train"
OURS, STRAIGHTFORWARD = "ours", "straightforward"
PREFIX = PrefixConfig(sampler="geometric", beta=0.9)
TRAIN = TrainConfig(prefix=PREFIX, normalize="batch")
TARGET_SECONDS, TARGET_BYTES = 0.6, 0.5
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative, of the loss. bfloat16 keeps 8 bits of a logit, and of a log-probability in the straightforward form."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Of dense products in bf16, by a part of the device's name."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One sequence and its blocks. Weights, states and tokens are random; the seeds are the same in both forms."""

    data: str
    device: str
    precision: str
    attention: str
    num_tokens: int
    num_blocks: int
    rounds: int
    shape: DrafterShape
    compiled: bool = False
    """Whether the layers of our form are."""

    @property
    def label(self) -> str:
        return f"{self.precision}, compiled" if self.compiled else self.precision


def make_shape(
    vocab_size: int, hidden_size: int, heads: tuple[int, int], head_dim: int, intermediate_size: int, num_context: int
) -> DrafterShape:
    """A drafter of five layers and blocks of 16, with heads and widths of its target."""
    return DrafterShape(
        num_layers=5,
        hidden_size=hidden_size,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=8192,
        vocab_size=vocab_size,
        block_size=16,
        mask_token_id=vocab_size - 1,
        target_layer_ids=tuple(range(1, num_context + 1)),
        num_target_layers=num_context + 3,
    )


SMOLLM2_SHAPE = make_shape(49152, 576, (9, 3), 64, 1536, 3)
QWEN3_SHAPE = make_shape(151936, 4096, (32, 8), 128, 12288, 5)
ON_CPU = [
    Setting(SMOLLM2.name, "cpu", "float32", "structured", 512, 64, 5, SMOLLM2_SHAPE),
    Setting(SMOLLM2.name, "cpu", "bfloat16", "structured", 512, 64, 3, SMOLLM2_SHAPE),
]
ON_GPU = [
    Setting(QWEN3.name, "cuda", "bfloat16", "flex", 3072, 512, 10, QWEN3_SHAPE, compiled=compiled)
    for compiled in (False, True)
]


class Batch(NamedTuple):
    features_TD: Tensor
    anchors_N: Tensor
    block_ids_NG: Tensor
    labels: BlockLabels
    embed_VH: Tensor
    head_VH: Tensor


class Measured(NamedTuple):
    """What a step gave."""

    loss: float
    grad_norm: float
    seconds: float


def bench_train(folder: Path) -> list[Figure]:
    settings = ON_CPU + (ON_GPU if torch.cuda.is_available() else [])
    return [figure for setting in settings for figure in compare(setting)]


def compare(setting: Setting) -> list[Figure]:
    """Medians over the rounds, the forms in turn, each in a process of its own, which holds its memory alone."""
    with ExitStack() as stack:
        forms = {name: stack.enter_context(closing(Form(setting, name))) for name in (OURS, STRAIGHTFORWARD)}
        first = {name: form.step() for name, form in forms.items()}
        check_equal(first[OURS], first[STRAIGHTFORWARD], TOLERANCES[setting.precision])
        seconds = interleave({name: form.seconds for name, form in forms.items()}, setting.rounds)
        peaks = {name: form.peak_bytes() for name, form in forms.items()}

    def figure(name: str, value: float, unit: str = "x", target: float | None = None) -> Figure:
        name = f"{setting.label}: {name}"
        return Figure(
            benchmark=NAME, name=name, data=setting.data, value=value, unit=unit, target=target, less_is_better=True
        )

    found = [
        figure("step / straightforward", median_ratio(seconds[OURS], seconds[STRAIGHTFORWARD]), "x", TARGET_SECONDS),
        figure("memory of a step / straightforward", peaks[OURS] / peaks[STRAIGHTFORWARD], "x", TARGET_BYTES),
    ]
    for name in forms:
        found.append(figure(f"step, {name}", median(seconds[name]), "s"))
        found.append(figure(f"memory of a step, {name}", peaks[name] / MIB, "MiB"))
    if setting.device == "cuda":
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in torch.cuda.get_device_name()), None)
        for name in forms if peak is not None else []:
            share = model_flops(setting) / median(seconds[name]) / cast(float, peak)
            found.append(figure(f"model flops utilization, {name}", 100 * share, "%"))
    return found


def check_equal(ours: Measured, straightforward: Measured, tolerance: float) -> None:
    """The loss, and the norm of the gradient at ten times its tolerance."""
    for a, b, allowed in (
        (ours.loss, straightforward.loss, tolerance),
        (ours.grad_norm, straightforward.grad_norm, 10 * tolerance),
    ):
        assert abs(a - b) <= allowed * abs(b), (ours, straightforward)


class Form:
    """One form's process."""

    def __init__(self, setting: Setting, name: str):
        self.setting, self.name = setting, name
        self.pool = ProcessPoolExecutor(1, get_context("spawn"))

    def step(self) -> Measured:
        return self.pool.submit(run_step, self.setting, self.name).result()

    def seconds(self) -> float:
        return self.step().seconds

    def peak_bytes(self) -> int:
        return self.pool.submit(find_peak, self.setting, self.name).result()

    def close(self) -> None:
        self.pool.shutdown()


class Step:
    """A form with its weights and batch in memory."""

    def __init__(self, setting: Setting, name: str):
        self.drafter = Drafter(setting.shape, setting.attention).to(setting.device)
        self.drafter.init_weights(torch.Generator(setting.device).manual_seed(0))
        if setting.compiled and name == OURS:
            self.drafter.compile_layers()
        self.dtype = torch.bfloat16 if setting.precision == "bfloat16" else torch.float32
        self.device = setting.device
        self.loss = our_loss if name == OURS else straightforward_loss
        batch = make_batch(setting, self.dtype)
        self.run(few_blocks(batch))  # Loads code.
        self.peak = measure_peak()
        self.batch = batch
        if self.device == "cuda":
            self.run(batch)  # Compiles.
            self.peak = measure_peak_on_gpu()

    def run(self, batch: Batch) -> Measured:
        self.drafter.zero_grad()
        started = self.now()
        loss = self.loss(self.drafter, batch, self.dtype)
        loss.backward()
        seconds = self.now() - started
        gradients = [parameter.grad for parameter in self.drafter.parameters() if parameter.grad is not None]
        grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self.drafter.zero_grad()
        return Measured(float(loss.detach()), grad_norm, seconds)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@cache
def load(setting: Setting, name: str) -> Step:
    return Step(setting, name)


def run_step(setting: Setting, name: str) -> Measured:
    step = load(setting, name)
    return step.run(step.batch)


def find_peak(setting: Setting, name: str) -> int:
    """Bytes by which memory exceeded weights and batch at most, gradients included."""
    return load(setting, name).peak()


def measure_peak_on_gpu() -> Callable[[], int]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return lambda: torch.cuda.max_memory_allocated() - before


def make_batch(setting: Setting, dtype: torch.dtype) -> Batch:
    """Blocks at uniform anchors, all their positions labeled, prefix lengths by Eq. 6 of arXiv 2606.04446."""
    shape, N, G = setting.shape, setting.num_blocks, setting.shape.block_size
    generator = torch.Generator().manual_seed(1)
    num_features = len(shape.target_layer_ids) * shape.hidden_size
    features_TD = torch.randn(setting.num_tokens, num_features, generator=generator)
    positions_M = torch.arange(1, setting.num_tokens + 1)
    candidates = AnchorCandidates(positions_M, torch.full_like(positions_M, G - 1), G, None)
    anchors_N = positions_M[choose_anchors(AnchorConfig(), candidates, N, generator)]
    tokens_NG = torch.randint(shape.mask_token_id, (N, G), generator=generator)
    num_labels_N = torch.full((N,), G - 1)
    prefix_len_N = draw_prefixes(PREFIX, BlockFacts(num_labels_N, G, None), torch.rand(N, generator=generator))
    labels = BlockLabels(tokens_NG, (torch.arange(G) > 0).expand(N, G), prefix_len_N)
    matrices = [torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype, device=setting.device) for _ in range(2)]
    on_device = torch.Generator(setting.device).manual_seed(2)
    embed_VH, head_VH = (matrix.normal_(std=0.02, generator=on_device) for matrix in matrices)
    return Batch(
        features_TD.to(setting.device),
        anchors_N.to(setting.device),
        show_prefix(tokens_NG, prefix_len_N, shape.mask_token_id).to(setting.device),
        BlockLabels(*(field.to(setting.device) for field in labels)),
        embed_VH,
        head_VH,
    )


def few_blocks(batch: Batch) -> Batch:
    labels = BlockLabels(*(field[:2] for field in batch.labels))
    return batch._replace(anchors_N=batch.anchors_N[:2], block_ids_NG=batch.block_ids_NG[:2], labels=labels)


def our_loss(drafter: Drafter, batch: Batch, dtype: torch.dtype) -> Tensor:
    with autocast(batch, dtype):
        context = drafter.context(batch.features_TD)
        embedded_NGH = batch.embed_VH[batch.block_ids_NG]
        states_PH = drafter(embedded_NGH, batch.anchors_N, context, wanted_P=batch.labels.predicted_P)
    parts = block_loss(states_PH, batch.labels, HeadRows(batch.head_VH, None, None), TRAIN)
    return parts.loss_sum / parts.denominator


def straightforward_loss(drafter: Drafter, batch: Batch, dtype: torch.dtype) -> Tensor:
    with autocast(batch, dtype):
        states_QH = straightforward_states(drafter, batch)
    logits_QV = F.linear(states_QH, batch.head_VH)
    loss_Q = F.cross_entropy(logits_QV, batch.labels.labels_NG.flatten(), reduction="none")
    with torch.no_grad():
        (logits_QV.argmax(dim=1) == batch.labels.labels_NG.flatten()).sum()  # The accuracy, which both forms find.
    weights_Q = position_weights(batch.labels, TRAIN.tau).flatten()
    return (loss_Q * weights_Q).sum() / weights_Q.sum()


def straightforward_states(drafter: Drafter, batch: Batch) -> Tensor:
    """Hidden states [Q, H], every block position a row of one long sequence."""
    shape, (N, G) = drafter.shape, batch.block_ids_NG.shape
    T, h, k, d = len(batch.features_TD), shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    device = batch.anchors_N.device
    context_TH = plain_norm(drafter.hidden_norm, drafter.fc(batch.features_TD))
    states_QH = batch.embed_VH[batch.block_ids_NG].flatten(0, 1)
    block_positions_Q = (batch.anchors_N[:, None] + torch.arange(G, device=device)).flatten()
    rope = rotary(torch.cat([torch.arange(T, device=device), block_positions_Q]), shape, states_QH.dtype)
    rope_of_blocks = rope[0][T:], rope[1][T:]
    block_Q = torch.arange(N, device=device).repeat_interleave(G)
    in_context_QT = torch.arange(T, device=device) < batch.anchors_N[block_Q, None]
    mask = torch.cat([in_context_QT, block_Q[:, None] == block_Q], dim=1)
    for layer in drafter.layers:
        layer = cast(DrafterLayer, layer)
        attention = layer.self_attn
        inputs_QH = plain_norm(layer.input_layernorm, states_QH)
        query = rotate(plain_norm(attention.q_norm, attention.q_proj(inputs_QH).view(-1, h, d)), rope_of_blocks)
        key = torch.cat([attention.k_proj(context_TH), attention.k_proj(inputs_QH)]).view(-1, k, d)
        value = torch.cat([attention.v_proj(context_TH), attention.v_proj(inputs_QH)]).view(-1, k, d)
        key = rotate(plain_norm(attention.k_norm, key), rope)
        key, value = (x.repeat_interleave(h // k, dim=1) for x in (key, value))
        heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
        mixed_hQd = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)[0]
        states_QH = states_QH + attention.o_proj(mixed_hQd.transpose(0, 1).flatten(1))
        states_QH = states_QH + plain_mlp(layer.mlp, plain_norm(layer.post_attention_layernorm, states_QH))
    return plain_norm(drafter.norm, states_QH)


def plain_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """In float32, as in transformers' Qwen3."""
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + cast(float, norm.eps))
    return norm.weight.to(x.dtype) * values.to(x.dtype)


def plain_mlp(mlp: SwiGLU, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def autocast(batch: Batch, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(batch.features_TD.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def model_flops(setting: Setting) -> float:
    batch = make_batch(setting, torch.bfloat16)
    num_labels = len(batch.labels.predicted_P)
    return training_flops(
        setting.shape, setting.num_tokens, setting.num_blocks, num_labels, float(batch.anchors_N.sum())
    )
