"""One forward pass in one thread: packs what autograd saves, and decides by the operation how it is kept.

    operation ──saves x──▶ pack(x) ──▶ Slot, which holds x until the operation is known: when the next one saves
    something, the graph leads back to the node that saved x, and the table (rules.py) says how x may be kept
    backward  ◀──x'──── unpack(Slot)

What lies in the same memory is held once.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from . import graph
from .again import Both, Maker, attention, maker
from .kept import Again, Empty, Encoded, Exact, Flags, Layout, Memory, Narrow, Sided, flatten, place_of
from .normalised import Normalised, statistic
from .rules import CODES, NORMALISED, OUTPUT, RULES, SHAPE, VIEWS, WEIGHT, Bits, Sides, rule_of
from .slots import Slot, Untouched, local_shard
from .weights import Weights, weight_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32, torch.int16)
SAVERS = frozenset(f"{name}Backward0" for name in ("Addmm", "Mm", "Bmm", "Convolution", "NativeLayerNorm"))
# The operand that data passes through, where it has no gradient itself: the first layer, or one after a frozen part.
INPUTS = {"mat1", "input", "self"}


class Pass:
    """site: the SavedTensors whose codec, state and listeners serve this pass.
    weights: of its model.
    """

    def __init__(self, site: Any, weights: Weights) -> None:
        self.site, self.trial, self.weights = site, site.trial, weights
        self.first = torch.autograd._get_sequence_nr()  # of the nodes that this pass makes
        self.pending: dict[int, list[weakref.ref[Slot]]] = {}  # weak: what nobody takes goes before the pass ends
        self.records: dict[int, dict[str, Any]] = {}
        self.handled: set[int] = set()  # sequence numbers of nodes that have saved something here
        self.seen: set[int] = set()
        self.users: dict[int, str] = {}  # by the number of a node, the operation that takes its result
        self.made_by: dict[tuple[int, int], weakref.ref[Slot]] = {}
        self.memory = Memory()
        self.counts: Counter[str] = Counter()
        self.report: dict[tuple[str, str], list[int]] = {}
        self.attentions: dict[int, Both] = {}
        self.passed_by = 0  # operations that saved past these hooks
        self.decoded = site.decoded()
        self._asked: list[Any] | None = None

    # -- hooks ------------------------------------------------------------------------------------------------
    def pack(self, x: Tensor) -> Any:
        if torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return Untouched(x)  # tangents may have no memory at all
        number = torch.autograd._get_sequence_nr() - 1
        before = x.grad_fn
        if before is not None and before.name() == "CloneBackward0" and before._sequence_nr() == number:
            number -= 1  # what an operation in place saves of its input is a clone, made after its own node
        local, wrap = local_shard(x)
        if not self.site.takes(local):
            self.handled.add(number)
            return Untouched(x)
        if self.weights.has(local):
            self.handled.add(number)
            return Untouched(x)
        slot = Slot(x, local, self.decoded, wrap)
        if graph.in_checkpoint():
            self._input_of_checkpoint(slot)
            return slot
        self.handled.add(number)
        self.find(x.grad_fn, number)
        self.pending.setdefault(number, []).append(weakref.ref(slot))
        if x.grad_fn is not None:
            key = x.grad_fn._sequence_nr(), x.output_nr
            if key not in self.made_by or self.made_by[key]() is None:
                self.made_by[key] = weakref.ref(slot)
        return slot

    def unpack(self, packed: Any) -> Tensor:
        if self._asked is None:
            return packed.unpack()
        self._asked.append(packed)
        return packed.tensor if getattr(packed, "tensor", None) is not None else torch.empty(0)

    def finish(self, outputs: Iterable[Tensor]) -> None:
        """The pass has ended with these outputs: decide about what is still open."""
        self._resolve(y.grad_fn for y in outputs)
        for slot in alive(reference for references in self.pending.values() for reference in references):
            self._unknown(slot, "not reached from the outputs")
        for table in (self.pending, self.records, self.attentions, self.made_by, self.memory):
            table.clear()

    # -- from nodes to rules ----------------------------------------------------------------------------------
    def find(self, node: Any, current: int) -> None:
        """Decide about what the nodes that lead to `node` have saved.  current: the node that is being made."""
        if node is None:
            return
        if node._sequence_nr() == current:  # it saves its own result, and is not ready to be asked
            self._resolve(before for before, _ in node.next_functions)
        else:
            self._resolve([node])

    def _resolve(self, roots: Iterable[Any]) -> None:
        for node in graph.new_nodes(roots, self.first, self.seen, self.users):
            number = node._sequence_nr()
            slots = alive(self.pending.pop(number, []))
            if number not in self.handled:
                self.passed_by += node.name() in SAVERS
                continue
            if slots and (node.name() in RULES or not isinstance(node, BackwardCFunction)):
                mine = [(name, p) for name, p in self.record(node).items() if any(p is slot for slot in slots)]
                # Results come last: they may be made of what is kept of the inputs.
                for name, slot in sorted(mine, key=lambda pair: rule_of(node, pair[0]) == OUTPUT):
                    self._decide(slot, node, name)
            for slot in slots:
                if slot.content is None:
                    self._unknown(slot, graph.operation(node))

    def record(self, node: Any) -> dict[str, Any]:
        """What was packed for a node, by the names of its saved tensors."""
        number = node._sequence_nr()
        found = self.records.get(number)
        if found is None:
            if number not in self.handled:  # it saved past these hooks: asking could run a checkpointed part again
                return graph.scalar_factor(node)
            self._asked = []
            try:
                found = self.records[number] = graph.ask(node, self._heard)
            finally:
                self._asked = None
        return found

    def _heard(self) -> list[Any]:
        assert self._asked is not None
        heard, self._asked = self._asked, []
        return heard

    # -- what can be made again -------------------------------------------------------------------------------
    def saved(self, node: Any, name: str) -> Maker | None:
        packed = self.record(node).get(name)
        if isinstance(packed, (Untouched, graph.Number)):
            return packed.value
        if not isinstance(packed, Slot) or packed.wrap is not None:
            return None
        content = packed.content
        sides = isinstance(content, Empty) or isinstance(content, Flags) and not content.exact
        return None if sides else packed.value

    def normalised(self, node: Any, name: str) -> Maker | None:
        packed = self.record(node).get(name)
        content = packed.content if isinstance(packed, Slot) and packed.wrap is None else None
        return content.normalised if isinstance(content, Normalised) else None

    def edge(self, node: Any, index: int) -> Maker | None:
        before, output = node.next_functions[index]
        if before is None:
            return None
        if before.name() == graph.LEAF:
            return Untouched(before.variable).value if isinstance(before.variable, nn.Parameter) else None
        reference = self.made_by.get((before._sequence_nr(), output))
        slot = None if reference is None else reference()
        if slot is None or slot.wrap is not None or isinstance(slot.content, (Flags, Empty, type(None))):
            return None
        return slot.value

    def _again(self, slot: Slot, run: Tensor) -> Again | None:
        """Made by the operation whose result is the tensor, or what the tensor is a view of, and fills its memory."""
        x, made_by = slot.tensor, slot.node
        if slot.made is None or made_by is None:
            return None
        node, output, layout = slot.made
        while made_by[0] is not None and made_by[0].name() in VIEWS and made_by != (node, output):
            made_by = made_by[0].next_functions[0]
        if made_by != (node, output):  # a function between, as FSDP's, behind which weights are not at hand
            return None
        assert x is not None
        if not run.numel() == math.prod(layout.shape) == x.untyped_storage().nbytes() // x.element_size():
            return None
        run_again = maker(node, output, self)
        return None if run_again is None else Again(run_again, layout)

    # -- how a tensor is kept ---------------------------------------------------------------------------------
    def _decide(self, slot: Slot, node: Any, name: str) -> None:
        x = slot.tensor
        assert x is not None
        rule, operation = rule_of(node, name, self.users.get(node._sequence_nr(), "")), graph.operation(node)
        if x.dtype not in FLOATS or x._version != slot.version or (rule != OUTPUT and not self._is_large(x)):
            self._unknown(slot, operation)
        elif rule == SHAPE:
            self._hold(slot, operation, "shape", Empty)
        elif isinstance(rule, Sides):
            self._hold(slot, operation, rule, lambda run: self._sided(slot, run, node, operation, rule), node)
        elif isinstance(rule, Bits):
            self._hold(slot, operation, rule, lambda run: Flags.of(run, rule))
        elif rule == OUTPUT:
            self._attention_output(slot, node, name, operation)
        elif rule == NORMALISED:
            self._hold(slot, operation, "values", lambda run: self._normalised(x, run, node, operation), node)
        elif not slot.follows and (mask := self.site.two_values(x)) is not None:
            self._hold(slot, operation, "values", lambda run: mask)
        elif rule == CODES and not self._is_weight(slot, node, name):
            self._hold(slot, operation, "values", lambda run: self._values(slot, run, node, operation), node)
        else:
            self._exactly(slot, f"{operation} (weight)" if rule in (WEIGHT, CODES) else operation)

    def _hold(self, slot: Slot, operation: str, how: Any, make: Callable[[Tensor], Any], node: Any = None) -> None:
        """As others hold the same memory, or as `make` has it; exactly where nothing would be gained."""
        x = slot.tensor
        assert x is not None
        run, layout, gaps = flatten(x)
        held, place = self.memory.of(x), place_of(x, run, gaps)
        content = held.get("exactly", place) or held.get(how, place)
        if content is None and (content := make(run.detach())) is not None:
            self._tell(operation, content, held.put(how, place, content, run), run)
        if content is None or isinstance(content, Exact):
            self._exactly(slot, operation)
            return
        if self.trial is not None and node is not None:
            self.trial.use(content, operation, weight_of(node))
        slot.settle(content, layout)

    def _values(self, slot: Slot, run: Tensor, node: Any, operation: str) -> Any:
        if not self.site.gains(run):
            return None
        return self._again(slot, run) or self._encode(run, node, operation)

    def _sided(self, slot: Slot, run: Tensor, node: Any, operation: str, rule: Sides) -> Any:
        values = self._values(slot, run, node, operation)
        return None if values is None else Sided(values, run, rule)

    def _encode(self, run: Tensor, node: Any, operation: str, rows: bool = True) -> Encoded:
        weight = None if node is None else weight_of(node)
        name = self.weights.names.get(id(weight), "").removesuffix(".weight") or operation
        place = f"{name}#{self.counts[name]}"
        self.counts[name] += 1
        content = self.site.encode(place, run, rows)
        content.place = place
        return content

    def _normalised(self, x: Tensor, run: Tensor, node: Any, operation: str) -> Any:
        if not self.site.gains(run):
            return None
        mean, rstd = (self.record(node).get(f"result{i}") for i in (1, 2))
        if mean is None or rstd is None or flatten(x)[2] or run.numel() != x.numel():
            return self._encode(run, node, operation)
        mean, rstd = (statistic(p.value, operation, tuple(x.shape)) for p in (mean, rstd))
        return Normalised.of(x, mean, rstd, lambda y: self._encode(y, node, operation, rows="Layer" in operation))

    def _input_of_checkpoint(self, slot: Slot) -> None:
        """All that a checkpoint runs again is of the same decoded input.  No node of autograd's saves it."""
        operation = "checkpoint"
        if slot.dtype in FLOATS and slot.follows and slot.tensor is not None and self._is_large(slot.tensor):
            self._hold(slot, operation, "values",
                       lambda run: self._encode(run, None, operation) if self.site.gains(run) else None)  # fmt: skip
        else:
            self._unknown(slot, operation)

    def _attention_output(self, slot: Slot, node: Any, name: str, operation: str) -> None:
        x, run, saved = slot.tensor, attention(node, self), self.record(node)
        operands = [saved.get(key) for key in ("query", "key", "value")]
        assert x is not None
        if run is None or all(isinstance(getattr(p, "content", p), (Exact, Untouched)) for p in operands):
            self._exactly(slot, operation)  # which fits exact operands
        elif name == "output" and node._saved_dropout_p:
            self._hold(slot, operation, "values", lambda flat: self._encode(flat, node, operation))
        else:
            index = 0 if name == "output" else 1
            get = partial(self.attentions.setdefault(node._sequence_nr(), Both(run)).get, index)
            layout = Layout.of(x)
            self._hold(slot, operation, "values", lambda flat: Again(get, layout, shared=index == 0))

    def _exactly(self, slot: Slot, operation: str) -> None:
        x = slot.tensor
        assert x is not None
        if x._version == slot.version and x.untyped_storage().nbytes() > 4 * x.numel() * x.element_size():
            # One token of every row: a copy is smaller than the storage with all tokens.
            slot.tensor = x = x.clone()
            slot.version = x._version
        run, _, gaps = flatten(x)
        run = x if gaps else run
        held, place = self.memory.of(x), place_of(x, run, gaps)
        content = held.get("exactly", place)
        if content is None:
            content = Exact(run)
            operation = operation if self._is_large(x) else "small tensors"
            self._tell(operation, content, held.put("exactly", place, content, run), run)
        slot.settle(content, None)

    def _unknown(self, slot: Slot, operation: str) -> None:
        """Exactly; masks and indices in as little as that takes."""
        x = slot.tensor
        assert x is not None
        if x._version != slot.version or not self._is_large(x):
            self._exactly(slot, operation)
        elif x.dtype == torch.bool:
            self._hold(slot, operation, "values", lambda run: Flags.of(run, Bits(0.0, None, 0.0, 1.0), exact=True))
        elif x.dtype in INTS and x.device.type == "cpu" and (narrow := self.site.narrowest(x)) is not None:
            self._hold(slot, operation, "values", lambda run: Narrow(run, narrow))
        elif x.dtype in FLOATS and not slot.follows and (mask := self.site.two_values(x)) is not None:
            self._hold(slot, operation, "values", lambda run: mask)
        else:
            self._exactly(slot, operation)

    def _is_weight(self, slot: Slot, node: Any, name: str) -> bool:
        if not slot.follows:  # data, a constant, or a cast of a frozen weight
            return name not in INPUTS or self.weights.is_cast(slot.shape, slot.dtype)
        if slot.node is None:
            return False
        producer, _ = slot.node
        if name == "mat2" and len(slot.shape) == 2 and producer.name() == "TBackward0":
            return True  # F.linear takes its weight transposed
        return self.weights.computed(producer, self._has_data)

    def _has_data(self, node: Any) -> bool:
        """Whether a node saves what is neither a weight nor depends on one that is trained."""
        slots = [packed for packed in self.record(node).values() if isinstance(packed, Slot) and not packed.follows]
        return not all(not slot.shape or self.weights.is_cast(slot.shape, slot.dtype) for slot in slots)

    def _is_large(self, x: Tensor) -> bool:
        rows = 1 if self.trial is None else self.trial.scale
        if x.numel() * rows < self.site.smallest:
            return False
        # Means and deviations of norms: few, and everything depends on them.
        return not (x.dtype in FLOATS and x.dim() > 1 and x.shape[-1] == 1)

    def _tell(self, operation: str, content: Any, raw: int, run: Tensor) -> None:
        row = self.report.setdefault((operation, content.how), [0, 0, 0])
        for i, value in enumerate((1, raw, content.nbytes)):
            row[i] += value
        more = {} if content.codec is None else {"x": run, "decode": lambda: content.get().view(run.shape)}
        self.site.tell(getattr(content, "place", operation), raw, content.nbytes, codec=content.codec, **more)


def alive(references: Iterable[weakref.ref[Slot]]) -> list[Slot]:
    return [slot for reference in references if (slot := reference()) is not None]
