"""What tests of the command line work on."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks
from place import Place


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
