"""A LoRA adapter of the target, in peft's form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ...data.errors import TargetError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FROZEN = ("embed_tokens", "lm_head", "norm")
"""Modules that an adapter must not change, because the cache stores them from the target's own files."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter on disk."""

    folder: Path
    rank: int
    """The largest rank of all its modules."""

    @property
    def files(self) -> list[Path]:
        return [self.folder / ADAPTER_CONFIG, self.folder / ADAPTER_WEIGHTS]


def load_adapter(name: str) -> Adapter:
    """
    Raises:
        TargetError: there is no such LoRA adapter, or it changes a module of `FROZEN`.
    """
    folder = Path(name)
    missing = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / file).is_file()]
    if missing:
        found = " and no ".join(missing)
        raise TargetError(f"expected a LoRA adapter in {name}, found no {found}. Check extract.adapter.")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        kind, ranks = str(config["peft_type"]), [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
        rank = max(map(int, ranks))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TargetError(f"{folder / ADAPTER_CONFIG}: expected the JSON of a LoRA adapter: {error!r}.") from None
    if kind != "LORA":
        raise TargetError(f"{folder}: expected a LoRA adapter, found {kind}. Merge it, and extract the merged target.")
    unknown = [name for name, plain in (("use_dora", False), ("bias", "none")) if config.get(name, plain) != plain]
    if unknown:
        raise TargetError(
            f"{folder}: expected a plain LoRA adapter, found {', '.join(unknown)} set, which vLLM does not apply. "
            "Merge it, and extract the merged target."
        )
    changed = config.get("target_modules") or []
    changed = [*([changed] if isinstance(changed, str) else changed), *(config.get("modules_to_save") or [])]
    frozen = [module for module in changed if any(word in module for word in FROZEN)]
    if frozen:
        raise TargetError(
            f"{folder}: expected an adapter of attention and MLP, found one that changes {', '.join(frozen)}. "
            "Merge it, and extract the merged target."
        )
    return Adapter(folder, rank)


def can_apply() -> bool:
    """Whether transformers can load an adapter, for which it needs peft."""
    return find_spec("peft") is not None
