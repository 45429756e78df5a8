"""Which targets run through vLLM's Transformers backend: those whose class in vLLM hands out no states."""

from pathlib import Path
from typing import Any

import pytest
from support.kinds import save_kind
from vpd.stages.extract.target import load_target
from vpd.stages.extract.vllm.backend import BACKEND, EXPERTS_BACKEND, choose_backend


@pytest.mark.parametrize(
    ("kind", "engine_args", "backend"),
    [
        ("Gemma 2", {}, BACKEND),
        ("Llama, tied", {}, None),
        ("Llama, tied", {"model_impl": "transformers"}, BACKEND),
        ("Gemma 2", {"model_impl": "vllm"}, None),
        ("Gemma 2", {"hf_overrides": {"architectures": ["Own"]}}, None),
        ("Mixtral", {}, EXPERTS_BACKEND),
    ],
)
def test_the_backend_is_chosen_where_it_helps(
    kind: str, engine_args: dict[str, Any], backend: str | None, tmp_path: Path
):
    found = choose_backend(load_target(str(save_kind(kind, tmp_path / "target"))), engine_args)
    assert found.get("hf_overrides") == (None if backend is None else {"architectures": [backend]})
