"""Carries a plan out: what is traced into the forward graph, and what is put into the backward graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .operators import bits_saved, decode_saved, encode_saved, flags_saved, row_nbytes
from .plan import Form, Plan, two_values

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
    payload = encode_saved(form.dense(x), codec, form.group, len(form.tail), *plan.shares[name])
    return payload if sides is None else torch.cat([payload, sides], -1)


def fetch(plan: Plan, name: str) -> None:
    """After `encoded` was inlined: the empty tensor in the forward graph becomes a copy of a small input."""
    if name in plan.fetched:
        new = plan.forward.output_node().prev
        new.target, new.args, new.kwargs = aten.clone.default, (plan.fetched[name],), {}


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


def _decoded(plan: Plan, name: str) -> Node:
    node, form, placeholder = plan.nodes[name], plan.forms[name], plan.inputs[name]
    x: Tensor = node.meta["val"]
    if plan.kept[name] == "bits":
        new = _flags(plan, name, placeholder)
        if values := two_values(node):
            low, high = (_constant(plan, value, x) for value in values)
            new = _call(plan, aten.where.self, (new, low, high))
        return new
    codes = placeholder
    if name in plan.sided:
        begin = row_nbytes(plan.codec, form.group, math.prod(form.tail))
        codes = _call(plan, aten.slice.Tensor, (placeholder, -1, 0, begin))
    new = _call(plan, decode_saved, (codes, str(plan.codec), form.group, form.tail, x.dtype))
    new = _back(plan, form, new)
    if name in plan.sided:
        new = _with_sides(plan, name, new, _call(plan, aten.slice.Tensor, (placeholder, -1, begin)))
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
    above = _call(plan, aten.clamp_min.default, (value, torch.finfo(x.dtype).tiny))
    return _call(plan, aten.where.self, (_flags(plan, name, bits), above, _constant(plan, 0.0, x)))


def _constant(plan: Plan, value: float, like: Tensor) -> Node:
    kwargs = {"dtype": like.dtype, "device": like.device}
    new = plan.backward.call_function(aten.full.default, ([], value), kwargs)
    with like.fake_mode:
        new.meta["val"] = torch.full([], value, **kwargs)
    return new


def _call(plan: Plan, target: Any, args: tuple) -> Node:
    """A new node, with its value in its meta data."""
    new = plan.backward.call_function(target, args)
    values = [_value(plan, entry) if isinstance(entry, Node) else entry for entry in args]
    with values[0].fake_mode:
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
