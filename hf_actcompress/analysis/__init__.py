"""What compression does to a training run: measures on tensors, records of them, and the probe that takes them."""

from .records import COLUMNS, FILE_NAME, read_records

__all__ = ["COLUMNS", "FILE_NAME", "read_records"]
