"""Modules outside the project add samplers and codecs, in every process and before settings are read."""

from pathlib import Path

import pytest
from support.compare import train
from support.forks import Forks
from support.place import check_message

PLUGIN = '''
import torch
from vpd.data.cache.codecs import Raw, codec
from vpd.stages.train.prefix import prefix_sampler


@prefix_sampler("mine")
def mine(config, facts):
    """All lengths alike."""
    return torch.ones(len(facts.num_labels_N), facts.block_size - 1, device=facts.num_labels_N.device)


@codec("plain")
class Plain(Raw):
    """The states as they are, under another name."""
'''
SETTINGS = {"max_steps": 2, "batch_tokens": 100}


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds a plug-in."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_vpd.py").write_text(PLUGIN)
    return {"PYTHONPATH": str(tmp_path / "modules"), "VPD_PLUGINS": "my_vpd"}


def test_a_plug_in_shows_in_help_and_is_accepted(
    plugin: dict[str, str], drafted_cache: Path, tmp_path: Path, forks: Forks
):
    shown = forks.start(["train", "--help"], plugin).wait()
    assert "topk|mixture|mine]" in shown.out.replace("\n", "").replace(" ", "")
    flags = train(drafted_cache, tmp_path / "run", **SETTINGS, prefix_sampler="mine")
    assert forks.start(flags, plugin).result()["step"] == 2
    outcome = forks.start(flags).wait()
    assert outcome.code == 2
    assert "'mine' is not one of" in outcome.err


def test_every_process_of_a_run_has_the_plug_in(
    plugin: dict[str, str], drafted_cache: Path, tmp_path: Path, forks: Forks
):
    flags = train(drafted_cache, tmp_path / "run", **SETTINGS, prefix_sampler="mine")
    assert forks.start([*flags, "--num-processes", 2], plugin).result()["step"] == 2


def test_a_cache_in_a_codec_of_a_plug_in(plugin: dict[str, str], tiny_cache: Path, tmp_path: Path, forks: Forks):
    recoded = tmp_path / "recoded"
    found = forks.start(["recode", tiny_cache, recoded, "--codec", "plain", "--json"], plugin).result()
    assert found["codec"] == "plain"
    assert forks.start(["inspect", recoded, "--json"], plugin).result()["num_tokens"] == found["num_tokens"]
    outcome = forks.start(["inspect", recoded]).wait()
    assert outcome.code in (1, 2)
    assert "plain" in outcome.message


@pytest.mark.parametrize(
    "command", [["train", "--help"], ["inspect", "x"], ["sweep", "x", "--out", "y", "--vary", "z"]]
)
def test_a_plug_in_that_can_not_be_imported_is_named(command: list[str], tmp_path: Path, forks: Forks):
    (tmp_path / "broken_vpd.py").write_text("1 / 0")
    environment = {"PYTHONPATH": str(tmp_path), "VPD_PLUGINS": "broken_vpd"}
    outcome = forks.start(command, environment).wait()
    check_message(outcome, 2, ["the plug-in broken_vpd, which VPD_PLUGINS names", "ZeroDivisionError", "Repair it"])


def test_an_entry_point_names_a_plug_in(tmp_path: Path, forks: Forks):
    folder = tmp_path / "theirs-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[vpd.plugins]\ntheirs = their_vpd\n")
    outcome = forks.start(["train", "--help"], {"PYTHONPATH": str(tmp_path)}).wait()
    check_message(outcome, 2, ["the plug-in their_vpd", "the entry point theirs of vpd.plugins", "No module named"])
