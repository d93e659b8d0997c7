"""How many groups or tensors with NaN or Inf a site has found.

Codecs count on the device of each tensor (codecs/base.py).  Reading a count waits for a GPU, so that is left to
whoever writes a log line or a record, and to a check once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .measures import read


class Nonfinite:
    """The count of one site.

    name: of the site, for errors.
    raises: whether `check` raises.
    """

    def __init__(self, name: str = "", raises: bool = False) -> None:
        self.name, self.raises, self.seen = name, raises, 0
        self.counts: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """int64 [1] on that device, for a codec to add to."""
        count = self.counts.get(device)
        if count is None:
            count = self.counts[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return count

    def total(self) -> int:
        """Waits for the device."""
        return sum(int(values[0]) for values in read(list(self.counts.values())))

    def check_at_once(self, x: Tensor) -> None:
        """`check` where reading costs nothing: on a CPU."""
        if self.raises and x.device.type == "cpu":
            check([self], f" among the {x.numel()} values of a tensor of shape {tuple(x.shape)}")


def check(found: Sequence[Nonfinite], where: str = " in a tensor of the last step") -> None:
    """Raises FloatingPointError for the first site that has found NaN or Inf since it was checked last.

    Waits for the device, once whatever the number of sites, and only where one of them raises.
    """
    found = [one for one in found if one.raises]
    places = [(one, count) for one in found for count in one.counts.values()]
    now = dict.fromkeys(map(id, found), 0)
    for (one, _), values in zip(places, read([count for _, count in places]), strict=True):
        now[id(one)] += int(values[0])
    news = [one for one in found if now[id(one)] > one.seen]
    for one in found:
        one.seen = now[id(one)]
    if news:
        raise FloatingPointError(
            f"{news[0].name}: NaN, Inf or a value that the codec cannot represent{where}. With nonfinite='pass' its "
            "group (or the tensor, where a codec has one scale for all of it) would become NaN and be counted."
        )
