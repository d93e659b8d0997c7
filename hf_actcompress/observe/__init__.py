"""What compression does to a training run: meters, measures on tensors, records of them, and what takes them."""

from .records import COLUMNS, FILE_NAME, read_records

__all__ = ["COLUMNS", "FILE_NAME", "read_records"]
