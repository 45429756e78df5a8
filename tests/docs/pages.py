"""The README and the pages of docs/, taken apart for the tests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README, CHANGELOG = ROOT / "README.md", ROOT / "CHANGELOG.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", CHANGELOG, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("vpd", "make", "srun", "torchrun")
"""First words of the lines that are commands."""
FENCE = re.compile(r"^```(?P<info>.*)$")
MARKER = re.compile(r"^<!-- (?P<text>.*) -->$")
LINK = re.compile(r"!?\[[^\]]*\]\((?P<place>[^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")


class Fence(NamedTuple):
    """A block between two lines of three backticks."""

    page: Path
    line: int
    """Line of its first line, from 1."""
    info: str
    marker: str
    """Text of an HTML comment right above the block; empty: there is none."""
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.name}:{self.line}"


class Line(NamedTuple):
    """A command in a block."""

    fence: Fence
    words: list[str]

    @property
    def id(self) -> str:
        return f"{self.fence.id} {' '.join(self.words)[:60]}"


def fences(page: Path) -> Iterator[Fence]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start, info = None, ""
    for number, line in enumerate(lines):
        found = FENCE.match(line)
        if found is None:
            continue
        if start is None:
            start, info = number + 1, found["info"]
        else:
            marker = MARKER.match(lines[start - 2]) if start > 1 else None
            text = "\n".join(lines[start:number]) + "\n"
            yield Fence(page, start + 1, info, marker["text"] if marker else "", text)
            start = None
    assert start is None, f"{page}: a block is not closed"


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> Iterator[Line]:
    """Commands in the page's blocks: those after `$ ` where a block shows a session, else all that look like one."""
    for fence in fences(page):
        if fence.info not in ("", "sh", "bash", "console") or fence.marker == "demo output":
            continue
        lines = fence.text.replace("\\\n", " ").splitlines()
        is_session = any(line.startswith("$ ") for line in lines)
        for line in lines:
            text = line.removeprefix("$ ")
            if text.partition(" ")[0] in COMMANDS and (line.startswith("$ ") or not is_session):
                yield Line(fence, shlex.split(text, comments=True))


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
