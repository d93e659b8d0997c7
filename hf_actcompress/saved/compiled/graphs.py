"""Carries a plan out: what is traced into the forward graph, and what is put into the backward graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .operators import bits_saved, decode_saved, encode_saved, flags_saved
from .plan import Plan, two_values

aten = torch.ops.aten


# -- the forward graph ----------------------------------------------------------------------------------------------
def encoded(plan: Plan, name: str, x: Tensor) -> Tensor:
    """What is saved of `x`: traced into the forward graph."""
    kept = plan.kept.get(name, "exact")
    if kept == "exact":
        return x
    if kept == "again":
        primal = plan.fetched.get(name)
        if primal is None:
            return x.new_empty(0)
        like = primal.meta["val"]
        return x.new_empty(like.shape, dtype=like.dtype)  # `fetch` makes it a copy of the input
    form, codec = plan.forms[name], str(plan.codec)
    if kept == "bits":
        values = two_values(plan.nodes[name])
        return bits_saved(form.dense(x if values is None else x == values[0]), codec, x.element_size())
    return encode_saved(form.dense(x), codec, form.group, len(form.tail), *plan.shares[name])


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
    payload = encoded(plan, name, x)
    if plan.kept[name] == "bits":
        new = _call(plan, flags_saved, payload, (placeholder, form.tail[0]))
    else:
        new = _call(plan, decode_saved, payload, (placeholder, str(plan.codec), form.group, form.tail, x.dtype))
    if form.back != list(range(x.dim())):
        new = _call(plan, aten.permute.default, new.meta["val"], (new, form.back))
    if values := two_values(node):
        low, high = (_constant(plan, value, x) for value in values)
        new = _call(plan, aten.where.self, new.meta["val"], (new, low, high))
    return new


def _constant(plan: Plan, value: float, like: Tensor) -> Node:
    kwargs = {"dtype": like.dtype, "device": like.device}
    new = plan.backward.call_function(aten.full.default, ([], value), kwargs)
    with like.fake_mode:
        new.meta["val"] = torch.full([], value, **kwargs)
    return new


def _call(plan: Plan, target: Any, first: Tensor, args: tuple) -> Node:
    """A new node, with the shape of its result; `first` is the value of the first argument."""
    new = plan.backward.call_function(target, args)
    rest = [entry.meta["val"] if hasattr(entry, "meta") else entry for entry in args[1:]]
    with first.fake_mode:
        new.meta["val"] = target(first, *rest)
    return new


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
            own = _copy(plan, plan.nodes[name], own, plan.fetched.get(name), made)
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
