"""What becomes of each tensor that a compiled forward graph saves for its backward graph.

    codes    one uint8 tensor is saved; it is decoded where the backward graph first needs the value
    again    nothing is saved: cheap operations and fused attention run again on what else is saved
    bits     bool tensors and masks of two constants: one bit an element
    exact    what no rule covers (rules.py), small tensors, statistics of rows, parameters and inputs
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef

from ...codecs.base import Codec
from ...codecs.block import GROUP, Block
from ...codecs.identity import Identity
from .. import kept as limits
from . import rules
from .operators import row_nbytes

LONGEST = 48  # operations that run again for one saved tensor


@dataclass
class Form:
    """How a tensor is coded: with its dimensions in the `order` of memory, of which the last ones, `tail`, are a row,
    in groups of `group` elements that share a scale (0: the whole tensor as the codec has it)."""

    order: list[int]
    tail: list[int]
    group: int

    def dense(self, x: Tensor) -> Tensor:
        return x.permute(self.order)

    @property
    def back(self) -> list[int]:
        return sorted(range(len(self.order)), key=self.order.__getitem__)


def form_of(x: Tensor, codec: Codec | None) -> Form | None:
    """codec: None for bits.  None where elements share memory, or where the sizes that groups depend on are
    symbolic."""
    order = sorted(range(x.dim()), key=lambda d: (-rules.hint(x.stride(d)), d))
    expected = 1
    for d in reversed(order):
        if rules.hint(x.shape[d]) != 1 and rules.hint(x.stride(d)) != expected:
            return None
        expected *= rules.hint(x.shape[d])
    sizes = [x.shape[d] for d in order]
    if codec is not None and not in_rows(codec):
        return Form(order, sizes, 0) if all(isinstance(size, int) for size in sizes) else None
    for tail in range(1, len(sizes) + 1):
        if not isinstance(sizes[-tail], int):
            return None
        row = math.prod(sizes[-tail:])
        group = 8 if codec is None else divisor(row, codec.group or GROUP)
        if group and (row >= limits.SHORT or tail == len(sizes)):
            return Form(order, sizes[-tail:], group)
    return None


def in_rows(codec: Codec) -> bool:
    """Whether groups can be parts of rows, so that the number of rows may be symbolic.  Features are not equalized
    then: that takes a pass over the tensor more."""
    return isinstance(codec, Block) and codec.splits is None and codec.dim is None and codec.equalize != "feature"


def divisor(row: int, target: int) -> int:
    """The divisor of `row` nearest to `target`: a multiple of 16, else of 8, at most 256; 0 if there is none.

    Rows are not filled up here, as they are in eager mode: the graph would hold a copy.
    """
    for unit in (16, 8):
        found = [size for size in range(unit, min(row, 256) + 1, unit) if row % size == 0]
        if found:
            return min(found, key=lambda size: abs(size - target))
    return 0


@dataclass
class Row:
    """One saved tensor of a compiled graph.

    module, operation: that made it ("model.layers.0.mlp", "aten::mul"), as far as the graph knows.
    kept: codes, again, bits or exact; why: what kept it exact.
    raw, held: bytes.
    """

    module: str
    operation: str
    kept: str
    raw: int
    held: int
    why: str = ""


class Plan:
    """What happens to each saved tensor of one pair of graphs."""

    def __init__(self, forward: Graph, backward: Graph, codec: Codec) -> None:
        self.forward, self.backward, self.codec = forward, backward, codec
        self.inputs = {n.name: n for n in backward.nodes if n.op == "placeholder"}
        outputs = forward.output_node().args[0]
        names = {n.name: n for n in outputs if hasattr(n, "name")}
        self.nodes = {name: names[name] for name in self.inputs if name in names}  # forward nodes of what is saved
        elsewhere = self._held_elsewhere(outputs)
        self.order = [  # what the hooks will be called with: intermediate tensors, in the order of the forward graph
            n
            for n in forward.nodes
            if self.nodes.get(n.name) is n and n.op != "placeholder" and isinstance(rules.value_of(n), Tensor)
            and storage_of(n) not in elsewhere
        ]
        self.kept: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self.forms: dict[str, Form] = {}
        self.fetched: dict[str, Node] = {}  # a small input of the forward graph that is saved in place of a tensor
        self.sided: set[str] = set()  # whose ReLU's mask is kept beside them: one bit
        self.masks: dict[str, list[Node]] = {}  # likewise other comparisons in backward with what is made of them
        self.decoded: set[str] = set()
        self.leaves: dict[str, str] = {}  # of a tensor that is made again: the first saved one that it is made from
        if isinstance(codec, Identity):
            self.kept = {node.name: "exact" for node in self.order}
            self.why = dict.fromkeys(self.kept, "identity")
        else:
            self._decide()
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
        attentions = {
            found
            for node in self.order
            if (found := rules.attention_of(node)) and not rules.argument(found, "dropout_p", 0.0)
        }
        while True:
            self.kept, self.why, self.forms, self.fetched, self.leaves, self.sided = {}, {}, {}, {}, {}, set()
            self.masks = {}
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

    def _decide_one(self, node: Node, uses: Any, attentions: set) -> None:
        name, value = node.name, rules.value_of(node)
        kept, why = "exact", ""
        if value.dtype == torch.bool or two_values(node):
            self.forms[name] = form = form_of(value, None)
            kept, why = ("bits", "") if form else ("exact", "layout")
        elif not value.is_floating_point():
            why = str(value.dtype).removeprefix("torch.")
        elif rules.attention_of(node) in attentions:
            kept, why = ("again", "") if self._again(node, attentions) else ("exact", "attention")
        elif rules.numel(node) < limits.SMALLEST:
            why = "small"
        elif hint_last(value) == 1:
            why = "statistic"
        elif why := uses.objection(self.inputs[name]):
            pass
        elif uses.sided:
            form = form_of(value, self.codec)
            if form is None or not form.group:
                why = "aten::le"
            else:
                self.forms[name], kept = form, "again" if self._again(node, attentions, fetch=False) else "codes"
                self.sided.add(name)
        elif masks := [m for m in uses.masks if not any(m in own for own in self.masks.values())]:
            form = form_of(value, self.codec)
            if form is None or not form.group or not all(self._like(mask, value) for mask in masks):
                why = rules.operator_of(masks[0])
            else:
                self.forms[name], self.masks[name], kept = form, masks, "codes"
        elif self._again(node, attentions):
            kept = "again"
        else:
            self.forms[name] = form = form_of(value, self.codec)
            kept, why = ("codes", "") if form else ("exact", "layout")
        self.kept[name], self.why[name] = kept, why

    def _like(self, mask: Node, value: Tensor) -> bool:
        """Whether a bool tensor of the backward graph has the sizes of a saved one, and the forward graph can make
        it."""
        sizes = [[str(size) for size in x.shape] for x in (rules.value_of(mask), value)]
        return sizes[0] == sizes[1] and self._in_forward(mask)

    def _in_forward(self, node: Node) -> bool:
        if twin_of(self.forward, node) is not None:
            return True
        made = rules.COMPARISONS | rules.LOGIC | {"aten::alias", "aten::detach"}
        return rules.operator_of(node) in made and all(self._in_forward(entry) for entry in node.all_input_nodes)

    def _again(self, node: Node, attentions: set, fetch: bool = True) -> bool:
        """Whether cheap operations make a saved tensor from others that are kept.

        fetch: and from one small input, which is saved in its place.
        """
        waiting, seen, leaves, missing = list(node.all_input_nodes), set(), [], []
        while waiting:
            entry = waiting.pop()
            if entry in seen:
                continue
            seen.add(entry)
            if entry.name in self.inputs and self.kept.get(entry.name) != "again":
                leaves.append(entry.name)
            elif entry.op == "placeholder":
                if not isinstance(rules.value_of(entry), Tensor) or rules.numel(entry) >= limits.SMALLEST:
                    return False
                missing.append(entry)
            elif rules.cheap(entry) or entry in attentions:
                waiting += entry.all_input_nodes
            elif entry.target is operator.getitem and entry.args[0] in attentions:
                waiting.append(entry.args[0])
            else:
                return False
        cheap = rules.cheap(node) or rules.attention_of(node) in attentions
        if not cheap or len(seen) > LONGEST or len(missing) > fetch or not any(n in self.kept for n in leaves):
            return False
        if missing:
            self.fetched[node.name] = missing[0]
        self.leaves[node.name] = next(n for n in leaves if n in self.kept)
        return True

    # -- the report -----------------------------------------------------------------------------------------------
    def rows(self) -> list[Row]:
        return [Row(*origin(node), self.kept[node.name], raw, self._held(node, raw), self.why[node.name])
                for node, raw in self._raw()]  # fmt: skip

    def _raw(self) -> list[tuple[Node, int]]:
        """The saved tensors with their bytes.  Views of one tensor are held once."""
        found, seen = [], set()
        for node in self.order:
            found.append((node, 0 if storage_of(node) in seen else rules.nbytes(node)))
            seen.add(storage_of(node))
        return found

    def _held(self, node: Node, raw: int) -> int:
        name, kept = node.name, self.kept[node.name]
        if kept == "exact":
            return raw
        if name in self.fetched:
            return rules.nbytes(self.fetched[name])
        if name not in self.forms:
            return 0
        form = self.forms[name]
        if kept == "codes" and not form.group:
            return self.codec.payload_nbytes(tuple(form.tail), node.meta["val"].dtype)
        row = math.prod(form.tail)
        bits = -(-row // 8) * ((kept == "bits" or name in self.sided) + len(self.masks.get(name, ())))
        codes = row_nbytes(self.codec, form.group, row) if kept == "codes" else 0
        return rules.numel(node) // row * (bits + codes)

    def _shares(self) -> dict[str, tuple[float, float]]:
        """Bytes made again, and kept exactly, over those of the coded tensor that they are counted with."""
        own = {node.name: raw for node, raw in self._raw() if self.kept[node.name] == "codes" and raw}
        again, exact = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
        first = next(iter(own), None)
        for node, raw in self._raw() if own else ():
            leaf = self.leaves.get(node.name)
            if self.kept[node.name] == "again":
                again[leaf if leaf in own else first] += raw
            elif self.kept[node.name] == "exact":
                exact[first] += raw
        shares = {name: (again[name] / raw, exact[name] / raw) for name, raw in own.items()}
        views = [n for n, kept in self.kept.items() if kept == "codes" and n not in own]
        return {**shares, **dict.fromkeys(views, (-1.0, 0.0))}  # views of a tensor that is counted


def twin_of(forward: Graph, node: Node) -> Node | None:
    """The node of the forward graph that one of the backward graph is a copy of: it has its name and operation."""
    found = next((n for n in forward.nodes if n.name == node.name), None)
    return found if found is not None and (node.op == "placeholder" or found.target == node.target) else None


def storage_of(node: Any) -> Any:
    value = node.meta.get("val") if hasattr(node, "meta") else None
    return StorageWeakRef(value.untyped_storage()) if isinstance(value, Tensor) else None


def two_values(node: Node) -> tuple[float, float] | None:
    """The constants of `where(condition, a, b)`."""
    if rules.operator_of(node) != "aten::where":
        return None
    low, high = node.args[1:]
    constants = (rules.operator_of(n) in ("aten::scalar_tensor", "aten::full") and not n.meta["val"].dim()
                 for n in (low, high))  # fmt: skip
    return (low.args[-1], high.args[-1]) if all(constants) else None


def hint_last(x: Tensor) -> int:
    return rules.hint(x.shape[-1]) if x.dim() else 1


def origin(node: Node) -> tuple[str, str]:
    """Module and operation."""
    def hands_on(node: Node) -> bool:
        return rules.operator_of(node) in rules.VIEWS or node.target is operator.getitem

    while hands_on(node) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else "", rules.operator_of(node) or node.name
