"""`dataset.json`: what a cache was made from, and whether a run may add to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import CacheCorruptError, CacheNotFoundError, FingerprintMismatchError
from .files import write_text_durably

SCHEMA_VERSION = 1
MANIFEST_NAME = "dataset.json"


class CacheManifest(BaseModel):
    """Everything that a reader needs to know of a cache besides its parts.

    The fields from `schema_version` to `generation` must agree before anything is added to the cache.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    target_fingerprint: str
    """Hash of the target's config and weight files."""
    tokenizer_hash: str
    template_hash: str
    """Hash of the chat template and its arguments; token ids are stored, and never rendered again."""
    layer_ids: tuple[int, ...]
    """Captured layers, drafter convention: id i is the output of the target's 0-based layer i."""
    prompt_set: str
    """Hash of the contents of all prompts."""
    generation: dict[str, Any]
    """Mode, sampling and lengths: what decides the tokens of a sequence."""

    vllm_layer_ids: tuple[int, ...]
    """The same layers in the convention of vLLM and of transformers' `hidden_states`: one more than `layer_ids`."""
    target: str
    """The target as it was named when the cache was made."""
    num_target_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str = "bfloat16"
    codec: str = "raw"
    chunk_tokens: int
    """Tokens of an inner Zarr chunk; every sequence starts on a chunk."""
    versions: dict[str, str]
    rendered_sample: str
    """The first prompt as the template rendered it."""

    def check_same_origin(self, found: CacheManifest, folder: Path) -> None:
        """Refuses to add to a cache of another origin.

        Raises:
            FingerprintMismatchError: names each field that differs.
        """
        fields = [
            "schema_version",
            "target_fingerprint",
            "tokenizer_hash",
            "template_hash",
            "layer_ids",
            "prompt_set",
            "generation",
        ]
        different = [
            f"{name}: the cache has {getattr(found, name)}, this run has {getattr(self, name)}"
            for name in fields
            if getattr(found, name) != getattr(self, name)
        ]
        if different:
            raise FingerprintMismatchError(
                f"the cache {folder} was made from something else, so nothing was added to it. "
                f"Differing: {'; '.join(different)}. Use the settings it was made with, or another output folder."
            )

    def write(self, folder: Path) -> None:
        write_text_durably(folder / MANIFEST_NAME, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> CacheManifest:
        """Reads a cache's manifest.

        Raises:
            CacheNotFoundError: there is none.
            CacheCorruptError: it is not a manifest of this schema version.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise CacheNotFoundError(
                f"expected a cache at {folder}, found no {MANIFEST_NAME} there. Make one with `vpd extract`."
            )
        try:
            manifest = cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise CacheCorruptError(
                f"{path} is not a manifest of schema version {SCHEMA_VERSION}: {error.errors()[0]['msg']} at "
                f"{'.'.join(map(str, error.errors()[0]['loc'])) or 'the top'}. Restore the file, or extract anew."
            ) from None
        if manifest.schema_version != SCHEMA_VERSION:
            raise CacheCorruptError(
                f"{path} is not of schema version {SCHEMA_VERSION}, but of {manifest.schema_version}. "
                "Use the vpd that made the cache, or extract anew."
            )
        return manifest
