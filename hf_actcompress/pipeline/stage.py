"""A pipeline stage whose sends and receives carry payloads."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..codecs import Codec, CodecState, raw_nbytes
from .engine import BACKWARD, DIRECTIONS, FORWARD, LinkedStage
from .frames import HEADER, VERSION, WireError, framed, number_of, over_network, seal, unseal
from .links import Links, exchange
from .wire import NOT_FINITE_TEXT, WireFormat

# Bits of a tag: place of the tensor, micro-batch, direction and link.
PLACES, CHUNKS = 8, 4096
SETTINGS = PLACES * CHUNKS - 1
VERSIONS = f"hf_actcompress {__version__}, torch {torch.__version__.partition('+')[0]}, format {VERSION}"


class CompressedPipelineStage(LinkedStage):
    """A PipelineStage, used as torch's own in any schedule.

    codec: of the activations; grad_codec: of the gradients, None for `codec.for_gradients()`.  Integers and bools are
        sent as they are.
    seed: of stochastic rounding and of a codec's first state.
    timeout: seconds that the stage waits for a peer.
    nonfinite: "pass" sends NaN and Inf on as they would arrive uncompressed (codecs decode them as NaN), so that a
        gradient scaler can skip the step; "raise" stops and names stage and micro-batch, and waits for the device.
    checksum: of every message; None: where messages leave this machine.
    agree: settings that neighbours must share besides codecs, model and number of stages, {name: value}.

    Before the first step neighbours compare these settings.  `bytes` counts what was sent in each direction,
    `raw_bytes` the size without compression, `seconds` the time to encode, decode and wait for peers.  There is one
    codec state for each link, direction and micro-batch (one a link for codecs that remember samples);
    `codec_state()` can be saved.
    Raises WireError for a message that is not the expected one, LinkError where a peer does not answer; both name
    stage, micro-batch, step and cause.
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
        timeout: float = 300.0,
        nonfinite: str = "pass",
        checksum: bool | None = None,
        agree: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, **options)
        if grad_codec is None:
            grad_codec = codec.for_gradients()
        if grad_codec != grad_codec.for_gradients():
            raise ValueError(f"grad_codec={grad_codec} is for activations alone; use {grad_codec.for_gradients()}.")
        for one in (codec, grad_codec):
            if "wire" in one.traits.unfit:
                raise ValueError(f"{one} cannot be used between stages: {one.traits.unfit['wire']}")
        if nonfinite not in ("pass", "raise"):
            raise ValueError(f"nonfinite={nonfinite!r} is not known; choose 'pass' or 'raise'.")
        self.codecs = {FORWARD: codec, BACKWARD: grad_codec}
        self.seed, self.steps, self.refuse = seed, 0, nonfinite == "raise"
        self.checksum = over_network() if checksum is None else checksum
        self.agree = {"checksum": self.checksum, "nonfinite": nonfinite, **(agree or {})}
        self.shared = getattr(submodule, "shared", None)
        self.bytes, self.raw_bytes, self.seconds = Counter(), Counter(), Counter()
        self.links = Links(self.group, timeout)
        self._compared = False
        self._ids: list[Tensor] | None = None
        self._plans: dict[tuple[str, int], Any] = {}
        self._formats: dict[tuple, WireFormat] = {}
        self._states: dict[str, CodecState | None] = {}
        self._buffers: dict[tuple, Tensor] = {}
        self._expected: dict[tuple, tuple[WireFormat | None, Any, int]] = {}

    def sample_ids(self, ids: Sequence[int] | Tensor | None, chunks: int) -> None:
        """Sample ids of the next training step, in the order of the batch, which is cut into `chunks` micro-batches.

        Codecs that remember samples (`delta`) need them on both sides of a link; rows with an id below 0 are not
        remembered.
        """
        self._ids = None if ids is None else list(torch.as_tensor(ids, dtype=torch.int64).tensor_split(chunks))

    # -- what the engine calls -----------------------------------------------------------------------------------
    def begin(self) -> None:
        if not self._compared:
            self._compared = True
            self._compare_settings()
        self.links.flush()
        self.steps += 1  # on every rank once a step, so that numbers of messages agree
        self._plans.clear()
        self._expected.clear()
        if self.shared is not None and self.has_backward:
            self.shared.begin()

    def finish(self) -> None:
        self.links.flush()
        self._ids = None
        self.seconds["wait"] += self.links.waited
        self.links.waited = 0.0

    def sum_tied(self, scale: int) -> None:
        if self.shared is not None:
            self.shared.finish(self, scale, self.links, self.checksum)
            self.bytes["shared"], self.shared.bytes = self.bytes["shared"] + self.shared.bytes, 0
            self.seconds["wait"] += self.links.waited
            self.links.waited = 0.0

    def is_tied(self, p: Tensor) -> bool:
        return self.shared is not None and self.shared.is_shared(p)

    def send(self, direction: str, chunk: int, place: int, x: Tensor, other: int, peer: int) -> None:
        self.raw_bytes[direction] += raw_nbytes(tuple(x.shape), x.dtype)
        what = self._where(direction, chunk, f"to stage {other}")
        tag = self._tag(direction, chunk, place, other)
        if not x.is_floating_point():
            buffer = framed(x.contiguous().cpu().reshape(-1).view(torch.uint8))
            seal(buffer, self._number(chunk), checksum=self.checksum)
        else:
            began = time.perf_counter()
            state = self._state("send", direction, chunk, place)
            plan = self._plan(direction, chunk, x.shape, state)
            wire = self._format(direction, x.shape, x.dtype, plan)
            buffer = self._buffer("send", tag, wire)
            sent = wire.encode(x.detach(), state, buffer, self._number(chunk), self.refuse)
            self.seconds["encode"] += time.perf_counter() - began
            if not sent:
                self.links.send(buffer, peer, tag, what)  # so that the peer learns why
                self.links.flush()
                raise WireError(f"{what}: {NOT_FINITE_TEXT}")
        self.bytes[direction] += buffer.numel()
        self.links.send(buffer, peer, tag, what)

    def expect(self, direction: str, chunk: int, place: int, meta: Any, other: int, peer: int) -> None:
        tag, wire = self._tag(direction, chunk, place, other), None
        if meta.dtype.is_floating_point:
            state = self._state("receive", direction, chunk, place)
            wire = self._format(direction, meta.shape, meta.dtype, self._plan(direction, chunk, meta.shape, state))
            buffer = self._buffer("receive", tag, wire)
        else:
            buffer = framed(b"", raw_nbytes(tuple(meta.shape), meta.dtype))
        self._expected[direction, chunk, place] = wire, meta, other
        self.links.expect(buffer, peer, tag, self._where(direction, chunk, f"from stage {other}"))

    def collect(self, direction: str, chunk: int, place: int) -> Tensor | None:
        found = self._expected.pop((direction, chunk, place), None)
        if found is None:
            return None
        wire, meta, other = found
        buffer = self.links.collect(self._tag(direction, chunk, place, other))
        where = self._where(direction, chunk, f"from stage {other}")
        if wire is None:
            unseal(buffer, self._number(chunk), where=where, checksum=self.checksum)
            return buffer[HEADER:].to(self.device).view(meta.dtype).view(meta.shape)
        began = time.perf_counter()
        state = self._state("receive", direction, chunk, place)
        self._plan(direction, chunk, meta.shape, state)
        x = wire.decode(buffer, self._number(chunk), where, state, self.device)
        self.seconds["decode"] += time.perf_counter() - began
        return x

    # -- messages -------------------------------------------------------------------------------------------------
    def _where(self, direction: str, chunk: int, other: str) -> str:
        return f"Stage {self.stage_index}, step {self.steps}, micro-batch {chunk}, {direction} {other}"

    def _tag(self, direction: str, chunk: int, place: int, other: int) -> int:
        link = min(self.stage_index, other) * 2 + DIRECTIONS.index(direction) + 1
        return (link * CHUNKS + chunk) * PLACES + place

    def _number(self, chunk: int) -> int:
        return number_of(self.steps, chunk)

    def _buffer(self, role: str, tag: int, wire: WireFormat) -> Tensor:
        buffer = self._buffers.get((role, tag))
        if buffer is None or buffer.numel() != wire.nbytes:
            buffer = self._buffers[role, tag] = wire.buffer()
        return buffer

    def _format(self, direction: str, shape: Sequence[int], dtype: torch.dtype, plan: Any) -> WireFormat:
        new = None if plan is None else len(plan.new)
        key = (direction, tuple(shape), dtype, new)
        if key not in self._formats:
            self._formats[key] = WireFormat(
                self.codecs[direction], tuple(shape), dtype, checksum=self.checksum, new=new
            )
        return self._formats[key]

    def _compare_settings(self) -> None:
        """Compare settings with the neighbours: gloo would abort on buffers of another size."""
        mine = {
            "codec": str(self.codecs[FORWARD]), "gradient codec": str(self.codecs[BACKWARD]),
            "versions": VERSIONS, "number of stages": self.num_stages,
            "model": getattr(self.submod, "plan", None), **self.agree,
        }  # fmt: skip
        tags = {}
        for other in (self.stage_index - 1, self.stage_index + 1):
            if 0 <= other < self.num_stages and not self._is_same_rank(other):
                tag = min(self.stage_index, other) * 2 * CHUNKS * PLACES + SETTINGS
                tags[other] = (self._resolve_peer_global_rank(other), tag)
        what = f"Stage {self.stage_index}, before the first step"
        text = json.dumps(mine, default=str)
        for other, theirs in exchange(dict.fromkeys(tags, text), self.links, tags, what).items():
            theirs = json.loads(theirs)
            differing = [k for k in {**mine, **theirs} if str(mine.get(k)) != str(theirs.get(k))]
            if differing:
                raise WireError(
                    f"{what}: stage {other} does not fit. "
                    + " ".join(f"{k}: {mine.get(k)!r} here, {theirs.get(k)!r} there." for k in differing)
                    + " Start all ranks with the same configuration and model."
                )

    # -- state -----------------------------------------------------------------------------------------------------
    def _plan(self, direction: str, chunk: int, shape: Sequence[int], state: CodecState | None) -> Any:
        """Which rows both sides remember, set in the state for the next call; made in the order of micro-batches."""
        if not self.codecs[direction].traits.per_sample:
            return None
        key = (state.site, chunk)
        if key not in self._plans:
            if self.has_backward and self._ids is None:
                raise ValueError(
                    f"Stage {self.stage_index}: {self.codecs[direction]} remembers samples and needs their ids: call "
                    "stage.sample_ids(ids, chunks) on every rank before each training step."
                )
            if self.has_backward:
                for number, ids in enumerate(self._ids):
                    self._plans[state.site, number] = state.plan(ids.tolist(), tuple(shape))
            else:
                self._plans[key] = state.plan(None, tuple(shape))
        state.current = self._plans[key]
        return state.current

    def _state(self, role: str, direction: str, chunk: int, place: int) -> CodecState | None:
        """Only codecs that remember samples have a state on the receiving side."""
        codec = self.codecs[direction]
        if codec.traits.per_sample:
            name = f"{direction}/{role}/all/{place}"
        elif role == "receive":
            return None
        else:
            name = f"{direction}/{role}/{chunk}/{place}"
        if name not in self._states:
            self._states[name] = codec.init_state(f"stage{self.stage_index}/{name}", self.seed)
        return self._states[name]

    def codec_state(self) -> dict[str, Any]:
        """The states of this stage's codecs by direction, micro-batch and output, and the number of steps."""
        found = {name: state.state_dict() for name, state in self._states.items() if state is not None}
        return {"steps": self.steps, "codecs": [str(self.codecs[d]) for d in DIRECTIONS], "states": found}

    def load_codec_state(self, values: dict[str, Any]) -> None:
        """Load what `codec_state` returned.  Raises ValueError for the state of another codec."""
        codecs = [str(self.codecs[d]) for d in DIRECTIONS]
        if values["codecs"] != codecs:
            raise ValueError(
                f"The checkpoint was written with the codecs {values['codecs']}, this stage has {codecs}: use those, "
                "or start without the state of the codecs."
            )
        self.steps = values["steps"]
        for name, value in values["states"].items():
            direction, role, chunk, place = name.split("/")
            state = self._state(role, direction, 0 if chunk == "all" else int(chunk), int(place))
            if state is not None:
                state.load_state_dict(value)
