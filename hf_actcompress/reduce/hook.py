"""The site: what attaches the exchange to DistributedDataParallel's buckets and to FSDP2's reduce-scatter.

DDP hands over a bucket of gradients as soon as they are there, while the backward pass goes on.  On a CPU a thread of
its own encodes and sends them, in the order in which DDP gives them; on a GPU all is put on a stream of its own.  The
process group is its own, too, so that DDP's and the user's collectives do not come between.
"""

# Annotations are evaluated here: DDP looks at those of its hook.
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..codecs import Codec
from ..observe.events import Event, Listener
from .exchange import Exchange, run
from .spec import PowerSGD

logger = logging.getLogger(__name__)

PATIENCE = 2  # training passes until it is said that nothing reduces gradients


class Reduction:
    """Compresses the gradients that `model`'s processes add up.

    model: the user's module, which DistributedDataParallel wraps, now or by the first training pass, or which is
        sharded by `fully_shard`.
    codec: of the gradients, or PowerSGD.
    Where nothing adds gradients up, a warning after the first passes says so.
    """

    def __init__(self, model: nn.Module, codec: Codec | PowerSGD, seed: int = 0) -> None:
        self.model, self.codec, self.seed = model, codec, seed
        self.enabled, self.attached = True, False
        self.listeners: list[Listener] = []
        self._passes = 0
        self._exchange: Exchange | None = None
        self._power: powerSGD_hook.PowerSGDState | None = None
        self._loaded: dict[str, Any] = {}
        self._noted = 0, 0
        self._worker: _Worker | None = None
        self._removers: list[Callable[[], None]] = []
        if any(isinstance(hook, _Finder) and hook.reduction for hook in model._forward_pre_hooks.values()):
            raise ValueError(
                f"The gradients of this {type(model).__name__} are compressed already: call handle.remove() first."
            )
        handle = model.register_forward_pre_hook(_Finder(self), prepend=True)
        self._removers.append(handle.remove)
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            self._shard()

    # -- attaching ---------------------------------------------------------------------------------------------
    def find(self, module: nn.Module) -> None:
        """Look for DDP in its own forward: a Trainer makes it, and gives callbacks the model inside."""
        if self.attached or not module.training or not torch.is_grad_enabled():
            return
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None and any(one is module for one in wrapper.modules()):
            self.wrap(wrapper)
            return
        self._passes += 1
        if self._passes == PATIENCE:
            logger.warning(
                "reduce=%r has nothing to do: %s is trained by one process, or is not wrapped by "
                "DistributedDataParallel or sharded by fully_shard. Launch it by `torchrun --nproc_per_node N` or "
                "`accelerate launch`, or leave reduce= out.", str(self.codec), type(module).__name__,
            )  # fmt: skip

    def wrap(self, wrapper: DistributedDataParallel) -> None:
        """Take over the gradients of a DistributedDataParallel module.

        Raises ValueError for one that has a communication hook of the user's.
        """
        self._begin(wrapper.process_group)
        switch = vars(wrapper).get("_actcompress_switch")
        if switch is None:  # a hook cannot be taken off again
            switch = _Switch(wrapper.process_group)
            try:
                wrapper.register_comm_hook(switch, _call)
            except RuntimeError as error:
                raise ValueError(
                    f"reduce={str(self.codec)!r}: this DistributedDataParallel has a communication hook already, and "
                    "takes one. Leave out either."
                ) from error
            wrapper._actcompress_switch = switch
        switch.reduction = self
        self._removers.append(switch.off)

    def _shard(self) -> None:
        if isinstance(self.codec, PowerSGD):
            raise ValueError(
                f"reduce={str(self.codec)!r} is for DistributedDataParallel; with fully_shard use a codec."
            )
        self._begin(None)
        for name, module in self.model.named_modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(ShardedReduce(self, name))
                self._removers.append(lambda module=module: module.set_custom_reduce_scatter(ShardedReduce(None, "")))

    def _begin(self, group: dist.ProcessGroup | None) -> None:
        ranks = None if group is None else dist.get_process_group_ranks(group)
        own = dist.new_group(ranks)
        self.attached = True
        if isinstance(self.codec, PowerSGD):
            self._power = powerSGD_hook.PowerSGDState(
                own, matrix_approximation_rank=self.codec.rank, start_powerSGD_iter=self.codec.start,
                random_seed=0, orthogonalization_epsilon=1e-8,
            )  # fmt: skip
            _load_power(self._power, self._loaded)
        else:
            self._exchange = Exchange(self.codec, own, self.seed)
            self._exchange.load_state_dict(self._loaded)

    def remove(self) -> None:
        """Gradients are added up as ever from now on."""
        self._loaded = self.state_dict()
        while self._removers:
            self._removers.pop()()
        if self._worker is not None:
            self._worker.end()
            self._worker = None
        if self._exchange is not None:
            self._exchange.close()
        self.attached = False

    # -- buckets -----------------------------------------------------------------------------------------------
    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The mean gradients of a bucket, to come."""
        x, index = bucket.buffer(), bucket.index()
        if x.device.type == "cpu" and self._worker is None:
            self._worker = _Worker()
        if self._power is not None:
            state = self._power
            self._tell(index, x.nbytes, _power_nbytes(state, bucket))
            if self._worker is None:
                return powerSGD_hook.powerSGD_hook(state, bucket)
            # One bucket at a time: its callbacks wait in gloo's two threads, and two buckets would fill both.
            return self._worker.submit(lambda: powerSGD_hook.powerSGD_hook(state, bucket).wait())
        if self._worker is not None:
            y = torch.empty_like(x)
            pieces = list(self._exchange.pieces(f"bucket{index}", x, y))
            return self._worker.follow(pieces, y, lambda: self._note(index))
        stream = _side_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[x.device])
        with torch.cuda.stream(stream):
            y = self._mean(index, x)
            x.record_stream(stream)
            future.set_result(y)
        return future

    @torch.no_grad()
    def _mean(self, index: int, x: Tensor) -> Tensor:
        y = self._exchange.mean(f"bucket{index}", x)
        self._note(index)
        return y

    def _note(self, index: int) -> None:
        """Tell what was sent since the last time."""
        exchange = self._exchange
        self._tell(index, exchange.plain - self._noted[0], exchange.sent - self._noted[1])
        self._noted = exchange.plain, exchange.sent

    def _tell(self, index: int, plain: int, sent: int) -> None:
        codec = self.codec if isinstance(self.codec, Codec) else None
        for listener in self.listeners:
            listener(Event("reduce", f"bucket{index}", "reduce", plain, sent, codec))

    # -- state -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Of this rank: errors that wait to be sent, warm starts, counters of noise."""
        if self._exchange is not None:
            return self._exchange.state_dict()
        return self._loaded if self._power is None else _power_state(self._power)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._loaded = values
        if self._exchange is not None:
            self._exchange.load_state_dict(values)
        elif self._power is not None:
            _load_power(self._power, values)


class _Finder:
    """The forward pre-hook.  A copy of the model (an average of weights, a pickle) compresses nothing."""

    def __init__(self, reduction: Reduction | None = None) -> None:
        self.reduction = reduction

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.reduction is not None:
            self.reduction.find(module)

    def __reduce__(self) -> tuple[Any, tuple]:
        return _Finder, ()


class _Switch:
    """The one hook that a DDP module can have: compresses while a Reduction is attached and enabled."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.reduction: Reduction | None = None

    def off(self) -> None:
        self.reduction = None


def _call(switch: _Switch, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    if switch.reduction is not None and switch.reduction.enabled:
        return switch.reduction.reduce(bucket)
    x, size = bucket.buffer(), dist.get_world_size(switch.group)
    work = dist.all_reduce(x.div_(size), group=switch.group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class ShardedReduce:
    """torch's interface of FSDP2's reduce-scatter.  Without a `reduction`, as FSDP2 does it by itself."""

    def __init__(self, reduction: Reduction | None, name: str) -> None:
        self.reduction, self.name = reduction, name or "root"

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        reduction = self.reduction
        exchange = None if reduction is None or not reduction.enabled else reduction._exchange
        if exchange is None or op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG) or async_op or (
            output_tensor.numel() < 1024
        ):  # fmt: skip
            return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        sent, plain = exchange.sent, exchange.plain
        exchange.group, exchange.size = group, dist.get_world_size(group)
        with torch.no_grad():
            output_tensor.copy_(exchange.scatter(self.name, input_tensor))
            if op == dist.ReduceOp.AVG:
                output_tensor.div_(exchange.size)
        reduction._tell(0, exchange.plain - plain, exchange.sent - sent)
        return None


class _Worker:
    """A thread that carries out what it is given: means in pieces, several under way at a time, or whole calls."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._left: dict[Any, tuple[list, Tensor, torch.futures.Future[Tensor], Callable[[], None]]] = {}
        self._thread = threading.Thread(target=self._run, name="hf_actcompress reduce", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Tensor]) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._orders.put((work, future))
        return future

    def follow(self, pieces: list, y: Tensor, ended: Callable[[], None]) -> torch.futures.Future[Tensor]:
        """`y`, once all pieces have been carried out."""
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        left = [len(pieces)]
        for piece in pieces:
            self._left[piece] = left, y, future, ended
            self._orders.put(piece)
        return future

    def _run(self) -> None:
        with torch.no_grad():
            while (order := self._orders.get()) is not None:
                if isinstance(order, tuple):
                    work, future = order
                    try:
                        future.set_result(work())
                    except BaseException as error:  # noqa: BLE001 - it is raised where the future is waited for
                        future.set_exception(error)
                    continue
                try:
                    run(self._following(order), self._done)
                except BaseException as error:  # noqa: BLE001
                    for _, _, future, _ in list(self._left.values()):
                        if not future.done():
                            future.set_exception(error)
                    self._left.clear()

    def _following(self, first: Any) -> Iterator[Any]:
        """The pieces that are there; None where one may come while others are under way."""
        yield first
        while self._left:
            try:
                yield self._orders.get_nowait()
            except queue.Empty:
                yield None

    def _done(self, piece: Any) -> None:
        left, y, future, ended = self._left.pop(piece)
        left[0] -= 1
        if not left[0]:
            ended()
            future.set_result(y)

    def end(self) -> None:
        self._orders.put(None)
        self._thread.join()


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


# -- PowerSGD's state, without pickles -------------------------------------------------------------------------------
TABLES = ("error_dict", "p_memory_dict", "q_memory_dict")


def _power_state(state: powerSGD_hook.PowerSGDState) -> dict[str, Any]:
    tables = {name: {str(k): v for k, v in getattr(state, name).items()} for name in TABLES}
    kind, keys, position, gauss, cached = state.rng.get_state()
    return {**tables, "iter": state.iter, "rng": [kind, keys.tolist(), position, gauss, cached]}


def _load_power(state: powerSGD_hook.PowerSGDState, values: dict[str, Any]) -> None:
    if not values:
        return
    for name in TABLES:
        setattr(state, name, {int(k): v for k, v in values[name].items()})
    state.iter = values["iter"]
    kind, keys, *rest = values["rng"]
    state.rng.set_state((kind, keys, *rest))


def _power_nbytes(state: powerSGD_hook.PowerSGDState, bucket: dist.GradBucket) -> int:
    """Bytes of the tensors that are added up, by torch's own rule of which are compressed."""
    if state.iter < state.start_powerSGD_iter:
        return bucket.buffer().nbytes
    rank, total = state.matrix_approximation_rank, 0
    for x in bucket.gradients():
        rows, columns = x.shape[0] if x.dim() else 1, x.numel() // max(1, x.shape[0] if x.dim() else 1)
        low = min(rows, columns, rank) * (rows + columns)
        small = x.dim() > 1 and low * state.min_compression_rate < x.numel()
        total += (low if small else x.numel()) * x.element_size()
    return total
