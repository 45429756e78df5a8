"""Links, names and tables of the README and of docs/."""

import re
import tomllib
from pathlib import Path

import pytest
import vpd
from pages import CHANGELOG, LINK, PAGES, README, ROOT, SPAN, prose, slugs
from settings_page import PAGE, choices, parameters, render
from vpd.data import errors
from vpd.pipeline.cli import main
from vpd.pipeline.config import VpdConfig
from vpd.pipeline.options import leaf_fields

LIVING = [page for page in PAGES if page != CHANGELOG]
"""Pages that speak of today; the changelog also names what is gone."""
SETTING = re.compile(rf"(?:{'|'.join(VpdConfig.model_fields)})\.(?!json\b)[a-z_]+(?:\.[a-z_]+)*")
PLACE = re.compile(r"(?:pipeline|stages|data|configs|tests|docs)/[\w./-]*")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
EXTRAS = re.compile(r'"\.\[([\w,-]+)\]"')
OTHER_FLAGS = {"--help", "--version", "--force-exclude"}
TABLES = {
    "train.prefix.sampler": "training.md",
    "train.anchor.sampler": "training.md",
    "train.attention": "training.md",
    "eval.policies": "evaluation.md",
    "extract.codec": "caches.md",
    "extract.engine": "extraction.md",
}
"""Setting -> page that explains each of its choices."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_living_page = pytest.mark.parametrize("page", LIVING, ids=lambda page: page.name)


def links(page: Path) -> list[str]:
    return [found["place"] for found in LINK.finditer(prose(page))]


@every_page
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        place = (page.parent / name).resolve() if name else page
        if not place.exists() or (anchor and anchor not in slugs(place)):
            broken.append(link)
    assert not broken


def test_every_page_is_linked() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    assert [page.name for page in (ROOT / "docs").iterdir() if page.resolve() not in linked] == []


@every_living_page
def test_flags_exist(page: Path) -> None:
    """Flags in code spans: those of the command that the span names, else those of any command."""
    wrong = []
    for span in SPAN.findall(prose(page)):
        words = span.split()
        named = words[1] if words[0] == "vpd" and len(words) > 1 and words[1] in main.commands else None
        known = {flag for name in ([named] if named else main.commands) for flag in flags_of(name)} | OTHER_FLAGS
        wrong += [f"{flag} in {span}" for flag in FLAG.findall(span) if flag not in known]
    assert not wrong


def flags_of(command: str) -> list[str]:
    return [flag for each in parameters(command).values() for flag in (*each.opts, *each.secondary_opts)]


@every_living_page
def test_commands_exist(page: Path) -> None:
    spans = [span.split() for span in SPAN.findall(prose(page))]
    named = {words[1] for words in spans if words[0] == "vpd" and len(words) > 1}
    assert [name for name in named if name.islower() and name not in main.commands] == []


@every_living_page
def test_settings_exist(page: Path) -> None:
    leaves = leaf_fields(VpdConfig)
    known = {key[:end] for key in leaves for end in range(len(key) + 1) if end == len(key) or key[end] == "."}
    found = {match[0] for span in SPAN.findall(prose(page)) if (match := SETTING.match(span))}
    # An entry of a setting that is a mapping, such as extract.engine_args.max_num_seqs.
    assert [key for key in found if key not in known and key.rpartition(".")[0] not in leaves] == []


@every_living_page
def test_files_and_extras_exist(page: Path) -> None:
    words = [word for span in SPAN.findall(prose(page)) for word in span.split()]
    places = [word for word in words if PLACE.fullmatch(word)]
    assert [place for place in places if not (ROOT / place).exists()] == []
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = {extra for word in words if (match := EXTRAS.fullmatch(word)) for extra in match[1].split(",")}
    assert extras <= known.keys()


@pytest.mark.parametrize(("setting", "page"), TABLES.items(), ids=TABLES)
def test_every_choice_is_explained(setting: str, page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    names = [name for name in choices(leaf_fields(VpdConfig)[setting]) if name != "auto"]
    assert names
    assert [name for name in names if not re.search(rf"^(\| |- `--\w+ )`?{name}`", text, re.MULTILINE)] == []


def test_the_cache_format_has_every_codec() -> None:
    text = (ROOT / "docs" / "cache-format.md").read_text(encoding="utf-8")
    assert [name for name in choices(leaf_fields(VpdConfig)["extract.codec"]) if f"`{name}`" not in text] == []


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+Error)`", text, re.MULTILINE)
    found = [name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, Exception)]
    assert sorted(rows) == sorted(name for name in found if name != "VpdError")


def test_every_name_of_the_api_is_explained() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    assert [name for name in vpd.__all__ if f"`vpd.{name}`" not in text] == []


def test_the_settings_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "docs/settings.md is stale: run make docs"


def test_the_readme_links_the_license() -> None:
    assert "LICENSE" in links(README)
