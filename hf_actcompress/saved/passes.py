"""One forward pass in one thread: packs what autograd saves, and decides by the operation how it is kept.

    operation ──saves x──▶ pack(x) ──▶ Slot, which holds x until the operation is known: when the next one saves
    something, the graph leads back to the node that saved x, and the table (rules.py) says how x may be kept
    backward  ◀──x'──── unpack(Slot)

What lies in the same memory is held once.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops.memory import Pool
from . import graph
from .again import Both, Maker, attention, maker
from .kept import Again, Empty, Exact, Flags, Layout, Narrow, Normalised, flatten, narrowest
from .masks import pack_two_values
from .rules import CODES, NORMALISED, OUTPUT, RULES, SHAPE, VIEWS, WEIGHT, Bits, rule_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32, torch.int16)
SAVERS = frozenset(f"{name}Backward0" for name in ("Addmm", "Mm", "Bmm", "Convolution", "NativeLayerNorm"))
# Of a row of squares: they spread one gradient, or products with a weight, over all of it.
SUMS = frozenset({"Addmm", "Convolution", "Mean", "Mm", "Sum"})
# The operand that data passes through, where it has no gradient itself: the first layer, or one after a frozen part.
INPUTS = {"mat1", "input", "self"}
DECODED = 8  # tensors that are looked up, should they still be there


class Slot:
    """What the graph holds in place of a saved tensor."""

    __slots__ = (
        "__weakref__", "content", "dtype", "follows", "layout", "node", "owner", "shape", "tensor", "version", "wrap",
    )  # fmt: skip

    def __init__(self, owner: Pass, x: Tensor, local: Tensor, wrap: Callable[[Tensor], Tensor] | None = None) -> None:
        """x: as the operation has it.  local: its values here, another tensor where `x` is sharded."""
        # Not x, whose grad_fn would make a cycle of an output and the node that saved it.
        self.owner, self.tensor, self.version = owner, local.detach(), local._version
        self.node: tuple[Any, int] | None = None if x.grad_fn is None else (x.grad_fn, x.output_nr)
        self.follows = x.requires_grad  # whether it depends on what is trained
        self.content: Any = None
        self.layout: Layout | None = None
        self.shape, self.dtype, self.wrap = tuple(local.shape), local.dtype, wrap

    def settle(self, content: Any, layout: Layout | None) -> None:
        """From now on `content` is what is held."""
        self.content, self.layout, self.node = content, layout, None
        if not isinstance(content, Exact):
            self.tensor = None

    def value(self) -> Tensor:
        """With the shape and the strides of the tensor."""
        if self.tensor is not None:
            _unchanged(self.tensor, self.version)
            return self.tensor
        assert self.layout is not None
        return self.layout.restore(self.owner.values(self.content))

    def unpack(self) -> Tensor:
        if self.tensor is None and torch.is_grad_enabled():
            raise RuntimeError(
                "saved= keeps what second derivatives need (create_graph=True) in codes, so they would be wrong. "
                "Compute them in a forward pass under `with handle.disabled():`."
            )
        x = self.value()
        return x if self.wrap is None else self.wrap(x)


class Untouched:
    """The tensor itself: a parameter, a few values, or what is none of ours."""

    __slots__ = ("tensor", "version")

    def __init__(self, x: Tensor, detached: bool = True) -> None:
        # A parameter whose storage is freed while it is sharded has to be held itself.
        self.tensor, self.version = x.detach() if detached else x, x._version

    def unpack(self) -> Tensor:
        _unchanged(self.tensor, self.version)
        return self.tensor

    value = unpack


def _unchanged(x: Tensor, version: int) -> None:
    """Like autograd, refuse a tensor that was changed in place since it was saved."""
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a saved "
            f"tensor of shape {tuple(x.shape)} is at version {x._version}, expected version {version}. Use the "
            "operation's version that is not in place, or clone its input first."
        )


class Pass:
    """site: the SavedTensors whose codec, state and listeners serve this pass.
    buffers: addresses of the storages of the model's buffers.
    shapes: {shape: dtypes} of parameters and buffers.
    names: of parameters, by their ids.
    """

    def __init__(self, site: Any, buffers: set[int], shapes: dict[tuple, set], names: dict[int, str]) -> None:
        self.site, self.trial = site, site.trial
        self.buffers, self.shapes, self.names = buffers, shapes, names
        self.pending: dict[int, list[Slot]] = {}
        self.records: dict[int, dict[str, Any]] = {}
        self.handled: set[int] = set()  # sequence numbers of nodes that have saved something here
        self.seen: set[int] = set()
        self.users: dict[int, str] = {}  # by the number of a node, the operation that takes its result
        self.made_by: dict[tuple[int, int], weakref.ref[Slot]] = {}
        self.stored: dict[int, tuple[StorageWeakRef, dict]] = {}
        self.counts: Counter[str] = Counter()
        self.report: dict[tuple[str, str], list[int]] = {}
        self.attentions: dict[int, Both] = {}
        self.passed_by = 0  # operations that saved past these hooks
        self.pool = Pool()
        self._asked: list[Any] | None = None
        self._decoded: list[tuple[weakref.ref, StorageWeakRef, tuple]] = []
        self._last: dict[bool, Tensor] = {}

    # -- hooks ------------------------------------------------------------------------------------------------
    def pack(self, x: Tensor) -> Any:
        if torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return Untouched(x)  # tangents may have no memory at all
        number = torch.autograd._get_sequence_nr() - 1
        before = x.grad_fn
        if before is not None and before.name() == "CloneBackward0" and before._sequence_nr() == number:
            number -= 1  # what an operation in place saves of its input is a clone, made after its own node
        self.handled.add(number)
        local, wrap = x, None
        if type(x).__name__ == "DTensor" and not isinstance(x, nn.Parameter):
            local, wrap = x._local_tensor, partial(_sharded, type(x), x._spec)  # type: ignore[attr-defined]
        if type(local) is not Tensor or local.layout != torch.strided or local.device.type == "meta":
            return Untouched(x, detached=not isinstance(x, nn.Parameter))
        if graph.is_parameter(local) or local.untyped_storage()._cdata in self.buffers:
            return Untouched(x, detached=not graph.is_parameter(local))
        slot = Slot(self, x, local, wrap)
        self.find(x.grad_fn, number)
        self.pending.setdefault(number, []).append(slot)
        if slot.node is not None:
            self.made_by.setdefault((x.grad_fn._sequence_nr(), x.output_nr), weakref.ref(slot))
        return slot

    def unpack(self, packed: Any) -> Tensor:
        if self._asked is None:
            return packed.unpack()
        self._asked.append(packed)
        return packed.tensor if getattr(packed, "tensor", None) is not None else torch.empty(0)

    def finish(self, outputs: Iterable[Tensor]) -> None:
        """The pass has ended with these outputs: decide about what is still open."""
        self._resolve(graph.new_nodes([y.grad_fn for y in outputs], self.seen, self.users))
        for slots in self.pending.values():
            for slot in slots:
                self._unknown(slot, "not reached from the outputs")
        self.pending.clear()
        self.records.clear()
        self.attentions.clear()
        self.made_by.clear()
        self.stored.clear()

    # -- from nodes to rules ----------------------------------------------------------------------------------
    def find(self, node: Any, current: int) -> None:
        """Decide about what the nodes that lead to `node` have saved.  current: the node that is being made."""
        if node is None:
            return
        if node._sequence_nr() == current:  # it saves its own result, and is not ready to be asked
            roots = [before for before, _ in node.next_functions]
        else:
            roots = [node]
        self._resolve(graph.new_nodes(roots, self.seen, self.users))

    def _resolve(self, nodes: list[Any]) -> None:
        for node in nodes:
            number = node._sequence_nr()
            slots = self.pending.pop(number, [])
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
        if isinstance(packed, Slot) and packed.wrap is None and not isinstance(packed.content, (Flags, Empty)):
            return packed.value
        masks = isinstance(packed, Slot) and isinstance(packed.content, Flags) and packed.content.exact
        return packed.value if masks else None

    def normalised(self, node: Any, name: str) -> Maker | None:
        packed = self.record(node).get(name)
        content = packed.content if isinstance(packed, Slot) and packed.wrap is None else None
        return content.normalised if isinstance(content, Normalised) else None

    def edge(self, node: Any, index: int) -> Maker | None:
        before, output = node.next_functions[index]
        if before is None:
            return None
        if before.name() == graph.LEAF:
            return before.variable.detach if isinstance(before.variable, nn.Parameter) else None
        reference = self.made_by.get((before._sequence_nr(), output))
        slot = None if reference is None else reference()
        values = slot is not None and slot.wrap is None and not isinstance(slot.content, (Flags, Empty, type(None)))
        return slot.value if values else None  # type: ignore[union-attr]

    def _again(self, slot: Slot, run: Tensor) -> Again | None:
        """Made by the operation whose result lies in the slot's memory and fills it."""
        size = run.numel() * run.element_size()
        assert slot.tensor is not None
        if slot.node is None or slot.wrap or slot.tensor.untyped_storage().nbytes() != size:
            return None
        node, output = slot.node
        while node is not None and node.name() in VIEWS:
            node, output = node.next_functions[0]
        if node is None or node.name() == graph.LEAF:
            return None
        run_again = maker(node, output, self)
        return None if run_again is None else Again(run_again, run.numel())

    # -- how a tensor is kept ---------------------------------------------------------------------------------
    def _decide(self, slot: Slot, node: Any, name: str) -> None:
        x = slot.tensor
        assert x is not None
        rule, operation = rule_of(node, name), graph.operation(node)
        if rule == CODES and self._is_square(node) and self.users.get(node._sequence_nr()) not in SUMS:
            rule = None
        if x.dtype not in FLOATS or x._version != slot.version or (rule != OUTPUT and not self._is_large(x)):
            self._unknown(slot, operation)
        elif rule == SHAPE:
            self._hold(slot, operation, "shape", lambda run: Empty(run))
        elif isinstance(rule, Bits):
            self._hold(slot, operation, rule, lambda run: Flags.of(run, rule))
        elif rule == OUTPUT:
            self._attention_output(slot, node, name, operation)
        elif rule == NORMALISED:
            self._hold(slot, operation, "values", lambda run: self._normalised(slot, run, node, operation), node)
        elif not slot.follows and (mask := self._mask_of(x)) is not None:
            self._hold(slot, operation, "values", lambda run: mask)
        elif rule == CODES and not self._is_weight(slot, node, name):
            self._hold(slot, operation, "values", lambda run: self._values(slot, run, node, operation), node)
        else:
            self._exactly(slot, f"{operation} (weight)" if rule in (WEIGHT, CODES) else operation)

    def _is_square(self, node: Any) -> bool:
        """x ** 2 or x * x: where it is small, what follows may divide by it, and the gradient is large just there.
        The sum of a row spreads one gradient over all of it."""
        if node.name() == "PowBackward0":
            return float(node._saved_exponent) == 2.0
        edges = node.next_functions
        return node.name() == "MulBackward0" and edges[0][0] is not None and edges[0] == edges[1]

    def _hold(self, slot: Slot, operation: str, kind: Any, make: Callable[[Tensor], Any], node: Any = None) -> None:
        """As others hold the same memory, or as `make` has it; exactly where nothing would be gained."""
        x = slot.tensor
        assert x is not None
        run, layout, gaps = flatten(x)
        stored, place = self._stored_of(x), _place(x, run, gaps)
        content = _alive(stored, ("exactly", *place)) or _alive(stored, (kind, *place))
        if content is None:
            content = make(run.detach())
            if content is None:
                self._exactly(slot, operation)
                return
            stored[(kind, *place)] = weakref.ref(content)
            self._tell(operation, content, self._raw(stored, place, run), run)
        if isinstance(content, Exact):
            self._exactly(slot, operation)
            return
        if self.trial is not None and node is not None:
            self.trial.use(content, operation, self._weight_edge(node))
        slot.settle(content, layout)

    def _values(self, slot: Slot, run: Tensor, node: Any, operation: str) -> Any:
        if not self.site.gains(run):
            return None
        return self._again(slot, run) or self._encode(run, node, operation)

    def _encode(self, run: Tensor, node: Any, operation: str, rows: bool = True) -> Any:
        weight = self._weight_edge(node)
        name = self.names.get(id(weight), "").removesuffix(".weight") or operation
        place = f"{name}#{self.counts[name]}"
        self.counts[name] += 1
        content = self.site.encode(place, run, rows)
        content.place = place
        return content

    def _normalised(self, slot: Slot, run: Tensor, node: Any, operation: str) -> Any:
        if not self.site.gains(run):
            return None
        x = slot.tensor
        assert x is not None
        record, layout = self.record(node), Layout(tuple(x.shape), x.stride())
        mean, rstd = (record.get(f"result{i}") for i in (1, 2))
        if mean is None or rstd is None or flatten(x)[2] or run.numel() != x.numel():
            return self._encode(run, node, operation)
        if "Batch" in operation:
            mean, rstd = (_channel_wise(p.value, x.dim()) for p in (mean, rstd))
        elif "Group" in operation:
            each = x.shape[1] // mean.value().shape[-1]
            mean, rstd = (_group_wise(p.value, x.dim(), each) for p in (mean, rstd))
        else:
            mean, rstd = mean.value, rstd.value
        normal = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        torch.sub(x, mean(), out=normal).mul_(rstd())
        codes = self._encode(flatten(normal)[0], node, operation, rows="Layer" in operation)
        return None if codes is None else Normalised(codes, layout, mean, rstd)

    def _attention_output(self, slot: Slot, node: Any, name: str, operation: str) -> None:
        values = [p.content for key, p in self.record(node).items()
                  if key in ("query", "key", "value") and isinstance(p, Slot)]  # fmt: skip
        run = attention(node, self)
        if run is None or all(isinstance(content, Exact) for content in values):
            self._exactly(slot, operation)
        elif name == "output" and node._saved_dropout_p:
            self._hold(slot, operation, "values", lambda flat: self._encode(flat, node, operation))
        else:
            both = self.attentions.setdefault(node._sequence_nr(), Both(run))
            index = 0 if name == "output" else 1
            get = partial(both.get, index)
            self._hold(slot, operation, "values", lambda flat: Again(get, flat.numel(), shared=index == 0))

    def _exactly(self, slot: Slot, operation: str) -> None:
        x = slot.tensor
        assert x is not None
        if x._version == slot.version and x.untyped_storage().nbytes() > 4 * x.numel() * x.element_size():
            # One token of every row: a copy is smaller than the storage with all tokens.
            slot.tensor = x = x.clone()
            slot.version = x._version
        run, _, gaps = flatten(x)
        run = x if gaps else run
        stored, place = self._stored_of(x), _place(x, run, gaps)
        content = _alive(stored, ("exactly", *place))
        if content is None:
            content = Exact(run)
            stored[("exactly", *place)] = weakref.ref(content)
            operation = operation if self._is_large(x) else "small tensors"
            self._tell(operation, content, self._raw(stored, place, run), run)
        slot.settle(content, None)

    def _unknown(self, slot: Slot, operation: str) -> None:
        """Exactly; masks and indices in as little as that takes."""
        x = slot.tensor
        assert x is not None
        if x._version != slot.version or not self._is_large(x):
            self._exactly(slot, operation)
        elif x.dtype == torch.bool:
            self._hold(slot, operation, "values", lambda run: Flags.of(run, Bits(0.0, None, 0.0, 1.0), exact=True))
        elif x.dtype in INTS and x.device.type == "cpu" and (narrow := narrowest(x)) is not None:
            self._hold(slot, operation, "values", lambda run: Narrow(run, narrow))
        elif x.dtype in FLOATS and not slot.follows and (mask := self._mask_of(x)) is not None:
            self._hold(slot, operation, "values", lambda run: mask)
        else:
            self._exactly(slot, operation)

    def _mask_of(self, x: Tensor) -> Flags | None:
        run, _, _ = flatten(x)
        found = pack_two_values(run)
        return None if found is None else Flags(found[0], run.numel(), *found[1:], x.dtype, exact=True)

    def _is_weight(self, slot: Slot, node: Any, name: str) -> bool:
        x = slot.tensor
        assert x is not None
        if not slot.follows:  # data, a constant, or a cast of a frozen weight
            return name not in INPUTS or self._is_cast(tuple(x.shape), x.dtype)
        if slot.node is None:
            return False
        producer = slot.node[0]
        if name == "mat2" and x.dim() == 2 and producer.name() == "TBackward0":
            return True  # F.linear takes its weight transposed
        return graph.of_parameters(producer, self.shapes, self._has_data)

    def _is_cast(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a tensor without a gradient may be a cast of a frozen weight: one of its shape in another dtype.
        In its own dtype it would be the parameter itself."""
        kinds = self.shapes.get(shape, set()) | self.shapes.get(shape[::-1], set())
        return bool(kinds) and dtype not in kinds

    def _has_data(self, node: Any) -> bool:
        """Whether a node saves what is neither a weight nor depends on one that is trained."""
        slots = [packed for packed in self.record(node).values() if isinstance(packed, Slot) and not packed.follows]
        return not all(not slot.shape or self._is_cast(slot.shape, slot.dtype) for slot in slots)

    # -- bookkeeping ------------------------------------------------------------------------------------------
    def _is_large(self, x: Tensor) -> bool:
        rows = 1 if self.trial is None else self.trial.scale
        if x.numel() * rows < self.site.smallest:
            return False
        # Means and deviations of norms: few, and everything depends on them.
        return not (x.dtype in FLOATS and x.dim() > 1 and x.shape[-1] == 1)

    def _weight_edge(self, node: Any) -> Any:
        """The parameter that a layer multiplies its input with: the gradient of no other depends on that input."""
        for before, _ in node.next_functions:
            while before is not None and before.name() in VIEWS:
                before = before.next_functions[0][0]
            if before is not None and before.name() == graph.LEAF and before.variable.dim() > 1:
                return before.variable
        for before, _ in node.next_functions:
            if before is not None and before.name() == graph.LEAF:
                return before.variable
        return None

    def values(self, content: Any) -> Tensor:
        """The memory of a content, flat.

        Neighbouring operations often saved the same tensor, so the last one of codes and the last one that was made
        again stay, and what an operation still uses is found again.
        """
        for known, storage, layout in self._decoded:
            if known() is content and (flat := _revived(storage, *layout)) is not None:
                return flat
        with torch.no_grad(), self.pool.used():
            flat = content.get()
        if self.trial is None and flat.dtype in FLOATS and type(flat) is torch.Tensor:
            layout = (flat.dtype, flat.storage_offset(), flat.numel())
            reference = StorageWeakRef(flat.untyped_storage())
            self._decoded = [*self._decoded[1 - DECODED :], (weakref.ref(content), reference, layout)]
            if getattr(content, "shared", True):
                self._last[isinstance(content, Again)] = flat
        return flat

    def _stored_of(self, x: Tensor) -> dict:
        """What of this storage is held.  The weak reference keeps its address from being used again."""
        storage = x.untyped_storage()
        entry = self.stored.get(storage._cdata)
        if entry is None or entry[0].expired():
            entry = self.stored[storage._cdata] = (StorageWeakRef(storage), {})
        return entry[1]

    def _raw(self, stored: dict, place: tuple, run: Tensor) -> int:
        """Bytes that autograd would hold for this memory, once."""
        if ("raw", *place) in stored:
            return 0
        stored[("raw", *place)] = None
        return run.numel() * run.element_size()

    def _tell(self, operation: str, content: Any, raw: int, run: Tensor) -> None:
        row = self.report.setdefault((operation, content.how), [0, 0, 0])
        for i, value in enumerate((1, raw, content.nbytes)):
            row[i] += value
        more = {} if content.codec is None else {"x": run, "decode": lambda: content.get().view(run.shape)}
        self.site.tell(getattr(content, "place", operation), raw, content.nbytes, codec=content.codec, **more)


def _sharded(kind: type, spec: Any, local: Tensor) -> Tensor:
    return kind(local, spec, requires_grad=False)


def _place(x: Tensor, run: Tensor, gaps: bool) -> tuple:
    """A key of a run of memory.  One with gaps is told by its strides too."""
    strides = (tuple(x.shape), x.stride()) if gaps else None
    return x.storage_offset(), run.numel(), x.dtype, x._version, strides


def _alive(stored: dict, key: tuple) -> Any:
    reference = stored.get(key)
    return None if reference is None else reference()


def _revived(reference: StorageWeakRef, dtype: torch.dtype, offset: int, n: int) -> Tensor | None:
    """A flat tensor in that storage, if something still holds it."""
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return None if storage is None else torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, (n,))


def _channel_wise(value: Maker, dims: int) -> Maker:
    return lambda: value().view(1, -1, *[1] * (dims - 2))


def _group_wise(value: Maker, dims: int, each: int) -> Maker:
    def run() -> Tensor:
        values = value()
        return values.repeat_interleave(each, dim=-1).view(values.shape[0], -1, *[1] * (dims - 2))

    return run
