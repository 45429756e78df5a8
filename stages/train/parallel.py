"""One run on several processes: each computes some of a step's passes, and the gradients of all are summed."""

# T context tokens, N blocks, G block size, D context features, H hidden width
from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
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

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other. Only the first process writes and evaluates checkpoints; the others wait."""
RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which processes find each other."""
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which torchrun and MPI give the number of processes."""


class TrainingPass(nn.Module):
    """The drafter's context and blocks in one forward call, which DDP and FSDP2 need."""

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
    """A drafter in training: on one process, replicated on several (DDP), or sharded over several (FSDP2)."""

    def __init__(self, drafter: Drafter, accelerator: Accelerator, sharding: str, dtype: torch.dtype):
        """
        Args:
            sharding: none or fsdp2.
            dtype: what the forward pass computes in.

        Raises:
            ConfigError: accelerate is configured to shard too.
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
        """Context of one pass: processes exchange gradients in a step's last pass only."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def finish_gradients(self, denominator: float, clip: float) -> float:
        """Divides the summed gradients so that they are those of the mean loss, and clips them.

        Args:
            denominator: the sum of all passes' denominators.
            clip: largest norm.

        Returns:
            The norm before clipping.
        """
        divisor = denominator / self.accelerator.num_processes  # DDP and FSDP2 take the mean over processes
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(divisor)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def whole(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights on the CPU under the drafter's names, from weights under this module's names, maybe sharded."""
        found = {}
        for name, value in weights.items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[name.rpartition("drafter.")[2]] = value.detach().cpu()
        return found

    def weights(self) -> dict[str, Tensor]:
        """The drafter's weights, whole and on the CPU, under the drafter's names."""
        return self.whole(dict(self.module.named_parameters()))

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes over weights as `weights` gives them."""
        named: dict[str, Any] = {f"drafter.{name}": value for name, value in weights.items()}
        set_model_state_dict(self.module, named, options=self._options(loading=True))

    def like_parameters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under this module's names, on the devices and in the shards of the module's parameters."""
        found = {}
        for name, parameter in self.module.named_parameters():
            value = weights[name.rpartition("drafter.")[2]].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            found[name] = value
        return found

    def optimizer_state(self, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """The optimizers' whole state on the first process's CPU; any number of processes can load it."""
        return get_optimizer_state_dict(self.module, [*optimizers], options=self._options(loading=False))

    def load_optimizer_state(self, optimizers: Sequence[Optimizer], state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.module, [*optimizers], state, options=self._options(loading=True))

    def _options(self, loading: bool) -> StateDictOptions:
        return StateDictOptions(full_state_dict=True, cpu_offload=not loading)


def check_rendezvous() -> None:
    """
    Raises:
        ConfigError: this is one of several processes, but the variables to find the others are not set.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if size != "1" and missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, which makes this one of several processes, but {', '.join(missing)} is not set, so "
            "it can't join them. Start them with torchrun or --num-processes, or unset WORLD_SIZE to train alone."
        )


def check_joined(num_processes: int) -> None:
    """
    Raises:
        ConfigError: a launcher has started another number of processes than have joined.
    """
    if num_processes > 1 and os.environ.get("WORLD_SIZE") == str(num_processes):
        return  # with one torchrun per machine under MPI, MPI's variables give the number of machines
    for name in WORLD_SIZES:
        if int(size := os.environ.get(name, "1")) not in (1, num_processes):
            raise ConfigError(
                f"{name} makes this one of {size} processes, but it "
                + ("trains alone" if num_processes == 1 else f"works with {num_processes}")
                + ", and all would write one folder. Start them with torchrun or --num-processes, or unset "
                f"{name} to train alone."
            )
