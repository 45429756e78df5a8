"""The model card: what the run and an evaluation recorded, and nothing else."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny import SHAPE
from support.tiny_world import write_drafter
from vpd.data.errors import DrafterError
from vpd.pipeline.cli import main
from vpd.stages.drafter.checkpoint import drafter_fingerprint
from vpd.stages.export.export import export_drafter
from vpd.stages.train.checkpoints import CheckpointResult, find_drafter, write_result


def row(way: str, second: str | None, k: int, nodes: int | None, alpha: float, policy: str | None = None) -> dict:
    """An entry of `by_nodes`."""
    interval = [alpha - 0.2, alpha + 0.249]
    return {
        "way": way,
        "second": second,
        "policy": policy,
        "k": k,
        "nodes": nodes,
        "alpha": alpha,
        "interval": interval,
    }


ROWS = [
    row("chain", None, 0, None, 2.5),
    row("tree", None, 0, 16, 3.2),
    row("tree", None, 0, 8, 3.01),
    row("two-drafter tree", "d2sd", 2, 16, 9, "reranked"),
    row("two-drafter tree", "d2sd", 4, 16, 8, "paper"),
    row("two-drafter tree", "d2sd", 4, 16, 3.8051, "reranked"),
    row("branches", "first_as_second", 4, 8, 3.1, "reranked"),
]


def report(drafter: Path, role: str = "second") -> dict[str, Any]:
    """The keys of a result that the card reads."""
    return {
        "drafters": {"first": "0" * 16, role: drafter_fingerprint(drafter)},
        "by_nodes": ROWS,
        "k": 4,
        "policy": "reranked",
        "num_tokens": 3350,
        "num_responses": 56,
        "trained_on": {"first": {"yes": 0, "no": 50, "unknown": 6}},
        "warnings": ["the drafters are twins"],
    }


@pytest.fixture
def run(tmp_path: Path, first_run: Path) -> Path:
    return shutil.copytree(first_run, tmp_path / "run")


def card(drafter: Path, out: Path, form: str = "dflash", found: dict[str, Any] | None = None, target: str = "") -> str:
    path = out.with_name("report.json")
    if found is not None:
        path.write_text(json.dumps(found))
    export_drafter(drafter, out, form, target or None, path if found is not None else None)
    return (out / "README.md").read_text()


def section(text: str, heading: str) -> str:
    return re.split(r"^## ", text.partition(f"## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_recipe_is_the_runs(run: Path, tmp_path: Path):
    text = section(card(find_drafter(run), tmp_path / "out"), "Recipe")
    found = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert found == yaml.safe_load((run / "config.yaml").read_text())
    assert "Step 4 of a run" in text


def test_the_data_are_the_runs(run: Path, tmp_path: Path):
    recorded = json.loads((run / "provenance.json").read_text())
    text = section(card(find_drafter(run), tmp_path / "out"), "Data")
    for words in (
        recorded["target_fingerprint"],
        recorded["cache_fingerprint"],
        f"{recorded['num_sequences']} sequences, {recorded['num_tokens']} tokens",
        "a share of 0.3 of its sequences is held out",
        f"torch {recorded['versions']['torch']}",
    ):
        assert words in text


def test_places_of_the_machine_are_not_told(run: Path, tmp_path: Path):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["train"] |= {"init": "/home/someone/runs/first", "trackers": ["/home/someone/x"]}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    text = card(find_drafter(run), tmp_path / "out")
    assert "init: first\n" in text
    assert not re.search(r"/(home|tmp|work)/", text)


def test_a_drafter_without_a_run_says_that_nothing_is_known(tmp_path: Path):
    text = card(write_drafter(tmp_path / "drafter", SHAPE, 1), tmp_path / "out")
    assert "Nobody has measured it" in section(text, "Acceptance length")
    assert "Not known" in section(text, "Recipe")
    assert "## Data" not in text
    assert "# A first drafter for its target" in text


# Alpha


def test_alpha_is_a_table_by_verified_nodes(run: Path, tmp_path: Path):
    drafter = find_drafter(run)
    text = section(card(drafter, tmp_path / "out", found=report(drafter)), "Acceptance length")
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| way of decoding | second drafter | N = 8 | N = 16 |",
        "| --- | --- | --- | --- |",
        "| tree | none | 3.010 [2.81, 3.26] | 3.200 [3.00, 3.45] |",
        "| two-drafter tree | the VP-Drafter |  | 3.805 [3.61, 4.05] |",
        "| branches | the first drafter | 3.100 [2.90, 3.35] |  |",
    ]
    for words in ("3350 tokens of 56 answers", "0 of these 56 sequences; of 6 nobody knows", "the drafters are twins"):
        assert words in text


def test_alpha_of_the_checkpoint_is_told_without_a_report(run: Path, tmp_path: Path):
    drafter = find_drafter(run)
    write_result(drafter, CheckpointResult(2.34567, {"k": 4, "cache": "/data/cache"}))
    text = section(card(drafter, tmp_path / "out"), "Acceptance length")
    assert "alpha 2.346 (cache cache, k 4)" in text
    assert "|" not in text


def test_a_report_of_other_drafters_is_refused(run: Path, tmp_path: Path):
    other = write_drafter(tmp_path / "other", SHAPE, 2)
    with pytest.raises(DrafterError, match=r"report\.json: expected a result of the drafter .* found one of"):
        card(find_drafter(run), tmp_path / "out", found=report(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected a file of names and values"),
        ("[]", r"found \[\]"),
        ('{"alpha": 3}', r"keys drafters and by_nodes, found \['alpha'\]"),
    ],
    ids=["cut", "list", "other"],
)
def test_a_file_that_is_no_report_is_named(run: Path, tmp_path: Path, content: str, words: str):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(DrafterError, match=rf"report\.json: {words}|report\.json: .*{words}"):
        export_drafter(find_drafter(run), tmp_path / "out", "dflash", None, tmp_path / "report.json")


@pytest.mark.parametrize(
    "changes",
    [{"k": None, "by_nodes": [{}]}, {"trained_on": []}, {"by_nodes": 3}],
    ids=["no-figures", "list-in-place-of-object", "number-in-place-of-list"],
)
def test_a_report_that_lacks_something_is_refused(run: Path, tmp_path: Path, changes: dict[str, Any]):
    drafter = find_drafter(run)
    with pytest.raises(DrafterError, match=r"expected a result of vpd eval .* leave out --report"):
        card(drafter, tmp_path / "out", found=report(drafter) | changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["provenance.json", "config.yaml", "alpha.json"])
def test_a_damaged_record_is_named(run: Path, tmp_path: Path, name: str):
    (find_drafter(run) / name if name == "alpha.json" else run / name).write_text("{cut: [")
    with pytest.raises(DrafterError, match=rf"{re.escape(name)}: expected (a file of names and|the result of a check)"):
        card(find_drafter(run), tmp_path / "out")


# What a reader can do


@pytest.mark.parametrize("form", ["dflash", "speculators"])
def test_the_commands_of_the_card_can_be_given(run: Path, tmp_path: Path, form: str):
    text = card(find_drafter(run), tmp_path / "out", form, target="org/target")
    (line,) = re.findall(r"^vpd (.*)$", text, re.MULTILINE)
    name, *arguments = shlex.split(line)
    given = main.commands[name].make_context(name, arguments).params
    assert (given["first_drafter"], given["drafter"], given["target"]) == ("DRAFTER", "SECOND", "org/target")
    (line,) = re.findall(r"^vllm serve org/target --speculative-config (.*)$", text, re.MULTILINE)
    assert json.loads(*shlex.split(line)) == {"method": "dflash", "model": "DRAFTER", "num_speculative_tokens": 3}
    assert ("sglang" in text) == (form == "dflash")


def test_the_head_of_the_card_is_what_hubs_read(run: Path, tmp_path: Path):
    text = card(find_drafter(run), tmp_path / "out", "speculators", target="org/target")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "base_model": "org/target",
        "tags": ["speculative-decoding", "dflash", "draft-model", "speculators"],
    }
    local = card(find_drafter(run), tmp_path / "local", target="/models/target")
    assert "base_model" not in yaml.safe_load(local.split("---\n")[1])
    assert "# A first drafter for target\n" in local


def test_a_vp_drafter_says_how_engines_run_it(tmp_path: Path):
    drafter = write_drafter(tmp_path / "drafter", SHAPE, 1)
    config = json.loads((drafter / "config.json").read_text())
    config["dflash_config"] |= {"training_mode": "vp_drafter", "prefix_weight_base": 0.9}
    (drafter / "config.json").write_text(json.dumps(config))
    text = card(drafter, tmp_path / "out", target="org/target")
    assert "# A VP-Drafter for org/target" in text
    assert "as if it were a first drafter" in section(text, "Serve it")
    assert "--first-drafter FIRST --drafter DRAFTER" in text
    assert json.loads((tmp_path / "out/config.json").read_text())["dflash_config"]["prefix_weight_base"] == 0.9
