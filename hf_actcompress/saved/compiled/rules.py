"""What a compiled backward graph does with a saved tensor, and so how that tensor may be kept.

The tables name operators of AOTAutograd's graphs.  What is in no table is kept exactly.  Nothing here knows codecs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

# Move or cast values.
VIEWS = frozenset(
    "aten::view aten::_unsafe_view aten::reshape aten::permute aten::transpose aten::t aten::unsqueeze aten::squeeze "
    "aten::expand aten::slice aten::select aten::alias aten::detach aten::clone aten::_to_copy aten::cat aten::split "
    "aten::split_with_sizes aten::constant_pad_nd aten::unbind aten::flip prims::convert_element_type".split()
)
# Elementwise, and with a bounded slope wherever networks use them: an error in goes out as an error of like size.
SMOOTH = frozenset(
    "aten::add aten::sub aten::rsub aten::mul aten::neg aten::erf aten::tanh aten::sigmoid aten::sin aten::cos "
    "aten::relu aten::silu aten::gelu aten::square aten::where aten::clamp aten::clamp_min aten::clamp_max "
    "aten::hardtanh aten::leaky_relu aten::hardswish aten::hardsigmoid aten::mish prims::fma aten::addcmul".split()
)
REDUCTIONS = frozenset("aten::sum aten::mean aten::var aten::var_mean aten::amax".split())
# Wild at zero: only of statistics of rows (norms), which are never near it.
STATISTICS = frozenset("aten::rsqrt aten::sqrt aten::reciprocal".split())
PRODUCTS = frozenset("aten::mm aten::bmm aten::addmm aten::baddbmm aten::convolution".split())
COMPARISONS = frozenset("aten::le aten::lt aten::ge aten::gt aten::eq aten::ne".split())
LOGIC = frozenset(
    "aten::bitwise_or aten::bitwise_and aten::bitwise_not aten::logical_or aten::logical_and aten::logical_not".split()
)
CONSTANTS = frozenset("aten::full aten::scalar_tensor prims::iota".split())
# Fused attention: forward operator -> its backward, whose arguments 1 to 5 are q, k, v, out and logsumexp.
ATTENTION = {
    f"aten::{name}": f"aten::{name}_backward"
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}
EFFICIENT = "aten::_scaled_dot_product_efficient_attention"
# Backward operator -> the arguments that it takes linearly, or through a smooth slope.
BACKWARD = {
    **dict.fromkeys(PRODUCTS | {"aten::mul", "aten::convolution_backward", "prims::fma", "aten::addcmul"}, (0, 1, 2)),
    "aten::div": (0,),
    "aten::native_layer_norm_backward": (1,),
    "aten::_fused_rms_norm_backward": (1,),
    "aten::native_group_norm_backward": (1,),
    "aten::native_batch_norm_backward": (1,),
    "aten::cudnn_batch_norm_backward": (0,),
    "aten::gelu_backward": (1,),
    "aten::silu_backward": (1,),
    "aten::tanh_backward": (1,),
    "aten::sigmoid_backward": (1,),
    "aten::_softmax_backward_data": (1,),
}


def operator_of(node: Node) -> str:
    """The name aten::mul of a node, or nothing where it calls none."""
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def value_of(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, Node) else None


def is_float(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def hint(size: Any) -> int:
    """A number for a size that may be symbolic: the one of the call that was compiled."""
    if isinstance(size, int):
        return size
    found = size.node.hint
    return 4096 if found is None else int(found)


def numel(node: Node) -> int:
    return hint(value_of(node).numel())


def nbytes(node: Node) -> int:
    return numel(node) * value_of(node).element_size()


def depends_on_gradients(graph: Graph) -> set[Node]:
    """The nodes of a backward graph that are, or are made from, an incoming gradient."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.name.startswith("tangents") or found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def attention_of(node: Node) -> Node | None:
    """The fused attention, in the forward graph, whose output or logsumexp this is or is a view of."""
    while operator_of(node) in VIEWS and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.target is not operator.getitem:
        return None
    made_by = node.args[0]
    return made_by if operator_of(made_by) in ATTENTION or operator_of(made_by) == EFFICIENT else None


def logistic(node: Node) -> bool:
    """Whether an exp, reciprocal or division is a part of 1 / (1 + exp(-x)), which sigmoid and SiLU are made of."""
    name = operator_of(node)
    if name == "aten::exp":
        return operator_of(node.args[0]) == "aten::neg" and all(_one_more(user) for user in node.users)
    if name == "aten::reciprocal" or name == "aten::div":
        bottom = node.args[-1]
        return isinstance(bottom, Node) and _one_more(bottom) and logistic(bottom.args[0])
    return False


def _one_more(node: Node) -> bool:
    return operator_of(node) == "aten::add" and node.args[1] == 1 and isinstance(node.args[0], Node)


def cheap(node: Node) -> bool:
    """Whether an operation of the forward pass may run again on decoded values."""
    name = operator_of(node)
    if name == "aten::div":
        return not isinstance(node.args[1], Node) or logistic(node)
    return name in VIEWS or name in SMOOTH or name in CONSTANTS or logistic(node)


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument of a call, by its name in the operator's schema."""
    for index, entry in enumerate(node.target._schema.arguments):
        if entry.name == name:
            return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
    return default


def masks_from(comparison: Node) -> list[Node]:
    """The bool tensors, made of a comparison and others, that something else than logic uses."""
    found, seen, waiting = [], {comparison}, [comparison]
    while waiting:
        node = waiting.pop()
        logic = [user for user in node.users if operator_of(user) in LOGIC]
        if len(logic) < len(node.users):
            found.append(node)
        waiting += set(logic) - seen
        seen.update(logic)
    return found


class Uses:
    """Walks from a saved tensor through a backward graph and finds what forbids a decoded value there.

    attentions: the fused attentions that will run again in backward, so that their results fit decoded q, k, v.
    """

    def __init__(self, graph: Graph, attentions: set[Node], forward_of: dict[str, Node]) -> None:
        self.gradients, self.attentions, self.forward_of = depends_on_gradients(graph), attentions, forward_of

    def objection(self, saved: Node) -> str:
        """The first operation that needs the saved tensor exactly, or "" if there is none.

        Afterwards `sided` says whether one asks which values are 0 or less, the mask of a ReLU, and `masks` are bool
        tensors that comparisons make of what is computed again: they have to be those of the forward pass.
        """
        self.size, seen, waiting, self.sided, self.masks = numel(saved), {saved}, [saved], False, []
        same = {saved}
        while waiting:
            node = waiting.pop()
            for user in node.users:
                if user in seen or user.op == "output":
                    continue
                if node in same and operator_of(user) == "aten::le" and user.args[1] == 0:
                    self.sided = True
                    continue
                if node in same and operator_of(user) in ("aten::alias", "aten::detach"):
                    same.add(user)
                if operator_of(user) in COMPARISONS and user not in self.gradients:
                    self.masks += [mask for mask in masks_from(user) if mask not in self.masks]
                    continue
                goes_on = self._gradient(node, user) if user in self.gradients else self._forward(node, user, seen)
                if goes_on is None:
                    return operator_of(user) or str(user.target)
                if goes_on:
                    seen.add(user)
                    waiting.append(user)
        return ""

    def _gradient(self, node: Node, user: Node) -> bool | None:
        """A product with a gradient ends the walk; None forbids."""
        name = operator_of(user)
        if name in ATTENTION.values():
            return False if self._fits(user) else None
        places = [i for i, entry in enumerate(user.args) if entry is node]
        if name == "aten::div" and self._statistic(node):
            return False
        return False if places and all(i in BACKWARD.get(name, ()) for i in places) else None

    def _forward(self, node: Node, user: Node, seen: set[Node]) -> bool | None:
        """An operation of the forward pass that backward computes again: whether to go on; None forbids."""
        name = operator_of(user)
        if name in VIEWS or name in SMOOTH or name in REDUCTIONS or name in PRODUCTS or name in ATTENTION:
            return True
        if user.target is operator.getitem:
            return True
        if name in STATISTICS:
            return True if self._statistic(node) or logistic(user) else None
        if name == "aten::pow":
            power = user.args[1]
            return True if power in (1, 2, 3, 4) or power in (-0.5, -1) and self._statistic(node) else None
        if name == "aten::exp":
            return True if logistic(user) or self._bell(node) or self._softmax(node, user) else None
        if name == "aten::div":
            return True if user.args[1] is not node or self._statistic(node) or logistic(user) else None
        return None

    def _fits(self, backward: Node) -> bool:
        """Whether out and logsumexp are made again from what q, k and v are in backward."""
        for entry in backward.args[4:6]:
            forward = self.forward_of.get(entry.name)
            made_by = attention_of(entry) or (attention_of(forward) if forward is not None else None)
            if made_by is None or (made_by.graph is not backward.graph and made_by not in self.attentions):
                return False
        return True

    def _statistic(self, node: Node) -> bool:
        return numel(node) * 8 <= self.size

    def _bell(self, node: Node) -> bool:
        """x * x * negative: the slope of GELU."""
        if operator_of(node) != "aten::mul" or not isinstance(node.args[1], (int, float)) or node.args[1] > 0:
            return False
        square = node.args[0]
        if operator_of(square) == "aten::pow":
            return square.args[1] == 2
        return operator_of(square) == "aten::mul" and square.args[0] is square.args[1]

    def _softmax(self, node: Node, exp: Node) -> bool:
        """exp(x - max(x)) that is divided by its own sum, both computed again in backward."""
        if operator_of(node) != "aten::sub" or operator_of(node.args[1]) != "aten::amax":
            return False
        sums = [user for user in exp.users if operator_of(user) == "aten::sum"]
        others = [user for user in exp.users if user not in sums]
        return bool(sums) and all(operator_of(u) == "aten::div" and u.args[1] in sums for u in others)
