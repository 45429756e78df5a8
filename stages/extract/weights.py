"""The target's weight files: which of them hold the model, and whether each of them is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...data.errors import TargetError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
"""Begin of the small text that Git LFS leaves in place of a large file."""
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
DOWNLOAD = "Download the file again."


class Weights:
    """The tensors of a folder's weight files, by name; values are read when they are asked for."""

    def __init__(self, folder: Path):
        """Reads the index and the header of every file.

        Raises:
            TargetError: a file is missing, is no safetensors file or is cut short; or the index names other tensors.
        """
        self.folder = folder
        self.files: dict[str, Path] = {}
        """Tensor name -> file."""
        self.dtypes: dict[str, str] = {}
        """Tensor name -> safetensors' name of its type, such as `BF16` or `F8_E4M3`."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        indexed = _read_index(folder)
        for path in _choose_files(folder, indexed):
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    found = file.get_slice(name)
                    self.files[name], self.dtypes[name] = path, found.get_dtype()
                    self.shapes[name] = tuple(found.get_shape())
        _require_indexed(folder, indexed, self.files)
        if not indexed:
            _refuse_duplicates(folder, self.files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name."""
        with _open(self.files[name]) as file:
            return file.get_tensor(name)


def refuse_pointers(paths: Iterable[Path]) -> None:
    """
    Raises:
        TargetError: a file can't be read, is empty, or is the pointer that Git LFS leaves in place of a file.
    """
    for path in paths:
        try:
            with open(path, "rb") as file:
                begin = file.read(len(POINTER))
        except OSError as error:  # such as a link whose file is gone, in the hub's local cache
            raise TargetError(f"expected the content of {path}: {error.strerror}. {DOWNLOAD}") from None
        if begin == POINTER:
            raise TargetError(
                f"expected the content of {path}, found a Git LFS pointer. Fetch the files with git lfs pull, or "
                "download the model again."
            )
        if not begin:
            raise TargetError(f"expected the content of {path}, found an empty file. {DOWNLOAD}")


def read_json_object(path: Path) -> dict[str, Any]:
    """
    Raises:
        TargetError: the file does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair can't be stored with a cache
    except (ValueError, RecursionError) as error:
        raise TargetError(f"expected JSON in {path}, which is damaged or cut short: {error}. {DOWNLOAD}") from None
    if not isinstance(content, dict):
        raise TargetError(f"expected a JSON object in {path}, found {type(content).__name__}. {DOWNLOAD}")
    return content


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> name of its file, as the index says; empty if there is no index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    names = read_json_object(path).get("weight_map")
    if not (isinstance(names, dict) and names and all(isinstance(file, str) for file in names.values())):
        raise TargetError(f"expected a weight_map in {path} that names a file for each tensor, found none. {DOWNLOAD}")
    return names


def _choose_files(folder: Path, indexed: Mapping[str, str]) -> list[Path]:
    """The files that hold the model. Engines disagree where a folder holds both an index and one whole file."""
    present = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    if not present:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        found = f"{', '.join(others[:3])} in another format" if others else "none"
        raise TargetError(
            f"expected weights (*.safetensors) in the target's folder {folder}, found {found}. "
            "Save the model with save_pretrained, or download it completely."
        )
    refuse_pointers(present.values())
    if not indexed:
        _require_all_shards(folder, present)
        return [present[WHOLE]] if WHOLE in present else list(present.values())
    needed = sorted(set(indexed.values()))
    absent = [name for name in needed if name not in present]
    whole = (
        f" The folder holds a whole {WHOLE} too: remove {INDEX} if that file is the model."
        if WHOLE in present and WHOLE not in needed
        else ""
    )
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise TargetError(
            f"{folder / INDEX}: expected {absent[0]}{more}, which the index names, found no such file.{whole} "
            "Otherwise download the model completely."
        )
    if whole:
        raise TargetError(
            f"{folder / INDEX}: expected one set of weights, found the index's files and {WHOLE}, of which engines "
            f"load different ones.{whole} Otherwise remove {WHOLE}."
        )
    _require_all_shards(folder, needed)
    return [present[name] for name in needed]


def _require_all_shards(folder: Path, present: Iterable[str]) -> None:
    for match in filter(None, map(SHARD.fullmatch, present)):
        stem, digits, count = match["stem"], len(match["number"]), match["count"]
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:0{digits}}-of-{count}.safetensors"
            if name not in present:
                raise TargetError(f"expected {folder / name} beside {match[0]}, found no such file. {DOWNLOAD}")


def _require_indexed(folder: Path, indexed: Mapping[str, str], found: Mapping[str, Path]) -> None:
    for name, file in indexed.items():
        if found.get(name) is None or found[name].name != file:
            raise TargetError(
                f"{folder / INDEX}: expected the tensor {name} in {file}, found no such tensor there. The index and "
                "the weights are of different models: download both again."
            )


def _refuse_duplicates(folder: Path, found: Mapping[str, Path]) -> None:
    """vLLM reads all files of a folder without an index; transformers reads one.

    Raises:
        TargetError: another file than the model's has a tensor of the same name.
    """
    for path in sorted(set(folder.glob("*.safetensors")) - set(found.values())):
        with _open(path) as file:
            twice = next((name for name in file.keys() if name in found), None)  # noqa: SIM118
        if twice is not None:
            raise TargetError(
                f"expected the tensor {twice} once in {folder}, found it in {found[twice].name} and in {path.name}, of "
                "which engines load different ones. Remove the wrong file."
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise TargetError(
            f"{path} is no whole safetensors file ({error}), so its download was cut short or the file is damaged. "
            f"{DOWNLOAD}"
        ) from None
