"""The real vLLM drafts with exported drafters, next to the replay and to vpd's own hidden states."""

# C context tokens, G block size, H hidden width, K context layers, D = K x H
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import vpd
from safetensors.torch import load_file
from support.in_process import in_process
from support.tiny import TRAIN
from support.tiny import vpd as command
from torch import Tensor
from vpd.data.cache.index import SequenceRow
from vpd.stages.drafter.checkpoint import load_drafter, save_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.target_pieces import TargetPieces
from vpd.stages.train.checkpoints import find_drafter

pytestmark = pytest.mark.engine
BLOCK_SIZE, MAX_NEW_TOKENS = 4, 24
ROUNDING = 2e-5
"""Largest difference of float32 values of order one that rounding explains."""


class Draft(NamedTuple):
    """One pass of the drafter in vLLM."""

    features_CD: Tensor
    """The target's states before the anchor."""
    block_ids_G: Tensor
    states_GH: Tensor


@dataclass
class Recorder:
    """Stands between vLLM's proposer and its DFlash model, and records what goes in and out. One request at a time."""

    model: Any
    drafts: list[Draft] = field(default_factory=list)
    features: dict[int, Tensor] = field(default_factory=dict)
    """Position -> the target's states [D] at it."""

    def __post_init__(self) -> None:
        self._combined = torch.empty(0)
        for name in ("combine_hidden_states", "precompute_and_store_context_kv", "forward"):
            setattr(self.model, name, getattr(self, name)(getattr(self.model, name)))

    def combine_hidden_states(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(hidden_states: Tensor) -> Tensor:
            self._combined = hidden_states.clone()
            return original(hidden_states)

        return call

    def precompute_and_store_context_kv(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(states: Tensor, positions: Tensor, slots: Tensor | None = None) -> None:
            self.features |= dict(zip(positions.tolist(), self._combined, strict=False))
            original(states, positions, slots)

        return call

    def forward(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
            states = original(input_ids, positions, inputs_embeds)
            anchor = int(positions[0])
            seen = [self.features[position] for position in range(anchor)]
            self.drafts.append(Draft(torch.stack(seen), input_ids[:BLOCK_SIZE].clone(), states[:BLOCK_SIZE].clone()))
            return states

        return call


class Served(NamedTuple):
    """What the engine did with some prompts of the cache."""

    answers: list[list[int]]
    expected: list[list[int]]
    """The target's own answers, as the cache has them."""
    cycles: int
    """Drafts that the target verified."""

    @property
    def alpha(self) -> float:
        """Tokens that a cycle commits; each answer's first token comes without one."""
        return sum(len(answer) - 1 for answer in self.answers) / self.cycles


@dataclass
class Server:
    """vLLM with a drafter."""

    engine: Any
    recorder: Recorder
    drafter: Drafter
    """The same drafter in vpd."""
    cache: vpd.Cache
    pieces: TargetPieces

    def answer(self, rows: list[SequenceRow]) -> Served:
        from vllm import SamplingParams

        self.recorder.drafts.clear()
        sampling = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
        answers, expected, before = [], [], self._num_cycles()
        for row in rows:
            ids = self.cache.read(row).token_ids_S.tolist()
            self.recorder.features.clear()
            (out,) = self.engine.generate({"prompt_token_ids": ids[: row.prompt_len]}, sampling, use_tqdm=False)
            answers.append([*out.outputs[0].token_ids])
            expected.append(ids[row.prompt_len :])
        return Served(answers, expected, self._num_cycles() - before)

    def _num_cycles(self) -> int:
        return next(each.value for each in self.engine.get_metrics() if each.name == "vllm:spec_decode_num_drafts")

    @torch.inference_mode()
    def difference(self, of_context: Drafter | None = None) -> float:
        """Largest difference between the recorded hidden states and those that vpd computes.

        Args:
            of_context: makes the keys and values of the context; None: the drafter.
        """
        of_context, largest = of_context or self.drafter, 0.0
        for draft in self.recorder.drafts:
            context = of_context.context(draft.features_CD)
            anchors_N = torch.tensor([len(draft.features_CD)])
            states_GH = self.drafter(self.pieces.embed_VH[draft.block_ids_G][None], anchors_N, context)[0]
            largest = max(largest, float((states_GH - draft.states_GH).abs().max()))
        return largest


@contextmanager
def serving(folder: Path, target: Path, cache: vpd.Cache) -> Iterator[Server]:
    """A server as a user starts it, but in this process and with one request at a time."""
    from vllm import LLM

    speculation = {"method": "dflash", "model": str(folder), "num_speculative_tokens": BLOCK_SIZE - 1}
    with in_process():
        engine = LLM(
            str(target),
            dtype="float32",
            max_model_len=256,
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=1 << 26,
            disable_log_stats=False,
            speculative_config=speculation,
        )
        try:
            (model,) = engine.collective_rpc(lambda worker: worker.model_runner.drafter.model)
            yield Server(engine, Recorder(model), load_drafter(folder), cache, vpd.load_pieces(cache))
        finally:
            engine.llm_engine.engine_core.shutdown()


def with_one_key_norm(drafter: Drafter) -> Drafter:
    """A copy of a drafter, in which all layers have the first layer's norm of keys."""
    changed = copy.deepcopy(drafter)
    for layer in changed.layers:
        key_norm(layer).load_state_dict(key_norm(changed.layers[0]).state_dict())
    return changed


def key_norm(layer: Any) -> Any:
    return layer.self_attn.k_norm


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> dict[str, Path]:
    """Runs of a first drafter and of a VP-Drafter with two layers."""
    root = tmp_path_factory.mktemp("runs")
    shape = {"num_layers": 2, "block_size": BLOCK_SIZE}
    command("train", tiny_cache, "--out", root / "first", objective="dflash", max_steps=40, **shape, **TRAIN)
    start = {"init": root / "first", "prefix_sampler": "geometric"}
    command("train", tiny_cache, "--out", root / "vp", max_steps=20, **start, **shape, **TRAIN)
    return {"first": root / "first", "vp": root / "vp"}


@pytest.mark.parametrize(("name", "form"), [("first", "dflash"), ("vp", "speculators")])
def test_the_real_vllm_drafts_as_vpd_does(
    name: str,
    form: str,
    runs: dict[str, Path],
    tiny_llama: Path,
    tiny_cache: Path,
    tmp_path: Path,
    vllm_imported: None,
):
    """vLLM's kernel for CPUs applies the first layer's norm of keys to the context of every layer, so that a drafter of
    several layers drafts worse there than on a GPU. Layers that share this norm are not affected."""
    drafter = with_one_key_norm(load_drafter(find_drafter(runs[name])))
    mode = {"first": "dflash", "vp": "vp_drafter"}[name]
    config = drafter.shape.to_json(training_mode=mode, prefix_weight_base=None)
    save_drafter(drafter.state_dict(), tmp_path / "drafter", config)
    out = tmp_path / "exported"
    command("export", tmp_path / "drafter", out, format=form, target=tiny_llama)
    cache = vpd.open_cache(tiny_cache)
    rows = [row for row in cache.rows if row.num_supervised == row.num_tokens + 1 - row.prompt_len]
    with serving(out, tiny_llama, cache) as server:
        assert all_names(server.recorder.model) == {*load_file(out / "model.safetensors")}
        served = server.answer(rows)
        assert served.answers == served.expected
        assert server.difference() < ROUNDING
        # One request after another: the cycles are those of the replay.
        replayed = vpd.replay(cache, out, holdout=1, device="cpu").to_json()["sequences"]
        cycles = dict(zip(replayed["seq_ids"], replayed["num_cycles"]["first"], strict=True))
        assert served.cycles == sum(cycles[row.seq_id] for row in rows)
        assert served.alpha > 1.2

        scale_last_key_norm(server)
        assert server.answer(rows[:2]).answers == served.answers[:2]
        assert server.difference(with_one_key_norm(server.drafter)) < ROUNDING
        assert server.difference() > 0.1, "this vLLM applies each layer's own norm of keys: say so in docs/export.md"


def all_names(model: Any) -> set[str]:
    """Names in a checkpoint of all weights that vLLM's model has, except those that it takes from the target."""
    stacked = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    found = set()
    for name, _ in model.model.named_parameters():
        joined = next((each for each in stacked if each in name), "")
        found |= {name.replace(joined, part) for part in stacked.get(joined, ("",))}
    return found - {"embed_tokens.weight", "mask_embedding"}


def scale_last_key_norm(server: Server) -> None:
    """Triples the last layer's norm of keys, in vLLM and in vpd."""
    model = server.recorder.model.model
    for weight in (
        model._k_norm_weights[-1],
        key_norm(model.layers[-1]).weight.data,
        key_norm(server.drafter.layers[-1]).weight.data,
    ):
        weight *= 3
