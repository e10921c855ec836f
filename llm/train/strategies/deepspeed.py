"""DeepSpeed ZeRO stages 1 to 3: it places and reduces; accumulation, clipping and the division of the loss are ours.

DeepSpeed averages gradients over ranks where we sum; `clip` makes up for that. In bf16 the parameters stay fp32 and the
forward pass is in autocast, as in the other strategies.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.blocks.base import after_step
from llm.core.errors import UserError
from llm.parallel.mesh import Place
from llm.train.config import ParallelConfig, RunConfig
from llm.train.optim.groups import block_prefixes, grouped, named_parameters, param_rules
from llm.train.optim.muon import newton_schulz_dtype
from llm.train.strategies import common
from llm.train.strategies.base import NamedState
from llm.train.strategies.zero_layout import FlatLayout, FlatOptimizer


class DeepSpeedStrategy:
    """Gradients and optimizer state (1, 2), and parameters (3), partitioned over ranks by DeepSpeed.

    The forward pass under stage 3, also in evaluation, is a collective call. `state` gathers whole tensors on the CPU
    of every rank.
    """

    name = "deepspeed"

    def __init__(self, place: Place, parallel: ParallelConfig, *, owns_group: bool = False) -> None:
        self.rank = place.rank
        self.world_size = place.world_size
        self.device = place.device
        self.parallel = parallel
        self.owns_group = owns_group
        self.precision = "fp32"
        self.model: nn.Module

    def setup(self, model: nn.Module, run: RunConfig, seed: int) -> None:
        """Take a model on meta and make it ready to train."""
        deepspeed = _import_deepspeed(self.device)
        self.precision = run.train.precision
        common.prepare_blocks(model, run, self.device)
        params = named_parameters(model)
        self.shapes = {name: param.shape for name, param in params.items()}
        rules = param_rules({n: tuple(s) for n, s in self.shapes.items()}, block_prefixes(model), run.optim)
        if any(rule.kind == "rowwise_adamw" for rule in rules.values()):
            raise UserError(
                "optim.groups: optimizer=rowwise_adamw needs whole rows, which parallel.strategy=deepspeed cuts; "
                "set parallel.strategy=fsdp2 or ddp, or optimizer=adamw"
            )
        config = zero_config(model, self.parallel.zero_stage, self.device)
        stage3 = self.parallel.zero_stage == 3
        common.materialise(model, torch.device("cpu") if stage3 else self.device, seed)
        if stage3:
            # A block's parameters are gathered together: its parts may use one another's, as fused projections do.
            deepspeed.utils.set_z3_leaf_modules(model, sorted({type(b) for _, b in model.blocks()}, key=str))  # type: ignore[operator]
            deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.float32)
            for buffer in model.buffers():
                buffer.data = buffer.to(self.device)
        params = named_parameters(model)
        self.names = {id(param): name for name, param in params.items()}
        groups: list[dict[str, Any]] = [
            {"params": list(members.values()), "lr": rule.lr, "weight_decay": rule.weight_decay, "kind": rule.kind}
            for rule, members in grouped(params, rules).items()
        ]
        self.peaks = [group["lr"] for group in groups]
        self.optimizer = FlatOptimizer(groups, run.optim, newton_schulz_dtype(self.device.type, self.precision))
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self.zero = self.engine.optimizer
        self.model = self.engine.module
        for flat, layout, kind in self._flats():
            self.optimizer.attach(flat, layout, kind)

    def _flats(self) -> Iterator[tuple[Tensor, FlatLayout, str]]:
        """(fp32 partition, its layout, kind of optimizer) of each flat buffer."""
        stage3 = self.parallel.zero_stage == 3
        flats = self.zero.fp32_partitioned_groups_flat if stage3 else self.zero.single_partition_of_fp32_groups
        members = self.zero.fp16_groups if stage3 else self.zero.bit16_groups
        for index, (flat, params) in enumerate(zip(flats, members, strict=True)):
            names = tuple(self.names[id(param)] for param in params)
            slices = tuple(param.partition_numel() for param in params) if stage3 else ()
            layout = FlatLayout(names, tuple(self.shapes[name] for name in names), stage3, slices)
            group = self.zero.sub_group_to_group_id[index] if stage3 else index
            yield flat, layout, self.optimizer.param_groups[group]["kind"]

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return self._accumulate(last)

    @contextmanager
    def _accumulate(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        self.zero.clear_backward_seen_flag()
        yield

    def autocast(self) -> AbstractContextManager[Any]:
        return common.autocast(self.device, self.precision)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed would start its backward pass at the model's output; ours begins at the loss, before the head.
        loss.register_hook(self._begin_backward)
        self.engine.backward(loss, scale_wrt_gas=False)

    def _begin_backward(self, grad: Tensor) -> None:
        self.engine._backward_prologue()

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> Tensor:
        grads = [grad for group in self.zero.averaged_gradients.values() for grad in group or ()]
        total = common.reduce_sum(common.square_sum(grads, self.device))
        norm = total.sqrt() * self.world_size
        factor = norm.new_tensor(float(self.world_size))
        if max_norm is not None:
            factor = factor * common.clip_coefficient(norm, max_norm)
        common.scale_grads(grads, factor)
        return norm

    def step(self, lr_factor: float, skip: bool) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * lr_factor
        self.optimizer.skip = skip
        self.engine.step()
        if not skip:
            after_step(self.model, self.all_reduce)

    def all_reduce(self, values: Tensor) -> Tensor:
        return common.reduce_sum(values)

    def barrier(self) -> None:
        dist.barrier()

    def state(self) -> NamedState:
        """Whole tensors, gathered on the CPU: copies, for `load` to take back."""
        model: dict[str, Tensor] = {}
        optim: dict[str, dict[str, Tensor]] = {}
        for flat, layout in self.optimizer.layouts.items():
            model.update({name: whole.cpu() for name, whole in layout.whole(flat).items()})
            for key, value in self.optimizer.state[flat].items():
                if key == "step":
                    wholes = {name: value.cpu().clone() for name in layout.names}
                else:
                    wholes = {name: whole.cpu() for name, whole in layout.whole(value).items()}
                for name, whole in wholes.items():
                    optim.setdefault(name, {})[key] = whole
        ordered = {name: model[name] for name in self.shapes}
        ordered.update(self._buffers())
        return NamedState(ordered, {name: optim[name] for name in self.shapes})

    def _buffers(self) -> dict[str, Tensor]:
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {n: t for n, t in common.named_tensors(self.model).items() if n not in parameters}

    @torch.no_grad()
    def load(self, state: NamedState) -> None:
        """Take whole tensors; the optimizer's part may be left out."""
        held = self.state()
        common.copy_named(held, state)
        for name, buffer in self._buffers().items():
            buffer.copy_(held.model[name])
        for flat, layout in self.optimizer.layouts.items():
            flat.copy_(layout.part(held.model, flat))
            for key, value in self.optimizer.state[flat].items():
                if key == "step":
                    value.copy_(held.optim[layout.names[0]][key])
                else:
                    value.copy_(layout.part({name: held.optim[name][key] for name in layout.names}, value))
        self._refresh_parameters()

    def _refresh_parameters(self) -> None:
        """Bring the parameters that the model computes with up to the fp32 partitions."""
        if self.parallel.zero_stage < 3:
            self.zero.update_lp_params()
            return
        for index in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def unsharded(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model)

    def close(self) -> None:
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def zero_config(model: nn.Module, stage: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's config. Buckets take a block's gradients, what is prefetched is a block, and what stays whole under
    stage 3 is vectors."""
    params = list(model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for _, block in model.blocks()]  # type: ignore[operator]
    largest = max([p.numel() for p in params] + blocks)
    vectors = max((p.numel() for p in params if p.ndim < 2), default=0)
    bucket = largest + largest % 2
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": device.type == "cuda",
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 4 * bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_param_persistence_threshold": vectors + 1,
            "sub_group_size": 10**9,
        },
    }


def _import_deepspeed(device: torch.device) -> Any:
    """The package, quiet, on our device and without compiling anything. UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "parallel.strategy=deepspeed needs the package deepspeed; DS_BUILD_OPS=0 pip install deepspeed, or set "
            "parallel.strategy=fsdp2"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # A shared-memory collective for CPUs that would be compiled, for minutes, at the first start. gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed
