"""Targets and drafters that an id on the hub names, from the hub's local cache."""

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from support.tiny import DRAFTER, EXTRACT, PROMPTS, TRAIN, run_vpd, vpd
from vpd.data.errors import DrafterError, TargetError, VpdError
from vpd.stages.extract.target import load_target
from vpd.stages.train.checkpoints import find_drafter

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the hub; the hub itself can't be reached."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def add_model(hub: Path, model_id: str, folder: Path) -> Path:
    """Adds the files that a download would leave."""
    model = hub / f"models--{model_id.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    return shutil.copytree(folder, model / "snapshots" / COMMIT)


def test_a_target_of_the_hub_is_found(hub: Path, tiny_llama: Path):
    found = load_target(str(tiny_llama))
    add_model(hub, "owner/tiny-llama", tiny_llama)
    target = load_target("owner/tiny-llama")
    assert (target.name, target.fingerprint()) == ("owner/tiny-llama", found.fingerprint())


def test_an_estimate_asks_the_hub_for_the_small_files_alone(
    hub: Path, tiny_llama: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for path in add_model(hub, "owner/tiny-llama", tiny_llama).glob("*.safetensors"):
        path.unlink()
    asked: list[str] = []

    def noted_download(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return snapshot_download(name, allow_patterns=allow_patterns)

    monkeypatch.setattr("vpd.stages.hub.snapshot_download", noted_download)
    flags = {"out": tmp_path / "cache", **EXTRACT}
    found, local = (vpd("estimate", name, tiny_prompts, **flags) for name in ("owner/tiny-llama", tiny_llama))
    assert found | {"free_bytes": None} == local | {"free_bytes": None}
    assert found["num_sequences"] == len(PROMPTS)
    assert not any(fnmatch("model.safetensors", pattern) for pattern in asked)


def test_a_drafter_of_the_hub_is_used_as_a_local_one(hub: Path, first_run: Path, drafted_cache: Path, tmp_path: Path):
    snapshot = add_model(hub, "owner/tiny-DFlash-b4", find_drafter(first_run))
    assert find_drafter("owner/tiny-DFlash-b4") == snapshot
    evaluated = [
        vpd("eval", drafted_cache, "--first-drafter", name, holdout=1) for name in (first_run, "owner/tiny-DFlash-b4")
    ]
    assert evaluated[0]["alpha"] == evaluated[1]["alpha"]
    settings = {**DRAFTER, **TRAIN, "max_steps": 2}
    for name, first in (("local", find_drafter(first_run)), ("hub", "owner/tiny-DFlash-b4")):
        vpd("train", drafted_cache, "--out", tmp_path / name, "--init", first, "--first-drafter", first, **settings)
    local, found = (find_drafter(tmp_path / name) / "model.safetensors" for name in ("local", "hub"))
    assert local.read_bytes() == found.read_bytes()


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./no-such-folder", "no/such/folder", "no-such-owner/no-such-model"]
)
@pytest.mark.parametrize(
    ("find", "kind", "error"), [(load_target, "target", TargetError), (find_drafter, "drafter", DrafterError)]
)
def test_what_is_nowhere_is_refused(
    find: Callable[[str], object], kind: str, error: type[VpdError], name: str, hub: Path
):
    with pytest.raises(error) as caught:
        find(name)
    for word in (f"expected a {kind}", name, "neither a local folder", "Check the path"):
        assert word in str(caught.value)


def test_a_first_drafter_that_is_not_on_the_hub_is_named(hub: Path, drafted_cache: Path, tmp_path: Path):
    settings = {**DRAFTER, **TRAIN}
    outcome = run_vpd("train", drafted_cache, "--out", tmp_path, "--first-drafter", "owner/other", **settings)
    assert outcome.code == 1
    assert "expected a drafter: owner/other is neither" in outcome.message


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("{}/config.json", "It is a file: give its folder, {}."),
        ("~/llama", "Write ~ out: {}."),
        ("~nobody/llama", "Check the path"),
        ("owner/llama@main", "hf download ID --revision REVISION"),
        ("owner/llama", "Check the path"),
    ],
)
def test_a_name_that_is_nearly_right_is_told_what_to_do(
    name: str, advice: str, hub: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    with pytest.raises(TargetError) as caught:
        load_target(name.format(tiny_llama))
    assert advice.format(tiny_llama) in str(caught.value)
