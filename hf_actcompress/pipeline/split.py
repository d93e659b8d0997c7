"""A model cut into stages, each of which runs the model's own forward.

A stage keeps the modules of its layers and runs the model's whole forward: modules of earlier stages are replaced by
stand-ins, which return the received activation, and the forward ends after the stage's last layer.  So the model's own
code makes masks, positions and other side inputs in every stage, and nothing depends on the architecture.  Parameters
keep the names of the unsplit model.

A parameter belongs to the stages that compute with it (usage.py), also one that no layer holds.  Several stages have
one that is tied across them; its gradients are summed between them after each step (shared.py).
"""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.layers import Layer, find_layers, first_tensor
from .balance import balanced
from .shared import Shared
from .standins import Done, Exit, Fixed, Output, Received, StandIn
from .usage import used_parameters

# What a transformers model takes in place of tokens, so that later stages need none.
EMBEDDED = "inputs_embeds"


class StageModule(nn.Module):
    """Stage `index` of `count`.

    The first takes the model's own inputs, the others the activation before them; keyword arguments go to the model's
    forward.  The last returns the logits (or the model's only tensor), the others the activation after their last
    layer.
    `shared` is the record of parameters that several stages have, the same object for all stages of a split.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], index: int, bounds: Sequence[int],
        outputs: Mapping[str, Output], used: set[int], shared: Shared,
    ) -> None:  # fmt: skip
        super().__init__()
        self.index, self.count, self.shared = index, len(bounds) - 1, shared
        own = layers[bounds[index] : bounds[index + 1]]
        # What both sides of a link must have in common: the class, a hash of names and shapes, the cuts.
        shapes = zlib.crc32(str([(name, tuple(p.shape)) for name, p in model.named_parameters()]).encode())
        cuts = [bound - 1 for bound in bounds[1:-1]]
        self.plan = f"{type(model).__name__} {shapes:08x}, {len(layers)} layers cut after {cuts}"
        self.layers = tuple(layer.name for layer in own)
        received = self._received = Received()
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        mine = {path for layer in own for path in layer.parts}
        held = {id(p) for path in mine for p in model.get_submodule(path).parameters()}
        # Parameters are the model's own, not copies.
        memo: dict[int, Any] = {id(p): p for p in model.parameters()}
        for number, layer in enumerate(layers):
            earlier, later = number < bounds[index], number >= bounds[index + 1]
            for path in layer.parts if earlier or later else ():
                part, output = model.get_submodule(path), outputs.get(path, Output())
                parameters = dict(part.named_parameters())
                # Without parameters: one that returns a tuple makes positions for all blocks, and is run.
                if path in mine or not parameters and (later or output.length is not None):
                    continue
                expected = None if path == layer.module else layer.shape
                read = [name for name, p in parameters.items() if id(p) in used - held]
                # A later stage's modules are never reached; their weights may be read.
                later_one = nn.Identity() if later and not read else None
                memo[id(part)] = later_one or StandIn(part, received, output, expected, dtype, read)
        for path in mine:
            part = model.get_submodule(path)
            memo[id(part)] = part  # shared, not copied
        self.model = copy.deepcopy(model, memo)
        self.parts = tuple(f"{path}." for path in mine)
        self._keep(used | held)
        # A trained parameter of no layer may enter several: gradients of inputs and weights come in one pass.
        self.whole_backward = any(
            p.requires_grad and not name.startswith(self.parts) for name, p in self.model.named_parameters()
        )
        if index < self.count - 1:
            self.model.get_submodule(own[-1].module).register_forward_hook(Exit(received))
        names = inspect.signature(self.model.forward).parameters
        self._takes_embedded = EMBEDDED in names
        # Classifiers that look for the last token of each row find it by the number that pads.
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._pad = pad if index == self.count - 1 and "input_ids" in names else None

    def _keep(self, wanted: set[int]) -> None:
        """Other parameters become buffers that are neither trained nor saved: the forward may read them, and what it
        makes of them is dropped."""
        for module in list(self.model.modules()):
            for name, p in list(module._parameters.items()):
                if p is not None and id(p) not in wanted:
                    del module._parameters[name]
                    module.register_buffer(name, p.detach(), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        received = None
        if self.index:
            received, mask = args[0], kwargs.get("attention_mask")
            if self._pad is not None and mask is not None and mask.dim() == 2:
                other = 0 if self._pad else 1
                args, kwargs = (), {**kwargs, "input_ids": torch.where(mask.bool(), other, self._pad)}
            elif self._takes_embedded:
                args, kwargs = (), {**kwargs, EMBEDDED: received}
        try:
            with self._received.run(received):
                output = self.model(*args, **kwargs)
        except Done as done:
            return done.args[0]
        if isinstance(output, Mapping):
            return output["logits"]
        return first_tensor(output)

    def own_state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers that this stage has, by their names in the unsplit model.

        What several stages have (tied parameters, buffers of no layer) is in the first one's.
        """
        return {
            name: value for name, value in self.model.state_dict().items()
            if name.startswith(self.parts) or self.shared.owner(name) == self.index
        }  # fmt: skip


def split(
    model: nn.Module, cuts: Sequence[int] | None = None, stages: int | None = None, example_inputs: Any = None,
    balance: str = "layers",
) -> list[StageModule]:  # fmt: skip
    """The stages of `model`, which share its modules and parameters.

    cuts: numbers of layers after which the model is cut, ascending ((0, 4) makes three stages); or stages: how many.
    balance: with `stages`, what each stage is to have about as much of: "layers", "parameters", "flops" or "time" (of
        a forward pass, measured here).
    example_inputs: inputs of one forward pass, for models whose input cannot be guessed.

    In a single process `model` goes on working as a whole.  Where there are several it is trained in parts, and says
    so when it is called, until `load_state_dict` brings the parts together (`merge`).
    Raises ValueError for cuts that are not within the model, connections that skip a cut, encoder-decoders and models
    without layers.
    """
    guard(model, None)
    layers, outputs = _layers(model, example_inputs)
    if any(layer.stack for layer in layers):
        raise ValueError("An encoder-decoder cannot be split: its decoder needs the encoder's output in every block.")
    bounds = _bounds(model, layers, cuts, stages, example_inputs, balance)
    count = len(bounds) - 1
    found = used_parameters(model, layers, bounds, example_inputs)
    every = {id(p) for p in model.parameters()}
    held = [{id(p) for layer in layers[bounds[k] : bounds[k + 1]] for path in layer.parts
             for p in model.get_submodule(path).parameters()} for k in range(count)]  # fmt: skip
    loose = every - set().union(*held)  # of no layer
    # Without a pass, whatever belongs to no layer may be used by all; what nothing uses stays with the first stage.
    used = [set(loose) for _ in range(count)] if found is None else found
    used[0] |= loose - set().union(*used)
    shared = Shared()
    made = [StageModule(model, layers, k, bounds, outputs, used[k], shared) for k in range(count)]
    for path in {path for layer in layers for path in layer.parts}:
        if any(value is not None for value in outputs.get(path, Output()).plain):
            _follow(path, made)
    shared.find(model, [stage.model for stage in made], [stage.parts for stage in made])
    if count > 1:
        guard(model, count)
    return made


def _follow(path: str, stages: list[StageModule]) -> None:
    """Stand-ins of the module return the plain values that it returns."""
    there = [stage.model.get_submodule(path) for stage in stages]
    stand_ins = [module for module in there if isinstance(module, StandIn)]
    for stage, module in zip(stages, there, strict=True):
        if stand_ins and not isinstance(module, (StandIn, nn.Identity)):
            module.register_forward_hook(Fixed(stage._received, path, stand_ins, _alone))


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def _bounds(
    model: nn.Module, layers: list[Layer], cuts: Sequence[int] | None, stages: int | None, inputs: Any, balance: str
) -> list[int]:
    if (cuts is None) == (stages is None):
        raise ValueError(f"split: give either cuts or stages; got cuts={cuts!r} and stages={stages!r}.")
    count = len(layers)
    if cuts is None:
        if not isinstance(stages, int) or not 1 <= stages <= count:
            raise ValueError(f"split: stages={stages!r} is not a whole number from 1 to the {count} layers.")
        return balanced(model, layers, stages, balance, inputs)
    if balance != "layers":
        raise ValueError(f"split: balance={balance!r} chooses cuts; give stages= instead of cuts={list(cuts)}.")
    cuts = list(cuts)
    if any(not 0 <= c < count - 1 for c in cuts) or sorted(set(cuts)) != cuts:
        raise ValueError(
            f"split: cuts={cuts} must be ascending numbers of layers from 0 to {count - 2}; the model has: "
            f"{', '.join(f'{layer.index} {layer.name}' for layer in layers)}."
        )
    return [0, *(c + 1 for c in cuts), count]


class Guard:
    """A forward pre-hook of a model that is trained in parts by several processes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not _alone():
            raise RuntimeError(
                f"This {type(module).__name__} was split into {self.count} pipeline stages, and only those of this "
                "process are trained here. Run the stages; or join the parts with merge() of their own_state_dict() "
                "and model.load_state_dict(), and it runs as a whole."
            )


def guard(model: nn.Module, count: int | None) -> None:
    """Let `model` say that it was split; None takes that back."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, Guard):
            del model._forward_pre_hooks[key]
    if count is not None:
        model.register_forward_pre_hook(Guard(count))
        model.register_load_state_dict_post_hook(_joined)


def _joined(module: nn.Module, keys: Any) -> None:
    guard(module, None)


def _layers(model: nn.Module, example_inputs: Any) -> tuple[list[Layer], dict[str, Output]]:
    """The layers, and what every module returned in the traced forward."""
    outputs: dict[str, Output] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = Output.of(output)

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
