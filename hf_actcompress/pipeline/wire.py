"""A payload as bytes on a link: one buffer of a size that both sides know, with a header that is checked.

    sender:    payload ──write──▶ uint8 buffer ═══ link ═══▶ uint8 buffer ──read──▶ payload :receiver

The codec and the shape and dtype of the tensor fix the size, so that a receiver can post its buffer before anything
was computed.  Tensors lie in the buffer with the widest elements first, which keeps each aligned; reading makes
views, no copies.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codecs import Codec, CodecState, Payload, raw_nbytes
from .frames import HEADER, VERSION, WireError, seal, unseal

NOT_FINITE = 1  # flag: the sender's tensor held NaN or Inf, and it was asked to refuse that
NOT_FINITE_TEXT = (
    "the tensor holds NaN, Inf or values that the codec cannot represent. Lower the learning rate, or look for the "
    "cause there."
)


@dataclass(frozen=True)
class _Field:
    """Where a tensor of the payload lies: `path` through the parts of a chain, its name last."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        return raw_nbytes(self.shape, self.dtype)


class WireFormat:
    """The layout of the messages of one codec, for tensors of one shape and dtype.

    codec: its payloads must have the same tensors for every input of that shape, as all codecs of this package do.
    checksum: whether messages are protected by a crc32 (about a millisecond a MB); alike on both sides.
    new: for codecs that remember samples (delta), how many rows travel in full; all of them if not given.

    `nbytes` is the size of the buffer.  Raises ValueError for a codec that cannot take such a tensor.
    """

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        checksum: bool = True,
        new: int | None = None,
    ) -> None:
        self.codec, self.shape, self.dtype, self.checksum = codec, tuple(shape), dtype, checksum
        # The layout follows from the input's shape alone, so any tensor shows it.
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(self.shape, generator=generator).to(dtype)
        state = codec.init_state("wire")
        if codec.traits.per_sample:
            state.current = codec.example_plan(self.shape, new, state)  # type: ignore[attr-defined, union-attr]
        self._template = codec.encode(example, state)
        found = sorted(_tensors(self._template), key=lambda item: -item[1].element_size())
        self._fields, at = [], HEADER
        for path, tensor in found:
            self._fields.append(_Field(path, tuple(tensor.shape), tensor.dtype, at))
            at += self._fields[-1].nbytes
        self.nbytes = at
        text = f"{VERSION} {codec} {self.shape} {dtype} {[(f.path, f.shape, str(f.dtype)) for f in self._fields]}"
        self.fingerprint = zlib.crc32(text.encode())

    def buffer(self, device: torch.device | str = "cpu") -> Tensor:
        """uint8 [nbytes]"""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def encode(
        self, x: Tensor, state: CodecState | None, buffer: Tensor, number: int = 0, refuse: bool = False
    ) -> bool:
        """Encode `x` into `buffer` as message `number`; returns False for a tensor that is refused.

        NaN and Inf are sent, and decoded as NaN (by `identity` as they are).  With `refuse` such a tensor is marked in
        the header, so that the receiver stops as well; that waits for the device.
        Raises ValueError for another shape or dtype.
        """
        if tuple(x.shape) != self.shape or x.dtype != self.dtype:
            raise ValueError(
                f"The link was set up for tensors of shape {self.shape} and {self.dtype}; got {tuple(x.shape)} and "
                f"{x.dtype}. Pipelines have fixed shapes: pad the last batch, or drop it."
            )
        found = torch.zeros(1, dtype=torch.int64, device=x.device) if refuse else None
        payload = self.codec.encode(x, state, nonfinite=found)
        finite = found is None or not int(found)
        self.write(payload, buffer, number, finite)
        return finite

    def write(self, payload: Payload, buffer: Tensor, number: int = 0, finite: bool = True) -> None:
        """Write `payload` into `buffer`.  Raises ValueError for the payload of another codec or shape."""
        tensors = dict(_tensors(payload))
        for field in self._fields:
            tensor = tensors[field.path]
            if tuple(tensor.shape) != field.shape or tensor.dtype != field.dtype:
                raise ValueError(
                    f"{self.codec}: '{'/'.join(field.path)}' is {tuple(tensor.shape)} {tensor.dtype}, expected "
                    f"{field.shape} {field.dtype}: the payload belongs to another codec or shape."
                )
            self._view(buffer, field).copy_(tensor)
        seal(buffer, number, self.fingerprint, 0 if finite else NOT_FINITE, self.checksum)

    def read(self, buffer: Tensor, number: int = 0, where: str = "link") -> Payload:
        """The payload in `buffer`, as views of it.

        Raises WireError, which begins with `where`, if it is not message `number` of this codec, if it was damaged,
        or if the sender refused its tensor.
        """
        what = f"{self.codec} for {self.shape} {self.dtype}"
        if unseal(buffer, number, self.fingerprint, where, self.checksum, what) & NOT_FINITE:
            raise WireError(f"{where}: on the sender's side {NOT_FINITE_TEXT}")
        tensors = {field.path: self._view(buffer, field) for field in self._fields}
        return _filled(self._template, tensors, ())

    def decode(
        self, buffer: Tensor, number: int = 0, where: str = "link", state: CodecState | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:  # fmt: skip
        """The tensor that was sent, decoded; `state` is the receiver's own, for codecs that have one.

        device: where it is decoded; None for that of the buffer.  The bytes go there coded.
        """
        payload = self.read(buffer, number, where)
        if device is not None and torch.device(device) != buffer.device:
            moved = buffer.to(device, non_blocking=True)
            payload = _filled(self._template, {field.path: self._view(moved, field) for field in self._fields}, ())
        try:
            return self.codec.decode(payload, state)
        except ValueError as error:
            raise WireError(f"{where}: {error}") from error

    def _view(self, buffer: Tensor, field: _Field) -> Tensor:
        return buffer[field.start : field.start + field.nbytes].view(field.dtype).view(field.shape)


def _tensors(payload: Payload, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    found = [((*path, name), tensor) for name, tensor in payload.tensors.items()]
    return found + [item for name, part in payload.parts.items() for item in _tensors(part, (*path, name))]


def _filled(template: Payload, tensors: dict[tuple[str, ...], Tensor], path: tuple[str, ...]) -> Payload:
    own = {name: tensors[(*path, name)] for name in template.tensors}
    parts = {name: _filled(part, tensors, (*path, name)) for name, part in template.parts.items()}
    return replace(template, tensors=own, parts=parts)
