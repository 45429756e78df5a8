"""`vpd train --drafter-config`: the drafter that the file describes is trained, or the file is refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.tiny import TRAIN, run_vpd, vpd
from vpd.data.errors import DrafterError
from vpd.stages.drafter.checkpoint import load_shape
from vpd.stages.drafter.shape import DrafterShape, check_config
from vpd.stages.train.checkpoints import find_drafter
from vpd.stages.train.plan import check_agrees

RUN = {key: value for key, value in TRAIN.items() if key != "num_layers"} | {"max_steps": 1, "objective": "dflash"}


@pytest.fixture
def public(first_run: Path) -> dict[str, Any]:
    """A config of a drafter that fits the tiny cache."""
    return json.loads((find_drafter(first_run) / "config.json").read_text())


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "drafter.json"
    path.write_text(json.dumps(config))
    return path


def test_the_drafter_of_the_file_is_trained(public: dict[str, Any], tiny_cache: Path, tmp_path: Path):
    config = public | {"num_hidden_layers": 2, "layer_types": None, "intermediate_size": 48, "head_dim": 16}
    path = write_config(tmp_path, config)
    vpd("train", tiny_cache, "--out", tmp_path / "run", "--drafter-config", path, **RUN)
    assert load_shape(find_drafter(tmp_path / "run")) == DrafterShape.from_json(config, "")


DIFFERENT: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 321,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "attention_dropout": 0.1,
}


@pytest.mark.parametrize("key", DIFFERENT)
def test_what_this_cache_can_not_train_is_named(key: str, public: dict[str, Any]):
    shape = DrafterShape.from_json(public, "")
    check_agrees(shape, check_config(public, "x.json"), "x.json")
    asked = check_config(public | {key: DIFFERENT[key]}, "x.json")
    with pytest.raises(DrafterError, match=rf"x\.json asks .*: the file has {DIFFERENT[key]}, this run") as caught:
        check_agrees(shape, asked, "x.json")
    assert [name for name in DIFFERENT if name in str(caught.value)] == [key]


def test_other_context_layers_are_refused_before_anything_is_written(
    public: dict[str, Any], tiny_cache: Path, tmp_path: Path
):
    public["dflash_config"]["target_layer_ids"] = [0, 1, 2]
    path = write_config(tmp_path, public)
    found = run_vpd("train", tiny_cache, "--out", tmp_path / "run", "--drafter-config", path, **RUN)
    assert found.code == 1
    assert f"{path} asks for another drafter" in found.message
    assert "target_layer_ids: the file has [0, 1, 2]" in found.message
    assert not (tmp_path / "run").exists()


def test_a_flag_wins_over_the_file(public: dict[str, Any], tiny_cache: Path, tmp_path: Path):
    path = write_config(tmp_path, public)
    vpd("train", tiny_cache, "--out", tmp_path / "run", "--drafter-config", path, block_size=3, **RUN)
    found, asked = load_shape(find_drafter(tmp_path / "run")), DrafterShape.from_json(public, "")
    assert asdict(found) == asdict(asked) | {"block_size": 3}
