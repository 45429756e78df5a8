"""The errors of vLLM's processes, of which the engine's client learns only that there was one."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from ..architecture import one_line

CONFIG_PATH = "VLLM_LOGGING_CONFIG_PATH"
"""Variable that names a file with the logging configuration of vLLM's processes."""
RAISED = re.compile(
    r"^(?!subprocess\.CalledProcessError)(?:\w+\.)*\w*(?:Error|Exception)(?:: .*[^:\s][ \t]*)?$", re.MULTILINE
)
"""The last line of a traceback, which names the exception; not where the text of another process follows."""


class ErrorLog:
    """A file into which vLLM's processes write their errors, beside what they print."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="vpd-vllm-"))
        self._path = self._folder / "errors.log"

    @contextmanager
    def written(self) -> Iterator[None]:
        """Makes the processes that the block starts write the file, unless the user has configured vLLM's logging."""
        if CONFIG_PATH in os.environ or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0":
            yield
            return
        from vllm.logger import DEFAULT_LOGGING_CONFIG

        config = deepcopy(DEFAULT_LOGGING_CONFIG)
        config["formatters"]["plain"] = {"format": "%(message)s"}
        config["handlers"]["file"] = {
            **{"class": "logging.FileHandler", "filename": str(self._path), "encoding": "utf-8", "delay": True},
            **{"formatter": "plain", "level": "ERROR"},
        }
        config["loggers"]["vllm"]["handlers"].append("file")
        path = self._folder / "logging.json"
        path.write_text(json.dumps(config))
        os.environ[CONFIG_PATH] = str(path)
        try:
            yield
        finally:
            del os.environ[CONFIG_PATH]

    def first_error(self) -> str | None:
        """The exception that was logged first, on one line: what the others come from. None: none was logged."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        found = RAISED.search(text)
        return one_line(found[0]) if found else None

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
