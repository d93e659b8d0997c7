"""Saved tensors inside torch.compile: hooks that AOTAutograd inlines into its forward and backward graphs.

AOTAutograd calls the hooks once for each intermediate tensor that a compiled forward graph hands to its backward
graph.  At the first of them both graphs are there, and the whole plan is made (plan.py, graphs.py).
In eager mode the same two GraphModules call the functions that they were made with.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from ...codecs.base import Codec, CodecState
from . import graphs
from .operators import STATES, TOTALS, Totals
from .plan import Plan, Row

KEPT = {"codes": "codes", "again": "made again", "bits": "one bit", "exact": "exactly"}  # as in eager mode's report

_PAIRS: dict[tuple, tuple[GraphModule, GraphModule]] = {}
_PLANS: dict[str, weakref.WeakKeyDictionary[Graph, Plan]] = {}
_REPORTS: dict[str, list[list[Row]]] = {}


def graph_hooks(
    codec: Codec, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor], state: CodecState | None = None
) -> tuple[GraphModule, GraphModule]:
    """The pair of hooks for a codec, the same for the life of the process: compiled graphs are guarded by it.

    pack, unpack: what they do in eager mode.
    state: of the codec, for what compiled graphs encode from now on.
    Use: `torch._C._autograd._push_saved_tensors_default_hooks(*graph_hooks(...))` around the call of the model.
    Raises ValueError for a codec that cannot be used there.
    """
    name = str(codec)
    STATES[name] = state
    if (key := (name, pack, unpack)) not in _PAIRS:
        _check(codec)

        def pack_saved(x: Tensor) -> Any:
            context = _context()
            if context is None:
                return pack(x)
            plan, name = _plan(context, codec), context["_node"].name
            graphs.decode(plan, name)
            return graphs.encoded(plan, name, x)

        def unpack_saved(packed: Any) -> Tensor:
            context = _context()
            if context is None:
                return unpack(packed)
            graphs.fetch(_plan(context, codec), context["_node"].name)
            return packed

        _PAIRS[key] = _module(pack_saved, name), _module(unpack_saved, name)
    return _PAIRS[key]


def graphs_of(codec: Codec) -> list[list[Row]]:
    """For each graph that was compiled under the hooks of this codec, what became of each saved tensor."""
    return list(_REPORTS.get(str(codec), ()))


def totals(codec: Codec) -> Totals:
    """Of all calls so far of graphs that were compiled for this codec."""
    return dataclasses.replace(TOTALS.get(str(codec), Totals()))


def report(codec: Codec, first: int, raw: int, held: int) -> dict[tuple[str, str], list[int]]:
    """{(operation, how it is kept): [tensors, bytes that autograd would hold, bytes that are held]} of one pass.

    first: of the graphs that may have run.  By operation where all of these have: then the bytes add up.
    """
    rows = [row for graph in graphs_of(codec)[first:] for row in graph]
    if abs(sum(row.raw for row in rows) - raw) > raw // 100:
        return {("compiled graphs", "codes"): [1, raw, held]}
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        sums = found.setdefault((row.operation, KEPT[row.kept]), [0, 0, 0])
        for i, value in enumerate((1, row.raw, row.held)):
            sums[i] += value
    return found


def _context() -> dict[str, Any] | None:
    """The graphs that the hooks are inlined into; None in eager mode."""
    module = sys.modules.get("torch._functorch._aot_autograd.graph_compile")
    return None if module is None else module._get_saved_tensor_hook_context()


def _plan(context: dict[str, Any], codec: Codec) -> Plan:
    plans, graph = _PLANS.setdefault(str(codec), weakref.WeakKeyDictionary()), context["_fw_graph"]
    if graph not in plans:
        plan = plans[graph] = Plan(graph, context["_bw_graph"], codec)
        graphs.make_again(plan)
        _REPORTS.setdefault(str(codec), []).append(plan.rows())
    return plans[graph]


def _check(codec: Codec) -> None:
    traits = codec.traits
    if traits.per_sample or (traits.stateful and not traits.stochastic):
        raise ValueError(
            f"saved={codec}: inside torch.compile a codec must not remember earlier tensors. Use block, uniform, "
            "float8 or identity, or train without torch.compile."
        )


def _module(function: Callable[[Any], Any], name: str) -> GraphModule:
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
