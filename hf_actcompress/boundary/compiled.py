"""What torch.compile has to be told of hooks.

A compiled graph is used again where its guards hold, and by default they do not ask whether a module without hooks has
got one since, or whether another layer of the same class has one.  Such a graph would compress nothing, silently.
"""

from __future__ import annotations

import contextlib
import logging
import sys

import torch

from .passes import Passes

logger = logging.getLogger(__name__)


class HookGuards:
    """While one of these exists and was not removed, graphs are guarded on hooks.

    Graphs that were compiled before are dropped: they are compiled again at their next call, with the hooks.
    """

    _count = 0
    _before = True

    def __init__(self) -> None:
        import torch._dynamo as dynamo  # loads the compiler, which `import hf_actcompress` should not

        if not HookGuards._count:
            HookGuards._before = dynamo.config.skip_nnmodule_hook_guards
            dynamo.config.skip_nnmodule_hook_guards = False
        HookGuards._count += 1
        if dynamo.convert_frame.output_codes.seen:
            logger.info("torch.compile has compiled graphs without the hooks of this compression; all graphs of this "
                        "process are compiled again at their next call")  # fmt: skip
            dynamo.reset_code_caches()
        # By itself this hook needs no graph.  Within the graph of a larger model it is traced.
        for function in (Passes.__call__, Passes.begin, Passes.end):
            dynamo.eval_frame.skip_code(function.__code__)

    def remove(self) -> None:
        import torch._dynamo as dynamo

        HookGuards._count -= 1
        if not HookGuards._count:
            dynamo.config.skip_nnmodule_hook_guards = HookGuards._before


def eagerly() -> contextlib.AbstractContextManager:
    """Runs nothing compiled: hooks that find a model's layers must not be compiled into its graphs."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()  # then nothing is
    return torch.compiler.set_stance("force_eager")
