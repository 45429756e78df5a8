"""vLLM's engine without processes of its own, each of which would import vLLM again."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def in_process() -> Iterator[None]:
    """Engines that start in the block work in this process, as vLLM offers it. Their warnings are not the project's."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        warnings.simplefilter("ignore")
        yield
