"""The package's imports, read from the source: no circles, and layers that import only what lies below them.

Imports within functions and imports for type checkers count too. One kind does not count: settings take their choices
from a registry, so the file of a registry imports the settings' class for type checkers alone.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["data", "stages", "pipeline"]
"""From the bottom to the top."""


def modules() -> dict[str, Path]:
    """Name -> file, such as `data.cache.part`; a package has the name of its folder."""
    found = {}
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for_checkers = {id(node) for block in ast.walk(tree) if is_for_checkers(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package[: len(package) - node.level + 1]
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if not (id(node) in for_checkers and module.endswith("config")):
                targets = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        found |= {target.removeprefix("vpd.") for target in targets}
    return found & known.keys() - {name}


def is_for_checkers(node: ast.AST) -> bool:
    """Whether a node is a block `if TYPE_CHECKING`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def test_the_graph_is_not_empty(graph: dict[str, set[str]]):
    assert {"data.cache.part", "data.cache.records"} <= graph["data.cache.maintenance.verify_part"]
    assert "data.cache.storage.bucket" in graph["data.cache.storage.places"]  # within a function


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_imports_go_down_the_layers_alone(graph: dict[str, set[str]]):
    upward = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if LAYERS.index(target.split(".")[0]) > LAYERS.index(name.split(".")[0])
    ]
    assert upward == []
