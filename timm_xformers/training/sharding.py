"""Sharded training: every process holds a part of the model, for models that do not fit one device.

PyTorch's ``fully_shard`` (FSDP2) through Accelerate: parameters, gradients, averaged weights and
the optimiser's state are cut by the number of processes, and one block at a time is gathered to
compute with. Only the place of the numbers changes: mixed precision is autocast, as elsewhere, and
what lies on the disk is whole, in the same files.

Two processes on a CPU agree with unsharded ones (tests/training/test_sharding.py, which has to
persuade Accelerate, since it shards on accelerators alone). None of this has been run on a GPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, compare_versions
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe
from timm_xformers.training.stages import Stage, sides

__all__ = [
    "check_sharding",
    "equal_turns",
    "gather_shards",
    "is_sharded",
    "make_plugin",
    "place",
    "prepare_sharded",
    "shard_averages",
    "whole_weights",
]

# The first with fully_shard in the public interface; the first that shards models of any library.
OLDEST = (("torch", "2.6.0"), ("accelerate", "1.7.0"))


def make_plugin(cpu: bool) -> FullyShardedDataParallelPlugin:
    """What tells Accelerate to shard.

    Args:
        cpu: There is no accelerator; Accelerate would then not shard, without a word.

    Raises:
        UserError: There is nothing to shard over, or a library is too old.
    """
    for name, version in OLDEST:
        if compare_versions(name, "<", version):
            raise UserError(f"fsdp=true needs {name} {version} or later; update it.")
    state = PartialState(cpu=cpu)
    if state.device.type not in ("cuda", "xpu") or state.num_processes == 1:
        raise UsageError(
            f"fsdp=true shards a model over several processes with a GPU each, and this is "
            f"{state.num_processes} on {state.device.type}; start it with torchrun on GPUs, "
            "or use fsdp=false."
        )
    return new_plugin()


def new_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 that leaves the precision to autocast."""
    from torch.distributed.fsdp import MixedPrecisionPolicy  # torch 2.6

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        # Left out, Accelerate would cast weights and reductions to the lower precision, and no
        # buffers, such as random features, which then do not fit the weights.
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,
    )


def check_sharding(recipe: Recipe, stages: Sequence[Stage], accelerator: Accelerator) -> None:
    """Refuse what does not go with shards.

    Raises:
        UsageError: With the setting.
    """
    if _shards(accelerator) != recipe.fsdp:
        raise UsageError(
            f"fsdp={str(recipe.fsdp).lower()}, and Accelerate was set up for the opposite, by its "
            "configuration or an earlier run of this process; let the recipe alone decide."
        )
    if not recipe.fsdp:
        return
    if len(sides(stages)) > 1:
        raise UsageError(
            "fsdp=true keeps one image size, since sharded positions cannot be interpolated; "
            "leave img_size out of stages, or use fsdp=false."
        )
    # PyTorch refuses to shard the first, and the second is untried.
    for name in ("channels_last", "compile"):
        if getattr(recipe, name):
            raise UsageError(f"fsdp=true does not go with {name}=true; switch one of them off.")


def place(accelerator: Accelerator, model: Any) -> None:
    """Bring a model that is not trained to the device, or a part of it to each."""
    if not _shards(accelerator):
        model.to(accelerator.device)
        return
    from accelerate.utils import fsdp2_prepare_model  # accelerate 1.7

    _name_blocks(accelerator, model)
    fsdp2_prepare_model(accelerator, model)
    model.register_load_state_dict_pre_hook(_cut_weights)


def shard_averages(accelerator: Accelerator, ema: ModelEmaV3) -> None:
    """Shard averaged weights as the model is sharded that they average."""
    place(accelerator, ema.module)
    ema.foreach = False  # a list of shards and whole buffers is refused


def prepare_sharded(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, Optimizer]:
    """Do what ``accelerator.prepare`` does, and let both load the whole tensors of a checkpoint.

    Args:
        accelerator: From `make_plugin`.
        model: On the CPU: a block at a time goes to the device, to be cut there.
        optimizer: Of the model.

    Returns:
        The same model, changed in place, and Accelerate's optimiser.
    """
    _name_blocks(accelerator, model)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    wrapped.register_load_state_dict_pre_hook(_cut_weights)
    optimizer.register_load_state_dict_pre_hook(_cut_optimizer)
    return wrapped, prepared


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward pass needs all processes."""
    # Its parameters() would not tell: after an evaluation they are whole until somebody asks for
    # the state.
    return any(isinstance(value, DTensor) for value in model.state_dict().values())


def equal_turns(
    order: list[Tensor], num_images: int, batch_size: int, world_size: int
) -> list[Tensor]:
    """The batches of this process, and perhaps one that must not be counted: all have as many."""
    turns = math.ceil(math.ceil(num_images / batch_size) / world_size)
    return order + [torch.zeros(1, dtype=torch.long)] * (turns - len(order))


def gather_shards(state: Any) -> Any:
    """Dicts and lists of anything with whole tensors, on the CPU, in place of shards.

    All processes must call it; those other than the main one get None for each.
    """
    if isinstance(state, dict):
        return {key: gather_shards(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gather_shards(value) for value in state)
    if isinstance(state, DTensor):
        whole: Tensor = state.full_tensor()
        return whole.detach().cpu() if PartialState().is_main_process else None
    return state


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Let ``state_dict`` of a model give whole tensors; all processes must enter."""
    if not is_sharded(model):
        yield
        return
    weights = gather_shards(dict(model.state_dict()))

    def replace(_: nn.Module, found: dict[str, Any], *__: Any) -> None:
        found.update(weights)

    hook = model.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _shards(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def _name_blocks(accelerator: Accelerator, model: nn.Module) -> None:
    """Tell the plugin what to gather at once: a block; in a model without any, everything."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    lists = [module for name, module in model.named_modules() if name.split(".")[-1] == "blocks"]
    names = {type(block).__name__ for blocks in lists for block in blocks.children()}
    plugin = accelerator.state.fsdp_plugin
    # Accelerate binds the classes of the first model that it sees to the policy.
    policy: Callable[..., bool] | None = transformer_auto_wrap_policy if names else None
    plugin.auto_wrap_policy = policy
    plugin.transformer_cls_names_to_wrap = sorted(names)


def _cut(value: Any, like: Tensor) -> Any:
    """The shard of a whole tensor that belongs to a parameter; of another shape, all of it."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.dim()):
        return value
    mesh, same = like.device_mesh, value.shape == like.shape
    placements = like.placements if same else [Replicate()] * mesh.ndim
    return distribute_tensor(value.to(like.device), mesh, placements)


def _cut_weights(model: nn.Module, weights: dict[str, Any], *_: Any) -> None:
    for name, own in model.state_dict().items():
        if name in weights:
            weights[name] = _cut(weights[name], own)


def _cut_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        index: {name: _cut(value, own[index]) for name, value in entries.items()}
        for index, entries in saved["state"].items()
    }
    return {**saved, "state": states}
