"""One run over several processes: each computes some of a step's passes, and gradients are summed over all."""

# T context tokens, N blocks, G block size, D context features, H hidden width
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ...data.errors import ConfigError
from ..drafter.model import Drafter


class TrainingPass(nn.Module):
    """Context and blocks in one forward call, as the wrappers for several processes expect it."""

    def __init__(self, drafter: Drafter):
        super().__init__()
        self.drafter = drafter

    def forward(
        self,
        features_TD: Tensor,
        num_tokens: Sequence[int],
        blocks_NGH: Tensor,
        anchors_N: Tensor,
        num_blocks: Sequence[int],
        wanted_P: Tensor,
    ) -> Tensor:
        """Hidden states [P, H] of the wanted positions; see `Drafter`."""
        context = self.drafter.context(features_TD, num_tokens)
        return self.drafter(blocks_NGH, anchors_N, context, num_blocks, wanted_P)


class ParallelDrafter:
    """A drafter in training, on one process, replicated on several (DDP), or sharded over them (FSDP2)."""

    def __init__(self, drafter: Drafter, accelerator: Accelerator, sharding: str, dtype: torch.dtype):
        """
        Args:
            dtype: what the forward pass computes in.

        Raises:
            ConfigError: accelerate was told to shard too.
        """
        if accelerator.distributed_type.value == "FSDP":
            raise ConfigError(
                "accelerate was started with FSDP, which vpd does itself: set train.sharding to fsdp2, and launch "
                "without --use_fsdp."
            )
        self.accelerator = accelerator
        self.module: nn.Module = TrainingPass(drafter)
        self.is_sharded = sharding == "fsdp2" and accelerator.num_processes > 1
        if self.is_sharded:
            self._shard(dtype)
        elif accelerator.num_processes > 1:
            devices = [accelerator.device] if accelerator.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.module, device_ids=devices, gradient_as_bucket_view=True)

    def _shard(self, dtype: torch.dtype) -> None:
        fully_shard(
            self.module,
            mesh=init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,)),
            mp_policy=MixedPrecisionPolicy(dtype, torch.float32) if dtype != torch.float32 else MixedPrecisionPolicy(),
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.module.parameters()]

    def summing(self, last: bool) -> AbstractContextManager[Any]:
        """For one pass: gradients stay with their process until a step's last pass."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def finish_gradients(self, denominator: float, clip: float) -> float:
        """Turns summed gradients into those of the mean loss, and clips them; returns their norm before."""
        divisor = denominator / self.accelerator.num_processes  # the wrappers take means over processes
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(divisor)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def whole(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the drafter, in this module's names or sharded, as the drafter's own on the CPU."""
        found = {}
        for name, value in weights.items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[name.rpartition("drafter.")[2]] = value.detach().cpu()
        return found

    def weights(self) -> dict[str, Tensor]:
        return self.whole(dict(self.module.named_parameters()))

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        named: dict[str, Any] = {f"drafter.{name}": value for name, value in weights.items()}
        set_model_state_dict(self.module, named, options=self._options(loading=True))

    def like_parameters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the drafter in this module's names, each where and as the parameter of that name is."""
        found = {}
        for name, parameter in self.module.named_parameters():
            value = weights[name.rpartition("drafter.")[2]].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            found[name] = value
        return found

    def optimizer_state(self, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """The whole state on the CPU of the first process, by the drafter's names: it fits any number of processes."""
        return get_optimizer_state_dict(self.module, [*optimizers], options=self._options(loading=False))

    def load_optimizer_state(self, optimizers: Sequence[Optimizer], state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.module, [*optimizers], state, options=self._options(loading=True))

    def _options(self, loading: bool) -> StateDictOptions:
        return StateDictOptions(full_state_dict=True, cpu_offload=not loading)
