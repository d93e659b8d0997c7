"""What hf_actcompress/pipeline/engine.py relies on in torch, and torch alone: says so when torch has changed."""

import inspect

import pytest
import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d, pipelining
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining import stage as torch_stage

from hf_actcompress.pipeline import EarlySchedule1F1B, Shapes, engine


@pytest.mark.parametrize(("owner", "name", "parameters"), [
    (pipelining.PipelineStage, "get_fwd_send_ops", ["self", "fwd_chunk_id"]),
    (pipelining.PipelineStage, "get_bwd_send_ops", ["self", "bwd_chunk_id"]),
    (pipelining.PipelineStage, "get_fwd_recv_ops", ["self", "fwd_chunk_id"]),
    (pipelining.PipelineStage, "get_bwd_recv_ops", ["self", "bwd_chunk_id"]),
    (pipelining.PipelineStage, "_retrieve_recv_activations", ["self", "fwd_chunk_id"]),
    (pipelining.PipelineStage, "_retrieve_recv_grads", ["self", "bwd_chunk_id"]),
    (pipelining.PipelineStage, "_get_grad_send_meta", ["self", "input_idx"]),
    (pipelining.PipelineStage, "clear_runtime_states", ["self"]),
    (pipelining.PipelineStage, "perform_reduce_grad", ["self", "grad_scale_factor"]),
    (pipelining.PipelineStage, "_is_same_rank", ["self", "other_stage"]),
    (pipelining.PipelineStage, "_resolve_peer_global_rank", ["self", "stage_idx"]),
    (pipelining.PipelineStage, "set_local_fwd_input", ["self", "prev_stage_outputs", "mb_index"]),
    (pipelining.PipelineStage, "forward_one_chunk",
     ["self", "fwd_chunk_id", "args", "kwargs", "save_forward_output"]),
    (pipelining.PipelineStage, "backward_one_chunk",
     ["self", "bwd_chunk_id", "loss", "full_backward", "last_backward"]),
    (schedules.PipelineScheduleSingle, "_initialize_stage", ["self", "args", "kwargs", "target", "loss_kwargs"]),
    (schedules.PipelineScheduleMulti, "_initialize_stages", ["self", "args", "kwargs", "target", "loss_kwargs"]),
    (schedules.Schedule1F1B, "_step_microbatches",
     ["self", "arg_mbs", "kwarg_mbs", "target_mbs", "losses", "return_outputs", "loss_kwargs"]),
    (schedules.Schedule1F1B, "_check_inputs", ["self", "arg_mbs", "kwarg_mbs", "target_mbs", "losses"]),
    (schedules.Schedule1F1B, "_maybe_compute_loss",
     ["self", "stage", "output", "target_mbs", "mb_index", "loss_kwargs"]),
    (schedules.Schedule1F1B, "_maybe_get_loss", ["self", "stage", "mb_index"]),
    (schedules.Schedule1F1B, "_update_losses", ["self", "stages", "losses"]),
    (distributed_c10d, "_get_default_store", []),
])  # fmt: skip
def test_methods(owner, name, parameters):
    found = list(inspect.signature(getattr(owner, name)).parameters)
    assert found == parameters, f"torch has changed {owner.__name__}.{name}: pipeline/engine.py has to follow"


def test_fields():
    info = torch_stage._RecvInfo("x", 0, torch.zeros(1), None)
    assert (info.source, info.is_root_arg, info.buffer.numel(), info.tensor_meta) == (0, False, 1, None)
    base = inspect.getsource(torch_stage)
    for name in ("fwd_cache", *Shapes.STAGE):
        assert f"self.{name}" in base, name
    text = inspect.getsource(schedules)
    for name in ("_stage_forward_initialized", "_stage_backward_initialized", "_stages_forward_initialized",
                 "_stages_backward_initialized", "_has_backward"):  # fmt: skip
        assert f"self.{name}" in text, name


def test_what_a_schedule_cannot_take():
    with pytest.raises(ValueError, match="needs a CompressedPipelineStage"):
        EarlySchedule1F1B(object(), 4)
    with pytest.raises(ValueError, match="ahead=-1"):
        EarlySchedule1F1B(object(), 4, ahead=-1)


def test_another_torch_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(engine, "NEEDED", ("fwd_cache", "_gone"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="torch 2.14; those of torch .* have no _gone"):
            engine.LinkedStage(torch.nn.Linear(2, 2), 0, 2, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
