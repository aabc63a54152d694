"""Adapters, their gradients and AdamW's moments shared out over devices: FSDP of what is trained, and of nothing else.

What is frozen stays whole on every device: the packed weights are neither parameters nor buffers, and embeddings, head
and norms may be of another type than the adapters. So this saves 16 bytes for each adapter weight, less its share. It
is torch's second FSDP (`fully_shard`), which shards each parameter by itself; the first one flattens all parameters of
a module into one of a single type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.optim import Optimizer

from qratk.adapters.matrices.shards import is_sharded, shard_like, whole
from qratk.core.errors import ConfigurationError

if TYPE_CHECKING:
    from qratk.backbone.backbone import Backbone

NAME = "fsdp2"


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, with all devices in one group; `--trainer.strategy=fsdp2`.

    Checkpoints are those of a single device: one file with whole tensors, that any strategy continues.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """All devices of all nodes hold shards of the same parameters."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning gives the optimisers' states of a checkpoint to `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: the module puts whole adapters in the checkpoint."""
        return {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, as on one device."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """State of an optimiser with whole tensors on the CPU, as on one device; all processes must ask."""
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        moments = {index: {k: _to_cpu(v) for k, v in own.items()} for index, own in state["state"].items()}
        return {**state, "state": moments}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each process its shards of the optimisers' states."""
        Strategy.load_optimizer_state_dict(self, checkpoint)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if value.dim() and not is_sharded(value):
                        state[key] = shard_like(parameter, value)


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, ShardedStrategy, description="Adapters and their optimiser's state are sharded")


def require_strategy(strategy: Strategy, *, sharded: bool = True) -> None:
    """Raise `ConfigurationError` for a strategy that shards parameters in a way that adapters do not survive."""
    if isinstance(strategy, ShardedStrategy):
        if sharded:
            return
        raise ConfigurationError(
            "a search changes its adapters from candidate to candidate, which sharded ones cannot; "
            "leave --trainer.strategy out for a search, and shard the fit of what it found"
        )
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        raise ConfigurationError(
            f"{type(strategy).__name__} would shard or cast the frozen model together with the adapters; give "
            f"--trainer.strategy={NAME}, which shards the adapters and their optimiser's state alone, or "
            "--trainer.strategy=ddp"
        )


def shard(backbone: Backbone, strategy: ShardedStrategy) -> None:
    """Shard the adapters of every block; once. What is frozen is moved to the device whole."""
    from torch.distributed.fsdp import fully_shard

    from qratk.backbone.layers import find_blocks

    if any(is_sharded(parameter) for _, parameter in backbone.trainable_parameters()):
        return
    backbone.model.to(strategy.root_device)
    frozen = {parameter for parameter in backbone.model.parameters() if not parameter.requires_grad}
    options: Any = {"mesh": strategy.device_mesh["data_parallel"], "ignored_params": frozen}
    for block in find_blocks(backbone.base)[1]:
        if any(parameter.requires_grad for parameter in block.parameters()):
            # Resharded after each use, scoring included: between uses a parameter is always a shard.
            fully_shard(block, **options, reshard_after_forward=True)
    fully_shard(backbone.model, **options)


def _to_cpu(value: Any) -> Any:
    return whole(value).cpu() if isinstance(value, Tensor) else value
