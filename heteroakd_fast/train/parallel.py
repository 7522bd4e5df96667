"""The objective as it trains: itself, replicated over the ranks (DDP), or sharded (FSDP2)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import BackendUnavailableError
from .config import ScaleConfig
from .distributed import World
from .errors import ConfigError, ModelError, UserError
from .memory import ran_out
from .models import evaluating
from .objectives import Objective, without_group


class Parallel:
    """`module` is what is called and optimised; `objective` what is evaluated and saved.

    They are the same network, or with FSDP2 the plain objective is a copy: `collect` brings the
    trained weights into it, `distribute` sends its weights out again. Optimiser states travel by
    the names of their parameters, so that a run may go on with another number of ranks.
    """

    def __init__(
        self,
        objective: Objective,
        config: ScaleConfig,
        *,
        world: World,
        device: torch.device,
        side: tuple[int, int],
    ) -> None:
        self.objective, self.world, self.device = objective, world, device
        self.sharded = world.size > 1 and config.parallel == "fsdp"
        self.module: nn.Module = objective
        self._trained = objective
        if self.sharded:
            self._trained = self.module = self._shard(objective)
            objective.to("cpu")
        elif world.size > 1:
            self.module = DistributedDataParallel(
                objective,
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=bool(unused_parameters(objective, device, side)),
            )
        self._compiled = compile_model(self._trained) if config.compile else []

    def _shard(self, objective: Objective) -> Objective:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # The teacher is not trained: both copies use the same one. Its parts as well, for a tap
        # holds on to one of them, and would be left with a copy that nobody calls.
        teachers = getattr(objective, "_teacher", [])
        kept = {id(part): part for teacher in teachers for part in teacher.modules()}
        copied: Objective = copy.deepcopy(objective, kept)
        mesh = init_device_mesh(self.device.type, (self.world.size,))
        for block in sharded_blocks(copied.model):
            fully_shard(block, mesh=mesh)
        fully_shard(copied, mesh=mesh)  # whatever is in no block
        return copied

    def collect(self) -> None:
        """The trained weights into the plain objective, on the training device."""
        if self.sharded:
            self.objective.to(self.device)
            sharding = _sharding()
            full = sharding.StateDictOptions(full_state_dict=True)
            state = sharding.get_model_state_dict(self.module, options=full)
            self.objective.load_state_dict(state)

    def close(self) -> None:
        """Training is over: the objective has the weights, and its network runs as it is, so that
        a feature tap finds every module of what is a teacher from now on."""
        self.collect()
        for module in self._compiled:
            del module.forward

    def release(self) -> None:
        """The plain objective is not needed for a while."""
        if self.sharded:
            self.objective.to("cpu")

    def distribute(self) -> None:
        """The plain objective's weights into what trains."""
        if self.sharded:
            sharding = _sharding()
            full = sharding.StateDictOptions(full_state_dict=True)
            sharding.set_model_state_dict(self.module, self.objective.state_dict(), options=full)

    def reducing(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over the ranks in the last micro-batch of a step only."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()  # type: ignore[return-value]
        if self.sharded:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, a scalar; the same on every rank."""
        gradients = [p.grad for p in self._trained.parameters() if p.grad is not None]
        norm: Tensor = _full(nn.utils.get_total_norm(gradients))
        return norm

    def clip_gradients(self, limit: float, norm: Tensor) -> None:
        """Scale gradients of the given norm down to one of `limit`, if it is larger."""
        nn.utils.clip_grads_with_norm_(self._trained.parameters(), limit, norm)

    def non_finite_gradients(self) -> list[str]:
        """Names of parameters whose gradient has a NaN or an infinity; all ranks take part."""
        return [
            name
            for name, parameter in self._trained.named_parameters()
            if parameter.grad is not None and not _full(parameter.grad).isfinite().all()
        ]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Momenta and counts by the names of their parameters, in full. Rates and decays are the
        configuration's, and parameters that were never reached have none."""
        return {
            name: {key: _full(value) for key, value in optimizer.state[parameter].items()}
            for name, parameter in self._trained.named_parameters()
            if optimizer.state.get(parameter)
        }

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        names = {parameter: name for name, parameter in self._trained.named_parameters()}
        own = optimizer.state_dict()
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        own["state"] = {
            index: {key: _like(value, parameter) for key, value in state[name].items()}
            for index, parameter in enumerate(ordered)
            if (name := names[parameter]) in state
        }
        optimizer.load_state_dict(own)


def sharded_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that are gathered one by one, inner ones first: those whose classes
    transformers lists in `_no_split_modules`.

    Any other module may be entered by another method than `forward`, where it would find its
    parameters sharded, or be looked up by its class (transformers' `capture_outputs` does), which
    `fully_shard` replaces.
    """
    modules = list(model.modules())
    names = {name for m in modules for name in getattr(m, "_no_split_modules", None) or ()}
    return [module for module in reversed(modules) if type(module).__name__ in names]


def _sharding() -> Any:
    # Late: a second of imports that most runs need nothing of.
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _full(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Any, parameter: Any) -> Any:
    """A momentum, sharded as its parameter is."""
    if hasattr(parameter, "full_tensor") and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def uncompiled() -> AbstractContextManager[Any]:
    """Images of many shapes would be compiled one by one. Where nothing was compiled so far, what
    compiles is not even imported: that takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def compile_model(objective: Objective) -> list[nn.Module]:
    """Compile the trained network, in place, so that names of weights stay as they are.

    A compiled graph knows no hook inside it: around a feature tap, the tapped module and the parts
    beside the way to it are compiled one by one. Returns what was compiled.
    """
    taps = getattr(objective, "taps", None)
    parts = [objective.model] if taps is None else _around(objective.model, taps[0].module)
    for module in parts:
        # Its forward and not `module.compile()`, which leaves torch's own containers as they are.
        module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
    return parts


def _around(module: nn.Module, tapped: nn.Module) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for child in module.children():
        on_the_way = child is not tapped and any(inner is tapped for inner in child.modules())
        if on_the_way or isinstance(child, nn.ModuleList):
            parts += _around(child, tapped)
        else:
            parts.append(child)
    return parts


def unused_parameters(
    objective: Objective, device: torch.device, side: tuple[int, int]
) -> list[str]:
    """Parameters that no loss reaches (a classifier left in a backbone): DDP must know of them."""
    # A pass in training mode would change running statistics.
    with evaluating(objective), without_group(objective):
        objective(*_blank(1, side, device)).loss.backward()
    named = objective.named_parameters()
    unused = [name for name, p in named if p.requires_grad and p.grad is None]
    objective.zero_grad()
    return unused


def _blank(count: int, side: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels of zeros."""
    images = torch.zeros(count, 3, *side, device=device)
    return images, torch.zeros(count, *side, dtype=torch.int64, device=device)


@contextmanager
def rehearsal(objective: nn.Module, device: torch.device) -> Iterator[None]:
    """Passes in training mode that leave no trace: buffers and random states come back."""
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield
        own: dict[str, Tensor] = dict(objective.named_buffers())
        for name, buffer in buffers.items():
            own[name].copy_(buffer)


def dry_run(
    objective: Objective, side: tuple[int, int], device: torch.device, images: int | None = None
) -> None:
    """One pass, so that what the network, the loss or its backend refuses shows early.

    `images`: of a micro-batch, in training mode and with a graph, as in a training step, but
    without a trace; None: one image, in evaluation mode.
    """
    trains = images is not None
    objective.train(trains)
    name = type(objective.model).__name__
    try:
        with without_group(objective), rehearsal(objective, device), torch.set_grad_enabled(trains):
            loss = objective(*_blank(images or 1, side, device)).loss
        if trains and not loss.requires_grad:
            raise ModelError(f"{name}: its loss has no gradient: every parameter is frozen")
    except UserError:
        raise
    except Exception as error:  # of whatever layer it is
        if ran_out(error):
            raise
        if "more than 1 value per channel" in str(error):
            raise ModelError(
                f"{name}: a batch norm has one value per channel for a micro-batch of {images} "
                f"images of {side[1]} x {side[0]} pixels; take micro-batches of 2 or more "
                "(optim.batch_size over ranks and optim.accumulate), or a larger data.crop"
            ) from error
        if isinstance(error, BackendUnavailableError | TypeError | ValueError):
            raise ConfigError(f"distill: {error}") from error
        raise ModelError(f"{name} cannot train on {images} images: {error}") from error
    finally:
        objective.eval()


def synchronise_batch_norms(
    module: nn.Module, config: ScaleConfig, world: World, device: torch.device
) -> nn.Module:
    """Batch norms whose statistics are those of all ranks' images, if the configuration asks.

    Raises:
        ConfigError: torch has them for GPUs only.
    """
    if not config.sync_bn or world.size == 1:
        return module
    if device.type != "cuda":
        raise ConfigError(
            f"scale.sync_bn: torch's synchronised batch norm works on GPUs only, and this run is "
            f"on {device}; set it to false, or take a network without batch norms"
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return converted
