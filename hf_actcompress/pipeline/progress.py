"""A progress bar for the loop: steps, loss, and the shares of compute, codec and link."""

from __future__ import annotations

from typing import Any


class Progress:
    """`with Progress(total, trainer) as bar: bar(step)`; silent where the output is no terminal."""

    def __init__(self, total: int, trainer: Any) -> None:
        from rich import progress

        columns = (
            progress.TextColumn("step"), progress.MofNCompleteColumn(), progress.BarColumn(),
            progress.TextColumn("{task.fields[note]}"), progress.TimeRemainingColumn(),
        )  # fmt: skip
        self._bar, self._trainer = progress.Progress(*columns), trainer
        self._task = self._bar.add_task("", total=total, note="")

    def __enter__(self) -> Any:
        self._bar.start()
        return self._show

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def _show(self, step: int) -> None:
        self._bar.update(self._task, completed=step, note=describe(self._trainer.history))


def describe(history: list[dict[str, Any]]) -> str:
    """The last entry of the log in a line."""
    if not history:
        return ""
    one = history[-1]["ranks"][0]
    total = one["total"] or 1.0
    parts = {"compute": one["compute"], "codec": one["encode"] + one["decode"], "link": one["wait"]}
    shares = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in parts.items())
    return f"loss {history[-1]['loss']:.4f} (rank 0: {shares})"
