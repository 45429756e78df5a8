"""What tests of the command line work on."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forks import Forks
from support.place import Place
from support.tiny import vpd, write_jsonl
from support.workers import NUM_RECORDS, SETTINGS


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    found = Forks(tmp_path_factory.mktemp("forks"))
    yield found
    found.close()


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_qwen3: Path,
    tiny_prompts: Path,
    tiny_cache: Path,
    drafted_cache: Path,
    first_run: Path,
) -> Place:
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    drafted = shutil.copytree(drafted_cache, tmp_path / "drafted")
    return Place(tmp_path, tiny_llama, tiny_qwen3, tiny_prompts, cache, drafted, first_run)


@pytest.fixture(scope="session")
def many_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"prompt": f"what is the sum of {i} and {i * i % 7}?"} for i in range(NUM_RECORDS)]
    return write_jsonl(tmp_path_factory.mktemp("many") / "prompts.jsonl", records)


@pytest.fixture(scope="session")
def alone(tiny_llama: Path, many_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "cache"
    assert vpd("extract", tiny_llama, many_prompts, "--out", folder, **SETTINGS)["num_written"] == NUM_RECORDS
    return folder
