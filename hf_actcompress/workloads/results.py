"""What a run found: one JSON file, written whole or not at all, and the same as tables on the terminal.

A record is a plain dict. Three of its keys become tables of their own; other keys with plain values become one more.

    metrics               {"accuracy": 0.91} or {"accuracy": {"plain": 0.91, "compressed": 0.90}}
    samples_per_second    the same shapes
    compression           [{"boundary", "codec", "direction", "ratio", "rel_error", "cosine", "bytes_saved"}, ...]
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

FILE_NAME = "results.json"
COMPRESSION_COLUMNS = ("boundary", "codec", "direction", "ratio", "rel_error", "cosine", "bytes_saved")


def environment() -> dict[str, Any]:
    """Versions and size of the machine, and nothing that names it or its folders."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def bf16_is_fast() -> bool:
    """Whether bf16 autocast makes training faster here: on accelerators that have bf16, and CPUs that multiply in it.

    Other CPUs emulate it: a convolution then takes about ten times as long as in fp32.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return True
    # torch has no public function for this; where the private ones are gone, fp32 is never wrong.
    supported = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(ask() for ask in supported if ask is not None)


def write_results(output_dir: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Writes `record` with `environment()` to `output_dir/results.json` and returns that path.

    Keys are sorted. NumPy and torch scalars become numbers; NaN and infinities, which JSON lacks, become the strings
    "nan", "inf" and "-inf". The file appears by renaming, so a reader or a crash never sees half of it.

    Raises:
        ValueError: if a value is neither JSON nor a scalar; it names the key.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain({"environment": environment(), **record}), indent=2, sort_keys=True, allow_nan=False)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=FILE_NAME, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        # mkstemp makes private files; results are as readable as their folder allows.
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / FILE_NAME)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return folder / FILE_NAME


def _plain(value: Any, key: str = "record") -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0:  # NumPy and torch scalars
        return _plain(value.item(), key)
    raise ValueError(
        f"{key} is a {type(value).__name__}; results hold numbers, strings, lists and dicts: "
        "convert it with tolist() or str()."
    )


def print_results(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a record as tables; parts that are absent are left out."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    known = {"metrics": "Metrics", "samples_per_second": "Samples per second"}
    settings = {key: value for key, value in record.items() if not isinstance(value, Mapping | list | tuple)}
    if settings:
        table = Table(title="Run", show_header=False)
        for key, value in settings.items():
            table.add_row(key, _show(value))
        console.print(table)
    for key, title in known.items():
        if record.get(key):
            console.print(_measure_table(title, record[key]))
    rows: Sequence[Mapping[str, Any]] = record.get("compression") or ()
    if rows:
        table = Table(title="Compression")
        for name in COMPRESSION_COLUMNS:
            numbers = any(isinstance(row.get(name), int | float) for row in rows)
            table.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_show(row.get(name), name) for name in COMPRESSION_COLUMNS))
        console.print(table)


def _measure_table(title: str, values: Any) -> Any:
    """One row a measure; one column a variant where the values are dicts (plain, compressed)."""
    from rich.table import Table

    if not isinstance(values, Mapping):
        values = {"value": values}
    variants = list(dict.fromkeys(name for value in values.values() if isinstance(value, Mapping) for name in value))
    table = Table(title=title)
    table.add_column("")
    for name in variants or ["value"]:
        table.add_column(name, justify="right")
    for name, value in values.items():
        cells = value if isinstance(value, Mapping) else {(variants or ["value"])[0]: value}
        table.add_row(name, *(_show(cells.get(variant)) for variant in variants or ["value"]))
    return table


def _show(value: Any, name: str = "") -> str:
    if value is None:
        return "-"
    if name == "bytes_saved":
        return _bytes(float(value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
