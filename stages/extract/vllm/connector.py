"""The vLLM side of extraction: a KV connector that sends the states of finished requests to the driver.

The driver is the process that started the engine. vLLM's `extract_hidden_states` method keeps the chosen layers' states
in a cache-only KV layer. When a request ends, this connector gathers the request's states from that layer, copies them
to the host, and sends them through a local socket. States are sent in bfloat16, as the cache stores them. The last
layer's output, from which the target's choices are computed, is sent for the tokens with a wanted choice only. Nothing
is written to disk. The engine never waits for the driver: the driver bounds memory by the number of its requests.

The engine's processes import this module by its name.
"""

# T tokens of a request, C of them with a wanted choice, K stored layers, H hidden width
from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Client
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from .signals import obey_driver

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

CAPTURE = "vpd_capture"
"""Key of a request's `kv_transfer_params`; without this key, no states are sent."""


def capture_params(key: str, choices: list[int], answer_start: int, interval: int) -> dict[str, Any]:
    """A request's `kv_transfer_params` that ask for its states.

    Args:
        key: name under which the states are sent.
        choices: positions of the prompt after which the target's choice is wanted.
        answer_start: position of the prompt's last token; the answer begins after it.
        interval: n if the choice is wanted after every n-th position from `answer_start` on, 0 if after none.
    """
    return {CAPTURE: {"key": key, "choices": choices, "answer_start": answer_start, "interval": interval}}


@dataclass
class FinishedRequest:
    """A finished request whose states are in the KV layer."""

    request_id: str
    capture: dict[str, Any]
    """What `capture_params` put under `CAPTURE`."""
    token_ids: list[int]
    """The T tokens that entered the model."""
    block_ids: list[int]

    @property
    def choices(self) -> list[int]:
        """Positions, C of them, after which the target's choice is wanted."""
        interval = self.capture["interval"]
        answered = range(self.capture["answer_start"], len(self.token_ids)) if interval else ()
        return [*self.capture["choices"], *(i for i in answered if i % interval == 0)]


@dataclass
class FinishedRequests(KVConnectorMetadata):
    """What the scheduler sends to the workers in one step."""

    requests: list[FinishedRequest] = field(default_factory=list)


class StateSender:
    """Sends headers, and the tensors that they describe, through one socket in its own thread."""

    def __init__(self, address: str, authkey: bytes):
        self._connection = Client(address, authkey=authkey)
        self._queue: SimpleQueue[tuple[dict[str, Any], list[torch.Tensor], Callable[[], None]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vpd-state-sender", daemon=True)
        self._thread.start()

    def put(self, header: dict[str, Any], tensors: list[torch.Tensor], wait_copied: Callable[[], None]) -> None:
        self._queue.put((header, tensors, wait_copied))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=60)
        self._connection.close()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            header, tensors, wait_copied = item
            wait_copied()
            described = [(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for each in tensors]
            self._connection.send(header | {"tensors": described})
            for each in tensors:
                self._connection.send_bytes(each.flatten().view(torch.uint8).numpy().data)


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """Sends the captured states of every finished request that has the parameter `CAPTURE`.

    Extra config: `address` and `authkey` (hex) of the driver's listener; `driver`, the driver's process id; and
    `num_layers`, the number K of layers to store. The target's last layer, which the choices need, is either the last
    of these or one layer more. Only the first tensor-parallel rank sends, as the states are the same on every rank.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        of_states = [
            i for i, group in enumerate(groups) if any("cache_only_layers" in name for name in group.layer_names)
        ]
        if len(of_states) != 1:
            raise ValueError(f"expected one KV cache group of hidden states, found {len(of_states)} of {len(groups)}")
        self._group_id = of_states[0]
        self._block_size = groups[self._group_id].kv_cache_spec.block_size
        self._address = self._kv_transfer_config.get_from_extra_config("address", None)
        self._authkey = bytes.fromhex(self._kv_transfer_config.get_from_extra_config("authkey", ""))
        self._num_layers = int(self._kv_transfer_config.kv_connector_extra_config["num_layers"])
        self._finished: list[FinishedRequest] = []
        self._kv_cache: torch.Tensor | None = None
        self._sender: StateSender | None = None
        self._copies: dict[str, Callable[[], bool]] = {}
        self._copy_stream: torch.cuda.Stream | None = None
        if role == KVConnectorRole.SCHEDULER:
            obey_driver(int(self._kv_transfer_config.get_from_extra_config("driver", 0)))

    # Scheduler side

    def get_finished_count(self) -> int:
        return 1

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        pass

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keeps the request's blocks until its states are copied."""
        if RequestStatus.get_finished_reason(request.status) not in (FinishReason.STOP, FinishReason.LENGTH):
            return False, None  # vLLM gave the request up
        capture = (request.kv_transfer_params or {}).get(CAPTURE)
        if capture is None or self._group_id >= len(block_ids) or not block_ids[self._group_id]:
            return False, None
        token_ids = list(request.all_token_ids)[:-1]  # the last token never entered the model
        self._finished.append(FinishedRequest(request.request_id, capture, token_ids, list(block_ids[self._group_id])))
        return True, None

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        finished, self._finished = self._finished, []
        return FinishedRequests(finished)

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        (name,) = layers
        self._kv_cache = kv_caches[name]
        if self._kv_cache.shape[2] != self._block_size:
            raise ValueError(f"expected KV blocks of {self._block_size} tokens, found {self._kv_cache.shape[2]}")
        if get_tensor_model_parallel_rank() == 0:
            self._sender = StateSender(self._address, self._authkey)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Starts the copies of newly finished requests; returns the requests whose blocks may be freed."""
        if self._sender is None:
            return None, None
        if self.has_connector_metadata():
            metadata = self._get_connector_metadata()
            if isinstance(metadata, FinishedRequests):
                for request in metadata.requests:
                    self._copies[request.request_id] = self._send(request, self._sender)
        done = {request_id for request_id, is_copied in self._copies.items() if is_copied()}
        for request_id in done:
            del self._copies[request_id]
        return done or None, None

    def _send(self, request: FinishedRequest, sender: StateSender) -> Callable[[], bool]:
        """Starts to gather the request's states on the host; the returned call says whether the copy is complete."""
        assert self._kv_cache is not None
        if self._kv_cache.is_cuda:
            tensors, copied = self._gather_cuda(request)
            is_copied, wait_copied = copied.query, copied.synchronize
        else:
            tensors = self._gather(request, torch.tensor(request.block_ids), torch.tensor(request.choices))
            is_copied, wait_copied = (lambda: True), (lambda: None)
        header = {"key": request.capture["key"], "token_ids": request.token_ids, "choices": request.choices}
        sender.put(header, tensors, wait_copied)
        return is_copied

    def _gather(self, request: FinishedRequest, block_ids: torch.Tensor, choices_C: torch.Tensor) -> list[torch.Tensor]:
        """The stored layers' states, bfloat16 [T, K, H], and the last layer's where choices are wanted, [C, H]."""
        assert self._kv_cache is not None
        # The KV layer is [blocks, layers, block_size, H].
        stored = self._kv_cache[block_ids, : self._num_layers].bfloat16()
        states_TKH = stored.transpose(1, 2).flatten(0, 1)[: len(request.token_ids)].contiguous()
        choices_C = choices_C.long()
        last_CH = self._kv_cache[block_ids[choices_C // self._block_size], -1, choices_C % self._block_size]
        return [states_TKH, last_CH]

    def _gather_cuda(self, request: FinishedRequest) -> tuple[list[torch.Tensor], torch.cuda.Event]:
        """As `_gather`, but on a separate stream and into pinned memory, so that the model's stream goes on."""
        assert self._kv_cache is not None
        device = self._kv_cache.device
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream()
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copy_stream):
            indices = [torch.tensor(each).pin_memory() for each in (request.block_ids, request.choices)]
            on_device = self._gather(request, *(each.to(device, non_blocking=True) for each in indices))
            on_host = [torch.empty_like(each, device="cpu", pin_memory=True) for each in on_device]
            for target, source in zip(on_host, on_device, strict=True):
                target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(self._copy_stream)
        return on_host, copied

    # Required methods, which a connector that only sends does not use

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def shutdown(self) -> None:
        if self._sender is not None:
            self._sender.close()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str:
        """Tokens before heads, so that a token's states are contiguous."""
        return "LBNHC"
