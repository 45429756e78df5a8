"""`dataset.json`: what a cache was made from, and whether a run may add to it."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ..errors import CacheCorruptError, CacheNotFoundError, FingerprintMismatchError
from .codecs import CODECS
from .records import dump_record, parse_record
from .storage.base import Storage

SCHEMA_VERSION = 3
MANIFEST_NAME = "dataset.json"
ORIGIN = [
    "schema_version",
    "target_fingerprint",
    "tokenizer_hash",
    "template_hash",
    "layer_ids",
    "generation",
    "engine",
    "codec",
    "chunk_tokens",
]
"""The fields that must agree before a run adds anything to a cache."""


class FirstRecord(BaseModel):
    """How the first record of the prompts was read, and the text that the target reads; bounded in length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    row: int
    """Line number, or row number of a table; both count from 1."""
    used: tuple[str, ...]
    """Keys of the record whose values are in the text."""
    left_out: tuple[str, ...]
    """The record's other keys."""
    rules: tuple[str, ...]
    """Names of the rules that were applied to the record."""
    notes: tuple[str, ...]
    """What the chat template asks of the extraction beside its text."""
    runs: tuple[tuple[str, bool], ...]
    """Text, and whether it is supervised."""


class CacheManifest(BaseModel):
    """Everything that a reader needs to know about a cache besides the parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    target_fingerprint: str
    """Hash of the target's config and weight files."""
    tokenizer_hash: str
    template_hash: str
    """Hash of the chat template and its arguments. The cache stores token ids, so nothing is rendered again."""
    layer_ids: tuple[int, ...]
    """Captured layers, drafter convention: id i is the output of the target's 0-based layer i."""
    generation: dict[str, Any]
    """Mode, sampling and lengths: the settings that decide the tokens of a sequence."""
    engine: dict[str, Any]
    """Name, version, dtype, and the arguments that can change what the engine computes."""
    codec: str = "raw"
    """How the hidden states are stored: a name in `CODECS`."""
    chunk_tokens: int
    """Tokens of an inner Zarr chunk; every sequence starts a chunk."""

    vllm_layer_ids: tuple[int, ...]
    """The same layers in the convention of vLLM and of transformers' `hidden_states`: one more than `layer_ids`."""
    target: str
    """The name of the target in the command that made the cache."""
    num_target_layers: int
    hidden_size: int
    vocab_size: int
    versions: dict[str, str]
    rendered_sample: str
    """The first prompt as the template rendered it."""
    first_record: FirstRecord | None = None
    """How that prompt was read; None if no record could be used."""

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, value: str) -> str:
        return CODECS[value].name

    def check_same_origin(self, found: CacheManifest, place: str) -> None:
        """Checks that a run with this manifest may add to the cache with the manifest `found`.

        Raises:
            FingerprintMismatchError: a field of `ORIGIN` differs; the message names each.
        """
        different = [
            f"{name}: the cache has {getattr(found, name)}, this run has {getattr(self, name)}"
            for name in ORIGIN
            if getattr(found, name) != getattr(self, name)
        ]
        if different:
            raise FingerprintMismatchError(
                f"the cache {place} was made with other settings or another target, so nothing was added to it. "
                f"Differing: {'; '.join(different)}. Use the settings that made the cache, or another output folder."
            )

    def write(self, storage: Storage) -> None:
        storage.write(MANIFEST_NAME, dump_record(self.model_dump(mode="json")))

    @classmethod
    def read(cls, storage: Storage) -> CacheManifest:
        """Reads a cache's manifest.

        Raises:
            CacheNotFoundError: there is no manifest.
            CacheCorruptError: the file is not a manifest of this schema version, or not as it was written.
        """
        try:
            content = storage.read(MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise CacheNotFoundError(
                f"expected a cache at {storage.place}, found no {MANIFEST_NAME} there. Make one with `vpd extract`."
            ) from None
        place = f"{storage.place}/{MANIFEST_NAME}"
        version = _schema_version(content)
        if version is not None and version != SCHEMA_VERSION:
            raise CacheCorruptError(
                f"expected schema version {SCHEMA_VERSION} in {place}, found version {version}.",
                "Use the vpd that made the cache, or extract again.",
            )
        try:
            return cls.model_validate(parse_record(content, place, f"a manifest of schema version {SCHEMA_VERSION}"))
        except ValidationError as error:
            raise CacheCorruptError(
                f"{place} is not a manifest of schema version {SCHEMA_VERSION}: {error.errors()[0]['msg']} at "
                f"{'.'.join(map(str, error.errors()[0]['loc'])) or 'the top'}.",
                "Restore the file, or extract again.",
            ) from None


def _schema_version(content: bytes) -> int | None:
    """The schema version in a record that may be damaged otherwise; None if it can't be read."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    version = record.get("schema_version") if isinstance(record, dict) else None
    return version if isinstance(version, int) else None
