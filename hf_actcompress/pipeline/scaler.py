"""Loss scaling over stages: a step that overflows anywhere is skipped everywhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PipelineGradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler whose ranks agree on whether gradients were finite, so that all skip the same steps.

    Every rank makes one, with the same arguments, and calls `unscale_` or `step`, then `update`, as often as the
    others.  The rank of the last stage scales the loss: `loss_fn=lambda out, y: scaler.scale(loss_fn(out, y))`.
    group: of the ranks; it must work on CPU tensors (gloo).
    A rank with no gradients takes part.
    """

    def __init__(self, device: str = "cuda", *, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(device, **options)
        self.group = group
        if self.is_enabled():
            self._lazy_init_scale_growth_tracker(torch.device(device))  # only the last rank scales a loss

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16) or {found_inf.device: found_inf}
        agreed = torch.stack([one.detach().float().cpu().reshape(()) for one in found.values()]).max()
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.group)
        for one in found.values():
            one.fill_(agreed.item())
        return found
