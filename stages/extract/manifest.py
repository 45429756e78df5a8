"""The cache that an extraction writes to: its context layers, its manifest, its creation."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from ...data.cache.cache import CHUNK_TOKENS, Cache
from ...data.cache.manifest import CacheManifest
from ...data.chat import ChatFormat
from ...data.prompts.records import PromptSource
from .config import ExtractConfig
from .engines import plan_engine
from .fingerprint import FILE_HASHES
from .inputs import DATE
from .preview import read_first
from .target import Target, check_layers, context_layers, copy_pieces, target_facts

END_OF_TURN = "end_of_turn_id"
"""Key of `generation` for the template's end-of-turn token, if the target's files name it as no end."""


def plan_layers(target: Target, config: ExtractConfig) -> tuple[int, ...]:
    """The context layers that the settings list; without a list, those of DFlash's rule.

    Raises:
        TargetError: the target lacks a layer, or the list is not ascending.
    """
    listed = config.layer_ids
    layers = tuple(listed) if listed is not None else context_layers(target.num_layers, config.num_draft_layers)
    return check_layers(layers, target.num_layers)


def plan_manifest(
    target: Target,
    layer_ids: tuple[int, ...],
    chat: ChatFormat,
    prompts: PromptSource,
    config: ExtractConfig,
    fingerprint: str | None = None,
) -> CacheManifest:
    """The manifest of the cache that this run would create.

    Args:
        fingerprint: the target's, if it is known; None = its files are hashed.
    """
    names = ["mode", "max_len", "thinking"]
    if config.mode == "generate":
        names += ["max_new_tokens", "temperature", "top_p", "top_k"] + ["seed"] * (config.temperature > 0)
    generation = {name: getattr(config, name) for name in names}
    if chat.date is not None:
        generation[DATE] = chat.date.isoformat()
    if chat.further_end_id is not None:
        generation[END_OF_TURN] = chat.further_end_id
    first_record, text = read_first(prompts, chat, target, config)
    return CacheManifest(
        **target_facts(target, fingerprint),
        template_hash=chat.template_hash,
        layer_ids=layer_ids,
        vllm_layer_ids=tuple(i + 1 for i in layer_ids),
        generation=generation,
        engine=plan_engine(config),
        codec=config.codec,
        chunk_tokens=CHUNK_TOKENS,
        versions={name: metadata.version(name) for name in ("vpd", "torch", "transformers", "zarr")},
        rendered_sample=text,
        first_record=first_record,
    )


def open_cache(place: str | Path, manifest: CacheManifest, target: Target) -> Cache:
    """Creates the cache, or opens it to add to it; stores the target's pieces if they are not there.

    Raises:
        FingerprintMismatchError: the place holds a cache of another origin.
        TargetError: the target's weights lack a piece.
    """
    cache = Cache.create_or_open(place, manifest)
    copy_pieces(target, cache.storage)
    FILE_HASHES.keep(cache.storage, target.hashed_files())
    return cache
