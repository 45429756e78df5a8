"""What the command line says when something is wrong: what was expected, what was found, what to do."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.place import ANSWERED, Place, check_message
from support.tiny import HIDDEN, PROMPTS, VOCAB, run_vpd, snapshot, vpd
from vpd.data.cache.cache import Cache
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.target_files import store_target_files
from vpd.stages.train.checkpoints import find_drafter


class Wrong(NamedTuple):
    id: str
    arguments: Callable[[Place], list[object]]
    words: list[str]
    code: int = 1


def empty_cache(place: Place) -> Path:
    """A cache whose run has not committed anything yet."""
    Cache.create_or_open(place.folder / "empty", Cache.open(place.cache).manifest)
    return place.folder / "empty"


def without_commits(place: Place) -> Path:
    """A cache that lost its commit records; its index knows that there were some."""
    folder = shutil.copytree(place.cache, place.folder / "lost")
    shutil.rmtree(folder / "commits")
    return folder


def broken_manifest(place: Place) -> Path:
    folder = shutil.copytree(place.cache, place.folder / "broken")
    path = folder / "dataset.json"
    path.write_text(path.read_text()[:100])
    return folder


WRONG = [
    # Prompt files
    Wrong(
        "missing-prompt-file",
        lambda place: place.extract(place.folder / "nowhere.jsonl"),
        ["nowhere.jsonl", "does not exist", "check the path"],
    ),
    Wrong(
        "empty-prompt-file", lambda place: place.extract(place.write()), ["some.jsonl", "there is no record", "remove"]
    ),
    Wrong(
        "line-is-not-json",
        lambda place: place.extract(place.write(PROMPTS[0], "{broken")),
        ["some.jsonl:2:", "not JSON", "expected one JSON object per line"],
    ),
    Wrong(
        "record-of-no-known-form",
        lambda place: place.extract(place.write(PROMPTS[0], PROMPTS[1], {"riddle": "why?"})),
        ["some.jsonl:3:", "['riddle']", "expected", "messages", "text"],
    ),
    Wrong(
        "no-assistant-token-left",
        lambda place: place.extract(place.write(ANSWERED), mode="given", max_len=8),
        ["some.jsonl, row 1:", "no assistant token", "first 8 tokens", "extract.max_len", "--skip-bad"],
    ),
    Wrong(
        "no-answer-given",
        lambda place: place.extract(place.write(ANSWERED, {"prompt": "why?"}), mode="given"),
        ["some.jsonl, row 2:", "expected an assistant message", "['user']"],
    ),
    Wrong(
        "prompt-fills-the-sequence",
        lambda place: place.extract(place.write(PROMPTS[0], {"prompt": "fox " * 100})),
        ["some.jsonl, row 2:", "no room", "128", "extract.max_len", "--skip-bad"],
    ),
    Wrong(
        "missing-chat-template",
        lambda place: place.extract(place.prompts, chat_template=place.folder / "nowhere.jinja"),
        ["expected a chat template", "nowhere.jinja"],
    ),
    # Targets
    Wrong(
        "target-without-weights",
        lambda place: place.extract(place.prompts, target=place.without(place.llama, "*.safetensors")),
        ["expected weights (*.safetensors)", "found none", "save_pretrained"],
    ),
    Wrong(
        "no-target",
        lambda place: place.extract(place.prompts, target=place.folder / "nowhere"),
        ["expected a target", "nowhere", "Check the path"],
    ),
    Wrong(
        "layer-out-of-range",
        lambda place: place.extract(place.prompts, layer_ids="1,2,6"),
        ["0..5", "has 6 layers", "[1, 2, 6]", "extract.layer_ids"],
    ),
    Wrong(
        "too-few-layers-for-the-rule",
        lambda place: place.extract(place.prompts, num_draft_layers=5),
        ["distinct layer ids", "[1, 2, 2, 2, 3]", "extract.layer_ids"],
    ),
    # A cache that is there
    Wrong(
        "cache-of-another-target",
        lambda place: place.extract(place.prompts, "cache", target=place.qwen3),
        ["target_fingerprint: the cache has", "this run has", "nothing was added", "another output folder"],
    ),
    Wrong(
        "cache-of-another-codec",
        lambda place: place.extract(place.prompts, "cache", codec="fp8"),
        ["codec: the cache has raw, this run has fp8", "another output folder"],
    ),
    Wrong(
        "cache-of-other-settings",
        lambda place: place.extract(place.prompts, "cache", max_len=64),
        ["generation: the cache has", "'max_len': 128", "'max_len': 64"],
    ),
    # First drafters
    Wrong(
        "first-drafter-of-other-layers",
        lambda place: ["draft", place.cache, "--first-drafter", place.drafter(target_layer_ids=(0, 2, 3))],
        ["does not fit the cache", "context layers: the cache has (1, 2, 3), the drafter (0, 2, 3)", "Use a drafter"],
    ),
    Wrong(
        "first-drafter-of-other-width",
        lambda place: ["draft", place.cache, "--first-drafter", place.drafter(hidden_size=64)],
        ["does not fit the cache", f"hidden size: the cache has {HIDDEN}, the drafter 64", "Use a drafter"],
    ),
    Wrong(
        "first-drafter-of-another-vocabulary",
        lambda place: ["eval", place.cache, "--first-drafter", place.drafter(vocab_size=400)],
        ["does not fit the cache", f"vocabulary: the cache has {VOCAB}, the drafter 400"],
    ),
    Wrong(
        "extract-with-first-drafter-of-other-layers",
        lambda place: [*place.extract(place.prompts), "--first-drafter", place.drafter(target_layer_ids=(0, 2, 3))],
        ["does not fit the cache", "context layers"],
    ),
    Wrong(
        "block-size-of-the-drafts-is-another",
        lambda place: place.train(place.drafted, block_size=8),
        ["have block size 4", "drafter.block_size is 8", "Set drafter.block_size to 4"],
        code=2,
    ),
    Wrong(
        "no-first-drafter",
        lambda place: ["draft", place.cache, "--first-drafter", place.folder / "nowhere"],
        ["expected a drafter", "nowhere", "neither a local folder", "Check the path"],
    ),
    Wrong(
        "drafter-without-weights",
        lambda place: ["eval", place.cache, "--first-drafter", place.without(place.drafter(), "*.safetensors")],
        ["expected the weights of a drafter in", "model.safetensors", "found no such file"],
    ),
    Wrong(
        "another-stride",
        lambda place: ["draft", place.drafted, "--first-drafter", place.first_run, "--stride", 2],
        ["at stride 1", "this run asks for 2", "same stride"],
    ),
    # Training and evaluation
    Wrong(
        "mask-token-outside-the-vocabulary",
        lambda place: place.train(place.cache, objective="dflash", mask_token_id=VOCAB),
        [f"within the vocabulary of {VOCAB}", f"got {VOCAB}", "drafter.mask_token_id"],
    ),
    Wrong(
        "boundary-without-first-drafts",
        lambda place: place.train(place.cache),
        ["prefix sampler posterior", "expected first drafts in", "vpd draft", "--prefix-sampler geometric"],
    ),
    Wrong(
        "first-drafts-of-another-name",
        lambda place: place.train(place.drafted, first_drafter="ffff"),
        ["expected first drafts ffff", "found", "Name one"],
    ),
    Wrong(
        "no-cache",
        lambda place: place.train(place.folder / "nowhere", objective="dflash"),
        ["expected a cache at", "nowhere", "found no dataset.json", "vpd extract"],
    ),
    Wrong(
        "broken-manifest",
        lambda place: place.train(broken_manifest(place), objective="dflash"),
        ["dataset.json is not a manifest of schema version 3", "checksum", "vpd verify"],
    ),
    Wrong(
        "nothing-committed",
        lambda place: place.train(empty_cache(place), objective="dflash"),
        ["expected committed sequences in", "found none", "vpd extract"],
    ),
    Wrong(
        "commit-records-gone",
        lambda place: place.train(without_commits(place), objective="dflash"),
        ["the commit record of 1 committed part is gone", "vpd verify --repair"],
    ),
    Wrong(
        "everything-held-out",
        lambda place: place.train(place.cache, objective="dflash", holdout=0.999999),
        ["expected sequences to train on", "found none", "12 are held out", "lower train.holdout"],
    ),
    Wrong(
        "nothing-held-out",
        lambda place: place.evaluate("--holdout", 0.0),
        ["expected held-out greedy responses", "found none", "Hold out more"],
    ),
    Wrong(
        "no-such-device",
        lambda place: place.evaluate("--device", "cuda:77"),
        ["expected a device", "cuda:77"],
        code=2,
    ),
    # Settings
    Wrong(
        "unknown-key",
        lambda place: place.train(place.cache, "--set", "train.num_anchor=3"),
        ["train.num_anchor: unknown setting", "nearest: train.num_anchors"],
        code=2,
    ),
    Wrong(
        "value-of-another-type",
        lambda place: place.train(place.cache, "--set", "train.tau=fast"),
        ["train.tau: expected", "number", "'fast'"],
        code=2,
    ),
    Wrong(
        "unknown-recipe",
        lambda place: place.train(place.cache, "--config", "qwen-3"),
        ["qwen-3:", "expected a YAML file or a recipe", "nearest: qwen3"],
        code=2,
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_an_error_says_what_is_wrong_and_leaves_caches_alone(case: Wrong, place: Place):
    arguments = case.arguments(place)
    before = snapshot(place.cache), snapshot(place.drafted)
    check_message(run_vpd(*arguments), case.code, case.words)
    assert (snapshot(place.cache), snapshot(place.drafted)) == before
    assert not (place.folder / "run").exists()
    assert not list(place.folder.glob("new/commits/*"))


@pytest.mark.parametrize("command", [["train"], ["train", "x"], ["extract", "x"], ["eval", "x", "--k", "many"], ["no"]])
def test_misuse_of_the_command_line_has_exit_code_2(command: list[str]):
    outcome = run_vpd(*command)
    assert outcome.code == 2
    assert "Usage: " in outcome.err


def test_drafts_that_miss_a_part_are_completed_before_training(place: Place):
    folder = next((place.drafted / "drafts").iterdir())
    for path in (folder / "commits").iterdir():
        path.unlink()
    outcome = run_vpd(*place.train(place.drafted))
    check_message(outcome, 1, [f"the first drafts {folder.name} lack 1 of 1 parts", "Complete them: vpd draft"])
    vpd("draft", place.drafted, "--first-drafter", place.first_run)
    assert run_vpd(*place.train(place.drafted)).code == 0


def test_a_cache_without_the_target_s_pieces_is_named(place: Place):
    shutil.rmtree(place.cache / "target")
    outcome = run_vpd(*place.train(place.cache, objective="dflash"))
    check_message(outcome, 1, [str(place.cache / "target"), "vpd extract"])


def test_a_piece_of_the_target_that_was_changed_is_named(place: Place):
    path = place.cache / "target" / "config.json"
    path.write_text(path.read_text().replace("128", "256"))
    outcome = run_vpd(*place.train(place.cache, objective="dflash"))
    check_message(outcome, 1, [str(path), "not what was written", "vpd extract"])


def test_a_target_config_that_lacks_a_key_is_named(place: Place):
    pieces = shutil.copytree(place.cache / "target", place.folder / "pieces")
    config = json.loads((pieces / "config.json").read_text())
    del config["intermediate_size"]
    (pieces / "config.json").write_text(json.dumps(config))
    store_target_files(LocalStorage(place.cache), pieces)
    outcome = run_vpd(*place.train(place.cache, objective="dflash"))
    check_message(outcome, 1, ["intermediate_size", "drafter.intermediate_size"])
    assert vpd(*place.train(place.cache, objective="dflash", intermediate_size=64, max_steps=1))["step"] == 1


@pytest.mark.parametrize("content", ["", '{"part": "par', "[]", "{}"], ids=["empty", "cut", "list", "no-files"])
def test_a_damaged_commit_record_is_named(content: str, place: Place):
    (path,) = place.cache.glob("commits/*.json")
    path.write_text(content)
    outcome = run_vpd(*place.train(place.cache, objective="dflash"))
    check_message(outcome, 1, [str(path), "commit record"])


def test_a_cache_without_an_anchor_in_reach_is_refused(place: Place):
    outcome = run_vpd(*place.train(place.cache, objective="dflash", max_len=5))
    check_message(outcome, 1, ["anchor", "train.max_len", "5"])


def test_damage_found_while_reading_is_named(place: Place):
    (path,) = place.cache.glob("parts/*/hidden/c/0/0/0")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    outcome = run_vpd("draft", place.cache, "--first-drafter", place.first_run)
    check_message(outcome, 1, [str(path), "checksum"])
    assert not list((place.cache / "drafts").glob("*/commits/*"))


@pytest.mark.parametrize("command", ["extract", "train"])
def test_out_that_is_a_file_is_refused(command: str, place: Place):
    (place.folder / "new").write_text("a file")
    (place.folder / "run").write_text("a file")
    training = place.train(place.cache, objective="dflash")
    outcome = run_vpd(*(place.extract(place.prompts) if command == "extract" else training))
    check_message(outcome, 2, [str(place.folder / ("new" if command == "extract" else "run")), "Choose another --out"])
    assert {(place.folder / name).read_text() for name in ("new", "run")} == {"a file"}


TWICE = """
import json, sys
from vpd.pipeline.cli import main
arguments = json.loads(sys.argv[1])
try:
    main(arguments)
except SystemExit as end:
    print("exit code", end.code, file=sys.stderr)
main([*arguments, "--debug"])
"""


def test_a_traceback_is_shown_only_with_debug(tmp_path: Path):
    arguments = json.dumps(["train", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")])
    done = subprocess.run([sys.executable, "-c", TWICE, arguments], capture_output=True, text=True)
    plain, _, debug = done.stderr.partition("exit code 1\n")
    assert plain.startswith("vpd: error: expected a cache at")
    assert plain.count("\n") == 1
    assert debug.startswith("Traceback (most recent call last):")
    assert "vpd.data.errors.CacheNotFoundError: expected a cache at" in debug
    assert (done.returncode, done.stdout) == (1, "")


def test_a_drafters_folder_is_no_place_for_a_run(drafted_cache: Path, first_run: Path):
    checkpoint = find_drafter(first_run)
    before = sorted(path.name for path in checkpoint.iterdir())
    outcome = run_vpd("train", drafted_cache, "--out", checkpoint)
    assert outcome.code == 2
    assert "found a drafter (model.safetensors)" in outcome.message
    assert f"--init {checkpoint}" in outcome.message
    assert sorted(path.name for path in checkpoint.iterdir()) == before
