"""Fixtures shared by all tests. What lasts for a session is read-only: copy what a test changes."""

import os

# Tests run on several workers, and torch reads these settings as it is imported. Tensors are tiny, so threads that wait
# for each other cost more than they bring; the engines of two workers must not be bound to the same cores.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import shutil
from pathlib import Path

import pytest
import torch
from support.tiny import DRAFTER, EXTRACT, PROMPTS, TRAIN, make_tokenizer, save_target, vpd, write_jsonl
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that start an engine come first, those with SmolLM2 before the others, since they last longest.

    A worker runs all tests of a file (`make test`), whose fixtures they share.
    """
    marked = {name: {item.path for item in items if item.get_closest_marker(name)} for name in ("engine", "smollm2")}
    items.sort(key=lambda item: (item.path not in marked["smollm2"], item.path not in marked["engine"]))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with tied embeddings."""
    return save_target("llama", tmp_path_factory.mktemp("target") / "llama", tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Qwen3 with an LM head of its own."""
    return save_target("qwen3", tmp_path_factory.mktemp("target") / "qwen3", tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_prompts: Path) -> Path:
    """`tiny_llama` over `tiny_prompts`, made with `tiny.EXTRACT`; without first drafts."""
    folder = tmp_path_factory.mktemp("extract") / "cache"
    assert vpd("extract", tiny_llama, tiny_prompts, "--out", folder, **EXTRACT)["num_sequences"] == len(PROMPTS)
    return folder


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Path:
    """The run of a first drafter of block size 4, trained for a few steps on `tiny_cache`."""
    folder = tmp_path_factory.mktemp("train") / "first"
    vpd("train", tiny_cache, "--out", folder, objective="dflash", max_steps=4, **DRAFTER, **TRAIN)
    return folder


@pytest.fixture(scope="session")
def drafted_cache(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path, first_run: Path) -> Path:
    """A copy of `tiny_cache` with the first drafts of `first_run`."""
    folder = tmp_path_factory.mktemp("draft") / "cache"
    shutil.copytree(tiny_cache, folder)
    vpd("draft", folder, "--first-drafter", first_run)
    return folder
