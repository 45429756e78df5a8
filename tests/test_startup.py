"""What the command line and the package import: nothing heavy before it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vpd.pipeline.cli import main

HEAVY = ("torch", "transformers", "pyarrow", "zarr", "numcodecs", "numpy", "accelerate", "vllm", "ray")
DUMP = """
import atexit, json, os, sys
atexit.register(lambda: print(json.dumps([*sys.modules]), file=open(os.environ["VPD_TEST_MODULES"], "w")))
"""
"""A `sitecustomize` module: every process writes the names of its modules when it ends."""


def imported(tmp_path: Path, *command: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a command in a process of its own; returns its end, and the heavy packages that it has imported."""
    (tmp_path / "sitecustomize.py").write_text(DUMP)
    found = {"PYTHONPATH": str(tmp_path), "VPD_TEST_MODULES": str(tmp_path / "modules.json")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | found | environment)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert "sitecustomize" in modules
    return done, [name for name in HEAVY if name in modules]


def run_vpd(
    tmp_path: Path, *arguments: object, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    return imported(tmp_path, str(Path(sys.executable).with_name("vpd")), *map(str, arguments), **environment)


WRONG = [["--wrong"], ["no"], ["train", "--wrong"], ["train", "x", "--out", "y", "--lr", "fast"], ["extract", "x"]]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in main.commands)], ids=str
)
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path):
    done, heavy = run_vpd(tmp_path, *arguments)
    assert (done.returncode, heavy, done.stderr) == (0, [], "")
    assert done.stdout.startswith("vpd, version" if arguments == ["--version"] else "Usage: vpd")


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_misuse_imports_nothing_heavy(arguments: list[str], tmp_path: Path):
    done, heavy = run_vpd(tmp_path, *arguments)
    assert (done.returncode, heavy) == (2, [])
    assert done.stderr.startswith("Usage: vpd")


@pytest.mark.parametrize("assignment", ["train.lrr=1", "train.lr=fast", "train.prefix.sampler=dice"])
def test_wrong_settings_import_nothing_heavy(assignment: str, tmp_path: Path):
    done, heavy = run_vpd(tmp_path, "train", "x", "--out", "y", "--set", assignment)
    assert (done.returncode, heavy) == (2, [])
    assert done.stderr.startswith(f"vpd: error: {assignment.partition('=')[0]}: ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vpd tr", ["train"]),
        ("vpd train --prefix-s", ["--prefix-sampler"]),
        ("vpd train --prefix-sampler visible", ["visible-geometric"]),
        ("vpd extract --codec l", ["lossless"]),
        ("vpd recode --codec l", ["lossless"]),
        ("vpd eval --policies run", []),  # A list has no completion.
    ],
)
def test_completion_imports_nothing_heavy(words: str, expected: list[str], tmp_path: Path):
    number = str(len(words.split()) - 1)
    done, heavy = run_vpd(tmp_path, _VPD_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=number)
    assert (heavy, done.stderr) == ([], "")
    assert done.stdout.split() == [f"plain,{each}" for each in expected]


def test_a_cache_is_inspected_without_torch(drafted_cache: Path, tmp_path: Path):
    done, heavy = run_vpd(tmp_path, "inspect", drafted_cache)
    assert done.returncode == 0, done.stderr
    assert heavy == ["pyarrow", "numpy"]


@pytest.mark.parametrize("command", ["verify", "merge"])
def test_caches_are_looked_for_without_torch(command: str, tmp_path: Path):
    arguments = {"verify": ["nowhere"], "merge": ["nowhere", "--out", "new"]}[command]
    done, heavy = run_vpd(tmp_path, command, *arguments)
    assert done.returncode == 1
    assert heavy == ["pyarrow", "numpy"]


def test_the_package_imports_nothing_heavy(tmp_path: Path):
    code = "import vpd; vpd.__version__; dir(vpd); import vpd.pipeline.config, vpd.data.cache.manifest"
    done, heavy = imported(tmp_path, sys.executable, "-c", code)
    assert (done.returncode, heavy) == (0, []), done.stderr
