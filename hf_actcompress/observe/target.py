"""What `codec="auto:..."` asks for: a ratio to reach, or an error of the gradient to stay within.  Words and numbers
only."""

from __future__ import annotations

import re
from dataclasses import dataclass

START = "block:bits=4"  # until the first training batch has been measured

HELP = (
    "The automatic choice of codecs takes a ratio above 1 to reach over all boundaries and both directions, "
    "codec='auto:ratio=8', or a relative error of the parameters' gradient to stay within, codec='auto:error=0.1'."
)


@dataclass(frozen=True)
class Target:
    """Either `ratio` (bytes without compression over bytes with it) or `error` (of the gradient, relative)."""

    ratio: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.ratio, self.error) if v is not None]
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in given)
        low, high = (1, 1e6) if self.ratio is not None else (0, 10)
        if len(given) != 1 or not numbers or not low < given[0] < high:
            raise ValueError(f"auto got ratio={self.ratio!r}, error={self.error!r}. {HELP}")

    @classmethod
    def parse(cls, spec: str) -> "Target":
        """From "auto:ratio=8" or "auto:error=0.1"."""
        found = re.fullmatch(r"auto:(ratio|error)=([^,]+)", spec.strip().lower())
        try:
            return cls(**{found[1]: float(found[2])}) if found else cls()
        except ValueError:
            raise ValueError(f"codec={spec!r} is not known. {HELP}") from None

    def __str__(self) -> str:
        return f"auto:ratio={self.ratio:g}" if self.ratio is not None else f"auto:error={self.error:g}"


def is_auto(spec: object) -> bool:
    return isinstance(spec, str) and spec.strip().lower().split(":")[0] == "auto"
