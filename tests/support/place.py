"""Targets, caches and a first drafter for tests of the command line."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from support.tiny import DRAFTER, EXTRACT, TRAIN, Outcome, as_flags, save_random_drafter

ONE_STEP: dict[str, Any] = {**DRAFTER, **TRAIN, "max_steps": 1}
ANSWERED = {"prompt": "name a dog", "response": "the lazy dog"}


class Place(NamedTuple):
    """What a test may use; `cache` and `drafted` are copies that belong to the test."""

    folder: Path
    llama: Path
    qwen3: Path
    prompts: Path
    cache: Path
    drafted: Path
    first_run: Path

    def write(self, *lines: object) -> Path:
        """A prompt file with these lines: strings as they are, other objects as JSON."""
        path = self.folder / "some.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    def drafter(self, **changes: Any) -> Path:
        """A first drafter of another shape."""
        checkpoint = sorted((self.first_run / "checkpoints").iterdir())[-1]
        return save_random_drafter(self.folder / "drafter", checkpoint, **changes)

    def extract(self, prompts: Path, out: str = "new", target: object = None, **changes: Any) -> list[object]:
        target = self.llama if target is None else target
        return ["extract", target, prompts, "--out", self.folder / out, *as_flags({**EXTRACT, **changes})]

    def train(self, cache: Path, *more: object, **changes: Any) -> list[object]:
        return ["train", cache, "--out", self.folder / "run", *as_flags({**ONE_STEP, **changes}), *more]

    def evaluate(self, *more: object) -> list[object]:
        return ["eval", self.cache, "--first-drafter", self.first_run, *more]

    def without(self, folder: Path, name: str) -> Path:
        """A copy of a folder without some of its files."""
        copy = shutil.copytree(folder, self.folder / "without")
        for path in copy.glob(name):
            path.unlink()
        return copy


def check_message(outcome: Outcome, code: int, words: list[str]) -> None:
    """The command has failed with one paragraph that contains these words."""
    message = outcome.message
    for word in words:
        assert word in message
    assert "\n\n" not in message  # one paragraph
    assert message[-1] not in ":,"
    assert outcome.code == code
    assert outcome.out == ""
