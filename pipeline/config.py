"""All settings: the sections of the stages, filled from a recipe or YAML file and from dotted overrides."""

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from ..data.errors import ConfigError
from ..stages.config import ReadConfig, Section
from ..stages.draft.config import DraftConfig
from ..stages.drafter.shape import check_config, rope_parameters
from ..stages.evaluate.config import EvalConfig
from ..stages.extract.config import EstimateConfig, ExtractConfig
from ..stages.train.config import DrafterSection, TrainConfig
from .options import from_text, leaf_fields, takes_text
from .plugins import load_plugins


class VpdConfig(Section):
    """All settings; a command reads the sections that it needs."""

    extract: ExtractConfig = ExtractConfig()
    """Prompts to cached hidden states."""
    estimate: EstimateConfig = EstimateConfig()
    """What an extraction will take."""
    read: ReadConfig = ReadConfig()
    """How a cache is read."""
    draft: DraftConfig = DraftConfig()
    """First drafts over a cache."""
    drafter: DrafterSection = DrafterSection()
    """Shape of the trained drafter."""
    train: TrainConfig = TrainConfig()
    """Training from a cache."""
    eval: EvalConfig = EvalConfig()
    """Acceptance length from a cache."""


def load_config(source: str | Path | None, overrides: Mapping[str, Any]) -> VpdConfig:
    """The settings of a recipe or YAML file with dotted overrides on top.

    A string for a field that takes no text is read as YAML. A key below a mapping, such as
    `extract.engine_args.max_num_seqs`, adds an entry to the mapping.

    Args:
        source: a recipe's name or a YAML file; None: the defaults.

    Raises:
        ConfigError: something is wrong; one error lists all problems.
    """
    load_plugins()
    problems: list[str] = []
    flat = {} if source is None else _flatten(_read_source(source, problems), f" in {source}", problems)
    entries = {key: value for key, value in overrides.items() if _mapping_of(key)}
    rest = {key: value for key, value in overrides.items() if key not in entries}
    for key, value in _flatten(rest, "", problems).items():
        text_for_other = isinstance(value, str) and not takes_text(leaf_fields(VpdConfig)[key])
        flat[key] = from_text(value) if text_for_other else value
    for key, value in entries.items():
        _add_entry(flat, _mapping_of(key), key, value)
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
    """`a.b=c` as key and value. The value is read as YAML, unless the field takes text.

    Raises:
        ConfigError: the text is not KEY=VALUE.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"expected KEY=VALUE, such as train.lr=3e-4, found {text!r}")
    parsed = from_text(value)
    field = leaf_fields(VpdConfig).get(key)
    keep_text = field is not None and takes_text(field) and not isinstance(parsed, str | None)
    return key, value if keep_text else parsed


def config_yaml(config: VpdConfig, sections: Sequence[str]) -> str:
    """The named sections as YAML with all fields; `load_config` reads the same settings from it."""
    tree = {section: getattr(config, section).model_dump() for section in sections}
    return yaml.safe_dump(tree, sort_keys=False)


def from_drafter_json(path: str | Path) -> dict[str, Any]:
    """Overrides from a drafter's config.json as SpecForge writes it; a key that the file lacks gives no override.

    For a VP-Drafter the sampler is `visible-geometric`, with the file's `prefix_weight_base`, or 0.9 if it has none.

    Raises:
        DrafterError: the drafter is one that vpd does not compute, or a key is unknown or has a wrong value.
        ConfigError: the file can't be read, or contradicts itself.
    """
    content = read_drafter_json(path)
    dflash = content.get("dflash_config") or {}
    found = {
        "drafter.num_layers": content.get("num_hidden_layers"),
        "drafter.block_size": content.get("block_size") or dflash.get("block_size"),
        "drafter.mask_token_id": dflash.get("mask_token_id"),
        "drafter.rope_theta": rope_parameters(content).get("rope_theta"),
    }
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        found[f"drafter.{name}"] = content.get(name)
    spelled = f"{path}: dflash_config.training_mode (older spelling: loss_type)"
    modes = [dflash[key] for key in ("training_mode", "loss_type") if dflash.get(key) is not None]
    if modes[1:] and modes[0] != modes[1]:
        raise ConfigError(f"{spelled}: expected one value, found {modes[0]!r} and {modes[1]!r}")
    mode = modes[0] if modes else None
    if mode not in (None, "dflash", "vp_drafter"):
        raise ConfigError(f"{spelled}: expected dflash or vp_drafter, found {mode!r}")
    found["train.objective"] = "vp" if mode == "vp_drafter" else "dflash"
    if mode == "vp_drafter":
        base = dflash.get("prefix_weight_base")
        found["train.prefix.beta"] = 0.9 if base is None else base
        found["train.prefix.sampler"] = "visible-geometric"
    return {key: value for key, value in found.items() if value is not None}


def read_drafter_json(path: str | Path) -> dict[str, Any]:
    """A drafter's config.json in the public form, checked as that of a checkpoint, of which any key may be absent.

    Raises:
        DrafterError: the drafter is one that vpd does not compute, or a key is unknown or has a wrong value.
        ConfigError: the file can't be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a drafter's config.json: {error}") from error
    return check_config(content, str(path))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that a mapping gives twice is an error; PyYAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_source(source: str | Path, problems: list[str]) -> dict[Any, Any]:
    """Content of a recipe or YAML file. If the file can't be read, the content is empty and a problem is added."""
    files = [entry for entry in resources.files("vpd.configs").iterdir() if entry.name.endswith(".yaml")]
    recipes = {entry.name.removesuffix(".yaml"): entry for entry in files}
    recipe = recipes.get(str(source)) if isinstance(source, str) else None
    try:
        tree = yaml.load((recipe or Path(source)).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        names, nearest = ", ".join(sorted(recipes)), _nearest(str(source), recipes)
        problems.append(f"{source}: expected a YAML file or a recipe ({names}); nearest: {nearest}")
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problems.append(f"{source}{line}: expected YAML: {error.problem}")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{source}: expected a YAML file: {' '.join(str(error).split())}")
    else:
        if isinstance(tree, dict):
            return tree
        problems.append(f"{source}: expected a mapping of sections, found {tree!r:.80}")
    return {}


def _flatten(tree: Mapping[Any, Any], where: str, problems: list[str], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every known setting; each unknown one is added to the problems."""
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


def _mapping_of(key: str) -> str:
    """The mapping that a key names an entry of, such as `extract.engine_args`; empty if there is none."""
    leaves, place = leaf_fields(VpdConfig), key.rpartition(".")[0]
    while place and place not in leaves:
        place = place.rpartition(".")[0]
    return place if place and get_origin(leaves[place].annotation) is dict else ""


def _add_entry(flat: dict[str, Any], mapping: str, key: str, value: Any) -> None:
    """Adds an entry to a mapping among the settings."""
    others = flat.get(mapping, leaf_fields(VpdConfig)[mapping].get_default(call_default_factory=True))
    if isinstance(others, Mapping):  # Any other value is refused by the settings' types.
        flat[mapping] = {**others, key.removeprefix(f"{mapping}."): value}


def _nearest(name: str, valid: Collection[str]) -> str:
    """The valid names with the same last part, else those with a similar spelling, else the most similar one."""
    same = [key for key in valid if key.rpartition(".")[2] == name.rpartition(".")[2]]
    return ", ".join(same or get_close_matches(name, valid, 3, 0.8) or get_close_matches(name, valid, 1, 0.0))


def _describe(error: ErrorDetails) -> str:
    """One line for one pydantic error: dotted key, what was expected, what was found."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])[1:]
    text = error["msg"].replace("Field required", "a value").removeprefix("Value error, ")
    text = re.sub(r"^Input should be (?=greater|less)", "a value ", text).removeprefix("Input should be ")
    text = re.sub(r"^(?:List|Tuple) should have (.+) after validation, not .+", r"\1", text)
    return f"{key}: expected {text}, found {error['input']!r:.80}"
