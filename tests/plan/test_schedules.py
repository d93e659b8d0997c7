"""The orders of plan/schedules.py are those of torch and of EarlySchedule1F1B."""


import pytest
from torch.distributed.pipelining import schedules

from hf_actcompress.pipeline import EarlySchedule1F1B
from hf_actcompress.plan.schedules import orders

NAMES = {schedules.FORWARD: "F", schedules.FULL_BACKWARD: "B", schedules.BACKWARD_INPUT: "I",
         schedules.BACKWARD_WEIGHT: "W"}  # fmt: skip


def of_torch(cls, rank, devices, chunks, local=1):
    """What torch's schedule would do on `rank`, without processes."""
    it = cls.__new__(cls)
    it.pp_group_size, it.n_local_stages, it._n_microbatches = devices, local, chunks
    it._num_stages = it.num_stages = devices * local
    it.number_of_rounds = max(1, chunks // devices)
    it.microbatches_per_round = chunks // it.number_of_rounds
    found = it._calculate_single_rank_operations(rank)
    return computed(found)


def computed(actions):
    kept = [a for a in actions if a is not None and a.microbatch_index is not None]
    return [(NAMES[a.computation_type], a.stage_index, a.microbatch_index) for a in kept]


@pytest.mark.parametrize(("schedule", "cls", "local"), [
    ("interleaved", schedules.ScheduleInterleaved1F1B, 2), ("interleaved", schedules.ScheduleInterleaved1F1B, 3),
    ("zbv", schedules.ScheduleZBVZeroBubble, 2),
])  # fmt: skip
@pytest.mark.parametrize(("devices", "chunks"), [(2, 2), (2, 8), (3, 4), (4, 8)])
def test_orders_are_those_of_torch(schedule, cls, local, devices, chunks):
    ours = orders(schedule, devices * local, devices, chunks)
    for rank in range(devices):
        assert [(a.kind, a.stage, a.chunk) for a in ours[rank]] == of_torch(cls, rank, devices, chunks, local)


class Recorder:
    """A stage that only notes what it is asked to do."""

    def __init__(self, rank, devices):
        self.stage_index, self.num_stages, self.done = rank, devices, []
        self.get_fwd_recv_ops = self.get_fwd_send_ops = lambda chunk: []
        self.get_bwd_recv_ops = self.get_bwd_send_ops = lambda chunk: []
        self.perform_reduce_grad = lambda scale: None

    def forward_one_chunk(self, chunk, *args, **kwargs):
        self.done.append(("F", self.stage_index, chunk))

    def backward_one_chunk(self, chunk, **kwargs):
        self.done.append(("B", self.stage_index, chunk))


@pytest.mark.parametrize(("schedule", "cls"), [
    ("gpipe", schedules.ScheduleGPipe), ("1f1b", schedules.Schedule1F1B), ("early-1f1b", EarlySchedule1F1B),
])  # fmt: skip
@pytest.mark.parametrize(("devices", "chunks"), [(1, 1), (2, 8), (4, 4), (3, 7)])
def test_orders_of_one_stage_per_device_are_what_schedules_do(schedule, cls, devices, chunks):
    ours = orders(schedule, devices, devices, chunks, ahead=2)
    for rank in range(devices):
        it, stage = cls.__new__(cls), Recorder(rank, devices)
        it._stage, it._num_stages, it._n_microbatches, it.scale_grads, it.ahead = stage, devices, chunks, True, 2
        it._check_inputs = lambda args, kwargs, targets, losses: (args, kwargs)
        it._initialize_stage = it._maybe_compute_loss = it._maybe_get_loss = it._update_losses = lambda *a, **k: None
        it._step_microbatches([()] * chunks, [{}] * chunks)
        assert [(a.kind, a.stage, a.chunk) for a in ours[rank]] == stage.done
