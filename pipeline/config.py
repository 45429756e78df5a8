"""Settings of every stage: typed sections, filled from a recipe or YAML file and from dotted overrides.

One field is the YAML key, the command-line flag and the documentation at once.
"""

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from ..data.errors import ConfigError
from .options import from_text, leaf_fields, plain_types, takes_text

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
BlockSize = Annotated[int, Field(ge=2, le=255)]
Branches = Annotated[int, Field(ge=0, le=64)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        types = plain_types(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list | tuple) else [value]
        if bool not in types and any(isinstance(item, bool) for item in values):
            raise ValueError("a value other than true and false")
        return value


class ExtractConfig(Section):
    """`extract`: prompts through the target, its hidden states into the cache."""

    mode: Literal["generate", "given"] = "generate"
    """Whether the target answers the prompts, or the records already hold the answers."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """What runs the target."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the target computes in; auto = the target's own. States are always stored as bfloat16."""
    num_draft_layers: Count = 5
    """Number of context layers, chosen by DFlash's layer rule; >= 1."""
    layer_ids: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Context layers, in place of the rule's; id i = output of 0-based target layer i; distinct, >= 0."""
    max_len: Count = 3072
    """Longest sequence, in tokens of prompt and response together; >= 1."""
    max_new_tokens: Count = 2048
    """Longest answer, in tokens per assistant turn; >= 1."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; >= 0. 0 = greedy, which replay needs."""
    top_p: Ratio = 1.0
    """Probability mass of the tokens sampled from; in (0, 1]."""
    top_k: NonNegative = 0
    """Number of tokens sampled from; >= 0, 0 = off."""
    seed: NonNegative = 0
    """Seed of sampling; >= 0."""
    chat_template: str | None = None
    """Jinja file of the chat template; none = the tokenizer's own."""
    template_args: dict[str, Any] = {}
    """Arguments of the chat template, such as `enable_thinking: false`."""
    skip_bad: bool = False
    """Leave out records that can't be used, and count them, in place of stopping at the first."""
    limit: Count | None = None
    """Number of records to read from the start of the prompt file; >= 1, none = all."""
    part_mib: Count = 1024
    """Size of a part of the cache, in MiB; >= 1."""
    max_in_flight: Count = 256
    """Requests in the engine or waiting for the writer, which bounds memory; >= 1."""
    engine_args: dict[str, Any] = {}
    """Arguments passed to the engine as they are."""

    @field_validator("layer_ids")
    @classmethod
    def _distinct(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("distinct layer ids")
        return value


class DraftConfig(Section):
    """`draft`: first drafts and their boundaries over an existing cache."""

    stride: Count = 1
    """Draft at every stride-th supervised anchor; >= 1."""
    anchors_per_pass: Count = 256
    """Blocks drafted in one forward pass; >= 1."""
    device: str = "auto"
    """Torch device; auto = a GPU where there is one."""


class DrafterSection(Section):
    """`drafter`: shape of the drafter that is trained."""

    num_layers: Count = 5
    """Number of decoder layers; >= 1."""
    block_size: BlockSize = 16
    """Block positions, the anchor included (gamma); in 2..255."""
    mask_token_id: NonNegative | None = None
    """Id of the mask token; >= 0, none = chosen from the first drafter or the tokenizer."""
    num_attention_heads: Count | None = None
    """Number of query heads; >= 1, none = the target's."""
    num_key_value_heads: Count | None = None
    """Number of key and value heads; >= 1, none = the target's."""
    head_dim: Count | None = None
    """Width of a head; >= 1, none = the target's."""
    intermediate_size: Count | None = None
    """Width of the MLP; >= 1, none = the target's."""
    rope_theta: PositiveFloat | None = None
    """Base of RoPE; > 0, none = the target's."""


class PrefixConfig(Section):
    """`train.prefix`: how many tokens after the anchor a training block shows."""

    sampler: Literal["geometric", "visible-geometric", "boundary"] = "boundary"
    """Where prefix lengths come from.

    geometric: Eq. 6 of arXiv 2606.04446 over 0..gamma-2; visible-geometric: the public code's rule, which
    never draws 0; boundary: the accept length of the first draft at the anchor.
    """
    beta: Ratio = 0.9
    """Ratio of the geometric prior over prefix lengths (Eq. 6); in (0, 1]."""
    prior_share: Share = 0.3
    """Share of `boundary` blocks whose prefix comes from the geometric prior all the same; in [0, 1].

    Above 0, every prefix length keeps a floor probability.
    """


class TrainConfig(Section):
    """`train`: one training run from a cache."""

    objective: Literal["dflash", "vp"] = "vp"
    """What is trained: a first drafter (dflash) or a VP-Drafter (vp)."""
    prefix: PrefixConfig = PrefixConfig()
    """Prefix lengths of the training blocks; read by the vp objective alone."""
    first_drafter: str | None = None
    """Folder of the first drafter, or fingerprint of its drafts in the cache; none = the only one there."""
    num_anchors: Count = 512
    """Blocks drawn per sequence and visit; >= 1."""
    tau: PositiveFloat = 7.0
    """Decay length of the loss weights, in block positions (Eq. 7); > 0."""
    normalise: Literal["block", "batch"] = "block"
    """What the weighted loss is divided by: each block's weights (the paper) or the batch's (public code)."""
    labels: Literal["recorded", "argmax"] = "recorded"
    """What a block must predict: the recorded tokens or the target's argmax."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate of AdamW; > 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW; >= 0."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Two decay rates of AdamW's moments; each in [0, 1)."""
    clip: PositiveFloat = 1.0
    """Largest gradient norm; > 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup: Share = 0.04
    """Share of all steps in which the learning rate rises; in [0, 1]."""
    epochs: PositiveFloat = 6.0
    """Visits to every training sequence; > 0."""
    max_steps: Count | None = None
    """Number of optimizer steps, in place of epochs; >= 1."""
    batch_size: Count = 4
    """Sequences per forward pass and process; >= 1."""
    accumulate: Count = 1
    """Forward passes per optimizer step; >= 1."""
    max_len: Count = 3072
    """Tokens of a sequence that are read, from its start; >= 1."""
    holdout: BelowOne = 0.05
    """Share of sequences kept from training, chosen by hash of their id; in [0, 1)."""
    seed: NonNegative = 0
    """Seed of initial weights, order, anchors and prefix lengths; >= 0."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """What the forward pass computes in; auto = bf16 on a GPU that has it."""
    num_sampled_tokens: NonNegative = 0
    """Other tokens per step in a sampled softmax; >= 0, 0 = the whole vocabulary.

    n > 0: the softmax runs over the tokens that occur in the cache plus n of the others, drawn anew each
    step, whose weight is scaled up to stand for all of them. On a CPU the head is most of a step.
    """
    log_every: Count = 10
    """Optimizer steps between log lines; >= 1."""
    save_every: Count = 500
    """Optimizer steps between checkpoints; >= 1."""
    keep: Count = 2
    """Number of latest checkpoints kept; >= 1."""
    init: str | None = None
    """Folder of a drafter checkpoint to start from; none = random weights."""


class EvalConfig(Section):
    """`eval`: acceptance length by replay of held-out sequences."""

    k: Branches = 4
    """Branches beside the first draft in each cycle; in 0..64."""
    block_size: BlockSize | None = None
    """Block positions, the anchor included; in 2..255, none = the drafter's."""
    holdout: BelowOne | None = None
    """Share of sequences held out; in [0, 1), none = as in the VP-Drafter's run, else 0.05."""
    limit: Count | None = None
    """Number of held-out sequences; >= 1, none = all."""
    device: str = "auto"
    """Torch device; auto = a GPU where there is one."""


class VpdConfig(Section):
    """All settings; a command reads the sections it needs."""

    extract: ExtractConfig = ExtractConfig()
    """Prompts to cached hidden states."""
    draft: DraftConfig = DraftConfig()
    """First drafts over a cache."""
    drafter: DrafterSection = DrafterSection()
    """Shape of the trained drafter."""
    train: TrainConfig = TrainConfig()
    """Training from a cache."""
    eval: EvalConfig = EvalConfig()
    """Acceptance length from a cache."""


def load_config(source: str | Path | None, overrides: Mapping[str, Any]) -> VpdConfig:
    """Settings of a recipe or YAML file (none = the defaults), with dotted overrides on top.

    A string given for a field that takes no text is read as YAML. Raises one ConfigError with all problems.
    """
    problems: list[str] = []
    flat = {} if source is None else _flatten(_read_source(source, problems), f" in {source}", problems)
    for key, value in _flatten(overrides, "", problems).items():
        text_for_other = isinstance(value, str) and not takes_text(leaf_fields(VpdConfig)[key])
        flat[key] = from_text(value) if text_for_other else value
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[name] = value
    config = VpdConfig()
    try:
        config = VpdConfig.model_validate(tree)
    except ValidationError as error:
        problems += map(_describe, error.errors(include_url=False))
    if problems:
        title = f"{len(problems)} problems with the settings:\n  " if len(problems) > 1 else ""
        raise ConfigError(title + "\n  ".join(problems))
    return config


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=c` as key and value. The value is read as YAML; a field that takes text keeps it as text."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"expected KEY=VALUE, such as train.lr=3e-4, found {text!r}")
    parsed = from_text(value)
    field = leaf_fields(VpdConfig).get(key)
    keep_text = field is not None and takes_text(field) and not isinstance(parsed, str | None)
    return key, value if keep_text else parsed


def config_yaml(config: VpdConfig, sections: Sequence[str]) -> str:
    """The named sections, every field written out, as YAML that `load_config` reads back to the same."""
    tree = {section: getattr(config, section).model_dump() for section in sections}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def from_drafter_json(path: str | Path) -> dict[str, Any]:
    """Overrides from a drafter's config.json as SpecForge writes it; keys absent there yield none.

    `prefix_weight_base` is read for a VP-Drafter alone and means the sampler `visible-geometric`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a drafter's config.json: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {content!r:.80}")
    dflash = content.get("dflash_config") or {}
    rope = content.get("rope_parameters") or {}
    if not isinstance(dflash, dict) or not isinstance(rope, dict):
        raise ConfigError(f"{path}: expected JSON objects in dflash_config and rope_parameters")
    block_sizes = content.get("block_size"), dflash.get("block_size")
    found = {
        "drafter.num_layers": content.get("num_hidden_layers"),
        "drafter.block_size": _agreed(f"{path}: block_size", *block_sizes),
        "drafter.mask_token_id": dflash.get("mask_token_id"),
        "drafter.rope_theta": _agreed(f"{path}: rope_theta", content.get("rope_theta"), rope.get("rope_theta")),
        "extract.layer_ids": dflash.get("target_layer_ids"),
    }
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        found[f"drafter.{name}"] = content.get(name)
    spelled = f"{path}: dflash_config.training_mode (older spelling: loss_type)"
    mode = _agreed(spelled, dflash.get("training_mode"), dflash.get("loss_type"))
    if mode not in (None, "dflash", "vp_drafter"):
        raise ConfigError(f"{spelled}: expected dflash or vp_drafter, found {mode!r}")
    found["train.objective"] = "vp" if mode == "vp_drafter" else "dflash"
    if mode == "vp_drafter" and "prefix_weight_base" in dflash:
        base = dflash["prefix_weight_base"]
        found["train.prefix.beta"] = 0.9 if base is None else base
        found["train.prefix.sampler"] = "visible-geometric"
    return {key: value for key, value in found.items() if value is not None}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice in one mapping is an error, where PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_source(source: str | Path, problems: list[str]) -> dict[Any, Any]:
    """Content of a recipe or YAML file; empty, with a problem noted, if it can't be read."""
    files = [entry for entry in resources.files("vpd.configs").iterdir() if entry.name.endswith(".yaml")]
    recipes = {entry.name.removesuffix(".yaml"): entry for entry in files}
    place = recipes.get(str(source)) if isinstance(source, str) else None
    try:
        tree = yaml.load((place or Path(source)).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        names, nearest = ", ".join(sorted(recipes)), _nearest(str(source), recipes)
        problems.append(f"{source}: expected a YAML file or a recipe ({names}); nearest: {nearest}")
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problems.append(f"{source}{line}: expected YAML: {error.problem}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{source}: expected a YAML file: {' '.join(str(error).split())}")
    else:
        if isinstance(tree, dict):
            return tree
        problems.append(f"{source}: expected a mapping of sections, found {tree!r:.80}")
    return {}


def _flatten(tree: Mapping[Any, Any], where: str, problems: list[str], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every known setting; the others are noted as problems."""
    leaves = leaf_fields(VpdConfig)
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key, found = f"{prefix}{name}", {}
        is_section = any(leaf.startswith(f"{key}.") for leaf in leaves)
        if key in leaves:
            found = {key: value}
        elif isinstance(value, Mapping) and (value or is_section):
            found = _flatten(value, where, problems, f"{key}.")
        elif is_section:
            problems.append(f"{key}: expected a mapping of settings{where}, found {value!r:.80}")
        else:
            problems.append(f"{key}: unknown setting{where}; nearest: {_nearest(key, leaves)}")
        problems += [f"{twice}: given twice{where}" for twice in flat.keys() & found.keys()]
        flat |= found
    return flat


def _nearest(name: str, valid: Collection[str]) -> str:
    """The valid names with the same last part, else those spelled alike, else the one least unlike."""
    same = [key for key in valid if key.rpartition(".")[2] == name.rpartition(".")[2]]
    return ", ".join(same or get_close_matches(name, valid, 3, 0.8) or get_close_matches(name, valid, 1, 0.0))


def _describe(error: ErrorDetails) -> str:
    """One line for one pydantic error: dotted key, what was expected, what was found."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])[1:]
    text = error["msg"].replace("Field required", "a value").removeprefix("Value error, ")
    text = re.sub(r"^Input should be (?=greater|less)", "a value ", text).removeprefix("Input should be ")
    return f"{key}: expected {text}, found {error['input']!r:.80}"


def _agreed(label: str, one: Any, other: Any) -> Any:
    """The value given in either of two places, or None; an error if both give one and they differ."""
    if one is not None and other is not None and one != other:
        raise ConfigError(f"{label}: expected one value, found {one!r} and {other!r}")
    return other if one is None else one
