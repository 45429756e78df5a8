"""The vLLM side of extraction: a KV connector that streams the states of finished requests out.

vLLM's `extract_hidden_states` method keeps the chosen layers' states in a cache-only KV layer. When a request
ends, this connector gathers its states from that layer, copies them to the host and sends them through a local
socket to the process that drives the engine. Nothing is staged on disk, and the engine never waits for the
receiver: the driver bounds memory by the number of requests that it keeps in flight.

This module is imported inside the engine's processes, by name.
"""

# T tokens of a request, K captured layers, H hidden width
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

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

CAPTURE_KEY = "vpd_capture"
"""Request parameter (in `kv_transfer_params`): the name under which the request's states are sent. Absent: none."""


@dataclass
class FinishedRequest:
    """A request whose states wait in the KV layer: `token_ids` are the T tokens that entered the model."""

    request_id: str
    capture_key: str
    token_ids: list[int]
    block_ids: list[int]


@dataclass
class FinishedRequests(KVConnectorMetadata):
    """What the scheduler tells the workers in one step."""

    requests: list[FinishedRequest] = field(default_factory=list)


class StateSender:
    """Sends (header, states) pairs through one socket, in a thread of its own."""

    def __init__(self, address: str, authkey: bytes):
        self._connection = Client(address, authkey=authkey)
        self._queue: SimpleQueue[tuple[dict[str, Any], torch.Tensor, Callable[[], None]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vpd-state-sender", daemon=True)
        self._thread.start()

    def put(self, header: dict[str, Any], states_TKH: torch.Tensor, wait_copied: Callable[[], None]) -> None:
        self._queue.put((header, states_TKH, wait_copied))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=60)
        self._connection.close()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            header, states_TKH, wait_copied = item
            wait_copied()
            self._connection.send(header)
            self._connection.send_bytes(states_TKH.flatten().view(torch.uint8).numpy().data)


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """Hands over the captured states of every finished request that carries `CAPTURE_KEY`.

    Extra config: `address` and `authkey` (hex) of the listener that receives them. Only the first
    tensor-parallel rank sends, as the states are the same on every rank.
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
        self._finished: list[FinishedRequest] = []
        self._kv_cache: torch.Tensor | None = None
        self._sender: StateSender | None = None
        self._copies: dict[str, Callable[[], bool]] = {}
        self._copy_stream: torch.cuda.Stream | None = None

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
        """Keeps the request's blocks until its states are copied; the last token never entered the model."""
        capture_key = (request.kv_transfer_params or {}).get(CAPTURE_KEY)
        if capture_key is None or self._group_id >= len(block_ids) or not block_ids[self._group_id]:
            return False, None
        token_ids = list(request.all_token_ids)[:-1]
        self._finished.append(
            FinishedRequest(request.request_id, capture_key, token_ids, list(block_ids[self._group_id]))
        )
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
        """Starts the copies of newly finished requests, and names those whose blocks may be freed."""
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
        """Gathers the request's states [T, K, H] on the host; returns what tells that the copy is over."""
        assert self._kv_cache is not None
        num_tokens = len(request.token_ids)
        if self._kv_cache.is_cuda:
            states_TKH, copied = self._gather_cuda(request.block_ids, num_tokens)
            is_copied, wait_copied = copied.query, copied.synchronize
        else:
            states_TKH = self._gather(torch.tensor(request.block_ids), num_tokens)
            is_copied, wait_copied = (lambda: True), (lambda: None)
        header = {
            "key": request.capture_key,
            "token_ids": request.token_ids,
            "shape": tuple(states_TKH.shape),
            "dtype": str(states_TKH.dtype).removeprefix("torch."),
        }
        sender.put(header, states_TKH, wait_copied)
        return is_copied

    def _gather(self, block_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        assert self._kv_cache is not None
        # [blocks, K, block_size, H] -> [T, K, H]
        return self._kv_cache[block_ids].transpose(1, 2).flatten(0, 1)[:num_tokens].contiguous()

    def _gather_cuda(self, block_ids: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The same on a stream of its own, into pinned memory, so that the model's stream goes on."""
        assert self._kv_cache is not None
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream()
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copy_stream):
            ids = torch.tensor(block_ids).pin_memory().to(self._kv_cache.device, non_blocking=True)
            on_device = self._gather(ids, num_tokens)
            on_host = torch.empty_like(on_device, device="cpu", pin_memory=True)
            on_host.copy_(on_device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(self._copy_stream)
        return on_host, copied

    # Not used by a connector that only stores

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
        """Tokens before heads, so that a token's states lie together."""
        return "LBNHC"
