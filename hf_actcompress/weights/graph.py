"""A graph of operators as JSON, and back: for int8 models, whose class is gone after quantization.

torch's own archives (`torch.export.save`) are pickles in parts, and let a file name any function below `torch`.  Here
a file can name only operators that compute tensors from tensors; none of them opens a file or runs code.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

# Beside the operators of these namespaces: arithmetic on sizes.
NAMESPACES = ("aten", "quantized_decomposed")
FUNCTIONS = {f"operator.{f.__name__}": f for f in (
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
    operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
)} | {"torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min}  # fmt: skip
NAMES = {function: name for name, function in FUNCTIONS.items()}
# Arguments that JSON lacks.
CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format, "device": torch.device,
}  # fmt: skip
PRIVATE = ("__and__", "__or__", "__xor__", "_assert_tensor_metadata", "_softmax", "_log_softmax", "_to_copy")


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes in order.  Raises ValueError for an operator that `graph_from_json` would refuse."""
    nodes = []
    for node in graph.nodes:
        if node.op == "call_module" and not node.users:
            continue  # torch's check of the input's shape
        target = node.target
        if node.op == "call_function":
            target = NAMES.get(target) or str(target)
            _function(target)
        elif node.op not in ("placeholder", "get_attr", "output"):
            raise ValueError(f"The graph has the node {node.name}, a {node.op}, which cannot be saved.")
        args = node.args
        if node.op == "output" and isinstance(args[0], (list, tuple)) and len(args[0]) == 1:
            args = tuple(args[0])  # torch.export puts a single result into a tuple
        nodes.append({"name": node.name, "op": node.op, "target": target, "args": _write(args),
                      "kwargs": _write(node.kwargs)})  # fmt: skip
    return nodes


def graph_from_json(nodes: Any, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The module that computes what the nodes say; `tensors` are its parameters and buffers by name.

    Raises ValueError for nodes that `graph_to_json` would not have written.
    """
    graph, known = fx.Graph(), {}
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise ValueError("the graph is no list of nodes")
    for node in nodes:
        try:
            name, op, target = node["name"], node["op"], node["target"]
            args, kwargs = _read(node["args"], known), _read(node["kwargs"], known)
        except (KeyError, TypeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"the node {node.get('name')!r} is not complete ({reason})") from None
        if not (isinstance(name, str) and name.isidentifier() and isinstance(target, str)):
            raise ValueError(f"the node {name!r} with target {target!r} has no proper name")
        if op == "get_attr" and target not in tensors:
            raise ValueError(f"the node {name!r} reads {target!r}, and there is no such tensor")
        if op == "call_function":
            target = _function(target)
        elif op not in ("placeholder", "get_attr", "output"):
            raise ValueError(f"the node {name!r} is a {op!r}")
        known[name] = graph.create_node(op, target, tuple(args), kwargs, name=name)
    if not nodes or nodes[-1]["op"] != "output":
        raise ValueError("the graph does not end with an output")
    graph.lint()
    return fx.GraphModule(dict(tensors), graph)


def _function(name: str) -> Any:
    """The operator of a name such as "aten.conv2d.default"."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, *rest = name.split(".")
    if namespace in NAMESPACES and len(rest) == 2:
        op, overload = rest
        private = op.startswith("_") and op not in PRIVATE
        if not private and not overload.startswith("_") and "out" not in overload.split("_") and op != "from_file":
            found = getattr(getattr(getattr(torch.ops, namespace), op, None), overload, None)
            if isinstance(found, torch._ops.OpOverload):
                return found
    raise ValueError(f"the operator {name!r} is not one that a quantized model's file may call")


def _write(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_write(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _write(item) for key, item in value.items()}}
    for kind, cls in CONSTANTS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, slice):
        return {"slice": _write([value.start, value.stop, value.step])}
    raise ValueError(f"The graph has a {type(value).__name__} among its arguments, which cannot be saved.")


def _read(value: Any, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items() if len(value) == 1 else (("?", value),)
    if kind == "node":
        return known[inner]
    if kind == "dict":
        return {str(key): _read(item, known) for key, item in inner.items()}
    if kind == "slice":
        return slice(*_read(inner, known))
    if kind == "device":
        return torch.device(inner)
    found = getattr(torch, inner, None) if isinstance(inner, str) else None
    if kind not in CONSTANTS or not isinstance(found, CONSTANTS[kind]):
        raise ValueError(f"the argument {value!r} is not understood")
    return found
