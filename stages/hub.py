"""Models by name: a local folder, or the id of a model on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..data.errors import VpdError

ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def find_model(name: str, files: Sequence[str], kind: str, error: type[VpdError]) -> Path:
    """Folder of a model: the local folder of that name, or the hub's model of that id.

    A model of the hub is downloaded, or taken from the hub's local cache.

    Args:
        files: patterns of the files that a download takes.
        kind: what the model is used as, such as "target", for messages.
        error: raised if there is neither a folder nor a model.
    """
    if Path(name).is_dir():
        return Path(name)
    reason = "the name is no id of a model"
    if ID.fullmatch(name):
        try:
            return Path(snapshot_download(name, allow_patterns=[*files]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as failure:
            reason = str(failure).splitlines()[0]
    raise error(
        f"expected a {kind}: {name} is neither a local folder nor a model that the hub gave ({reason}). {advice(name)}"
    )


def advice(name: str) -> str:
    """What to do about a name that is neither a folder nor the id of a model."""
    if Path(name).is_file():
        return f"It is a file: give its folder, {Path(name).parent}."
    if os.path.isdir(whole := os.path.expanduser(name)):
        return f"Write ~ out: {whole}."
    if ID.fullmatch(name.partition("@")[0]) and "@" in name:
        return "A revision can't be named here: download it (hf download ID --revision REVISION), and give the folder."
    return "Check the path, or the id and the network."
