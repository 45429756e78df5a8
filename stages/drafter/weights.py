"""Checks a drafter's file of weights, and compares copies of the target's weights in it with the target's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...data.cache.target_files import PIECES
from ...data.errors import DrafterError
from .target_pieces import EMBED, HEAD

COPIES = {
    "embed_tokens.weight": (EMBED,),
    "lm_head.weight": (HEAD, EMBED),
    "verifier_lm_head.weight": (HEAD, EMBED),
    "verifier_norm.weight": ("norm.weight",),
}
"""Name of a copy in a checkpoint -> names of the target's piece; the first one that the target has is meant."""
DTYPES = ("F32", "BF16", "F16")
POINTER = b"version https://git-lfs"


def check_weights(path: Path, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Checks names, shapes and dtypes of a drafter's weights; reads the file's header only.

    Args:
        expected: name -> shape of every weight that the drafter has.

    Returns:
        The names of the copies of the target's weights in the file.

    Raises:
        DrafterError: the file is damaged, or holds other weights.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(found.get_shape()) for name, found in slices.items() if name not in COPIES}
            dtypes = {name: found.get_dtype() for name, found in slices.items()}
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"expected the weights of a drafter in {path}: {error}. {advice_for(path)}") from None
    if wrong := sorted({name for name, _ in expected.items() ^ shapes.items()}):
        name, alike = wrong[0], f"; also {', '.join(wrong[1:6])}" if wrong[1:] else ""
        raise DrafterError(
            f"{path} does not fit its config.json: for {name} expected {expected.get(name, 'nothing')}, "
            f"found {shapes.get(name, 'nothing')}{alike}. Give a checkpoint in the public DFlash form."
        )
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise DrafterError(
                f"{path}: expected {name} as {', '.join(DTYPES)}, found {dtype}. Give a drafter that is not quantized."
            )
    return [name for name in slices if name in COPIES]


def check_copies(path: Path, names: list[str], target_folder: Path | None) -> None:
    """Checks that copies in a drafter's file are the target's weights; such a drafter works as one without copies.

    Raises:
        DrafterError: they are not, or there is no target to compare them with.
    """
    if target_folder is None:
        raise DrafterError(
            f"{path} holds copies of the target's weights: {', '.join(names)}. Name the cache, so that they can be "
            "compared with the target's, or remove them from the file."
        )
    other: list[str] = []
    with safe_open(path, "pt") as file, safe_open(target_folder / PIECES, "pt") as target:
        present = set(target.keys())
        for name in names:
            piece = next((piece for piece in COPIES[name] if piece in present), None)
            if piece is None or not is_copy(file.get_tensor(name), target.get_tensor(piece)):
                other.append(name)
    if other:
        raise DrafterError(
            f"{path}: {', '.join(other)}: expected a copy of the target's weight, found other values, so this drafter "
            "was made for another target or has such weights of its own. Use a drafter made for this target."
        )


def is_copy(copy: Tensor, piece: Tensor) -> bool:
    """Whether two tensors are equal after rounding to the coarser one of their dtypes."""
    if copy.shape != piece.shape:
        return False
    return torch.equal(copy, piece.to(copy.dtype)) or torch.equal(copy.to(piece.dtype), piece)


def advice_for(path: Path) -> str:
    """What to do about a file of a drafter that can't be read."""
    index = path.with_name(f"{path.name}.index.json")
    if not path.exists() and index.exists():
        return f"{index.name} says that the weights are in several files: join them in {path.name}."
    if not path.exists():
        return "Fetch the file, or give the folder of a DFlash checkpoint."
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                return "The file is only a pointer of Git LFS: fetch the content with `git lfs pull`."
    return "Restore the file."
