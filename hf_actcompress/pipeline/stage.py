"""A stage of torch.distributed.pipelining whose sends and receives carry payloads.

Everything that relies on methods of torch that carry no promise is in this file: `PipelineStage` makes the operations
of a micro-batch (`get_{fwd,bwd}_{send,recv}_ops`) and picks up what arrived (`_retrieve_recv_{activations,grads}`);
here the tensor of each operation is swapped for a buffer of bytes.  tests/pipeline/test_stage.py says so when torch
changes them.  Stages on the same rank hand tensors over as before.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from ..codecs import Codec, CodecState, raw_nbytes
from ..sites.wire import WireFormat

FORWARD, BACKWARD = "forward", "backward"
DIRECTIONS = (FORWARD, BACKWARD)


class CompressedPipelineStage(PipelineStage):
    """A PipelineStage, used as torch's own in any schedule.

    codec: of the activations it sends and receives; grad_codec: of the gradients, None for the same.  Both neighbours
        of a link must have the same ones.  Integers and bools travel as they are.
    seed: of stochastic rounding and cold starts.

    `bytes` counts what was sent in each direction, `raw_bytes` what it would have been, `seconds` the time of encoding
    and decoding.  A state is kept for each link, direction and micro-batch; `codec_state()` is checkpointable.
    Raises WireError (sites/wire.py) where what arrives is not what was to arrive.
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        *,
        codec: Codec,
        grad_codec: Codec | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, **options)
        self.codecs = {FORWARD: codec, BACKWARD: codec if grad_codec is None else grad_codec}
        self.seed = seed
        self.steps = 0
        self.bytes, self.raw_bytes, self.seconds = Counter(), Counter(), Counter()
        self._formats: dict[tuple, WireFormat] = {}
        self._states: dict[str, CodecState | None] = {}
        self._sent: dict[tuple, Tensor] = {}  # buffers that may still be under way
        self._arriving: dict[tuple, tuple[WireFormat, Tensor]] = {}

    # -- what the schedule calls -------------------------------------------------------------------------------
    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self.steps += 1  # on every rank once a step, so that numbers of messages agree

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        places = [idx for idx, stages in self.act_send_info.items() if stages]
        return self._sending(FORWARD, fwd_chunk_id, places, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        if not ops:
            return ops
        places = [
            idx for idx, stage in enumerate(self.grad_send_info)
            if stage is not None and self._get_grad_send_meta(idx) is not None
        ]  # fmt: skip
        return self._sending(BACKWARD, bwd_chunk_id, places, ops)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        ops = super().get_fwd_recv_ops(fwd_chunk_id)
        return self._receiving(FORWARD, fwd_chunk_id, self.args_recv_info[fwd_chunk_id], ops)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        ops = super().get_bwd_recv_ops(bwd_chunk_id)
        return self._receiving(BACKWARD, bwd_chunk_id, self.grad_recv_info[bwd_chunk_id], ops) if ops else ops

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        self._unpack(FORWARD, fwd_chunk_id, self.args_recv_info[fwd_chunk_id])
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        self._unpack(BACKWARD, bwd_chunk_id, self.grad_recv_info[bwd_chunk_id])
        return super()._retrieve_recv_grads(bwd_chunk_id)

    # -- swapping ------------------------------------------------------------------------------------------------
    def _sending(self, direction: str, chunk: int, places: list[int], ops: list[dist.P2POp]) -> list[dist.P2POp]:
        for idx, op in zip(places, ops, strict=True):
            x = op.tensor
            raw = raw_nbytes(tuple(x.shape), x.dtype)
            self.raw_bytes[direction] += raw
            wire = self._format(direction, x)
            if wire is None:
                op.tensor = x.contiguous()
                self.bytes[direction] += raw
                continue
            key = (direction, chunk, idx)
            buffer = self._sent.get(key)
            if buffer is None or buffer.numel() != wire.nbytes:
                buffer = self._sent[key] = wire.buffer(x.device)
            began = time.perf_counter()
            wire.encode(x.detach(), self._state(*key), buffer, self._number(chunk))
            self.seconds["encode"] += time.perf_counter() - began
            self.bytes[direction] += wire.nbytes
            op.tensor = buffer
        return ops

    def _receiving(
        self, direction: str, chunk: int, infos: tuple[Any, ...], ops: list[dist.P2POp]
    ) -> list[dist.P2POp]:  # fmt: skip
        places = [idx for idx, info in enumerate(infos) if not info.is_root_arg and info.buffer is not None]
        for idx, op in zip(places, ops, strict=True):
            wire = self._format(direction, infos[idx].buffer)
            if wire is not None:
                op.tensor = wire.buffer(infos[idx].buffer.device)
                self._arriving[direction, chunk, idx] = wire, op.tensor
        return ops

    def _unpack(self, direction: str, chunk: int, infos: tuple[Any, ...]) -> None:
        for idx, info in enumerate(infos):
            found = self._arriving.pop((direction, chunk, idx), None)
            if found is None:
                continue
            wire, buffer = found
            began = time.perf_counter()
            where = f"stage {self.stage_index}, {direction} from stage {info.source}"
            info.buffer = wire.decode(buffer, self._number(chunk), where)
            self.seconds["decode"] += time.perf_counter() - began

    def _format(self, direction: str, x: Tensor) -> WireFormat | None:
        if not x.is_floating_point():
            return None
        key = (direction, tuple(x.shape), x.dtype)
        if key not in self._formats:
            self._formats[key] = WireFormat(self.codecs[direction], tuple(x.shape), x.dtype)
        return self._formats[key]

    def _number(self, chunk: int) -> int:
        return (self.steps * 1024 + chunk) & 0xFFFFFFFF

    # -- state -----------------------------------------------------------------------------------------------------
    def _state(self, direction: str, chunk: int, idx: int) -> CodecState | None:
        name = f"stage{self.stage_index}/{direction}/{chunk}/{idx}"
        if name not in self._states:
            self._states[name] = self.codecs[direction].init_state(name, self.seed)
        return self._states[name]

    def codec_state(self) -> dict[str, Any]:
        """What the codecs of this stage's sends remember, by direction, micro-batch and output."""
        return {name: state.state_dict() for name, state in self._states.items() if state is not None}

    def load_codec_state(self, values: dict[str, Any]) -> None:
        """Take it over.  Raises ValueError for the state of another codec."""
        for name, value in values.items():
            _, direction, chunk, idx = name.split("/")
            state = self._state(direction, int(chunk), int(idx))
            if state is not None:
                state.load_state_dict(value)
