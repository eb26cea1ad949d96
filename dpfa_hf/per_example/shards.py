"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) has spread over the processes.

FSDP2 gathers a layer's weights for the length of its forward and backward pass, so that every process computes its own
examples with whole layers: inputs, output gradients and norms are those of a model in one piece, and nobody has to ask
another process for them. Only what is kept is spread: weights, clipped sums, noise and optimizer state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from dpfa_hf.errors import PrivacyError

# Until torch 2.13 its name said of what.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shards:
    """Which trainable parameters are spread over the processes, and how a sum over all of them is spread likewise.

    Args:
        model: with `fully_shard` applied to it, and to its blocks.
        parameters: its trainable parameters, by name.

    Raises:
        PrivacyError: naming the first tensor that is spread in another way: not by FSDP2, over a mesh of more than one
            dimension or of other processes than all, along another dimension than the first, or kept on the CPU
            (offloading) while it is computed elsewhere.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, tensor in model.named_parameters():
            if isinstance(tensor, DTensor):
                _refuse_other_spreads(model, name, tensor)
        self._parameters = {name: each for name, each in parameters.items() if isinstance(each, DTensor)}

    @staticmethod
    def of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Shards | None:
        """None for a model of which every process holds the whole."""
        if not any(isinstance(tensor, DTensor) for tensor in model.parameters()):
            return None
        return Shards(model, parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def zeros(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Of the form of this process's rows."""
        return torch.zeros_like(self._parameters[name].to_local(), dtype=dtype)

    def own_rows(self, name: str, total: torch.Tensor) -> torch.Tensor:
        """This process's rows of what the processes' totals, each of the parameter's whole shape, add up to.

        All processes call it together, for the same names in the same order.
        """
        parameter = self._parameters[name]
        count = parameter.device_mesh.size()
        if count == 1:
            return total
        rows = -(-len(total) // count)  # as FSDP2 cuts: all shares but the last ones are of equal size
        padded = total.new_zeros(rows * count, *total.shape[1:])
        padded[: len(total)] = total
        own = total.new_empty(rows, *total.shape[1:])
        reduce_scatter(own, padded, group=parameter.device_mesh.get_group())
        return own[: len(parameter.to_local())]

    def spread(self, name: str, own: torch.Tensor) -> DTensor:
        """The tensor of the parameter's whole shape of which this process holds `own`."""
        parameter = self._parameters[name]
        return DTensor.from_local(
            own,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece; all processes call it together where it is spread, so it is for small ones."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _refuse_other_spreads(model: nn.Module, name: str, tensor: DTensor) -> None:
    mesh = tensor.device_mesh
    owners = [model, *(module for path, module in model.named_modules() if path and name.startswith(f"{path}."))]
    reasons = {
        "is spread by something else than FSDP2 (tensor parallelism)": not any(
            isinstance(owner, FSDPModule) for owner in owners
        ),
        "is spread over a mesh of several dimensions (HSDP, or tensor parallelism)": mesh.ndim != 1,
        "is spread over some of the processes": mesh.size() != dist.get_world_size(),
        "is cut along another dimension than the first": tensor.placements != (Shard(0),),
        "is offloaded to the CPU": tensor.to_local().device.type != mesh.device_type,
    }
    for reason, applies in reasons.items():
        if applies:
            raise PrivacyError(
                f"{name} {reason}; apply torch.distributed.fsdp.fully_shard to the model's blocks and the model, over "
                "a mesh of one dimension with all processes, and leave shard_placement_fn and offload_policy out"
            )
