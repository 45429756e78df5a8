"""Stage two runs where vLLM can't be imported and the target is gone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import DRAFTER, TRAIN, as_flags

SCRIPT = """
import json, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refused())
from vpd.pipeline.cli import main
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "vllm")))
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            print(json.dumps({"exit code": end.code}))
"""


@pytest.fixture
def no_target(tiny_llama: Path, tmp_path: Path) -> Iterator[None]:
    """The target of `tiny_cache` is out of the way."""
    shutil.move(tiny_llama, tmp_path / "away")
    yield
    shutil.move(tmp_path / "away", tiny_llama)


@pytest.mark.usefixtures("no_target")
def test_all_but_extraction_needs_neither_vllm_nor_the_target(
    tiny_cache: Path, first_run: Path, tiny_qwen3: Path, tiny_prompts: Path, tmp_path: Path
):
    cache, vp = shutil.copytree(tiny_cache, tmp_path / "cache"), tmp_path / "vp"
    training = as_flags({**DRAFTER, **TRAIN, "max_steps": 3})
    commands: list[list[object]] = [
        ["draft", cache, "--first-drafter", first_run],
        ["train", cache, "--out", vp, *training],
        ["eval", cache, "--first-drafter", first_run, "--drafter", vp, "--holdout", "0.9"],
        ["extract", tiny_qwen3, tiny_prompts, "--out", tmp_path / "new", "--num-draft-layers", "3"],
    ]
    texts = json.dumps([[*map(str, command), "--json"] for command in commands])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, texts], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    modules, draft, train, evaluation, extraction = map(json.loads, done.stdout.splitlines())
    assert modules == []
    assert draft["num_anchors"] == sum(draft["accept_lengths"].values()) > 0
    assert train["step"] == 3
    assert evaluation["alpha"].keys() == {"first", "first_tree", "first_as_second", "d2sd"}
    assert all(1 <= alpha <= DRAFTER["block_size"] for alpha in evaluation["alpha"].values())
    # Extraction alone asks for vLLM, and says what to install.
    assert extraction == {"exit code": 1}
    assert "vpd: error: the engine vllm was asked for, but importing it failed" in done.stderr
    assert "Install vpd[extract]" in done.stderr
    assert "Traceback" not in done.stderr
