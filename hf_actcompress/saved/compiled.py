"""Saved tensors inside torch.compile: hooks that AOTAutograd inlines, and what they do with its two graphs.

AOTAutograd calls the hooks once for each intermediate tensor that a compiled forward graph hands to its backward
graph.  At the first of them both graphs are there, and the whole plan is made: for each saved tensor

    codes    one uint8 tensor is saved; it is decoded where the backward graph first needs the value
    again    nothing is saved: cheap operations and fused attention run again on what else is saved
    bits     bool tensors and masks of two constants: one bit an element
    exact    what no rule covers (compiled_rules.py), small tensors, statistics of rows, parameters and inputs

In eager mode the same two GraphModules call the functions that they were made with.
"""

from __future__ import annotations

import math
import operator
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codecs.base import Codec
from ..codecs.block import Block
from ..codecs.identity import Identity
from .compiled_ops import bits_saved, decode_saved, encode_saved, flags_saved, row_nbytes

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node

SMALL = 16_384  # elements: below, codes save little and cost accuracy
LONGEST = 48  # operations that run again for one saved tensor
SHORT = 32  # elements of a row, below which neighbouring dimensions join it
GROUP = 128


def divisor(row: int, target: int) -> int:
    """The divisor of `row` nearest to `target`: a multiple of 16, else of 8, at most 256; 0 if there is none."""
    for unit in (16, 8):
        found = [size for size in range(unit, min(row, 256) + 1, unit) if row % size == 0]
        if found:
            return min(found, key=lambda size: abs(size - target))
    return 0


@dataclass
class Layout:
    """How a tensor lies in memory: `order` of its dimensions there, and the last `tail` of them that are a row."""

    order: list[int]
    tail: list[int]
    group: int

    def dense(self, x: Tensor) -> Tensor:
        return x.permute(self.order)

    @property
    def back(self) -> list[int]:
        return sorted(range(len(self.order)), key=self.order.__getitem__)


def layout_of(x: Tensor, codec: Codec | None) -> Layout | None:
    """None where elements share memory, or where the sizes that groups depend on are symbolic."""
    from .compiled_rules import hint

    order = sorted(range(x.dim()), key=lambda d: (-hint(x.stride(d)), d))
    expected = 1
    for d in reversed(order):
        if hint(x.shape[d]) != 1 and hint(x.stride(d)) != expected:
            return None
        expected *= hint(x.shape[d])
    sizes = [x.shape[d] for d in order]
    if codec is None:  # bits
        return Layout(order, sizes[-1:], 0) if sizes and isinstance(sizes[-1], int) and sizes[-1] >= 8 else None
    if not row_form(codec):
        return Layout(order, sizes, 0) if all(isinstance(size, int) for size in sizes) else None
    for tail in range(1, len(sizes) + 1):
        if not isinstance(sizes[-tail], int):
            return None
        row = math.prod(sizes[-tail:])
        group = divisor(row, codec.group or GROUP)
        if group and (row >= SHORT or tail == len(sizes)):
            return Layout(order, sizes[-tail:], group)
    return None


def row_form(codec: Codec) -> bool:
    return isinstance(codec, Block) and codec.splits is None and codec.dim is None and codec.equalize != "feature"


@dataclass
class Row:
    """One saved tensor of a compiled graph.  kept: codes, again, bits or exact; why: what kept it exact."""

    name: str
    kept: str
    raw: int
    held: int
    why: str = ""


class Plan:
    """What happens to each saved tensor of one pair of graphs."""

    def __init__(self, forward: "Graph", backward: "Graph", codec: Codec) -> None:
        self.forward, self.backward, self.codec = forward, backward, codec
        self.inputs = {n.name: n for n in backward.nodes if n.op == "placeholder"}
        outputs = forward.output_node().args[0]
        names = {n.name: n for n in outputs if hasattr(n, "name")}
        self.nodes = {name: names[name] for name in self.inputs if name in names}  # forward nodes of what is saved
        elsewhere = self._held_elsewhere(outputs)
        self.order = [  # what the hooks will be called with: intermediate tensors, in the order of the forward graph
            n
            for n in forward.nodes
            if self.nodes.get(n.name) is n and n.op != "placeholder" and storage_of(n) not in elsewhere
        ]
        self.kept: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self.layouts: dict[str, Layout] = {}
        self.fetched: dict[str, Node] = {}  # a small input of the forward graph that is saved in place of a tensor
        self.decoded: set[str] = set()
        self.leaves: dict[str, str] = {}  # of a tensor that is made again: the first saved one that it is made from
        if isinstance(codec, Identity):
            self.kept = {node.name: "exact" for node in self.order}
            self.why = dict.fromkeys(self.kept, "identity")
        else:
            self._decide()
            self._make_again()
        self.shares = self._shares()

    def _held_elsewhere(self, outputs: tuple) -> set:
        """The storages of inputs and of what the model returns: AOTAutograd keeps the hooks from them."""
        tangents = [name for name in self.inputs if name.startswith("tangents")]
        returned = outputs[: len(outputs) - (len(self.inputs) - len(tangents))]
        gradients = self.backward.output_node().args[0]
        inputs = [node for node in self.forward.nodes if node.op == "placeholder"]
        return {storage_of(node) for node in (*inputs, *returned, *gradients)} - {None}

    # -- decisions ----------------------------------------------------------------------------------------------
    def _decide(self) -> None:
        from . import compiled_rules as rules

        attentions = {
            found
            for node in self.order
            if (found := rules.attention_of(node)) and not rules.argument(found, "dropout_p", 0.0)
        }
        while True:
            self.kept, self.why, self.fetched, self.leaves = {}, {}, {}, {}
            uses = rules.Uses(self.backward, attentions, self.nodes)
            for node in self.order:
                self._decide_one(node, uses, attentions)
            failed = {
                found
                for node in self.order
                if (found := rules.attention_of(node)) in attentions and self.kept[node.name] != "again"
            }
            if not failed:
                return
            attentions -= failed

    def _decide_one(self, node: "Node", uses: Any, attentions: set) -> None:
        from . import compiled_rules as rules

        name, value = node.name, rules.value_of(node)
        kept, why = "exact", ""
        if not isinstance(value, Tensor):
            return
        if value.dtype == torch.bool or self._two_values(node):
            self.layouts[name] = layout = layout_of(value, None)
            kept, why = ("bits", "") if layout else ("exact", "layout")
        elif not value.is_floating_point():
            why = str(value.dtype).removeprefix("torch.")
        elif rules.attention_of(node) in attentions:
            kept, why = ("again", "") if self._again(node, attentions) else ("exact", "attention")
        elif rules.numel(node) < SMALL:
            why = "small"
        elif hint_last(value) == 1:
            why = "statistic"
        elif why := uses.objection(self.inputs[name]):
            pass
        elif self._again(node, attentions):
            kept = "again"
        else:
            self.layouts[name] = layout = layout_of(value, self.codec)
            kept, why = ("codes", "") if layout else ("exact", "layout")
        self.kept[name], self.why[name] = kept, why

    def _two_values(self, node: "Node") -> tuple[float, float] | None:
        """The constants of `where(condition, a, b)`."""
        from .compiled_rules import operator_of

        if operator_of(node) != "aten::where":
            return None
        found = []
        for entry in node.args[1:]:
            constant = operator_of(entry) in ("aten::scalar_tensor", "aten::full") and entry.meta["val"].dim() == 0
            if not constant:
                return None
            found.append(entry.args[-1])
        return tuple(found)

    def _again(self, node: "Node", attentions: set) -> bool:
        """Whether cheap operations make a saved tensor from others that are kept, and at most one small input."""
        from . import compiled_rules as rules

        waiting, seen, leaves, missing = list(node.all_input_nodes), set(), [], []
        while waiting:
            entry = waiting.pop()
            if entry in seen:
                continue
            seen.add(entry)
            if entry.name in self.inputs and self.kept.get(entry.name) != "again":
                leaves.append(entry.name)
            elif entry.op == "placeholder":
                if not isinstance(rules.value_of(entry), Tensor) or rules.numel(entry) >= SMALL:
                    return False
                missing.append(entry)
            elif rules.cheap(entry) or entry in attentions:
                waiting += entry.all_input_nodes
            elif entry.target is operator.getitem and entry.args[0] in attentions:
                waiting.append(entry.args[0])
            else:
                return False
        cheap = rules.cheap(node) or rules.attention_of(node) in attentions
        if not cheap or len(seen) > LONGEST or len(missing) > 1 or not any(n in self.kept for n in leaves):
            return False
        if missing:
            self.fetched[node.name] = missing[0]
        self.leaves[node.name] = next(n for n in leaves if n in self.kept)
        return True

    # -- the backward graph ---------------------------------------------------------------------------------------
    def _make_again(self) -> None:
        """Where a value is needed first: so no more is alive at once than without codes."""
        made: dict[str, Node] = {}
        changed = {self.inputs[n]: n for n, kept in self.kept.items() if kept == "again"}
        for node in list(self.backward.nodes):
            for entry in list(node.all_input_nodes):
                if entry in changed:
                    with self.backward.inserting_before(node):
                        node.replace_input_with(entry, self._make(changed[entry], made))

    def decode(self, name: str) -> None:
        """Before the hooks are inlined for this tensor: decode where it is needed first in backward."""
        if self.kept.get(name) not in ("codes", "bits") or name in self.decoded:
            return
        self.decoded.add(name)  # the hooks are called several times
        placeholder = self.inputs[name]
        users = set(placeholder.users)
        if not users:
            return
        first = next(node for node in self.backward.nodes if node in users)
        with self.backward.inserting_before(first):
            made = self._decoded(self.nodes[name], self.layouts[name])
        for user in users:
            user.replace_input_with(placeholder, made)

    def _make(self, name: str, made: dict[str, "Node"]) -> "Node":
        """The node of the backward graph that has the value of a node of the forward graph."""
        if name not in made:
            again = self.kept.get(name) == "again"
            own = self.inputs[name]
            made[name] = self._copy(self.nodes[name], own, self.fetched.get(name), made) if again else own
        return made[name]

    def _copy(self, node: "Node", own: "Node", fetched: "Node | None", made: dict[str, "Node"]) -> "Node":
        def value(entry: "Node") -> "Node":
            if entry is fetched:
                return own
            if entry.name in self.inputs:
                return self._make(entry.name, made)
            if entry.name not in made:
                made[entry.name] = self._copy(entry, own, fetched, made)
            return made[entry.name]

        for entry in node.all_input_nodes:  # before the node itself
            value(entry)
        return self.backward.node_copy(node, value)

    def _decoded(self, node: "Node", layout: Layout) -> "Node":
        x, placeholder = node.meta["val"], self.inputs[node.name]
        payload = self.encoded(node.name, x)
        if self.kept[node.name] == "bits":
            new = self._call(flags_saved, payload, (placeholder, layout.tail[0]))
        else:
            entries = (str(self.codec), layout.group, layout.tail, x.dtype)
            new = self._call(decode_saved, payload, (placeholder, *entries))
        if layout.back != list(range(x.dim())):
            new = self._call(torch.ops.aten.permute.default, new.meta["val"], (new, layout.back))
        if values := self._two_values(node):
            where = torch.ops.aten.where.self
            low, high = (self._constant(value, x) for value in values)
            new = self._call(where, new.meta["val"], (new, low, high))
        return new

    def _constant(self, value: float, like: Tensor) -> "Node":
        kwargs = {"dtype": like.dtype, "device": like.device}
        new = self.backward.call_function(torch.ops.aten.full.default, ([], value), kwargs)
        with like.fake_mode:
            new.meta["val"] = torch.full([], value, **kwargs)
        return new

    def _call(self, target: Any, first: Tensor, args: tuple) -> "Node":
        """A new node, with the shape of its result; `first` is the value of the first argument."""
        new = self.backward.call_function(target, args)
        rest = [entry.meta["val"] if hasattr(entry, "meta") else entry for entry in args[1:]]
        with first.fake_mode:
            new.meta["val"] = target(first, *rest)
        return new

    # -- what is saved --------------------------------------------------------------------------------------------
    def encoded(self, name: str, x: Tensor) -> Tensor:
        """What is saved of `x`: traced into the forward graph."""
        kept = self.kept.get(name, "exact")
        if kept == "exact":
            return x
        if kept == "again":
            primal = self.fetched.get(name)
            if primal is None:
                return x.new_empty(0)
            like = primal.meta["val"]
            return x.new_empty(like.shape, dtype=like.dtype)  # `fetch` makes it a copy of the input
        layout = self.layouts[name]
        if kept == "bits":
            values = self._two_values(self.nodes[name])
            return bits_saved(layout.dense(x if values is None else x == values[0]), str(self.codec))
        again, exact = self.shares.get(name, (0.0, 0.0)) if hasattr(self, "shares") else (0.0, 0.0)
        return encode_saved(layout.dense(x), str(self.codec), layout.group, len(layout.tail), again, exact)

    def fetch(self, name: str) -> None:
        """After `encoded` was inlined: the empty tensor in the forward graph becomes a copy of a small input."""
        if name in self.fetched:
            new = self.forward.output_node().prev
            new.target, new.args, new.kwargs = torch.ops.aten.clone.default, (self.fetched[name],), {}

    # -- the report -----------------------------------------------------------------------------------------------
    def rows(self) -> list[Row]:
        from .compiled_rules import nbytes

        rows, seen = [], set()
        for node in self.order:
            if (kept := self.kept.get(node.name)) is None:
                continue
            raw = 0 if storage_of(node) in seen else nbytes(node)  # views of one tensor are held once
            seen.add(storage_of(node))
            rows.append(Row(operation_of(node), kept, raw, self._held(node, raw), self.why[node.name]))
        return rows

    def _held(self, node: "Node", raw: int) -> int:
        from .compiled_rules import nbytes, numel

        name, kept = node.name, self.kept[node.name]
        if kept == "exact":
            return raw
        if kept == "again":
            return nbytes(self.fetched[name]) if name in self.fetched else 0
        if kept == "bits":
            row = self.layouts[name].tail[0]
            return numel(node) // row * -(-row // 8)
        layout = self.layouts[name]
        if not layout.group:
            return self.codec.payload_nbytes(tuple(layout.tail), node.meta["val"].dtype)
        row = math.prod(layout.tail)
        return numel(node) // row * row_nbytes(self.codec, layout.group, row)

    def _shares(self) -> dict[str, tuple[float, float]]:
        """Bytes made again, and kept exactly, over those of the coded tensor that they are counted with."""
        from .compiled_rules import nbytes

        coded = [node.name for node in self.order if self.kept.get(node.name) == "codes"]
        again, exact = dict.fromkeys(coded, 0), dict.fromkeys(coded, 0)
        for node in self.order if coded else ():
            kept = self.kept.get(node.name)
            if kept == "again":
                again[self.leaves[node.name] if self.leaves[node.name] in again else coded[0]] += nbytes(node)
            elif kept == "exact":
                exact[coded[0]] += nbytes(node)
        return {n: (again[n] / nbytes(self.nodes[n]), exact[n] / nbytes(self.nodes[n])) for n in coded}


def storage_of(node: Any) -> Any:
    from torch.multiprocessing.reductions import StorageWeakRef

    value = node.meta.get("val") if hasattr(node, "meta") else None
    return StorageWeakRef(value.untyped_storage()) if isinstance(value, Tensor) else None


def hint_last(x: Tensor) -> int:
    from .compiled_rules import hint

    return hint(x.shape[-1]) if x.dim() else 1


def operation_of(node: "Node") -> str:
    """ "model.layers.0.mlp: aten::mul", as far as the graph knows."""
    from .compiled_rules import VIEWS, operator_of

    while operator_of(node) in VIEWS and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = stack[-1][0] if stack else ""
    return f"{module}: {operator_of(node) or node.name}" if module else operator_of(node) or node.name


# -- the hooks ------------------------------------------------------------------------------------------------------
_PAIRS: dict[tuple, tuple["GraphModule", "GraphModule"]] = {}
_PLANS: dict[str, "weakref.WeakKeyDictionary[Graph, Plan]"] = {}
_REPORTS: dict[str, list[list[Row]]] = {}


def _context() -> dict[str, Any] | None:
    """The graphs that the hooks are inlined into; None in eager mode."""
    module = sys.modules.get("torch._functorch._aot_autograd.graph_compile")
    return None if module is None else module._get_saved_tensor_hook_context()


def _plan(context: dict[str, Any], codec: Codec) -> Plan:
    plans, graph = _PLANS.setdefault(str(codec), weakref.WeakKeyDictionary()), context["_fw_graph"]
    if graph not in plans:
        plans[graph] = Plan(graph, context["_bw_graph"], codec)
        _REPORTS.setdefault(str(codec), []).append(plans[graph].rows())
    return plans[graph]


def graph_hooks(
    codec: Codec, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> tuple["GraphModule", "GraphModule"]:
    """The pair of hooks for a codec, the same for the life of the process: compiled graphs are guarded by it.

    pack, unpack: what they do in eager mode.
    Use: `torch._C._autograd._push_saved_tensors_default_hooks(*graph_hooks(...))` around the call of the model.
    """
    codec = codec.for_saved()
    name = str(codec)
    if (key := (name, pack, unpack)) not in _PAIRS:
        _check(codec)

        def pack_saved(x: Tensor) -> Any:
            context = _context()
            if context is None:
                return pack(x)
            plan, name = _plan(context, codec), context["_node"].name
            plan.decode(name)
            return plan.encoded(name, x)

        def unpack_saved(packed: Any) -> Tensor:
            context = _context()
            if context is None:
                return unpack(packed)
            _plan(context, codec).fetch(context["_node"].name)
            return packed

        _PAIRS[key] = _module(pack_saved, name), _module(unpack_saved, name)
    return _PAIRS[key]


def _check(codec: Codec) -> None:
    traits = codec.traits
    if traits.per_sample or (traits.stateful and not traits.stochastic):
        raise ValueError(
            f"saved={codec}: inside torch.compile a codec must not remember earlier tensors. Use block, uniform, "
            "float8 or identity, or train without torch.compile."
        )


def _module(function: Callable[[Any], Any], name: str) -> "GraphModule":
    from torch.fx import Graph, GraphModule

    graph = Graph()
    node = graph.call_function(function, (graph.placeholder("value"),))
    node.meta.update(is_wrapped=True, user_cache_hash=f"hf_actcompress saved {name}")
    graph.output(node)
    module = GraphModule({}, graph)
    # In eager mode it is called from within operations of a model that dynamo may be watching for frames to compile.
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)  # and what it calls
    for code in (type(module).forward.__code__, function.__code__):
        frames.set_code_exec_strategy(code, skip)
    return module


def compiled_report(codec: Codec) -> list[list[Row]]:
    """For each graph that was compiled under the hooks of this codec, what became of each saved tensor."""
    return list(_REPORTS.get(str(codec.for_saved()), ()))
