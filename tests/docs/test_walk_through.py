"""The commands and Python blocks of the README and of docs/ are really run, with a tiny random target."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pages import PAGES, README, ROOT, Fence, command_lines, fences
from support.tiny import DRAFTER, EXTRACT, TRAIN, run_vpd, write_jsonl

GETTING_STARTED = ROOT / "docs" / "getting-started.md"
TARGET, FIRST_DRAFTER, RECIPE = "Qwen/Qwen3-8B", "z-lab/Qwen3-8B-DFlash-b16", "qwen3"
PROMPT_FILES = ("prompts.jsonl", "first.jsonl", "second.jsonl")
CONFIG = {"extract": EXTRACT, "drafter": DRAFTER, "train": TRAIN | {"max_steps": 2}}
BLOCKS = [fence for page in PAGES for fence in fences(page) if fence.info.split()[:1] == ["python"]]


def steps(page: Path, name: str) -> list[list[str]]:
    """The commands of the page's blocks that are marked as this walk-through."""
    return [line.words for line in command_lines(page) if line.fence.marker == f"walk-through: {name}"]


def walk(folder: Path, commands: list[list[str]], target: Path, first_drafter: Path) -> None:
    """Runs the commands in a folder, with the tiny target in place of the one they name."""
    for i, name in enumerate(PROMPT_FILES):
        write_jsonl(folder / name, [{"prompt": f"what is the sum of {j} and {i}?"} for j in range(12)])
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    stand_ins = {TARGET: str(target), FIRST_DRAFTER: str(first_drafter), RECIPE: str(config)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program, *arguments in commands:
            assert program == "vpd"
            outcome = run_vpd(*(stand_ins.get(word, word) for word in arguments))
            assert outcome.code == 0, f"vpd {' '.join(arguments)}\n{outcome.err}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, first_run: Path) -> Path:
    """Where the README's commands have been run: holds `cache`, `runs/vp` and a first drafter's run, `runs/first`."""
    folder = tmp_path_factory.mktemp("published")
    walk(folder, steps(README, "published"), tiny_llama, first_run)
    (folder / "runs" / "first").symlink_to(first_run)
    return folder


def test_the_readme_leads_to_a_drafter(walked: Path) -> None:
    assert list((walked / "runs" / "vp" / "checkpoints").glob("step-*/model.safetensors"))


def test_getting_started_has_the_commands_of_the_readme() -> None:
    assert steps(GETTING_STARTED, "published") == steps(README, "published")


def test_a_first_drafter_of_ones_own(tmp_path: Path, tiny_llama: Path) -> None:
    walk(tmp_path, steps(GETTING_STARTED, "own"), tiny_llama, tmp_path / "none")
    assert list((tmp_path / "runs" / "vp-2" / "checkpoints").glob("step-*/model.safetensors"))


@pytest.mark.parametrize("block", BLOCKS, ids=[block.id for block in BLOCKS])
def test_python_blocks_run(block: Fence, walked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may use the names of the blocks above it on its page."""
    monkeypatch.chdir(walked)
    names: dict[str, object] = {}
    for each in BLOCKS:
        if each.page == block.page and each.line <= block.line:
            exec(compile(each.text, each.id, "exec"), names)
