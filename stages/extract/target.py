"""The target on disk: config, tokenizer, fingerprint, context layers, and the pieces that stage two needs."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ...data.cache.part import reporting_full_disk
from ...data.cache.storage.base import Storage
from ...data.cache.target_files import PIECE_FACTS, PIECES, store_target_files, target_folder
from ...data.errors import CacheCorruptError, StorageError, TargetError
from ...data.hashing import hash_text
from ..hub import find_model
from .adapter import ADAPTER_CONFIG, Adapter, load_adapter
from .architecture import Architecture, build, one_line
from .fingerprint import FILE_HASHES
from .pieces import Pieces, find_pieces
from .weights import Weights, read_json_object, refuse_pointers

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Patterns of the config's and the tokenizer's files."""
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Target:
    """A target model in a local folder."""

    name: str
    folder: Path
    model_config: PretrainedConfig
    """Config of the whole model, which may hold more than the language model, such as a vision tower."""
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None = None
    """LoRA adapter that the engine adds to the target's weights; None = no adapter."""
    trust_remote_code: bool = False
    """Whether code in the folder may run."""
    further_end_ids: tuple[int, ...] = ()
    """Tokens that end an answer beside those that the target's files name."""

    @property
    def config(self) -> PretrainedConfig:
        """Config of the language model."""
        return self.model_config.get_text_config()

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def eos_token_ids(self) -> set[int]:
        """Tokens that end an answer: those of the tokenizer, the config and the generation config, and further ones.

        Raises:
            TargetError: the generation config is damaged, or a file names something else than tokens of the vocabulary.
        """
        path = self.folder / GENERATION_CONFIG
        generation = read_json_object(path) if path.is_file() else {}
        found = set(self.further_end_ids)
        for file, ids in (
            ("tokenizer_config.json", self.tokenizer.eos_token_id),
            ("config.json", self.config.eos_token_id),
            (GENERATION_CONFIG, generation.get("eos_token_id")),
        ):
            listed: list[Any] = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(each) is int and 0 <= each < self.vocab_size for each in listed):
                raise TargetError(
                    f"expected token ids, whole numbers in 0..{self.vocab_size - 1} (the vocabulary of config.json), "
                    f"for the end of text in {self.folder / file}, found {ids!r:.80}. Correct eos_token_id there."
                )
            found |= set(listed)
        return found

    @cached_property
    def weights(self) -> Weights:
        """The tensors of the weight files.

        Raises:
            TargetError: a file is missing or damaged.
        """
        return Weights(self.folder)

    @cached_property
    def architecture(self) -> Architecture:
        """
        Raises:
            TargetError: transformers has no class for the target that vpd can use.
        """
        return build(self.model_config, self.trust_remote_code)

    @cached_property
    def pieces(self) -> Pieces:
        """The pieces that stage two needs, found in the weights but not read.

        Raises:
            TargetError: the weights lack a piece, or hold it in a form that vpd can't read.
        """
        return find_pieces(self.architecture, self.weights, self.model_config)

    def weight_files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def hashed_files(self) -> list[Path]:
        """The config and every weight file, with the adapter's files."""
        return [self.folder / "config.json", *self.weight_files(), *(self.adapter.files if self.adapter else [])]

    def fingerprint(self) -> str:
        """Hash of the config and of every weight file, with the adapter's; 16 hex digits."""
        return hash_text("".join(FILE_HASHES.of(self.hashed_files())))

    def tokenizer_hash(self) -> str:
        """Hash of the vocabulary and of all else that decides a text's token ids; 16 hex digits."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hash_text(content)


def load_target(
    name: str, adapter: str | None = None, *, weights: bool = True, trust_remote_code: bool = False
) -> Target:
    """Finds a target: a local folder, or a model of the hub (downloaded, or from the hub's local cache).

    Args:
        adapter: folder of a LoRA adapter for the target.
        weights: whether the weights are needed; without them, config and tokenizer are enough.
        trust_remote_code: whether code in the folder may run.

    Raises:
        TargetError: there is no such target or adapter, or the target's config, tokenizer or weights can't be used.
    """
    files = (*SMALL_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if trust_remote_code else []))
    folder = find_model(name, files, "target", TargetError)
    refuse_other_folders(folder)
    refuse_pointers(sorted(path for pattern in SMALL_FILES for path in folder.glob(pattern)))
    config = load_config(folder, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    found = Target(
        name, folder, config, tokenizer, None if adapter is None else load_adapter(adapter), trust_remote_code
    )
    _ = found.eos_token_ids
    if weights:
        _ = found.pieces
    return found


def refuse_other_folders(folder: Path) -> None:
    """
    Raises:
        TargetError: the folder holds no model, or one with an adapter, which only some engines would apply.
    """
    if not (folder / "config.json").is_file():
        advice = "Give a transformers model folder."
        if (folder / ADAPTER_CONFIG).is_file():
            advice = f"This is an adapter: give its base model as the target, and set extract.adapter to {folder}."
        elif snapshots := sorted(path.parent for path in folder.glob("snapshots/*/config.json")):
            advice = f"This is a folder of the hub's local cache: give {snapshots[-1]}, or the model's id."
        raise TargetError(f"expected a model in {folder}, found no config.json. {advice}")
    if (folder / ADAPTER_CONFIG).is_file():
        raise TargetError(
            f"expected a model alone in {folder}, found {ADAPTER_CONFIG} beside it: transformers would apply that "
            "adapter, vLLM would not. Move the adapter into a folder of its own, and set extract.adapter to it."
        )


def load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """
    Raises:
        TargetError: the config is damaged, of an unknown kind, or needs code that may not run.
    """
    content = read_json_object(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        sizes = [getattr(config.get_text_config(), name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    except (Exception, SystemExit) as error:  # the class may be any code
        if content.get("auto_map") and not trust_remote_code:
            raise remote_code_error(folder, "config.json") from None
        raise TargetError(
            f"the target's config {folder / 'config.json'} can't be loaded: {one_line(error)}."
        ) from error
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise TargetError(
            f"expected positive num_hidden_layers, hidden_size and vocab_size in {folder / 'config.json'}, "
            f"found {sizes}. Download the file again."
        )
    return config


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that the folder ships. A Mistral folder's `tokenizer.json` goes before its `tekken.json`.

    Raises:
        TargetError: the tokenizer is damaged, of a newer form, or needs code that may not run.
    """
    settings = folder / "tokenizer_config.json"
    content = read_json_object(settings) if settings.is_file() else {}
    args = {"mistral_format": False} if (folder / "tekken.json").is_file() else {}
    if args and not (folder / "tokenizer.json").is_file():
        raise TargetError(
            f"expected a tokenizer.json in {folder}, found tekken.json alone, whose tokenizer has no chat template and "
            "gives no places of tokens in the text. Give a folder in the form of transformers, with tokenizer.json."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **args)
        tokenizer("fox")  # a setting of a wrong type fails with the first text
        return tokenizer
    except (Exception, SystemExit) as error:  # tokenizers raises bare exceptions
        if content.get("auto_map") and not trust_remote_code:
            raise remote_code_error(folder, settings.name) from None
        raise TargetError(
            f"the target's tokenizer in {folder} can't be loaded: {one_line(error)}. The files may be cut short, or "
            "made by a newer version of tokenizers: download tokenizer.json and tokenizer_config.json again, or "
            "update transformers."
        ) from error


def remote_code_error(folder: Path, file: str) -> TargetError:
    return TargetError(
        f"the target needs its own code (auto_map in {folder / file}), which vpd runs only with leave. Read the *.py "
        "files in that folder; if you trust them, set --trust-remote-code (extract.trust_remote_code)."
    )


def context_layers(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """DFlash's rule for n draft layers and N target layers: id_i = round(1 + i * (N - 4) / (n - 1)); N // 2 if n = 1.

    Returns:
        0-based layers of the target whose outputs are captured.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    steps = num_draft_layers - 1
    return tuple(round(1 + i * (num_target_layers - 4) / steps) for i in range(num_draft_layers))


def check_layers(layer_ids: tuple[int, ...], num_target_layers: int) -> tuple[int, ...]:
    """
    Raises:
        TargetError: a layer is out of range, or the layers are not ascending and distinct.
    """
    if not layer_ids or list(layer_ids) != sorted(set(layer_ids)):
        raise TargetError(f"expected ascending, distinct layer ids, got {list(layer_ids)}. Set extract.layer_ids.")
    if layer_ids[0] < 0 or layer_ids[-1] >= num_target_layers:
        raise TargetError(
            f"expected layer ids in 0..{num_target_layers - 1} (the target has {num_target_layers} layers), "
            f"got {list(layer_ids)}. Change extract.layer_ids or extract.num_draft_layers."
        )
    return layer_ids


def copy_pieces(target: Target, storage: Storage) -> None:
    """Stores the pieces of the target that stage two needs with the cache, unless the cache has them already.

    Only the tensors of `read_pieces` are read, not all weights.

    Raises:
        TargetError: the target's weights lack a piece.
        StorageError: the disk takes no more.
    """
    try:
        target_folder(storage)
        return
    except CacheCorruptError:
        pass
    pieces = read_pieces(target)
    with tempfile.TemporaryDirectory(dir=storage.local_folder) as temporary, reporting_full_disk(storage.place):
        folder = Path(temporary)
        save_plainly(target, folder)
        if (target.folder / GENERATION_CONFIG).is_file():
            shutil.copy(target.folder / GENERATION_CONFIG, folder)
        try:
            save_file(pieces, folder / PIECES)
        except SafetensorError as error:
            raise StorageError(
                f"the target's pieces could not be stored with {storage.place}: {error}. Is the disk full? Make room, "
                "and run the same command again."
            ) from error
        if facts := target.pieces.facts():
            (folder / PIECE_FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True))
        with suppress(FileExistsError):  # another run has stored the same pieces in the meantime
            store_target_files(storage, folder)


def save_plainly(target: Target, folder: Path) -> None:
    """Saves config and tokenizer so that no code of the target is needed to read them."""
    target.config.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        if content.pop("auto_map", None) is not None:
            path.write_text(json.dumps(content, indent=2))
    for path in folder.glob("*.py"):
        path.unlink()


def read_pieces(target: Target) -> dict[str, torch.Tensor]:
    """Embedding, final norm, and LM head unless it is tied to the embedding; with their biases, if they have any.

    Raises:
        TargetError: the weights lack a piece, or hold it in a form that vpd can't read.
    """
    return target.pieces.read()


def target_facts(target: Target, fingerprint: str | None = None) -> dict[str, Any]:
    """The manifest's fields about the target.

    Args:
        fingerprint: the target's, if it is known; None = its files are hashed.
    """
    return {
        "target": target.name if target.adapter is None else f"{target.name} + {target.adapter.folder}",
        "target_fingerprint": target.fingerprint() if fingerprint is None else fingerprint,
        "tokenizer_hash": target.tokenizer_hash(),
        "num_target_layers": target.num_layers,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
    }
