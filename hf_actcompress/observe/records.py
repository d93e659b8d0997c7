"""The analysis records of a run: one JSON object a line, all with the same columns.

pandas.read_json(path, lines=True) and datasets.load_dataset("json", data_files=path) read them as they are;
`read_records` checks them as well.  This file knows no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE_NAME = "actcompress_analysis.jsonl"

COLUMNS = {
    "model": "class, and a number made from the names and shapes of its parameters",
    "step": "optimizer steps that were done before",
    "epoch": "as the Trainer counts it; null elsewhere",
    "site": "'boundary', 'saved' (kept for the backward pass) or 'parameters' (their gradient)",
    "layer": "index in run order; null for the gradient as a whole and for 'saved'",
    "name": "of the layer or of the saved tensor; '' for the gradient as a whole",
    "direction": "'forward', 'backward', 'saved' or 'gradient'",
    "codec": "spec; '' for 'parameters'",
    "call": "0, or which call of a module that runs several times in a forward pass",
    "numel": "values of the tensor, or parameters",
    "ratio": "raw bytes over payload bytes; null for 'parameters'",
    "rel_error": "|decoded - input| / |input|",
    "snr_db": "the same as a signal-to-noise ratio in decibels; null for an exact copy",
    "cosine": "between decoded and input",
    "bias": "mean error over its standard error; beyond about 3 rounding is not unbiased",
    "zeroed": "share of values that were not zero and are now",
    "saturated": "share of values beyond the largest or smallest decoded one",
    "outlier": "largest distance from the mean over the standard deviation of the input",
    "kurtosis": "of the input; 3 for a Gaussian",
    "effective_bits": "log2 of the input's standard deviation over the error's root mean square; null if exact",
    "loss": "of the sampled batch under compression",
    "plain_loss": "of the same batch, weights and random numbers without",
    "grad_cosine": "between the parameters' gradients of the two, over all parameters",
    "grad_error": "|compressed - plain| / |plain| of the same",
}


class Writer:
    """Appends rows to a file, always whole lines."""

    def __init__(self, path: str | os.PathLike[str], model: str, *, resume_at: int = 0) -> None:
        """A run that starts at step 0 starts a new file; one that resumes keeps the rows before `resume_at`.

        Raises ValueError where the rows that would be kept are of another model.
        """
        self.path, self.model = Path(path), model
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_at and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut short by the crash that this run resumes from
                if row.get("model") != model:
                    raise ValueError(
                        f"{self.path} holds records of {row.get('model')!r}, and this run trains {model!r}. Resume "
                        "with another output_dir, or move that file away."
                    )
                if row["step"] < resume_at:
                    kept.append(line)
        unfinished = self.path.with_name(f"{self.path.name}.tmp")
        unfinished.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        unfinished.replace(self.path)

    def __call__(self, rows: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of one run's file, or of a folder that holds one.

    Raises ValueError for a file that is not there, empty or cut short, rows of two models, and missing columns.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"There are no records at {path}. A run writes them with ActCompressConfig(analysis=True).")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not any(line.strip() for line in lines):
        raise ValueError(
            f"{path} is empty: the run ended before its first sampled step. Train further, or with a smaller "
            "analysis_every."
        )
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            last = "The file was cut short there: delete that line. " if number == len(lines) else ""
            raise ValueError(f"{path}, line {number} of {len(lines)} is not JSON ({error}). {last}".strip()) from None
        missing = [name for name in COLUMNS if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(
                f"{path}, line {number} lacks {', '.join(missing)}: it is no analysis record, or one of another "
                "version. Needed are all of: " + ", ".join(COLUMNS) + "."
            )
        rows.append(row)
    models = list(dict.fromkeys(row["model"] for row in rows))
    if len(models) > 1:
        raise ValueError(
            f"{path} mixes records of {len(models)} models ({', '.join(models)}). Their errors do not compare: keep a "
            "file for each."
        )
    return rows


def row(**values: Any) -> dict[str, Any]:
    """A row with every column, in order; what is not given is null; six digits are enough."""
    unknown = set(values) - set(COLUMNS)
    assert not unknown, unknown
    return {name: _short(values.get(name)) for name in COLUMNS}


def rounded(value: Any) -> Any:
    """The same with six digits of every number, in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else _short(value)


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
