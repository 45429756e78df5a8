"""Which targets run through vLLM's Transformers backend: those whose class in vLLM hands out no states."""

from pathlib import Path
from typing import Any

import pytest
from support.kinds import save_kind
from vpd.stages.extract.target import load_target
from vpd.stages.extract.vllm.backend import BACKEND, choose_backend


@pytest.mark.parametrize(
    ("kind", "engine_args", "is_backend"),
    [
        ("Gemma 2", {}, True),
        ("Llama, tied", {}, False),
        ("Llama, tied", {"model_impl": "transformers"}, True),
        ("Gemma 2", {"model_impl": "vllm"}, False),
        ("Gemma 2", {"hf_overrides": {"architectures": ["Own"]}}, False),
        ("Mixtral", {}, False),  # the backend has another class for experts, which was not tried
    ],
)
def test_the_backend_is_chosen_where_it_helps(kind: str, engine_args: dict[str, Any], is_backend: bool, tmp_path: Path):
    found = choose_backend(load_target(str(save_kind(kind, tmp_path / "target"))), engine_args)
    assert (found.get("hf_overrides") == {"architectures": [BACKEND]}) == is_backend
