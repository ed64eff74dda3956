"""`timm-xformers` on CPU processes that Accelerate takes for ones with accelerators.

Under torchrun. Accelerate drops its FSDP plugin on the CPU, where PyTorch's fully_shard works; so
the state that Accelerate would have on GPUs is set by hand, and all else is the code of the
package.
"""

import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from timm_xformers.cli import main
from timm_xformers.training import session as session_module
from timm_xformers.training import sharding


def make_accelerator(mixed_precision, *, fsdp=False):
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    if fsdp:
        accelerator.state.fsdp_plugin = sharding.new_plugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        # Whoever asks for the state copies it from here.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def report_shards(open_session):
    def wrapper(recipe, data=None):
        session = open_session(recipe, data)
        trainer = session.trainer
        if recipe.fsdp:
            averages = [] if trainer.ema is None else [trainer.ema.module]
            for model in (trainer.model, *averages):
                own = [p.to_local().numel() for p in model.parameters()]
                units = sum(
                    isinstance(m, torch.distributed.fsdp.FSDPModule) for m in model.modules()
                )
                share = sum(own) / session.num_params
                # In one piece: the processes' lines must not mix.
                sys.stdout.write(f"shards: {share:.3f} of the numbers, {units} units\n")
                sys.stdout.flush()
        return session

    return wrapper


if __name__ == "__main__":
    session_module.make_accelerator = make_accelerator
    from timm_xformers.planning import dryrun
    from timm_xformers.training import train

    for module in (dryrun, train):
        module.open_session = report_shards(module.open_session)
    sys.exit(main(sys.argv[1:]))
