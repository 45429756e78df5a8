"""The target on disk: config, tokenizer, fingerprint, context layers, and the pieces that stage two needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ...data.cache.storage.base import Storage
from ...data.cache.target_files import PIECES, store_target_files, target_folder
from ...data.errors import CacheCorruptError, TargetError
from ...data.hashing import hash_text
from ..hub import find_model
from .adapter import Adapter, load_adapter

WEIGHTS_INDEX = "model.safetensors.index.json"
PIECE_SUFFIXES = {
    "embed_tokens.weight": ("embed_tokens.weight",),
    "norm.weight": ("model.norm.weight", "language_model.norm.weight"),
    "norm.bias": ("model.norm.bias", "language_model.norm.bias"),
    "lm_head.weight": ("lm_head.weight",),
    "lm_head.bias": ("lm_head.bias",),
}
"""Piece -> ends of the tensor's name in the weights of the architectures that vpd knows."""
REQUIRED_PIECES = ("embed_tokens.weight", "norm.weight")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Patterns of the config's and the tokenizer's files."""
HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class Target:
    """A target model in a local folder."""

    name: str
    folder: Path
    config: PretrainedConfig
    """Config of the language model."""
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None = None
    """LoRA adapter that the engine adds to the target's weights; None = no adapter."""

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
        """Tokens that end an answer, as the tokenizer, the config and the generation config name them."""
        path = self.folder / "generation_config.json"
        generation = json.loads(path.read_text()) if path.is_file() else {}
        found: set[int] = set()
        ends: list[Any] = [self.tokenizer.eos_token_id, self.config.eos_token_id, generation.get("eos_token_id")]
        for ids in ends:
            found |= {int(i) for i in ids} if isinstance(ids, list) else set() if ids is None else {int(ids)}
        return found

    def weight_files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def fingerprint(self) -> str:
        """Hash of the config and of every weight file, with the adapter's; 16 hex digits."""
        files = [self.folder / "config.json", *self.weight_files(), *(self.adapter.files if self.adapter else [])]
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = list(pool.map(_hash_file, files))
        return hash_text("".join(digests))

    def tokenizer_hash(self) -> str:
        """Hash of the vocabulary and of all else that decides a text's token ids; 16 hex digits."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hash_text(content)


def load_target(name: str, adapter: str | None = None) -> Target:
    """Finds a target: a local folder, or a model of the hub (downloaded, or from the hub's local cache).

    Args:
        adapter: folder of a LoRA adapter for the target.

    Raises:
        TargetError: there is no such target or adapter, or the target lacks its config, tokenizer or weights.
    """
    folder = find_model(name, (*SMALL_FILES, "*.safetensors"), "target", TargetError)
    if not (folder / "config.json").is_file():
        raise TargetError(f"expected a model in {folder}, found no config.json. Give a transformers model folder.")
    if not list(folder.glob("*.safetensors")):
        raise TargetError(
            f"expected weights (*.safetensors) in the target's folder {folder}, found none. "
            "Save the model with save_pretrained, or download it completely."
        )
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise TargetError(f"the target's config or tokenizer in {folder} can't be loaded: {error}") from error
    return Target(name, folder, config, tokenizer, None if adapter is None else load_adapter(adapter))


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
    """
    try:
        target_folder(storage)
        return
    except CacheCorruptError:
        pass
    with tempfile.TemporaryDirectory(dir=storage.local_folder) as temporary:
        folder = Path(temporary)
        target.config.save_pretrained(folder)
        target.tokenizer.save_pretrained(folder)
        if (target.folder / "generation_config.json").is_file():
            shutil.copy(target.folder / "generation_config.json", folder)
        save_file(read_pieces(target), folder / PIECES)
        with suppress(FileExistsError):  # another run has stored the same pieces in the meantime
            store_target_files(storage, folder)


def read_pieces(target: Target) -> dict[str, torch.Tensor]:
    """Embedding, final norm, and LM head unless it is tied to the embedding; with their biases, if they have any.

    Raises:
        TargetError: the weights have no tensor, or several, of a piece's name.
    """
    where = _tensor_files(target)
    pieces: dict[str, torch.Tensor] = {}
    for piece, suffixes in PIECE_SUFFIXES.items():
        names = [name for name in where if name.endswith(suffixes)]
        is_tied = piece == "lm_head.weight" and target.config.tie_word_embeddings
        if is_tied or not (names or piece in REQUIRED_PIECES):
            continue
        if len(names) != 1:
            raise TargetError(
                f"expected one tensor named ...{' or ...'.join(suffixes)} in the weights of {target.folder}, "
                f"found {len(names)}. vpd does not know the tensor names of this architecture."
            )
        with safe_open(where[names[0]], "pt") as file:
            pieces[piece] = file.get_tensor(names[0])
    return pieces


def _tensor_files(target: Target) -> dict[str, Path]:
    """Tensor name -> file, from the weights' index or from the files' headers."""
    index = target.folder / WEIGHTS_INDEX
    if index.is_file():
        return {name: target.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for path in target.weight_files():
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def target_facts(target: Target) -> dict[str, Any]:
    """The manifest's fields about the target."""
    return {
        "target": target.name if target.adapter is None else f"{target.name} + {target.adapter.folder}",
        "target_fingerprint": target.fingerprint(),
        "tokenizer_hash": target.tokenizer_hash(),
        "num_target_layers": target.num_layers,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
    }
