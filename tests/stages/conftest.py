"""Whole runs, each made once by the project's own commands."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.in_process import in_process
from support.tiny import PROMPTS as EXTRACT_PROMPTS
from support.tiny import write_jsonl
from support.tiny_world import World, make_world
from vpd.pipeline.commands.draft import run_draft
from vpd.pipeline.commands.extract import run_extract
from vpd.pipeline.commands.train import run_train
from vpd.pipeline.config import load_config
from vpd.pipeline.demo import PROMPTS, make_target

Run = dict[str, Any]
TINY = {
    "extract.engine": "transformers",
    "extract.dtype": "float32",
    "extract.num_draft_layers": 2,
    "extract.max_len": 128,
    "extract.max_new_tokens": 24,
}
TRAINING = {
    "drafter.num_layers": 1,
    "train.batch_tokens": 200,
    "train.holdout": 0.0,
    "train.lr": 3e-3,
    "train.prefix.sampler": "boundary",
}


@pytest.fixture
def four_prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "four.jsonl", EXTRACT_PROMPTS[:4])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def vllm_imported() -> None:
    """vLLM's import looks up deprecated names of torch; its warnings are not the project's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("vllm.v1.engine.llm_engine")


def make_run(
    root: Path, target: Path, prompts: Path, recipe: str | None, settings: dict[str, Any], *, first_steps: int
) -> Run:
    """Extraction, first drafter (trained briefly, so that it fails often), first drafts and VP-Drafter."""
    cache, first, vp = root / "cache", root / "first", root / "vp"
    config = load_config(recipe, settings)
    run_extract(str(target), (str(prompts),), str(cache), None, config, True)
    run_train(
        str(cache),
        first,
        load_config(recipe, settings | {"train.objective": "dflash", "train.max_steps": first_steps}),
        True,
    )
    run_draft(str(cache), first, config, True)
    run_train(str(cache), vp, load_config(recipe, settings | {"train.init": str(first)}), True)
    return {"target_folder": target, "cache_folder": cache, "first": first, "vp": vp}


@pytest.fixture(scope="session")
def tiny_target_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_prompts: Path) -> Run:
    settings = TINY | TRAINING | {"drafter.block_size": 4, "train.max_steps": 60}
    return make_run(tmp_path_factory.mktemp("tiny"), tiny_llama, tiny_prompts, None, settings, first_steps=20)


@pytest.fixture(scope="session")
def smollm2_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SmolLM2-135M-Instruct under vLLM; drafters small enough to learn eight responses by heart."""
    root = tmp_path_factory.mktemp("smollm2")
    make_target(root / "target")
    settings = TRAINING | {
        "drafter.block_size": 4,
        "extract.limit": 8,
        "extract.max_new_tokens": 24,
        "train.max_steps": 40,
        "train.num_anchors": 24,
        "train.lr": 2e-3,
    }
    with in_process():
        return make_run(root, root / "target", PROMPTS, "smollm2-135m", settings, first_steps=150)
