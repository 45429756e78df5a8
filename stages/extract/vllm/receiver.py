"""The driver's end of the socket through which the connector sends states."""

# T tokens, C of them with a wanted choice, K stored layers, H hidden width
from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from ....data.errors import ExtractionError


class CapturedStates(NamedTuple):
    """What the connector sent for a request."""

    token_ids: list[int]
    """The T tokens that entered the model."""
    choices: list[int]
    """Positions, C of them, after which the target's choice is wanted."""
    hidden_TKH: Tensor
    """bfloat16."""
    last_CH: Tensor
    """The last layer's output at `choices`, in the engine's type."""


class StateReceiver:
    """Listens on a local socket, and keeps what the connector sends."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="vpd-", dir=socket_folder())
        self.address = os.path.join(self._folder, "states")
        self.authkey = secrets.token_bytes(32)
        self.received: dict[str, CapturedStates] = {}
        self._queue: SimpleQueue[tuple[str, CapturedStates]] = SimpleQueue()
        self._listener = Listener(self.address, family="AF_UNIX", authkey=self.authkey)
        threading.Thread(target=self._accept, name="vpd-state-receiver", daemon=True).start()

    def collect(self, timeout: float) -> None:
        """Moves the states that have arrived into `received`.

        Args:
            timeout: seconds to wait until the states of at least one request are there; 0 = do not wait.

        Raises:
            ExtractionError: no states arrived in time.
        """
        try:
            key, states = self._queue.get(timeout=timeout) if timeout else self._queue.get_nowait()
            while True:
                self.received[key] = states
                key, states = self._queue.get_nowait()
        except Empty:
            if timeout and not self.received:
                raise ExtractionError(
                    f"the engine finished a request, but its states did not arrive within {timeout:.0f} s. "
                    "Run the same command again: what was committed is kept."
                ) from None

    def close(self) -> None:
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except AuthenticationError:
                continue
            except (OSError, EOFError):
                return
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: Connection) -> None:
        try:
            while True:
                header = connection.recv()
                tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in header["tensors"]]
                for each in tensors:
                    connection.recv_bytes_into(each.flatten().view(torch.uint8).numpy())
                self._queue.put((header["key"], CapturedStates(header["token_ids"], header["choices"], *tensors)))
        except (EOFError, OSError):
            connection.close()


def socket_folder() -> str:
    """Folder for local sockets. A socket's path may have about 100 bytes, and vLLM's sockets have names of 37 bytes."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= 60 else "/tmp"
