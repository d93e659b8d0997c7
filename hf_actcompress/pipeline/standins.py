"""What replaces the modules of other stages, so that a stage can run the model's whole forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layers import first_tensor


class Done(Exception):
    """Ends the model's forward after a stage's last layer; carries the output.  StageModule catches it."""


class Received:
    """The activation from the stage before, while a stage runs."""

    value: Tensor | None = None
    running = False

    @contextlib.contextmanager
    def run(self, value: Tensor | None) -> Iterator[None]:
        self.value, self.running = value, True
        try:
            yield
        finally:
            self.value, self.running = None, False


@dataclass(frozen=True)
class Output:
    """What a module returned in the traced forward: the length of a tuple, the shape of its first tensor, and what
    the tuple holds besides tensors (height and width of the patches)."""

    length: int | None = None
    shape: tuple[int, ...] | None = None
    plain: tuple[Any, ...] = ()

    @classmethod
    def of(cls, output: Any) -> Output:
        tensor = first_tensor(output)
        shape = None if tensor is None else tuple(tensor.shape)
        if type(output) is not tuple:
            return cls(None, shape)
        return cls(len(output), shape, tuple(value if _is_plain(value) else None for value in output))


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or isinstance(value, tuple) and all(map(_is_plain, value))


# Forward hooks on modules that are the user's own: they act only while their stage runs, so that the model as a whole,
# and other cuts of it, run as ever.
class Exit:
    """On a stage's last layer: ends the forward there."""

    def __init__(self, received: Received) -> None:
        self._received = received

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._received.running:
            raise Done(first_tensor(output))


class Fixed:
    """On a module whose stand-ins in later stages return its plain values, as they were in the traced forward.

    Stages of one process get those of each pass; where there are several processes other values are an error.
    """

    def __init__(self, received: Received, path: str, stand_ins: list[StandIn], alone: Callable[[], bool]) -> None:
        self._received, self._path, self._stand_ins, self._alone = received, path, stand_ins, alone

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        plain = Output.of(output).plain
        for one in self._stand_ins if self._received.running else ():
            if plain != one.plain and not self._alone():
                raise ValueError(
                    f"{self._path} returns {plain}, and {one.plain} when the model was split, which later stages "
                    "rely on. Pass example_inputs of the size of a training batch to split."
                )
            one.plain = plain


class StandIn(nn.Module):
    """Replaces a module of an earlier stage: returns the received activation in the form of the module's output.

    Where the module's output has another shape than the layers' (patches before a class token is added), it returns
    zeros; the model's result of them is dropped, since the last stand-in returns the received activation.
    Parameters that this stage reads from the module (the head of a language model may use the embedding's weight)
    are kept, under their own names.
    """

    def __init__(
        self, part: nn.Module, received: Received, output: Output, expected: tuple[int, ...] | None,
        dtype: torch.dtype, read: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        plain = {k: v for k, v in vars(part).items() if isinstance(v, (str, int, float, type(None))) and k[0] != "_"}
        self._plain = {k: v for k, v in plain.items() if k != "training"}
        self._received, self._dtype, self._length, self.plain = received, dtype, output.length, output.plain
        same = output.shape is None or expected is None or output.shape[1:] == expected[1:]
        self._shape = None if same else output.shape
        for child in dict.fromkeys(name.partition(".")[0] for name in read):
            inner = [name.partition(".")[2] for name in read if name.partition(".")[0] == child]
            if "" in inner:
                self._parameters[child] = part.get_parameter(child)
            else:
                self._modules[child] = StandIn(part.get_submodule(child), received, output, expected, dtype, inner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = self._received.value
        if self._shape is not None:
            value = value.new_zeros(value.shape[0], *self._shape[1:])
        return value if self._length is None else (value, *self.plain[1:])

    def __getattr__(self, name: str) -> Any:
        """Models read the dtype of a weight from their embeddings, and plain attributes from their blocks."""
        if name.startswith("_") or name in self._parameters or name in self._modules:
            return super().__getattr__(name)
        if name in ("weight", "bias"):
            return torch.empty(0, dtype=self._dtype)
        return self._plain.get(name, self)
