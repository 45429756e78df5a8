"""The registry of engines: a new engine is one class and one line; an engine's package is imported when it runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.extracting import make_config, run, tokens
from support.tiny import PROMPTS, write_jsonl
from vpd.data.errors import ExtractionError, FingerprintMismatchError
from vpd.stages.extract.engine import Completion
from vpd.stages.extract.engines import ENGINES, EngineEntry, plan_engine
from vpd.stages.extract.transformers_engine import TransformersEngine

VLLM_ARGS = {"enforce_eager": True, "quantization": "fp8", "max_num_seqs": 4}


class CountingEngine(TransformersEngine):
    """An engine that the package does not know."""

    neutral_args = frozenset({"color"})
    num_polled = 0

    def __init__(self, *args: Any, engine_args: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.color = engine_args["color"]

    @staticmethod
    def version() -> str:
        return "counting 1"

    def poll(self) -> list[Completion]:
        CountingEngine.num_polled += 1
        return super().poll()


@pytest.fixture(autouse=True)
def more_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENGINES, "_entries", {**ENGINES})
    ENGINES.add("counting", EngineEntry(f"{__name__}:CountingEngine", install="nothing"))
    ENGINES.add("absent", EngineEntry("no_such_package.engine:Engine", install="the package no-such-package"))


def test_a_registered_engine_extracts(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS[:3])
    settings: dict[str, Any] = {"max_new_tokens": 4, "audit": 0.0}
    red, blue = ({**settings, "engine": "counting", "engine_args": {"color": color}} for color in ("red", "blue"))
    assert run(tiny_llama, prompts, tmp_path / "cache", **red).num_written == 3
    assert CountingEngine.num_polled >= 3
    run(tiny_llama, prompts, tmp_path / "expected", **settings)
    assert tokens(tmp_path / "cache") == tokens(tmp_path / "expected")
    # A neutral argument may change, and another engine may not.
    assert run(tiny_llama, prompts, tmp_path / "cache", **blue).num_present == 3
    with pytest.raises(FingerprintMismatchError, match="engine"):
        run(tiny_llama, prompts, tmp_path / "cache", **settings)


def test_an_engine_that_is_not_installed_is_named(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS[:1])
    words = r"engine absent was asked for.*no_such_package.*Install the package no-such-package, or choose --engine"
    with pytest.raises(ExtractionError, match=words):
        run(tiny_llama, prompts, tmp_path / "cache", engine="absent")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("engine", "args", "decisive"),
    [
        ("vllm", VLLM_ARGS, {"quantization": "fp8"}),
        ("transformers", {"batch_size": 4, "attn_implementation": "eager"}, {"attn_implementation": "eager"}),
    ],
)
def test_each_engine_knows_which_arguments_decide_its_states(
    engine: str, args: dict[str, Any], decisive: dict[str, Any]
):
    planned = plan_engine(make_config(engine=engine, engine_args=args))
    assert (planned["name"], planned["args"]) == (engine, decisive)


def test_engines_are_known_without_heavy_packages():
    code = "import json, sys, vpd.stages.extract.engines; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "transformers", "numpy"} & {*json.loads(done.stdout)}


def test_vllm_is_imported_in_its_own_folder_alone():
    root = Path(__file__).parents[3]
    files = [path for name in ("data", "stages", "pipeline") for path in (root / name).rglob("*.py")]
    importing = [path for path in files if "import vllm" in (text := path.read_text()) or "from vllm" in text]
    assert {path.parent.relative_to(root).as_posix() for path in importing} == {"stages/extract/vllm"}
