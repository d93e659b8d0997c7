"""Which modules of a model may be its blocks: by transformers' class, by names that are given, or by structure.

    checkpointed     instances of transformers' GradientCheckpointingLayer
    listed           members of nn.ModuleList and nn.Sequential
    children         children that share a class with another child of the same parent (RegNet, Inception, DLA)
    resolutions      runs of plain layers between two changes of the image's size (VGG)

This file knows modules and a traced pass, not the numbers of layers.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from .tracing import Run, inside

CONTAINERS = (nn.Sequential, nn.ModuleList)


def innermost(paths: list[str]) -> list[str]:
    return [p for p in paths if not any(inside(q, p) for q in paths)]


def has_own_parameters(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def is_unit(module: nn.Module) -> bool:
    """Does something by itself: a leaf, or a parent with parameters of its own (a fused norm and activation)."""
    leaf = next(module.children(), None) is None
    return (leaf or has_own_parameters(module)) and not isinstance(module, (nn.Identity, nn.ModuleDict, *CONTAINERS))


def _holds_two(module: nn.Module) -> bool:
    return sum(map(has_own_parameters, module.modules())) >= 2


# -- candidates ----------------------------------------------------------------------------------------------------
def named(modules: dict[str, nn.Module], names: Sequence[str], option: str, listing: Callable[..., str]) -> list[str]:
    """Paths that the names or globs match, in the order of the names.  listing: candidates for an error message."""
    found: list[str] = []
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{option}={names!r} is not a list of module paths or globs, such as 'encoder.layer.*'.")
        pattern = name.split(".")
        hits = [path for path in modules if path and path.count(".") == name.count(".")
                and all(map(fnmatch.fnmatchcase, path.split("."), pattern))]  # fmt: skip
        if not hits:
            raise ValueError(f"{option}={name!r} matches no module; {listing(name, list(modules)[1:])}")
        found += [path for path in hits if path not in found]
    for inner in found:
        outer = next((path for path in found if inside(inner, path)), None)
        if outer is not None:
            raise ValueError(f"{option}: {inner!r} lies inside {outer!r}; name one of the two")
    return found


def checkpointed(modules: dict[str, nn.Module]) -> list[str]:
    # By name, so that finding layers does not import transformers.
    return innermost([path for path, module in modules.items()
                      if any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)])  # fmt: skip


def listed(modules: dict[str, nn.Module]) -> list[str]:
    """Members of ModuleList/Sequential that are not containers themselves and hold two parametrised leaves; and,
    where such members lie in one of several siblings of a class, that sibling (torchvision's GoogLeNet)."""
    found = [path for path, module in modules.items() if path and not isinstance(module, CONTAINERS)
             and isinstance(modules.get(path.rpartition(".")[0]), CONTAINERS) and _holds_two(module)]  # fmt: skip
    around = {path.rsplit(".", n)[0] for path in found for n in range(1, path.count(".") + 1)} - set(found)
    for path in sorted(around):
        parent = modules[path.rpartition(".")[0]]
        twins = sum(type(child) is type(modules[path]) for child in parent.children())
        if twins > 1 and not isinstance(modules[path], CONTAINERS) and not isinstance(parent, CONTAINERS):
            found.append(path)
    return found


def children(modules: dict[str, nn.Module]) -> list[str]:
    """Children that hold two parametrised leaves and share their class with another child of their parent, or would in
    another parent of its class (a stage with a single block); and the other children of such a parent, where they are
    built in the same way (Inception's reductions between its blocks)."""
    own = {path: [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()
                  if not isinstance(child, CONTAINERS) and _holds_two(child)]
           for path, module in modules.items() if not isinstance(module, CONTAINERS)}  # fmt: skip
    shared = {(type(modules[path]), kind) for path, kept in own.items()
              for kind, count in Counter(type(child) for _, child in kept).items() if count > 1}  # fmt: skip
    found: set[str] = set()
    others: list[str] = []
    for path, kept in own.items():
        members = {name for name, child in kept if (type(modules[path]), type(child)) in shared}
        found |= members
        others += [name for name, _ in kept if members and name not in members]
    found |= {path for path in others if any(inside(inner, path) for inner in found)}
    return [path for path in modules if path in found]


# -- with a traced pass --------------------------------------------------------------------------------------------
def ran(candidates: list[str], run: Run) -> dict[str, str]:
    """What was called -> the candidate: itself, or, where its `forward` alone was called (SqueezeBert) so that no hook
    fires on it, what was called last inside it."""
    found = {}
    for path in candidates:
        if path in run.calls:
            found[path] = path
        elif called := [each for each in run.calls if inside(each, path) and _parent_called(each, path, run)]:
            found.setdefault(called[-1], path)
    return found


def _parent_called(path: str, top: str, run: Run) -> bool:
    """Whether nothing between `top` and `path` was called: the outermost module that was."""
    between = path[len(top) + 1 :].split(".")[:-1]
    return not any(".".join([top, *between[: n + 1]]) in run.calls for n in range(len(between)))


def level(modules: dict[str, nn.Module], candidates: Iterable[str], run: Run) -> list[str]:
    """Of nested candidates the outermost, but stages are opened: a stage hands on its last member's output untouched,
    while a residual block adds to it. A class is opened only if all its instances are stages, because blocks without
    a residual look like stages where their neighbours do not."""
    known, called = set(candidates), [path for path in candidates if path in run.calls]
    closed = {type(modules[path]) for path in called if not run.handed_on.get(path, set()) & known}
    blocks = [path for path in called if type(modules[path]) in closed]
    return [path for path in blocks if not any(inside(path, outer) for outer in blocks)]


def covered(modules: dict[str, nn.Module], blocks: list[str], run: Run) -> float:
    """The share of layers with parameters that ran inside the blocks."""
    leaves = [path for path in run.calls if has_own_parameters(modules[path])]
    return sum(any(path == b or inside(path, b) for b in blocks) for path in leaves) / max(len(leaves), 1)


def resolutions(modules: dict[str, nn.Module], run: Run) -> list[str]:
    """For a plain chain of convolutions: the last module before the size of the image changes, and the last one.

    Fewer than two are no layers.
    """
    ends: list[str] = []
    last, size, weights = "", None, False
    for path in dict.fromkeys(run.events):
        if not is_unit(modules[path]) or run.calls[path] > 1:
            continue
        shape = run.outputs[path][0]
        if shape is None or len(shape) < 3 or set(shape[2:]) == {1}:
            break  # the classifier
        own = has_own_parameters(modules[path])
        if weights and shape[2:] != size:
            # What shrinks the image ends its stage, unless it has weights: a convolution with a stride begins one.
            ends.append(last if own else path)
            weights = False
        last, size, weights = path, shape[2:], own or (weights and path not in ends)
    if weights:
        ends.append(last)
    return ends if len(ends) > 1 else []
