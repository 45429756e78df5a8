"""Stage two runs where vLLM can't be imported and the target is gone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import DRAFTER, TRAIN, as_flags

SCRIPT = """
import json, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refused())
from vpd.pipeline.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "vllm")))
"""


def run_without_vllm(*commands: list[object]) -> list[Any]:
    """Runs `vpd --json` commands in one new process; returns their results, and vLLM's modules that were loaded."""
    texts = [[*map(str, command), "--json"] for command in commands]
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(texts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def no_target(tiny_llama: Path, tmp_path: Path):
    """The target of `tiny_cache` is out of the way."""
    shutil.move(tiny_llama, tmp_path / "away")
    yield
    shutil.move(tmp_path / "away", tiny_llama)


@pytest.mark.usefixtures("no_target")
def test_drafting_training_and_evaluation_need_neither_vllm_nor_the_target(
    tiny_cache: Path, first_run: Path, tmp_path: Path
):
    cache, vp = shutil.copytree(tiny_cache, tmp_path / "cache"), tmp_path / "vp"
    drafter, settings = as_flags(DRAFTER), as_flags({**TRAIN, "max_steps": 3})
    draft, train, evaluation, modules = run_without_vllm(
        ["draft", cache, "--first-drafter", first_run],
        ["train", cache, "--out", vp, *drafter, *settings],
        ["eval", cache, "--first-drafter", first_run, "--drafter", vp, "--holdout", "0.9"],
    )
    assert draft["num_anchors"] == sum(draft["accept_lengths"].values()) > 0
    assert train["step"] == 3
    assert evaluation["alpha"].keys() == {"first", "first_tree", "first_as_second", "d2sd"}
    assert all(1 <= alpha <= 4 for alpha in evaluation["alpha"].values())
    assert modules == []


def test_the_refusal_is_real(tiny_llama: Path, tiny_prompts: Path, tmp_path: Path):
    texts = ["extract", tiny_llama, tiny_prompts, "--out", tmp_path / "cache", "--engine", "vllm"]
    commands = json.dumps([[*map(str, texts)]])
    done = subprocess.run([sys.executable, "-c", SCRIPT, commands], capture_output=True, text=True)
    assert done.returncode == 1
    assert "vpd: error: the engine vllm was asked for, but importing it failed" in done.stderr
    assert "Traceback" not in done.stderr
