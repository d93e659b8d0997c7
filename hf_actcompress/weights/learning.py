"""Learning-Compression: training and compression alternate, and a penalty draws their weights together.

    L step: w      <- steps on loss(w) + sum of mu/2 |w - Delta(Theta) - lambda/mu|^2
    C step: Theta  <- the compression nearest to w - lambda/mu
            lambda <- lambda - mu (w - Delta(Theta));  mu <- growth * mu

w are the weights, Theta their compressed form (compressed_form.py), Delta(Theta) what it decompresses to.  At the end,
optionally, w = Delta(Theta) and only the floats of Theta are trained while its structure (which values share an entry,
which are zero) is fixed.

It works with any model and training loop, and knows no Trainer.  Source: Carreira-Perpinan and Idelbayev, Model
compression as constrained optimization, 2017 and 2018 ("Learning-compression" algorithms for neural net pruning).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import count_bits, save_compressed
from .compressed_form import CompressedForm
from .restore import restore
from .scheme import Scheme, Task, find_tasks
from .stream import Reader, Writer
from .tuning import Structure, project, structure


class LearningCompression:
    """The state of Learning-Compression for one model.

        lc = LearningCompression(model, {"conv*": "prune:keep=104", "fc*": "codebook:k=2"}, mu=1e-3, growth=1.2)
        for epoch in range(20):
            for batch in batches:
                (loss(model, batch) + lc.penalty()).backward(); optimizer.step(); ...
            lc.c_step()
            with lc.compressed():
                evaluate(model)
        lc.finish()                     # the model holds the compressed weights
        lc.save("folder")               # a file of about lc.bits / 8 bytes

    It starts from direct compression: lambda = 0.

    scheme: see `find_tasks`.
    mu: weight of the penalty in the first L step; growth: its factor at each C step.  With SGD, learning rate times mu
        should stay below 1.
    share: applied to each decompressed tensor after a C step; with several processes a broadcast from the first.

    Raises ValueError for a scheme that does not fit, frozen or sharded parameters, mu <= 0 and growth < 1.
    """

    def __init__(
        self, model: nn.Module, scheme: Scheme | str, *, mu: float = 1e-3, growth: float = 1.2,
        share: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        if not mu > 0 or not math.isfinite(mu):
            raise ValueError(f"mu={mu!r}: the weight of the penalty is a number above 0, such as 1e-3.")
        if not growth >= 1 or not math.isfinite(growth):
            raise ValueError(f"growth={growth!r}: mu is multiplied with it at each C step; give 1 or more.")
        self.model, self.mu, self.growth, self.share = model, float(mu), float(growth), share
        self.tasks: list[Task] = find_tasks(model, scheme)
        names = [name for task in self.tasks for name in task.names]
        self.parameters = {name: model.get_parameter(name) for name in names}
        frozen = [name for name, p in self.parameters.items() if not p.requires_grad]
        if frozen:
            raise ValueError(f"The scheme names frozen parameters: {', '.join(frozen)}. Train them or leave them out.")
        if any(hasattr(p, "placements") for p in self.parameters.values()):
            raise ValueError("Learning-Compression needs whole parameters; these are sharded (FSDP). Use DDP.")
        self.c_steps = 0
        self.forms: list[CompressedForm] = []  # one a task
        self.multipliers = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        self._weights: dict[str, Tensor] = {}  # the trained ones, while the model holds the compressed ones
        self._structures: list[Structure] | None = None  # once settled
        self._moved = False  # once settled: whether the weights have changed since `forms` were computed from them
        self._compress()

    # -- L step ------------------------------------------------------------------------------------------------
    def penalty(self) -> Tensor:
        """sum of mu/2 |w - Delta - lambda/mu|^2, a scalar to be added to the loss; 0 once settled."""
        if self.settled:
            return next(iter(self.parameters.values())).new_zeros(())
        terms = [(p.float() - self._target[name]).square().sum() for name, p in self.parameters.items()]
        return self.mu / 2 * torch.stack(terms).sum()

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient to what `.grad` holds: the same as having added `penalty()` to the loss.

        Once settled, `.grad` becomes its projection onto the structure.
        """
        if self._structures is not None:
            for task, found in zip(self.tasks, self._structures, strict=True):
                parameters = [self.parameters[name] for name in task.names]
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                for p, gradient in zip(parameters, project(found, gradients), strict=True):
                    p.grad = gradient.to(p.dtype)
            return
        for name, p in self.parameters.items():
            change = self.mu * (p.float() - self._target[name])
            p.grad = change.to(p.dtype) if p.grad is None else p.grad.add_(change.to(p.grad.dtype))

    # -- C step ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def c_step(self) -> None:
        """Compress w - lambda/mu, update lambda, raise mu.  Does nothing once settled."""
        if self.settled:
            return
        self.use_trained()
        self._compress()
        for name, p in self.parameters.items():
            self.multipliers[name] -= self.mu * (p.float() - self.delta[name])
        self.mu *= self.growth
        self.c_steps += 1
        self._aim()

    # -- training the floats of the compressed forms -----------------------------------------------------------
    @property
    def settled(self) -> bool:
        return self._structures is not None

    @torch.no_grad()
    def settle(self) -> None:
        """Compress w once more and fix the structure: from here on the model holds compressed weights.

        Call `add_gradients` before and `hold` after every optimizer step.
        """
        if self.settled:
            return
        self.use_trained()
        for multiplier in self.multipliers.values():
            multiplier.zero_()
        self._compress()
        for name, p in self.parameters.items():
            p.copy_(self.delta[name])
        self._settle()

    def _settle(self) -> None:
        self._structures = [structure(form, self.parameters[task.names[0]].device)
                            for task, form in zip(self.tasks, self.forms, strict=True)]  # fmt: skip

    @torch.no_grad()
    def hold(self) -> None:
        """Project the weights back onto the structure after an optimizer step (of any optimizer)."""
        if self._structures is None:
            return
        for task, found in zip(self.tasks, self._structures, strict=True):
            parameters = [self.parameters[name] for name in task.names]
            for p, value in zip(parameters, project(found, parameters), strict=True):
                p.copy_(value)
        self._moved = True

    def _take_over(self) -> None:
        """Compute `forms` from the weights as they are, and set the weights to exactly what these decompress to."""
        assert self._structures is not None
        self._moved = False
        for i, (task, found) in enumerate(zip(self.tasks, self._structures, strict=True)):
            flat = torch.cat([self.parameters[name].detach().reshape(-1).float() for name in task.names])
            self.forms[i] = found.form(flat)
            self._decompress(task, self.forms[i])
        for name, p in self.parameters.items():
            p.copy_(self.delta[name])

    @torch.no_grad()
    def _compress(self) -> None:
        forms, self.delta = [], {}
        for i, task in enumerate(self.tasks):
            now = [self.parameters[n].float() - self.multipliers[n] / self.mu for n in task.names]
            form = task.compression.compress(now, self.mu, self.forms[i] if self.forms else None, task.names)
            forms.append(form)
            self._decompress(task, form)
        self.forms = forms
        self._aim()

    def _decompress(self, task: Task, form: CompressedForm) -> None:
        for name, value in zip(task.names, form.values(), strict=True):
            p = self.parameters[name]
            # In the parameter's dtype, as evaluation and the file will have it.
            value = value.to(p.device, p.dtype)
            self.delta[name] = (value if self.share is None else self.share(value)).float()

    def _aim(self) -> None:
        self._target = {name: self.delta[name] + self.multipliers[name] / self.mu for name in self.parameters}

    # -- which weights the model holds -------------------------------------------------------------------------
    @torch.no_grad()
    def use_compressed(self) -> None:
        if self.settled:
            if self._moved:  # not again for every batch of an evaluation
                self._take_over()
        elif not self._weights:
            self._weights = {name: p.detach().clone() for name, p in self.parameters.items()}
            for name, p in self.parameters.items():
                p.copy_(self.delta[name])

    @torch.no_grad()
    def use_trained(self) -> None:
        for name, weight in self._weights.items():
            self.parameters[name].copy_(weight)
        self._weights = {}

    @contextlib.contextmanager
    def compressed(self) -> Iterator[None]:
        """The model holds the compressed weights inside of the block."""
        self.use_compressed()
        try:
            yield
        finally:
            self.use_trained()

    def finish(self) -> None:
        """The model keeps the compressed weights."""
        self.use_compressed()
        self._weights = {}

    # -- figures -----------------------------------------------------------------------------------------------
    @property
    def bits(self) -> int:
        """Counted bits of the whole model: compressed forms, and everything else at full size."""
        return count_bits(self.model) - self._dense_bits + sum(form.bits for form in self.forms)

    @property
    def ratio(self) -> float:
        """Bits of the uncompressed model over `bits`."""
        return count_bits(self.model) / self.bits

    @property
    def layers_ratio(self) -> float:
        """The same for the compressed parameters alone."""
        return self._dense_bits / max(sum(form.bits for form in self.forms), 1)

    @property
    def _dense_bits(self) -> int:
        return sum(8 * p.numel() * p.element_size() for p in self.parameters.values())

    @torch.no_grad()
    def distance(self) -> float:
        """|w - Delta| / |w|; 0 once settled."""
        if self.settled:
            return 0.0
        trained = {name: self._weights.get(name, p).float() for name, p in self.parameters.items()}
        gap = sum(float((w - self.delta[name]).square().sum()) for name, w in trained.items())
        return math.sqrt(gap / max(sum(float(w.square().sum()) for w in trained.values()), 1e-30))

    # -- state -------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, **about: Any) -> Path:
        """`save_compressed` with what was learned; bit for bit what the model holds after `finish()`."""
        return save_compressed(self.model, folder, [(t.names, form) for t, form in
                                                    zip(self.tasks, self.forms, strict=True)], **about)  # fmt: skip

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, texts) for safetensors: mu, lambda and the compressed forms."""
        if self.settled:
            with torch.no_grad():
                self._take_over()
            self._settle()  # the same start as that of a run which loads this
        out = Writer()
        stored = [form.store(out) for form in self.forms]
        tensors = {f"theta.{dtype}": stream for dtype, stream in out.joined().items()}
        tensors |= {f"lambda.{name}": value.clone() for name, value in self.multipliers.items()}
        about = {"tasks": self._described(), "thetas": stored, "mu": self.mu, "c_steps": self.c_steps,
                 "settled": self.settled}  # fmt: skip
        return tensors, {"lc": json.dumps(about)}

    def load_state_dict(self, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        """Continue from `state_dict`; ValueError if it belongs to another scheme or is damaged."""
        try:
            about = json.loads(texts["lc"])
            missing = {"tasks", "thetas", "mu", "c_steps"} - set(about)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The state of Learning-Compression cannot be read ({error}).") from None
        if missing:
            raise ValueError(f"The state of Learning-Compression lacks {', '.join(sorted(missing))}.")
        if about["tasks"] != self._described():
            raise ValueError(
                f"The checkpoint was written with the scheme {about['tasks']}, this run has {self._described()}. "
                "Resume with the same scheme, or start afresh from the checkpoint's weights."
            )
        missing = {f"lambda.{name}" for name in self.parameters} - set(tensors)
        if missing:
            raise ValueError(f"The state of Learning-Compression lacks {', '.join(sorted(missing))}.")
        streams = {name.removeprefix("theta."): t for name, t in tensors.items() if name.startswith("theta.")}
        source = Reader(streams)
        forms = [restore(stored, [tuple(self.parameters[n].shape) for n in task.names], source)
                  for task, stored in zip(self.tasks, about["thetas"], strict=True)]  # fmt: skip
        source.finish()
        self.use_trained()
        self.forms, self.mu, self.c_steps = forms, about["mu"], about["c_steps"]
        for name, p in self.parameters.items():
            self.multipliers[name] = tensors[f"lambda.{name}"].to(p.device)
        for task, form in zip(self.tasks, forms, strict=True):
            self._decompress(task, form)
        self._aim()
        self._structures, self._moved = None, False
        if about.get("settled"):
            self._settle()
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(self.delta[name])

    def _described(self) -> list[list[Any]]:
        return [[str(task.compression), list(task.names)] for task in self.tasks]
