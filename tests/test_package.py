"""The wheel and the source distribution: what is in them, and that they work where nothing else is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
BUILD = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
LIGHT = (
    "annotated_types",
    "click",
    "pydantic",
    "pydantic_core",
    "typing_extensions.py",
    "typing_inspection",
    "yaml",
    "_yaml",
)
"""What the command line may import before it runs a command."""


def run(*words: object, cwd: Path = ROOT) -> str:
    found = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """A wheel or source distribution by the build backend itself, without pip."""
    script = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    run(sys.executable, "-c", script, cwd=source)
    return out


def own_files() -> list[str]:
    """The repository's files, those that are not committed yet included."""
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    return sorted({name for name in names if (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, so that building leaves nothing in it."""
    folder = tmp_path_factory.mktemp("source") / "vpd"
    for name in own_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, *BUILD, folder, source)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build("sdist", source, tmp_path_factory.mktemp("sdist"))
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def empty_env(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter's folder of an environment with the wheel and what the command line needs at its start."""
    folder = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    run(*PIP, "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    ours = Path(sysconfig.get_path("purelib"))
    for name in LIGHT:
        (packages / name).symlink_to(ours / name)
    return folder / "bin"


def test_the_list_of_packages_is_complete() -> None:
    modules = [name for name in own_files() if name.endswith(".py") and not name.startswith("tests/")]
    packages = {".".join(["vpd", *Path(name).parent.parts]) for name in modules}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages)


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    packages = {Path(*name.split(".")[1:]) for name in PROJECT["tool"]["setuptools"]["packages"]}
    names = [name for name in own_files() if Path(name).parent in packages - {Path()}]
    names += [name for name in own_files() if "/" not in name and Path(name).suffix in (".py", ".typed")]
    assert {"py.typed", "__init__.py", "configs/prompts.jsonl"} <= set(names)
    with zipfile.ZipFile(wheel) as content:
        found = [name for name in content.namelist() if ".dist-info/" not in name]
    assert sorted(found) == sorted(f"vpd/{name}" for name in names)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        (name,) = [each for each in content.namelist() if each.endswith(".dist-info/METADATA")]
        facts = Parser().parsestr(content.read(name).decode())
        license_text = content.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert (facts["Name"], facts["License-Expression"]) == ("vpd", "Apache-2.0")
    assert "Typing :: Typed" in facts.get_all("Classifier", [])
    assert "The vpd authors" in license_text
    assert "END OF TERMS AND CONDITIONS" in license_text


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_command_line_starts_without_heavy_packages(empty_env: Path, tmp_path: Path, option: str) -> None:
    out = run(empty_env / "vpd", option, cwd=tmp_path)
    assert out.strip()
    assert option != "--version" or out.split()[-1] == PROJECT["project"]["version"]


def test_the_package_imports_without_heavy_packages(empty_env: Path, tmp_path: Path) -> None:
    place = run(empty_env / "python", "-c", "import vpd; print(vpd.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(empty_env.parent)


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
        content.extractall(tmp_path / "source", filter="data")
    assert {"LICENSE", "README.md", "pyproject.toml", "py.typed", "configs/prompts.jsonl"} <= names
    (unpacked,) = (path for path in (tmp_path / "source").iterdir())
    (again,) = build("wheel", unpacked, tmp_path / "again").glob("*.whl")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
