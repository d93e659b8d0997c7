"""Carries a plan out: what is traced into the forward graph, and what is put into the backward graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from ..kept import least
from .operators import bits_saved, decode_saved, encode_saved, flags_saved, row_nbytes
from .plan import Form, Plan, twin_of, two_values

aten = torch.ops.aten


# -- the forward graph ----------------------------------------------------------------------------------------------
def encoded(plan: Plan, name: str, x: Tensor) -> Tensor:
    """What is saved of `x`: traced into the forward graph."""
    kept, form, codec = plan.kept.get(name, "exact"), plan.forms.get(name), str(plan.codec)
    if kept == "exact":
        return x
    sides = bits_saved(~(form.dense(x) <= 0), codec, len(form.tail), 0) if name in plan.sided else None
    if kept == "again":
        if sides is not None:
            return sides
        primal = plan.fetched.get(name)
        if primal is None:
            return x.new_empty(0)
        like = primal.meta["val"]
        return x.new_empty(like.shape, dtype=like.dtype)  # `fetch` makes it a copy of the input
    if kept == "bits":
        values = two_values(plan.nodes[name])
        flags = x if values is None else x == values[0]
        return bits_saved(form.dense(flags), codec, len(form.tail), x.element_size())
    parts = [encode_saved(form.dense(x), codec, form.group, len(form.tail), *plan.shares[name])]
    parts += [] if sides is None else [sides]
    # What is compared is another tensor, which `fetch` puts there.
    parts += [bits_saved(form.dense(x) <= 0, codec, len(form.tail), 0) for _ in plan.masks.get(name, ())]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def fetch(plan: Plan, name: str) -> None:
    """After `encoded` was inlined: the empty tensor in the forward graph becomes a copy of a small input, and masks
    those of the tensors that they are made of."""
    if masks := plan.masks.get(name):
        packed = [node for node in plan.forward.nodes if node.target is bits_saved][-len(masks) :]
        for node, mask in zip(packed, masks, strict=True):
            with plan.forward.inserting_before(node):
                flags = _twin(plan, mask)
                order = _call(plan, aten.permute.default, (flags, plan.forms[name].order), plan.forward)
                node.replace_input_with(node.args[0], order)
    if name in plan.fetched:
        new = plan.forward.output_node().prev
        new.target, new.args, new.kwargs = aten.clone.default, (plan.fetched[name],), {}


def _twin(plan: Plan, node: Node) -> Node:
    """The node of the forward graph for one of the backward graph, made where there is none."""
    found = twin_of(plan.forward, node)
    if found is None:
        args = tuple(_twin(plan, entry) if isinstance(entry, Node) else entry for entry in node.args)
        found = _call(plan, node.target, args, plan.forward)
    return found


# -- the backward graph ---------------------------------------------------------------------------------------------
def decode(plan: Plan, name: str) -> None:
    """Before the hooks are inlined for this tensor: decode where it is needed first in backward."""
    if plan.kept.get(name) not in ("codes", "bits") or name in plan.decoded:
        return
    plan.decoded.add(name)  # the hooks are called several times
    placeholder = plan.inputs[name]
    users = set(placeholder.users)
    if not users:
        return
    first = next(node for node in plan.backward.nodes if node in users)
    with plan.backward.inserting_before(first):
        made = _decoded(plan, name)
    for user in users:
        user.replace_input_with(placeholder, made)
    _use_masks(plan, name)


def _use_masks(plan: Plan, name: str) -> None:
    """What compares decoded values becomes the mask of the forward pass."""
    masks, form, codec = plan.masks.get(name, ()), plan.forms.get(name), plan.codec
    for k, mask in enumerate(masks):
        row = math.prod(form.tail)
        begin = row_nbytes(codec, form.group, row) + -(-row // 8) * (k + (name in plan.sided))
        with plan.backward.inserting_before(mask):
            bits = _call(plan, aten.slice.Tensor, (plan.inputs[name], -1, begin, begin + -(-row // 8)))
            mask.replace_all_uses_with(_flags(plan, name, bits))


def _decoded(plan: Plan, name: str) -> Node:
    node, form, placeholder = plan.nodes[name], plan.forms[name], plan.inputs[name]
    x: Tensor = node.meta["val"]
    if plan.kept[name] == "bits":
        new = _flags(plan, name, placeholder)
        if values := two_values(node):
            low, high = (_constant(plan, value, x) for value in values)
            new = _call(plan, aten.where.self, (new, low, high))
        return new
    codes, row = placeholder, math.prod(form.tail)
    if name in plan.sided or name in plan.masks:
        begin = row_nbytes(plan.codec, form.group, row)
        codes = _call(plan, aten.slice.Tensor, (placeholder, -1, 0, begin))
    new = _call(plan, decode_saved, (codes, str(plan.codec), form.group, form.tail, x.dtype))
    new = _back(plan, form, new)
    if name in plan.sided:
        bits = _call(plan, aten.slice.Tensor, (placeholder, -1, begin, begin + -(-row // 8)))
        new = _with_sides(plan, name, new, bits)
    return new


def _back(plan: Plan, form: Form, new: Node) -> Node:
    if form.back == list(range(len(form.back))):
        return new
    return _call(plan, aten.permute.default, (new, form.back))


def _flags(plan: Plan, name: str, bits: Node) -> Node:
    """bool, with the dimensions of the tensor of that name."""
    form = plan.forms[name]
    return _back(plan, form, _call(plan, flags_saved, (bits, form.tail)))


def _with_sides(plan: Plan, name: str, value: Node, bits: Node) -> Node:
    """Above 0 where the result of the ReLU was, and 0 elsewhere."""
    x: Tensor = plan.nodes[name].meta["val"]
    above = _call(plan, aten.clamp_min.default, (value, least(x.dtype)))
    return _call(plan, aten.where.self, (_flags(plan, name, bits), above, _constant(plan, 0.0, x)))


def _constant(plan: Plan, value: float, like: Tensor) -> Node:
    kwargs = {"dtype": like.dtype, "device": like.device}
    new = plan.backward.call_function(aten.full.default, ([], value), kwargs)
    with like.fake_mode:
        new.meta["val"] = torch.full([], value, **kwargs)
    return new


def _call(plan: Plan, target: Any, args: tuple, graph: Graph | None = None) -> Node:
    """A new node of the backward or another graph, with its value in its meta data."""
    backward = graph is None
    new = (plan.backward if backward else graph).call_function(target, args)
    values = [(_value(plan, entry) if backward else entry.meta["val"]) if isinstance(entry, Node) else entry
              for entry in args]  # fmt: skip
    with values[0].fake_mode, disable_proxy_modes_tracing():  # the hooks are being traced
        new.meta["val"] = target(*values)
    return new


def _value(plan: Plan, node: Node) -> Tensor:
    """Of what will have been saved, for an input that is a saved tensor: it is traced with the tensor itself."""
    saved = plan.inputs.get(node.name) is node and plan.kept.get(node.name) in ("codes", "bits", "again")
    return encoded(plan, node.name, plan.nodes[node.name].meta["val"]) if saved else node.meta["val"]


def make_again(plan: Plan) -> None:
    """Where a value is needed first: so no more is alive at once than without codes."""
    made: dict[str, Node] = {}
    changed = {plan.inputs[n]: n for n, kept in plan.kept.items() if kept == "again"}
    for node in list(plan.backward.nodes):
        for entry in list(node.all_input_nodes):
            if entry in changed:
                with plan.backward.inserting_before(node):
                    node.replace_input_with(entry, _make(plan, changed[entry], made))


def _make(plan: Plan, name: str, made: dict[str, Node]) -> Node:
    """The node of the backward graph that has the value of a node of the forward graph."""
    if name not in made:
        own = plan.inputs[name]
        if plan.kept.get(name) == "again":
            copy = _copy(plan, plan.nodes[name], own, plan.fetched.get(name), made)
            own = _with_sides(plan, name, copy, own) if name in plan.sided else copy
        made[name] = own
    return made[name]


def _copy(plan: Plan, node: Node, own: Node, fetched: Node | None, made: dict[str, Node]) -> Node:
    def value(entry: Node) -> Node:
        if entry is fetched:
            return own
        if entry.name in plan.inputs:
            return _make(plan, entry.name, made)
        if entry.name not in made:
            made[entry.name] = _copy(plan, entry, own, fetched, made)
        return made[entry.name]

    for entry in node.all_input_nodes:  # before the node itself
        value(entry)
    return plan.backward.node_copy(node, value)
