"""Flags: one for every setting, with its name, its type and its description."""

from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel
from vpd.pipeline.config import VpdConfig, load_config
from vpd.pipeline.options import collect_overrides, leaf_fields, section_options
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.train.config import DrafterSection, TrainConfig


def run(model: type[BaseModel], section: str, *args: str, only: list[str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def command(**kwargs: Any) -> None:
        found.update(collect_overrides(kwargs))

    options = section_options(model, section, only)
    result = CliRunner().invoke(click.Command("command", callback=command, params=options), args)
    assert result.exit_code == 0, result.output
    return found | ({"help": result.output} if "--help" in args else {})


TRAIN_VALUES = {
    "objective": "dflash",
    "prefix.sampler": "visible-geometric",
    "anchor.sampler": "failure",
    "normalize": "batch",
    "labels": "argmax",
    "schedule": "linear",
    "precision": "bfloat16",
    "betas": "0.8,0.9",
    "optimizer": "muon",
    "ema": "0.5",
    "attention": "flex",
    "sharding": "fsdp2",
    "non_finite": "skip",
    "trackers": "tensorboard,wandb",
    "project": "mine",
}
SWITCHES = {"compile"}
"""Settings whose flag takes no value."""


@pytest.mark.parametrize("key", [key for key in leaf_fields(TrainConfig) if key != "prefix.mixture"])
def test_every_training_setting_has_a_flag(key: str):
    text = [] if key in SWITCHES else [TRAIN_VALUES.get(key, "1")]
    overrides = run(TrainConfig, "train", f"--{key.replace('.', '-').replace('_', '-')}", *text)
    assert list(overrides) == [f"train.{key}"]
    if key != "holdout":
        dumped = load_config(None, overrides).train.model_dump()
        for part in key.split("."):
            dumped = dumped[part]
        others = {
            "betas": (0.8, 0.9),
            "init": "1",
            "first_drafter": "1",
            "ema": 0.5,
            "trackers": ["tensorboard", "wandb"],
        }
        assert dumped == others.get(key, TRAIN_VALUES.get(key, 1))


def test_no_flag_gives_no_override():
    for name in VpdConfig.model_fields:
        assert run(type(getattr(VpdConfig(), name)), name) == {}


def test_settings_of_a_hidden_section_have_no_flags():
    text = run(ExtractConfig, "extract", "--help")["help"]
    assert "--part-mib" in text
    assert "unit-records" not in text
    key = "extract.machinery.unit_records"
    assert load_config(None, {key: 7}).extract.machinery.unit_records == 7
    with pytest.raises(ValueError, match=r"unit_records: .* greater than or equal to 1"):
        load_config(None, {key: 0})


def test_flags_of_other_kinds():
    args = ["--skip-bad", "--layer-ids", "1,9", "--limit", "3"]
    expected = {"extract.skip_bad": True, "extract.layer_ids": [1, 9], "extract.limit": 3}
    assert run(ExtractConfig, "extract", *args) == expected
    assert run(ExtractConfig, "extract", "--audit", "0.5%") == {"extract.audit": "0.5%"}
    assert run(ExtractConfig, "extract", "--no-skip-bad") == {"extract.skip_bad": False}


@pytest.mark.parametrize("args", [["--layer-ids", "1,x"], ["--engine", "tgi"], ["--seed", "x"], ["--engine-args", "1"]])
def test_flag_with_a_wrong_value_or_name_is_refused(args: list[str]):
    command = click.Command("command", callback=lambda **_: None, params=section_options(ExtractConfig, "extract"))
    assert CliRunner().invoke(command, args).exit_code == 2


def test_help_is_the_first_sentence_and_the_default():
    text = " ".join(run(TrainConfig, "train", "--help")["help"].split())
    assert "--lr FLOAT Peak learning rate; > 0. [default: 0.0006]" in text
    assert "Ratio of the geometric prior over prefix lengths (Eq. 6); > 0. [default: 0.9]" in text
    assert "Number of optimizer steps; >= 1, none = as many as `epochs` takes. [default: none]" in text
    assert "|topk|mixture] The rule that draws prefix lengths. [default: posterior]" in text
    assert text.index("--objective") < text.index("--prefix-sampler") < text.index("--init")


def test_only_the_named_flags():
    text = run(TrainConfig, "train", "--help", only=["prefix", "lr"])["help"]
    flags = [word for word in text.split() if word.startswith("--")]
    assert flags == ["--prefix-sampler", "--prefix-beta", "--prefix-k", "--lr", "--help"]
    with pytest.raises(ValueError, match="rate"):
        section_options(TrainConfig, "train", ["rate"])


def test_two_sections_on_one_command():
    def command(**kwargs: Any) -> None:
        click.echo(collect_overrides(kwargs | {"out": "x"}))

    options = [*section_options(DrafterSection, "drafter", ["num_layers"]), *section_options(EvalConfig, "eval", ["k"])]
    found = click.Command("command", callback=command, params=options)
    output = CliRunner().invoke(found, ["--num-layers", "2", "--k", "1"]).output
    assert output.strip() == "{'drafter.num_layers': 2, 'eval.k': 1}"
