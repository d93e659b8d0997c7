"""What we use of torch.distributed.pipelining beyond its public interface: all of it is in this file.

`PipelineStage` makes the operations of a micro-batch (`get_{fwd,bwd}_{send,recv}_ops`), which the schedule starts and
waits for, and picks up what arrived (`_retrieve_recv_{activations,grads}`).  Here the stage itself sends and receives:
the schedule gets no operations, sends go off at once, receives are posted for a whole step before it begins, and a
stage waits only for what it is about to use.  So codec, link and compute overlap under every schedule, and an order of
operations that would deadlock does not.  Stages on one rank hand tensors over as before.

It knows no codec.  tests/pipeline/test_engine.py says so when torch changes what is used here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

default_store = _get_default_store  # where processes leave each other notes

FORWARD, BACKWARD = "forward", "backward"
DIRECTIONS = (FORWARD, BACKWARD)
# Of torch's stages, beside the methods that are replaced below.
NEEDED = ("_stage_meta", "_get_grad_send_meta", "_resolve_peer_global_rank", "_is_same_rank", "args_recv_info",
          "act_send_info", "grad_recv_info", "grad_send_info", "fwd_cache")  # fmt: skip


class LinkedStage(PipelineStage):
    """A PipelineStage that leaves its sends and receives to `send`, `expect` and `collect`.

    A subclass implements them.  `peer` is a global rank, `other` a stage, `place` the number of the output (forward)
    or input (backward).
    """

    def send(self, direction: str, chunk: int, place: int, x: Tensor, other: int, peer: int) -> None:
        """Send `x`, without waiting."""
        raise NotImplementedError

    def expect(self, direction: str, chunk: int, place: int, meta: Any, other: int, peer: int) -> None:
        """Be ready for a tensor of `meta.shape` and `meta.dtype`, without waiting."""
        raise NotImplementedError

    def collect(self, direction: str, chunk: int, place: int) -> Tensor | None:
        """Wait for what was expected; None if nothing was (it came from a stage of the same rank)."""
        raise NotImplementedError

    def begin(self) -> None:
        """A step begins: once on every rank."""

    def finish(self) -> None:
        """All of a step was computed and sent."""

    def sum_tied(self, scale: int) -> None:
        """The step's gradients are there: those of parameters that other stages have, too, are summed, and divided by
        `scale`."""

    def is_tied(self, p: Tensor) -> bool:
        """Whether `sum_tied` divides the gradient of this parameter."""
        return False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        missing = [name for name in NEEDED if not hasattr(self, name)]
        if missing:
            raise RuntimeError(
                "hf_actcompress.pipeline builds on the pipeline stages of torch 2.14; those of torch "
                f"{torch.__version__} have no {', '.join(missing)}. Use torch 2.14 for pipelines; "
                "all else works with older ones."
            )

    # -- what the schedule calls -------------------------------------------------------------------------------
    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self._posted, self._idle = False, set()
        self.begin()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        super().perform_reduce_grad(grad_scale_factor)
        self.finish()
        if self.has_backward:
            self.sum_tied(grad_scale_factor)

    def scale_grads(self, grad_scale_factor: int) -> None:
        # Two stages on this rank may have the same parameter, whose gradient is divided once.
        for p in self.submod.parameters():
            if p.grad is not None and not self.is_tied(p):
                p.grad.div_(grad_scale_factor)

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, **options: Any) -> None:
        outputs = loss if self.is_last else self.fwd_cache[bwd_chunk_id][0]
        if self.has_backward and not any(x.requires_grad for x in _tensors(outputs)):
            self._nothing_to_learn(bwd_chunk_id)
        else:
            # torch's separate pass for weights fails where one parameter enters several layers, and misses some where
            # no input learns.
            inputs = self.has_backward and any(x.requires_grad for x in _tensors(self.fwd_cache[bwd_chunk_id][1]))
            whole = not inputs or getattr(self.submod, "whole_backward", False)
            if whole and not self.is_first and not options.get("full_backward", True):
                options["full_backward"] = True
                self._idle.add(bwd_chunk_id)
            super().backward_one_chunk(bwd_chunk_id, loss=loss, **options)

    def _nothing_to_learn(self, chunk: int) -> None:
        """In place of the backward pass of a stage that is frozen, and before which nothing learns."""
        self.fwd_cache.pop(chunk)
        self.bwd_cache[chunk] = (None,) * len(self._stage_meta.inputs or ())
        self._idle.add(chunk)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, **options: Any) -> None:
        if bwd_chunk_id not in self._idle:
            super().backward_weight_one_chunk(bwd_chunk_id, **options)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._post()
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._post()
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._post()
        outputs, _ = self.fwd_cache[fwd_chunk_id]
        for place, x in enumerate(outputs):
            for other in self.act_send_info[place]:
                self._check_shape(FORWARD, fwd_chunk_id, x, self._stage_meta.outputs[place])
                self.send(FORWARD, fwd_chunk_id, place, x.detach(), other, self._resolve_peer_global_rank(other))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        # Torch's own method knows which inputs have a gradient, and puts zeros where there is none.
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        if ops:
            places = [
                place for place, stage in enumerate(self.grad_send_info)
                if stage is not None and self._get_grad_send_meta(place) is not None
            ]  # fmt: skip
            for place, op in zip(places, ops, strict=True):
                self._check_shape(BACKWARD, bwd_chunk_id, op.tensor, self._get_grad_send_meta(place))
                self.send(BACKWARD, bwd_chunk_id, place, op.tensor, self.grad_send_info[place], op.peer)
        return []

    def _check_shape(self, direction: str, chunk: int, x: Tensor, meta: Any) -> None:
        if x.shape != meta.shape or x.dtype != meta.dtype:
            raise ValueError(
                f"Stage {self.stage_index}, micro-batch {chunk}, {direction}: a tensor of shape {tuple(x.shape)} and "
                f"dtype {x.dtype} is to go over a link set up for {tuple(meta.shape)} and {meta.dtype}. Shapes "
                "may change between steps with hf_actcompress.pipeline.Shapes; else pad the last batch, or drop it."
            )

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        return self._pick_up(FORWARD, fwd_chunk_id, super()._retrieve_recv_activations)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        return self._pick_up(BACKWARD, bwd_chunk_id, super()._retrieve_recv_grads)

    def _infos(self, direction: str) -> dict[int, tuple[Any, ...]]:
        return self.args_recv_info if direction == FORWARD else self.grad_recv_info

    def _post(self) -> None:
        if self._posted:
            return
        self._posted = True
        for direction in DIRECTIONS if self.has_backward else (FORWARD,):
            for chunk, infos in sorted(self._infos(direction).items()):
                for place, info in enumerate(infos):
                    if info.is_root_arg or info.tensor_meta is None or self._is_same_rank(info.source):
                        continue
                    info.buffer = None  # torch's own, as large as the tensor
                    peer = self._resolve_peer_global_rank(info.source)
                    self.expect(direction, chunk, place, info.tensor_meta, info.source, peer)

    def _pick_up(self, direction: str, chunk: int, retrieve: Any) -> tuple[Tensor | None, ...]:
        infos = self._infos(direction)[chunk]
        for place, info in enumerate(infos):
            arrived = self.collect(direction, chunk, place)
            if arrived is not None:
                info.buffer = arrived
        found = retrieve(chunk)
        for info in infos:
            if not info.is_root_arg:
                info.buffer = None  # the graph holds it as long as it is needed
        return found


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [one for one in x or () if isinstance(one, Tensor)]


class EarlySchedule1F1B(Schedule1F1B):
    """1F1B whose forwards run `ahead` micro-batches further before the first backward, for each link up to the last.

    With 1F1B a stage has as many micro-batches under way as there are stages after it, which hides the time of
    computing on the others, but not that of the link: over a slow one it stands still.  Two cover the way there and
    back of a link that is as slow as the computation.  Each micro-batch more costs the memory of one more
    micro-batch's activations.  For stages of hf_actcompress.pipeline.
    """

    def __init__(self, stage: LinkedStage, n_microbatches: int, *args: Any, ahead: int = 2, **options: Any) -> None:
        if not isinstance(ahead, int) or ahead < 0:
            raise ValueError(f"ahead={ahead!r}: give 0 (1F1B) or more micro-batches.")
        if not isinstance(stage, LinkedStage):
            raise ValueError(f"EarlySchedule1F1B needs a CompressedPipelineStage, got a {type(stage).__name__}.")
        self.ahead = ahead
        super().__init__(stage, n_microbatches, *args, **options)

    def _step_microbatches(
        self, arg_mbs: Any = None, kwarg_mbs: Any = None, target_mbs: Any = None, losses: Any = None,
        return_outputs: bool = True, loss_kwargs: Any = None,
    ) -> None:  # fmt: skip
        arg_mbs, kwarg_mbs = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
        self._initialize_stage(arg_mbs[0], kwarg_mbs[0], target_mbs[0] if target_mbs else None, loss_kwargs)
        stage, count = self._stage, self._n_microbatches

        def forward(chunk: int) -> None:
            stage.get_fwd_recv_ops(chunk)
            output = stage.forward_one_chunk(chunk, arg_mbs[chunk], kwarg_mbs[chunk], return_outputs)
            stage.get_fwd_send_ops(chunk)
            self._maybe_compute_loss(stage, output, target_mbs, chunk, loss_kwargs)

        def backward(chunk: int) -> None:
            loss = self._maybe_get_loss(stage, chunk)
            stage.backward_one_chunk(chunk, loss=loss, last_backward=chunk == count - 1)
            stage.get_bwd_send_ops(chunk)

        links = self._num_stages - 1 - stage.stage_index
        warm = min(count, 1 + links * (1 + self.ahead))
        for chunk in range(warm):
            forward(chunk)
        for chunk in range(count):
            backward(chunk)
            if warm + chunk < count:
                forward(warm + chunk)
        self._update_losses(stage, losses)
        stage.perform_reduce_grad(count if self.scale_grads else 1)


def forward_only(schedule: Any, stages: Sequence[LinkedStage], arg_mbs: list, kwarg_mbs: list) -> list[Any]:
    """The last stage's outputs by micro-batch, if it is on this rank, without a backward pass.

    (`schedule.eval` asks for a target and fails on V-shaped schedules.)
    """
    before, schedule._has_backward = schedule._has_backward, False
    try:
        for stage in stages:
            stage.has_backward = False
            stage.clear_runtime_states()
        if isinstance(schedule, PipelineScheduleSingle):
            schedule._initialize_stage(arg_mbs[0], kwarg_mbs[0])
        else:
            schedule._initialize_stages(arg_mbs[0], kwarg_mbs[0])
        numbers = {stage.stage_index: stage for stage in stages}
        with torch.no_grad():
            groups: list[list[LinkedStage]] = []  # neighbours on this rank run together
            for stage in sorted(stages, key=lambda s: s.stage_index):
                if stage.stage_index - 1 in numbers:
                    groups[-1].append(stage)
                else:
                    groups.append([stage])
            outputs = []
            for group in groups:
                for chunk in range(len(arg_mbs)):
                    for stage in group:
                        stage.get_fwd_recv_ops(chunk)
                        output = stage.forward_one_chunk(chunk, arg_mbs[chunk], kwarg_mbs[chunk], False)
                        following = numbers.get(stage.stage_index + 1)
                        if following is not None:
                            following.set_local_fwd_input(output, chunk)
                        elif not stage.is_last:
                            stage.get_fwd_send_ops(chunk)
                        else:
                            outputs.append(output)
                        stage.fwd_cache.pop(chunk)
        for stage in stages:
            stage.finish()
        return outputs
    finally:
        schedule._has_backward = before


class Shapes:
    """Lets shapes change between steps.

    torch finds out once what passes between the stages, from the first micro-batch, and needs it unchanged after.
    Here that is kept for each `key` (train or evaluate, and the shape of the batch); `use` has to be called before
    every step, on every rank with an equal key.  A key that is new costs one forward and backward pass.
    """

    STAGE = ("args_recv_info", "act_send_info", "grad_recv_info", "grad_send_info", "_stage_meta")

    def __init__(self, schedule: Any, stages: Sequence[LinkedStage]) -> None:
        self.schedule, self.stages = schedule, stages
        one = "stage" if isinstance(schedule, PipelineScheduleSingle) else "stages"
        self._flags = (f"_{one}_forward_initialized", f"_{one}_backward_initialized")
        self._known: dict[Hashable, tuple] = {}
        self._current: Hashable = None

    def use(self, key: Hashable) -> None:
        if key == self._current:
            return
        self._known[self._current] = self._state()
        if key in self._known:
            flags, fields = self._known[key]
        else:
            flags = (False, False)
            fields = [({}, {}, {}, None, type(stage._stage_meta)()) for stage in self.stages]
        for name, value in zip(self._flags, flags, strict=True):
            setattr(self.schedule, name, value)
        for stage, values in zip(self.stages, fields, strict=True):
            for name, value in zip(self.STAGE, values, strict=True):
                setattr(stage, name, value)
        self._current = key

    def _state(self) -> tuple:
        flags = tuple(getattr(self.schedule, name) for name in self._flags)
        return flags, [tuple(getattr(stage, name) for name in self.STAGE) for stage in self.stages]
