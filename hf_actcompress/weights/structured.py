"""Structured pruning: channels, attention heads and neurons are cut out, so that a model gets faster.

torch-pruning finds out which tensors hang together; this file says what counts as a channel, a head or a neuron, keeps
the attributes of attention right, and prunes gradually inside of a Trainer.  What is cut is written down by
`manifest.py`, whole layers by `depth.py`.  Knows no codec.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..observe.trainer import go_first, save_with_checkpoints
from .files import INSTALL
from .manifest import write_shapes

logger = logging.getLogger(__name__)

IMPORTANCES = ("l1", "l2", "taylor")
# How attention names its projections, and what it remembers of its heads.
PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("qkv",))
HEADS = ("num_attention_heads", "num_heads", "n_heads")
WIDTHS = ("all_head_size", "attn_dim")  # heads times their size


@dataclass(frozen=True)
class Pruned:
    """What one call has cut."""

    parameters_before: int
    parameters: int
    groups: int  # of tensors that hang together

    def __str__(self) -> str:
        share = 1 - self.parameters / self.parameters_before
        return f"{self.parameters_before:,} -> {self.parameters:,} parameters ({100 * share:.1f} % less)"


class StructuredPruner:
    """Cuts shares of a model's channels, heads and neurons, in `steps` equal parts.

        pruner = StructuredPruner(model, {"pixel_values": torch.zeros(1, 3, 64, 64)}, channels=0.2)
        pruner.step()

    Args:
        model: is changed in place: parameters become new, smaller ones.
        example_inputs: one batch as its forward takes it (a mapping, a tuple or a tensor); traced once.
        channels: share of the output channels of convolutions.  Streams with LayerNorm keep their width.
        heads: share of the heads of each attention, rounded up.
        neurons: share of the inner features of MLPs and of other linear layers that feed linear layers.
        importance: "l1" or "l2" norm of all weights of a unit (Li et al. 2017), or "taylor", |weight * gradient|
            (Molchanov et al. 2019), which needs gradients: call `step(batches)`, or backward yourself.
        steps: number of `step()` calls that reach the shares.
        everywhere: rank units of all layers together, so that layers of little use lose more.
        keep: modules, or their paths, that keep their outputs; the classifier does always.
        round_to: numbers of channels and neurons become multiples of this (8 or 16 suit vector units).

    Raises ValueError for shares outside [0, 1), an unknown importance, a path without a module, and where there is
    nothing to prune.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, *, channels: float = 0.0, heads: float = 0.0,
        neurons: float = 0.0, importance: str = "l2", steps: int = 1, everywhere: bool = False,
        keep: Sequence[str | nn.Module] = (), round_to: int | None = None,
    ) -> None:  # fmt: skip
        for name, share in (("channels", channels), ("heads", heads), ("neurons", neurons)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share!r} is no share of 0 or more and less than 1.")
        if importance not in IMPORTANCES:
            raise ValueError(f"importance={importance!r} is unknown; use one of {', '.join(IMPORTANCES)}.")
        if steps < 1:
            raise ValueError(f"steps={steps!r}: give 1 or more.")
        if not (channels or heads or neurons):
            raise ValueError("Nothing to prune: give channels=, heads= or neurons= a share above 0.")
        self.model, self.importance, self.steps, self.done = model, importance, steps, 0
        tp = _torch_pruning()
        self._attentions = dict(_attentions(model)) if heads else {}
        if heads and not self._attentions:
            raise ValueError(f"heads={heads}: no attention found in {type(model).__name__}; known are modules with "
                             f"{' or '.join(HEADS)} and projections {' or '.join('/'.join(p) for p in PROJECTIONS)}.")
        every = [module for _, projections in self._attentions.values() for module in projections]
        score = {
            "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
            "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "taylor": lambda: tp.importance.GroupTaylorImportance(),
        }[importance]()
        kept = [*_modules(model, keep), *_outputs(model)]
        with _tracing(model):
            graph = _graph(tp, model, example_inputs)
            shares = _shares(tp, graph, kept, channels, neurons)
            if not shares and not heads:
                raise ValueError(f"{type(model).__name__} has no units that channels={channels}, neurons={neurons} "
                                 "would prune.")  # fmt: skip
            if everywhere and shares:
                shares = {tuple(m for m in shares if shares[m] == s): s for s in set(shares.values())}
            # torch-pruning looks at heads only where a width is to shrink; prune_head_dims=False leaves it alone.
            shares |= {module: heads for module in every}
            self._pruner = tp.pruner.BasePruner(
                model, _inputs(example_inputs), score, global_pruning=everywhere, pruning_ratio=0.0,
                pruning_ratio_dict=shares, iterative_steps=steps, ignored_layers=kept, round_to=round_to,
                # torch-pruning would otherwise change its own default arguments for the next model.
                in_channel_groups={}, out_channel_groups={},
                num_heads={module: number for number, parts in self._attentions.values() for module in parts},
                prune_num_heads=bool(heads), prune_head_dims=not heads, head_pruning_ratio=heads,
                head_pruning_ratio_dict={module: heads for module in every},
                forward_fn=_forward, output_transform=_tensors,
            )  # fmt: skip

    def step(self, batches: Iterable[Mapping[str, Any]] | None = None) -> Pruned:
        """One of `steps` parts.  `batches`, with labels, are what "taylor" takes gradients from; without them the
        gradients that the parameters hold are used."""
        if self.done == self.steps:
            raise ValueError(f"All {self.steps} steps of this pruner are done; make a new one to prune further.")
        if batches is not None:
            accumulate_gradients(self.model, batches)
        elif self.importance == "taylor" and all(p.grad is None for p in self.model.parameters()):
            raise ValueError("importance='taylor' needs gradients: pass step(batches) or call loss.backward() before.")
        before = count(self.model)
        self.done += 1
        groups = 0
        for group in self._pruner.step(interactive=True):
            group.prune()
            groups += 1
        for path, (_, modules) in self._attentions.items():
            _patch(self.model.get_submodule(path), self._pruner.num_heads[modules[0]])
        return Pruned(before, count(self.model), groups)


def prune(model: nn.Module, example_inputs: Any, *, batches: Iterable[Mapping[str, Any]] | None = None,
          **options: Any) -> Pruned:  # fmt: skip
    """One-shot: `StructuredPruner(model, example_inputs, **options).step(batches)`."""
    return StructuredPruner(model, example_inputs, **{**options, "steps": 1}).step(batches)


class PruningCallback(TrainerCallback):
    """Prunes step by step in training: `pruner.steps` times, every `every` optimizer steps, from step `start` on.

    Gradients of the step serve "taylor".  Optimizer state of tensors that were cut starts afresh.  Each checkpoint
    gets the manifest of its shapes: to resume one, `apply_shapes(model, read_shapes(checkpoint))` first and give
    a pruner of the steps that are left.  One process: DistributedDataParallel has arranged its buffers for the old
    shapes.
    """

    def __init__(self, pruner: StructuredPruner, every: int = 100, start: int = 0) -> None:
        if every < 1 or start < 0:
            raise ValueError(f"every={every!r}, start={start!r}: every is 1 or more, start 0 or more.")
        self.pruner, self.every, self.start = pruner, every, start
        self.history: list[dict[str, Any]] = []
        self._trainer: Any = None
        self._stop_saving: Callable[[], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            raise ValueError(f"Gradual pruning runs in one process, not in {args.world_size}; prune before training "
                             "with prune(model, ...), or train the pruned model on several.")  # fmt: skip
        self._end_saving()  # a run that raised never reached on_train_end
        self._trainer = go_first(self)
        if self._trainer is not None:
            self._stop_saving = save_with_checkpoints(self._trainer, self._save)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        since = state.global_step - self.start
        if self.pruner.done < self.pruner.steps and since >= 0 and since % self.every == 0:
            old = dict(self.pruner.model.named_parameters())
            outcome = self.pruner.step()
            replace_in_optimizer(kwargs["optimizer"], old, dict(self.pruner.model.named_parameters()))
            self.history.append({"step": state.global_step, "parameters": outcome.parameters})
            logger.info("step %d, part %d of %d: %s", state.global_step, self.pruner.done, self.pruner.steps, outcome)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer is None:  # otherwise the manifest is in the checkpoint already
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.is_world_process_zero)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_saving()

    def _end_saving(self) -> None:
        if self._stop_saving is not None:
            self._stop_saving()
            self._stop_saving = None

    def _save(self, folder: Path, first_process: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_shapes(self.pruner.model, folder)


def replace_in_optimizer(optimizer: Any, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Puts parameters that pruning has replaced into the optimizer; their state is dropped."""
    swap = {id(old[name]): new[name] for name in new if new[name] is not old[name]}
    for group in optimizer.param_groups:
        group["params"] = [swap.get(id(p), p) for p in group["params"]]
    for p in [p for p in optimizer.state if id(p) in swap]:
        del optimizer.state[p]


def accumulate_gradients(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Mean gradient of the model's own loss over `batches` (mappings with labels), left in `.grad`."""
    training = model.training
    model.eval()  # BatchNorm's statistics are not to move
    model.zero_grad()
    number = 0
    device = next(model.parameters()).device
    for number, batch in enumerate(batches, 1):  # noqa: B007
        output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        loss = output["loss"] if isinstance(output, Mapping) else output[0]
        if loss is None:
            raise ValueError(f"The batch has {sorted(batch)} and gave no loss; 'taylor' needs labels.")
        loss.backward()
    if not number:
        raise ValueError("batches is empty; 'taylor' needs one batch or more.")
    model.train(training)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# What is pruned


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ValueError(f"Structured pruning needs torch-pruning: {INSTALL}.") from None
    return torch_pruning


def _attentions(model: nn.Module) -> Iterator[tuple[str, tuple[int, list[nn.Module]]]]:
    """(path, (heads, its projections)) of every attention."""
    for path, module in model.named_modules():
        heads = next((getattr(module, name) for name in HEADS if isinstance(getattr(module, name, None), int)), None)
        for names in PROJECTIONS:
            parts = [getattr(module, name, None) for name in names]
            if heads and all(isinstance(part, nn.Linear) for part in parts):
                if len({part.out_features for part in parts}) > 1:
                    logger.warning("%s shares keys between heads and keeps its heads", path)
                    continue
                yield path, (heads, parts)


def _patch(attention: nn.Module, heads: int) -> None:
    before = next(getattr(attention, name) for name in HEADS if hasattr(attention, name))
    if heads == before:
        return
    for name in HEADS:
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, heads)
    for name in WIDTHS:
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, getattr(attention, name) // before * heads)


def _shares(tp: Any, graph: Any, kept: list[nn.Module], channels: float, neurons: float) -> dict[nn.Module, float]:
    """The share of each group's first module: `channels` where a convolution puts the units out, `neurons` where only
    linear layers do; nothing for streams (LayerNorm, embeddings) and inside of attention."""
    ignored = [inner for module in kept for inner in module.modules()]
    projections = {id(p) for _, (_, parts) in _attentions(graph.model) for p in parts}
    shares: dict[nn.Module, float] = {}
    for group in graph.get_all_groups(ignored_layers=ignored):
        made = [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        if any(isinstance(m, (nn.LayerNorm, nn.Embedding, nn.Parameter)) or "RMSNorm" in type(m).__name__
               or id(m) in projections for m in made):  # fmt: skip
            continue
        convolution = any(isinstance(m, nn.modules.conv._ConvNd) for m in made)
        share = channels if convolution else neurons
        if share:
            shares[group[0].dep.target.module] = share
    return shares


def _outputs(model: nn.Module) -> list[nn.Module]:
    """The classifier, whose outputs are classes: the last layer, and what a transformers model calls so."""
    named = [model.get_output_embeddings()] if hasattr(model, "get_output_embeddings") else []
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    return [m for m in (*named, *layers[-1:]) if m is not None]


def _modules(model: nn.Module, keep: Sequence[str | nn.Module]) -> list[nn.Module]:
    known = dict(model.named_modules())
    unknown = [name for name in keep if isinstance(name, str) and name not in known]
    if unknown:
        raise ValueError(f"keep names {unknown}, which {type(model).__name__} does not have.")
    return [known[name] if isinstance(name, str) else name for name in keep]


# Tracing


@contextlib.contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    """Eval mode, and gradients for all: torch-pruning reads the autograd graph."""
    training, frozen = model.training, [p for p in model.parameters() if not p.requires_grad]
    model.eval()
    for p in frozen:
        p.requires_grad_(True)
    try:
        with warnings.catch_warnings():
            # Tokens and scales without a module: the last dimension, torch-pruning's guess, is the right one.
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            yield
    finally:
        model.train(training)
        for p in frozen:
            p.requires_grad_(False)


def _graph(tp: Any, model: nn.Module, example_inputs: Any) -> Any:
    return tp.DependencyGraph().build_dependency(
        model, _inputs(example_inputs), forward_fn=_forward, output_transform=_tensors
    )


def _inputs(example: Any) -> Any:
    return example if isinstance(example, (Mapping, Tensor)) else tuple(example)


def _forward(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(example) if isinstance(example, Tensor) else model(*example)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]
