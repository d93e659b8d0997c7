"""Warns of a likely loss of accuracy, by the errors that meters measure at boundaries anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..codecs import Codec

# Of the relative error at the worst boundary and direction.  Of 98 runs on three tasks 29 are above it; among them are
# 17 of the 22 runs that lost a tenth of what the model had learnt (benchmarks/warning_hits.py).
WARN_ERROR = 0.25


def warning_of(
    errors: Mapping[tuple[str, str], float], limit: float, codecs: Mapping[tuple[str, str], Codec]
) -> str | None:
    """The text of the warning, or None where the errors are small or were not measured.

    errors: the relative error by (boundary, direction).
    limit: for the largest of them; 0 never warns.
    codecs: the codec in use by (boundary, direction).
    """
    place = max(errors, key=errors.__getitem__, default=None)
    if not limit or place is None or errors[place] <= limit:
        return None
    what = "activations" if place[1] == "forward" else "gradients"
    return (
        f"The {what} after {place[0]} have a relative error of {errors[place]:.2f} with {codecs[place]}. "
        f"Above {limit:g} a run may lose accuracy. {_remedy(codecs[place], place[1])} analysis=True records what the "
        "parameters' gradient suffers; warn_error=0 turns this warning off."
    )


def _remedy(codec: Codec, direction: str) -> str:
    bits = codec.traits.bits
    option = "codec" if direction == "forward" else "grad_codec"
    if bits is None:
        more = f"Use {option}='rotated:bits=4'"
    elif codec.traits.rotates or direction == "backward":
        more = f"Use more bits, {option}='block:bits={min(max(4, 2 * bits), 16)}'"
    else:
        more = f"Use {option}='rotated:bits={min(bits, 8)}' at the same bits, or more bits"
    return f"{more}; or codec='auto:ratio=8', which gives each boundary what it needs."
