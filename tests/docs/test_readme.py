"""The README's size, and that it names what there is."""

from pages import README, SPAN, prose
from vpd.pipeline.cli import main

MAX_LINES = 150


def test_size() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_table_has_every_command() -> None:
    rows = [line for line in prose(README).splitlines() if line.startswith("| `vpd ")]
    found = [SPAN.findall(row)[0].split()[1] for row in rows]
    assert sorted(found) == sorted(name for name, command in main.commands.items() if not command.hidden)


def test_the_tree_has_every_folder() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [name for name in ("pipeline", "stages", "data", "configs", "tests", "docs") if f"\n{name}/ " not in text]
    assert not missing
    below = [path.name for path in (README.parent / "stages").iterdir() if (path / "__init__.py").is_file()]
    assert [name for name in below if f"{name}/" not in text] == []


def test_the_demo_output_can_be_found() -> None:
    _, found, after = README.read_text(encoding="utf-8").partition("<!-- demo output -->\n```")
    assert found
    assert "<!-- end -->" in after
