"""What callbacks need of the Trainer that calls them, and it does not offer: to be called before others, to add to its
checkpoints, to evaluate twice.

Nothing here knows codecs; transformers is not imported.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

UNCOMPRESSED = "uncompressed"  # the name that the second metrics of evaluate="both" carry


class _Replaced:
    """A method of one Trainer, replaced by this object until `restore`."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def restore(self, owner: Any, name: str) -> None:
        """What was there before: the class's own method, or what somebody had put in its place."""
        delattr(owner, name)
        if self.method != getattr(owner, name):
            setattr(owner, name, self.method)


class _SaveStates(_Replaced):
    """`Trainer._save_checkpoint`, with the callbacks' states in the folder before the rest.

    The Trainer deletes older checkpoints before it tells callbacks of the new one (`on_save`): a run that is killed in
    between would be left with a checkpoint without states.  Only this method knows the folder, too, which a
    hyperparameter search puts into the trial's own.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer._save_checkpoint)
        self.trainer, self.saves = trainer, []

    def __call__(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(self.trainer._get_output_dir(trial=trial)) / f"checkpoint-{self.trainer.state.global_step}"
        for save in self.saves:
            save(folder, self.trainer.is_world_process_zero())
        self.trainer.accelerator.wait_for_everyone()  # the first process deletes older checkpoints for all
        return self.method(model, trial, *args, **kwargs)


def save_with_checkpoints(trainer: Any, save: Callable[[Path, bool], None]) -> Callable[[], None]:
    """Have `save(folder, whether this is the first process)` called whenever a Trainer writes a checkpoint.

    Returns a function that ends this, which may be called more than once.
    """
    saver = vars(trainer).get("_save_checkpoint")
    if not isinstance(saver, _SaveStates):
        trainer._save_checkpoint = saver = _SaveStates(trainer)
    saver.saves.append(save)

    def stop() -> None:
        if save in saver.saves:
            saver.saves.remove(save)
        if not saver.saves and vars(trainer).get("_save_checkpoint") is saver:
            saver.restore(trainer, "_save_checkpoint")

    return stop


class EvaluateTwice(_Replaced):
    """`Trainer.evaluate`, compressed, and once more without compression under another name."""

    PREFIX = "metric_key_prefix"

    def __init__(self, method: Any, handle: Any) -> None:
        super().__init__(method)
        self.handle, self._inside = handle, False

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self._inside:  # the Trainer calls itself once for each of several data sets
            return self.method(*args, **kwargs)
        self._inside = True
        try:
            metrics = self.method(*args, **kwargs)
            with self.handle.disabled():
                return {**metrics, **self._again(args, kwargs)}
        finally:
            self._inside = False

    def _again(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, float]:
        """The same evaluation under another prefix.  Trainers have arguments of their own, in orders of their own."""
        signature = inspect.signature(self.method)
        if self.PREFIX in signature.parameters:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            bound.arguments[self.PREFIX] = f"{bound.arguments[self.PREFIX]}_{UNCOMPRESSED}"
            return self.method(*bound.args, **bound.kwargs)
        prefix = f"{kwargs.get(self.PREFIX, 'eval')}_{UNCOMPRESSED}"
        if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            return self.method(*args, **{**kwargs, self.PREFIX: prefix})
        return {f"{UNCOMPRESSED}_{key}": value for key, value in self.method(*args, **kwargs).items()}


# A Trainer hands its callbacks neither itself nor the folder that it resumes from, and neither can be had otherwise:
# the frames that called the event have both.
def _callers() -> Iterator[dict[str, Any]]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back


def go_first(callback: Any) -> Any:
    """Move a callback before those that report, so that they see what its `on_log` adds; the Trainer, or None.

    To be called within one of the callback's own events.
    """
    for values in _callers():
        trainer = values.get("self")
        if hasattr(trainer, "callback_handler"):
            handler = trainer.callback_handler
            # A new list: the handler is iterating over the old one.
            handler.callbacks = [callback, *(c for c in handler.callbacks if c is not callback)]
            return trainer
    return None


def resumed_from(args: Any, state: Any) -> Path:
    """The checkpoint folder that the calling run was resumed from."""
    for values in _callers():
        folder = values.get("resume_from_checkpoint")
        if isinstance(folder, (str, os.PathLike)):
            return Path(folder)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
