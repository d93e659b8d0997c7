"""A model cut into stages, each of which runs the model's own forward.

A stage keeps the modules of its layers and runs the model's whole forward: modules of earlier stages are replaced by
stand-ins, which return the received activation, and the forward ends after the stage's last layer.  So the model's own
code makes masks, positions and other side inputs in every stage, and nothing depends on the architecture.  Parameters
keep the names of the unsplit model.
"""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layers import Layer, find_layers, first_tensor

# What a transformers model takes in place of tokens, so that later stages need none.
EMBEDDED = "inputs_embeds"


class _Done(Exception):
    """Raised after a stage's last layer to end the model's forward; carries the output."""


class _Received:
    """The activation from the stage before."""

    value: Tensor | None = None


@dataclass(frozen=True)
class _Output:
    """What a module returned in the traced forward: the length of a tuple, and the shape of its first tensor."""

    length: int | None
    shape: tuple[int, ...] | None


class StandIn(nn.Module):
    """Replaces a module of an earlier stage: returns the received activation in the form of the module's output.

    Where the module's output has another shape than the layers' (patches before a class token is added), it returns
    zeros; the model's result of them is dropped, since the last stand-in returns the received activation.
    """

    def __init__(
        self, part: nn.Module, received: _Received, output: _Output, expected: tuple[int, ...] | None,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        plain = {k: v for k, v in vars(part).items() if isinstance(v, (str, int, float, type(None))) and k[0] != "_"}
        self._plain = {k: v for k, v in plain.items() if k != "training"}
        self._received, self._length, self._dtype = received, output.length, dtype
        same = output.shape is None or expected is None or output.shape[1:] == expected[1:]
        self._shape = None if same else output.shape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = self._received.value
        if self._shape is not None:
            value = value.new_zeros(value.shape[0], *self._shape[1:])
        return value if self._length is None else (value, *[None] * (self._length - 1))

    def __getattr__(self, name: str) -> Any:
        """Models read the dtype of a weight from their embeddings, and plain attributes from their blocks."""
        if name.startswith("_"):
            return super().__getattr__(name)
        if name in ("weight", "bias"):
            return torch.empty(0, dtype=self._dtype)
        return self._plain.get(name, self)


class StageModule(nn.Module):
    """Stage `index` of `count`.

    The first takes the model's own inputs, the others the activation before them; keyword arguments go to the model's
    forward.  The last returns the logits (or the model's only tensor), the others the activation after their last
    layer.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], index: int, bounds: Sequence[int],
        outputs: Mapping[str, _Output],
    ) -> None:  # fmt: skip
        super().__init__()
        self.index, self.count = index, len(bounds) - 1
        own = layers[bounds[index] : bounds[index + 1]]
        # What both sides of a link must have in common: the class, a hash of names and shapes, the cuts.
        shapes = zlib.crc32(str([(name, tuple(p.shape)) for name, p in model.named_parameters()]).encode())
        cuts = [bound - 1 for bound in bounds[1:-1]]
        self.plan = f"{type(model).__name__} {shapes:08x}, {len(layers)} layers cut after {cuts}"
        self.layers = tuple(layer.name for layer in own)
        received = self._received = _Received()
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        memo: dict[int, Any] = {}
        mine = {path for layer in own for path in layer.parts}
        self._last = None if index == self.count - 1 else own[-1].module
        for layer in layers[: bounds[index]]:
            for path in layer.parts:
                part, output = model.get_submodule(path), outputs.get(path, _Output(None, None))
                # A module without parameters that returns a tuple is run: it makes positions for all blocks.
                if path not in mine and (output.length is None or any(True for _ in part.parameters())):
                    expected = None if path == layer.module else layer.shape
                    memo[id(part)] = StandIn(part, received, output, expected, dtype)
        for layer in layers[bounds[index + 1] :]:
            for path in layer.parts:
                part = model.get_submodule(path)
                if path not in mine and any(True for _ in part.parameters()):
                    memo[id(part)] = nn.Identity()  # never reached
        for path in mine:
            part = model.get_submodule(path)
            memo[id(part)] = part  # shared, not copied
        self.model = copy.deepcopy(model, memo)
        if self._last is not None:
            self.model.get_submodule(self._last).register_forward_hook(_leave)
        names = inspect.signature(self.model.forward).parameters
        self._takes_embedded = EMBEDDED in names
        # Classifiers that look for the last token of each row find it by the number that pads.
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._pad = pad if index == self.count - 1 and "input_ids" in names else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.index:
            self._received.value = args[0]
            mask = kwargs.get("attention_mask")
            if self._pad is not None and mask is not None and mask.dim() == 2:
                other = 0 if self._pad else 1
                args, kwargs = (), {**kwargs, "input_ids": torch.where(mask.bool(), other, self._pad)}
            elif self._takes_embedded:
                args, kwargs = (), {**kwargs, EMBEDDED: args[0]}
        try:
            output = self.model(*args, **kwargs)
        except _Done as done:
            return done.args[0]
        finally:
            self._received.value = None
        if isinstance(output, Mapping):
            return output["logits"]
        return first_tensor(output)

    def own_state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the unsplit model; those of the model itself belong to stage 0."""
        found = {}
        for name, value in self.model.state_dict().items():
            top = "." not in name
            if not top or self.index == 0:
                found[name] = value
        return found


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    raise _Done(first_tensor(output))


def split(
    model: nn.Module, cuts: Sequence[int] | None = None, stages: int | None = None, example_inputs: Any = None
) -> list[StageModule]:
    """The stages of `model`, which share its modules.

    cuts: numbers of layers after which the model is cut, ascending ((0, 4) makes three stages); or stages: how many,
        with about as many layers each.
    example_inputs: inputs of one forward pass, for models whose input cannot be guessed.
    Raises ValueError for cuts that are not within the model, encoder-decoders and models without layers.
    """
    layers, outputs = _layers(model, example_inputs)
    if any(layer.stack for layer in layers):
        raise ValueError("An encoder-decoder cannot be split: its decoder needs the encoder's output in every block.")
    parts = tuple(f"{path}." for layer in layers for path in (*layer.parts, layer.module))
    shared = [name for name, _ in model.named_parameters() if "." in name and not name.startswith(parts)]
    if shared:
        raise ValueError(
            f"{type(model).__name__} cannot be split: {', '.join(shared[:3])} belong to no layer, so that every stage "
            "would train its own copy."
        )
    if (cuts is None) == (stages is None):
        raise ValueError(f"split: give either cuts or stages; got cuts={cuts!r} and stages={stages!r}.")
    count = len(layers)
    if cuts is None:
        if not isinstance(stages, int) or not 1 <= stages <= count:
            raise ValueError(f"split: stages={stages!r} is not a whole number from 1 to the {count} layers.")
        cuts = [round(count * k / stages) - 1 for k in range(1, stages)]
    cuts = list(cuts)
    if any(not 0 <= c < count - 1 for c in cuts) or sorted(set(cuts)) != cuts:
        raise ValueError(
            f"split: cuts={cuts} must be ascending numbers of layers from 0 to {count - 2}; the model has: "
            f"{', '.join(f'{layer.index} {layer.name}' for layer in layers)}."
        )
    bounds = [0, *(c + 1 for c in cuts), count]
    return [StageModule(model, layers, index, bounds, outputs) for index in range(len(bounds) - 1)]


def _layers(model: nn.Module, example_inputs: Any) -> tuple[list[Layer], dict[str, _Output]]:
    """The layers, and what every module returned in the traced forward."""
    outputs: dict[str, _Output] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            shape = None if tensor is None else tuple(tensor.shape)
            outputs[name] = _Output(len(output) if type(output) is tuple else None, shape)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        return find_layers(model, example_inputs), outputs
    finally:
        for handle in handles:
            handle.remove()


def merge(stages: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state dict of the unsplit model from those of its stages (`own_state_dict`)."""
    whole: dict[str, Tensor] = {}
    for state in stages:
        for name, value in state.items():
            whole.setdefault(name, value)
    return whole
