"""Settings: where they come from, which of them wins, and what the errors say."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from vpd.data.errors import ConfigError, DrafterError
from vpd.pipeline.config import VpdConfig, config_yaml, from_drafter_json, load_config, parse_assignment
from vpd.stages.train.config import PrefixConfig

SECTIONS = list(VpdConfig.model_fields)


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def write_json(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def models(model: type[BaseModel] = VpdConfig) -> list[type[BaseModel]]:
    nested = [field.annotation for field in model.model_fields.values()]
    sections = [kind for kind in nested if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [model, *(found for section in sections for found in models(section))]


# Sources


def test_no_source_gives_the_defaults():
    assert load_config(None, {}) == VpdConfig()


def test_demo_recipe():
    config = load_config("smollm2-135m", {})
    assert (config.extract.dtype, config.extract.num_draft_layers, config.extract.part_mib) == ("float32", 3, 64)
    assert config.extract.engine_args["enforce_eager"] is True
    assert (config.drafter.block_size, config.train.lr, config.train.max_steps) == (8, 0.001, 200)


def test_qwen3_recipe():
    config = load_config("qwen3", {})
    assert config.extract.template_args == {"enable_thinking": False}
    assert (config.drafter.block_size, config.drafter.mask_token_id) == (16, 151669)
    assert config.train.prefix == PrefixConfig(sampler="posterior")


def test_yaml_file_by_path_and_by_string(tmp_path: Path):
    path = write(tmp_path, "train:\n  prefix: {beta: 0.8}\n  lr: 3e-4\n")
    config = load_config(path, {})
    assert (config.train.prefix.beta, config.train.lr) == (0.8, 3e-4)
    assert load_config(str(path), {}) == config


def test_overrides_win_and_leave_the_rest(tmp_path: Path):
    path = write(tmp_path, "train:\n  prefix: {beta: 0.8, sampler: geometric}\n")
    config = load_config(path, {"train.prefix.beta": 0.7, "train.prefix": {"k": 2}})
    assert (config.train.prefix.beta, config.train.prefix.sampler) == (0.7, "geometric")
    assert config.train.prefix.k == 2


def test_a_mixture_is_replaced_as_a_whole(tmp_path: Path):
    path = write(tmp_path, "train:\n  prefix: {mixture: {boundary: 2, geometric: 1}}\n")
    assert load_config(path, {}).train.prefix.mixture == {"boundary": 2, "geometric": 1}
    config = load_config(path, dict([parse_assignment("train.prefix.mixture={topk: 1}")]))
    assert config.train.prefix.mixture == {"topk": 1}


@given(
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    betas=st.tuples(*[st.floats(min_value=0, max_value=1, exclude_max=True)] * 2),
    layer_ids=st.none() | st.lists(st.integers(0, 100), min_size=1, unique=True),
    first_drafter=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    engine_args=st.dictionaries(st.text("abc_", min_size=1), st.booleans() | st.integers() | st.text("0e.-~: ")),
)
@example(lr=1e-5, betas=(0.0, 0.5), layer_ids=None, first_drafter="\x85", engine_args={"a": "1e5"})
@settings(max_examples=60, deadline=None)
def test_resolved_yaml_reads_back_to_the_same(tmp_path_factory: pytest.TempPathFactory, **fields: Any):
    sections = {"first_drafter": "train", "lr": "train", "betas": "train"}
    overrides = {f"{sections.get(name, 'extract')}.{name}": value for name, value in fields.items()}
    config = load_config("smollm2-135m", overrides)
    path = write(tmp_path_factory.mktemp("round-trip"), config_yaml(config, SECTIONS))
    assert load_config(path, {}) == config


def test_resolved_yaml_holds_only_the_named_sections():
    text = config_yaml(VpdConfig(), ["drafter"])
    assert text.startswith("drafter:\n  num_layers: 5\n  block_size: 16\n")
    assert "train" not in text


# Errors


class Wrong(NamedTuple):
    id: str
    yaml: str
    overrides: dict[str, Any]
    words: list[str]


WRONG = [
    Wrong("unknown-in-yaml", "train: {num_anchor: 4}", {}, ["train.num_anchor:", "nearest: train.num_anchors"]),
    Wrong("unknown-nested", "train: {prefix: {betta: 1}}", {}, ["train.prefix.betta:", "train.prefix.beta"]),
    Wrong("unknown-override", "", {"drafter.blocksize": 8}, ["drafter.blocksize:", "drafter.block_size"]),
    Wrong("without-section", "lr: 0.1", {}, ["lr: unknown", "train.lr"]),
    Wrong("wrong-section", "trian: {lr: 0.1}", {}, ["trian.lr:", "train.lr"]),
    Wrong("wrong-type", "train: {num_anchors: many}", {}, ["train.num_anchors:", "valid integer", "'many'"]),
    Wrong("fraction", "", {"train.num_anchors": 1.5}, ["train.num_anchors:", "valid integer", "1.5"]),
    Wrong("bool", "", {"train.num_anchors": True}, ["train.num_anchors:", "True"]),
    Wrong("bool-in-list", "", {"extract.layer_ids": [1, True]}, ["extract.layer_ids:", "True"]),
    Wrong("not-a-choice", "train: {objective: vpd}", {}, ["train.objective:", "'dflash' or 'vp'", "'vpd'"]),
    Wrong("section-is-no-mapping", "train: 5", {}, ["train:", "mapping", "5"]),
    Wrong("empty-section", "train:", {}, ["train:", "mapping", "None"]),
    Wrong("zero-lr", "", {"train.lr": 0}, ["train.lr:", "greater than 0", "found 0"]),
    Wrong("nan", "", {"train.lr": ".nan"}, ["train.lr:", "found nan"]),
    Wrong("holdout-one", "train: {holdout: 1.0}", {}, ["train.holdout:", "less than 1", "1.0"]),
    Wrong("k", "eval: {k: 65}", {}, ["eval.k:", "less than or equal to 64", "65"]),
    Wrong("block-size", "drafter: {block_size: 1}", {}, ["drafter.block_size:", "equal to 2", "found 1"]),
    Wrong("beta", "", {"train.prefix.beta": 0}, ["train.prefix.beta:", "greater than 0"]),
    Wrong("sampler", "train: {prefix: {sampler: prior}}", {}, ["train.prefix.sampler:", "'mixture'", "'prior'"]),
    Wrong("mixture-empty", "train: {prefix: {mixture: {}}}", {}, ["train.prefix.mixture:", "at least one sampler"]),
    Wrong("mixture-of-mixtures", "", {"train.prefix.mixture": {"mixture": 1}}, ["train.prefix.mixture", "'mixture'"]),
    Wrong("mixture-zero", "", {"train.prefix.mixture": {"topk": 0}}, ["train.prefix.mixture.topk:", "greater than 0"]),
    Wrong("share", "", {"extract.audit": 1.5}, ["extract.audit:", "less than or equal to 1"]),
    Wrong("below-one", "", {"train.ema": 1.0}, ["train.ema:", "less than 1"]),
    Wrong("betas", "train: {betas: [0.9, 1.0]}", {}, ["train.betas[1]:", "less than 1"]),
    Wrong("betas-short", "train: {betas: [0.9]}", {}, ["train.betas[1]:", "expected a value"]),
    Wrong("layer-ids-twice", "extract: {layer_ids: [1, 1]}", {}, ["extract.layer_ids:", "distinct"]),
    Wrong("layer-ids-empty", "extract: {layer_ids: []}", {}, ["extract.layer_ids: expected at least 1 item"]),
    Wrong("layer-ids-negative", "extract: {layer_ids: [-1]}", {}, ["extract.layer_ids[0]:", "equal to 0"]),
    Wrong("no-mapping", "[1, 2]", {}, ["settings.yaml:", "mapping of sections", "[1, 2]"]),
    Wrong("empty", "", {}, ["settings.yaml:", "mapping of sections", "None"]),
    Wrong("syntax", "train:\n  lr: [1\n", {}, ["settings.yaml, line 3:"]),
    Wrong("key-twice", "train:\n  lr: 1\n  lr: 2\n", {}, ["settings.yaml, line 3:", "lr is given twice"]),
    Wrong("key-twice-by-dots", "train.lr: 1\ntrain: {lr: 2}", {}, ["train.lr: given twice"]),
    Wrong("bytes", "train: \x00", {}, ["settings.yaml:", "expected a YAML file"]),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_wrong_settings_are_named(case: Wrong, tmp_path: Path):
    source = None if case.overrides else write(tmp_path, case.yaml)
    with pytest.raises(ConfigError) as caught:
        load_config(source, case.overrides)
    assert "\n" not in str(caught.value)
    for word in case.words:
        assert word in str(caught.value)


def test_all_problems_are_reported_together(tmp_path: Path):
    path = write(tmp_path, "train: {num_anchor: 4, lr: -1, prefix: {beta: 0}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"eval.k": "four", "drafter.size": 1})
    first, *lines = str(caught.value).splitlines()
    assert first == "5 problems with the settings:"
    keys = {line.split(":")[0].strip() for line in lines}
    assert keys == {"train.num_anchor", "train.lr", "train.prefix.beta", "eval.k", "drafter.size"}


@pytest.mark.parametrize("source", ["smollm-135m", "smollm2-135m.yml", Path("smollm2-135m")])
def test_unknown_recipe_names_the_recipes_and_the_nearest(source: str | Path):
    with pytest.raises(ConfigError, match=r"qwen3, .*nearest: smollm2-135m"):
        load_config(source, {})


def test_folder_in_place_of_a_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a YAML file"):
        load_config(tmp_path, {})


# Assignments


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.lr=3e-4", "train.lr", 3e-4),
        ("train.lr=0.1", "train.lr", 0.1),
        ("train.max_steps=null", "train.max_steps", None),
        ("train.betas=[0.8, 0.9]", "train.betas", (0.8, 0.9)),
        ("extract.layer_ids=[1,2]", "extract.layer_ids", [1, 2]),
        ("extract.engine_args={a: 1}", "extract.engine_args", {"a": 1}),
        ("extract.audit=0.5%", "extract.audit", 0.005),
        ("extract.skip_bad=true", "extract.skip_bad", True),
        ("train.first_drafter=00123", "train.first_drafter", "00123"),
        ("train.first_drafter=null", "train.first_drafter", None),
        ("train.init=a=b: c", "train.init", "a=b: c"),
    ],
)
def test_assignment_reaches_its_field(text: str, key: str, value: Any):
    config = load_config("smollm2-135m", dict([parse_assignment(text)]))
    section, name = key.split(".")
    found = getattr(getattr(config, section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["extract.engine_args.a=2"], {"enforce_eager": True, "a": 2}),
        (["extract.engine_args.a=2", "extract.engine_args.enforce_eager=false"], {"enforce_eager": False, "a": 2}),
        (["extract.engine_args={b: 1}", "extract.engine_args.a={c: [3]}"], {"b": 1, "a": {"c": [3]}}),
    ],
)
def test_an_entry_of_a_mapping_is_added_to_the_others(texts: list[str], expected: dict[str, Any]):
    recipe = load_config("smollm2-135m", {}).extract.engine_args
    found = load_config("smollm2-135m", dict(map(parse_assignment, texts))).extract.engine_args
    kept = {} if "b" in expected else recipe
    assert found == kept | expected


def test_an_entry_goes_into_a_mapping_alone():
    with pytest.raises(ConfigError, match=r"train\.lr\.a: unknown setting"):
        load_config(None, {"train.lr.a": 2})


@pytest.mark.parametrize("text", ["train.lr", "=3", ""])
def test_assignment_without_key_or_equals(text: str):
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_assignment(text)


def test_string_override_is_read_by_the_type_of_its_field():
    config = load_config(None, {"extract.layer_ids": "[1, 2]", "train.first_drafter": "123"})
    assert (config.extract.layer_ids, config.train.first_drafter) == ([1, 2], "123")


# Drafter JSON

SHAPE = {
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "block_size": 16,
    "rope_theta": 1000000,
}
DFLASH = {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]}


@pytest.mark.parametrize("spelling", ["training_mode", "loss_type"])
def test_drafter_json_of_a_vp_drafter(spelling: str, tmp_path: Path):
    content = SHAPE | {"dflash_config": DFLASH | {spelling: "vp_drafter", "prefix_weight_base": None}}
    config = load_config(None, from_drafter_json(write_json(tmp_path, content)))
    shape = {"num_layers": 5, "mask_token_id": 151669, **{key: SHAPE[key] for key in list(SHAPE)[1:]}}
    assert config.drafter.model_dump() == shape
    assert config.train.objective == "vp"
    assert (config.train.prefix.sampler, config.train.prefix.beta) == ("visible-geometric", 0.9)


def test_explicit_setting_wins_over_the_drafter_json(tmp_path: Path):
    content = {"dflash_config": {"training_mode": "vp_drafter", "prefix_weight_base": 0.8}}
    path = write_json(tmp_path, content)
    config = load_config(None, {**from_drafter_json(path), **dict([parse_assignment("train.prefix.beta=0.5")])})
    assert (config.train.prefix.sampler, config.train.prefix.beta) == ("visible-geometric", 0.5)


class Drafter(NamedTuple):
    id: str
    content: dict[str, Any]
    overrides: dict[str, Any]


VP = {"train.objective": "vp", "train.prefix.beta": 0.9, "train.prefix.sampler": "visible-geometric"}
DRAFTERS = [
    Drafter("bare", {}, {"train.objective": "dflash"}),
    Drafter("named", {"dflash_config": {"training_mode": "dflash"}}, {"train.objective": "dflash"}),
    Drafter("null", {"dflash_config": {"loss_type": None}}, {"train.objective": "dflash"}),
    Drafter("base-without-vp", {"dflash_config": {"prefix_weight_base": 0.8}}, {"train.objective": "dflash"}),
    Drafter("vp-without-base", {"dflash_config": {"training_mode": "vp_drafter"}}, VP),
    Drafter(
        "nested-block-and-rope",
        {"dflash_config": {"block_size": 8}, "rope_parameters": {"rope_theta": 1e6}},
        {"train.objective": "dflash", "drafter.block_size": 8, "drafter.rope_theta": 1e6},
    ),
    Drafter(
        "both-spellings-of-rope",
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 1e6}},
        {"train.objective": "dflash", "drafter.rope_theta": 1e6},
    ),
]


@pytest.mark.parametrize("case", DRAFTERS, ids=lambda case: case.id)
def test_drafter_json_yields_only_what_it_holds(case: Drafter, tmp_path: Path):
    assert from_drafter_json(write_json(tmp_path, case.content)) == case.overrides


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"dflash_config": {"training_mode": "dpace"}}, "training_mode.*vp_drafter.*'dpace'"),
        ({"dflash_config": {"loss_type": ["dflash"]}}, "loss_type.*vp_drafter"),
        ({"dflash_config": {"training_mode": "dflash", "loss_type": "vp_drafter"}}, "'dflash' and 'vp_drafter'"),
    ],
)
def test_drafter_json_that_makes_no_sense(content: Any, words: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=words):
        from_drafter_json(write_json(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"dflash_config": 3}, "dflash_config"),
        ({"block_size": 8, "dflash_config": {"block_size": 16}}, "block_size: found 8, and 16"),
        ([], "JSON object"),
        ({"dflash_config": {"projector_type": "domino"}}, "projector_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
        ({"rope_scaling": {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 1e6}}, r"1000000\.0 and 10000\.0"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, r"10000\.0 and 1000000\.0"),
        ({"num_hiden_layers": 5}, "num_hiden_layers: unknown key, nearest: num_hidden_layers"),
    ],
)
def test_drafter_json_is_checked_as_a_checkpoints_config(content: Any, words: str, tmp_path: Path):
    with pytest.raises(DrafterError, match=words):
        from_drafter_json(write_json(tmp_path, content))


def test_drafter_json_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.json"):
        from_drafter_json(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        from_drafter_json(write(tmp_path, "{"))


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_field_is_described(model: type[BaseModel]):
    for name, field in model.model_fields.items():
        assert field.description, name
