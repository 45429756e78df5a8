"""`vpd export` as a user sees it."""

from pathlib import Path

import pytest
from support.place import Place
from support.tiny import run_vpd, snapshot, vpd
from vpd.stages.drafter.checkpoint import load_shape
from vpd.stages.train.checkpoints import CheckpointResult, find_drafter, list_checkpoints, write_result


def test_a_run_is_exported(place: Place):
    out = place.folder / "out"
    result = vpd("export", place.first_run, out)
    assert (result["folder"], result["format"], result["training_mode"]) == (str(out), "dflash", "dflash")
    assert result["drafter"] == str(find_drafter(place.first_run))
    assert result["num_bytes"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert [each["program"].split()[0] for each in result["agreements"]] == ["vpd", "transformers"]
    assert load_shape(out) == load_shape(find_drafter(place.first_run))


def test_people_get_the_same_in_words(place: Place):
    outcome = run_vpd("export", find_drafter(place.first_run), place.folder / "out", "--format", "speculators")
    assert outcome.code == 0, outcome.err
    for words in ("the first drafter", "in the form speculators", "parameters", "speculators 0.9"):
        assert words in outcome.out


def test_the_best_checkpoint_is_exported(place: Place):
    run = place.folder / "run"
    flags = {"objective": "dflash", "max_steps": 2, "save_every": 1, "keep": 5, "num_layers": 1, "block_size": 4}
    vpd("train", place.cache, "--out", run, **flags)
    for alpha, checkpoint in zip((1.5, 1.2), list_checkpoints(run), strict=True):
        write_result(checkpoint, CheckpointResult(alpha, {}))
    assert vpd("export", run, place.folder / "best")["drafter"].endswith("step-0000001")
    assert "alpha 1.500" in (place.folder / "best/README.md").read_text()


@pytest.mark.parametrize("form", ["dflash", "speculators"])
def test_an_exported_folder_is_a_drafter_for_every_command(place: Place, form: str):
    out = place.folder / "out"
    vpd("export", place.first_run, out, format=form)
    flags = {"holdout": 1, "limit": 4, "k": 1, "max_k": 1}
    ours = vpd("eval", place.cache, "--first-drafter", place.first_run, **flags)
    theirs = vpd("eval", place.cache, "--first-drafter", out, **flags)
    assert ours["alpha"] == theirs["alpha"]


def test_the_card_has_the_table_of_an_evaluation(place: Place):
    report = place.folder / "report.json"
    arguments = ["--first-drafter", place.first_run, "--holdout", 1, "--limit", 4, "--max-k", 1, "--k", 1]
    result = vpd("eval", place.cache, *arguments, "--out", report)
    vpd("export", place.first_run, place.folder / "out", report=report)
    card = (place.folder / "out/README.md").read_text()
    rows = [row for row in result["by_nodes"] if row["nodes"] is not None and row["k"] in (0, 1)]
    assert len(rows) > 4
    for row in rows:
        assert f"{row['alpha']:.3f} [" in card
    other = run_vpd("export", place.drafter(), place.folder / "other", "--report", report)
    assert other.code == 1
    assert "report.json: expected a result of the drafter" in other.message


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["nowhere", "out"], "expected a drafter: nowhere is neither", 1),
        (["RUN", "RUN"], "found a folder that is not empty. Choose another OUT", 1),
        (["RUN", "out", "--format", "gguf"], "'gguf' is not one of 'dflash', 'speculators'", 2),
        (["RUN", "out", "--report", "nowhere.json"], "nowhere.json: expected a file", 1),
        (["DRAFTER", "out", "--format", "speculators"], "Give --target", 2),
    ],
    ids=["no-run", "full-folder", "unknown-form", "no-report", "no-target"],
)
def test_what_is_wrong_is_one_paragraph(
    place: Place, arguments: list[str], words: str, code: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"RUN": place.first_run, "DRAFTER": place.drafter()}
    before = snapshot(place.folder)
    outcome = run_vpd("export", *(names.get(each, each) for each in arguments))
    assert outcome.code == code
    assert words in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert snapshot(place.folder) == before
    assert not Path("out").exists()
