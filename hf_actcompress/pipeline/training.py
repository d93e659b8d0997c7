"""A training loop over pipeline stages: steps, evaluation, checkpoints, and where the time goes.

One process a rank, launched by torchrun or accelerate.  Rank 0 reads the data (batches.py) and sends the others what
their stages need (batch_metadata.py).  The pipeline scripts in examples/ use it; it knows no data set and no
transformers.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleZBVZeroBubble
from torch.nn import functional as F

from ..codecs import parse_codec
from . import checkpoints
from .arguments import PipelineArguments
from .batch_metadata import BatchLink
from .batches import IGNORED, Batch, evaluation_batches, training_batches
from .checkpoints import check_folder
from .engine import EarlySchedule1F1B, Shapes, forward_only
from .frames import over_network
from .launch import join, share
from .links import LinkError, Links, reason
from .scaler import PipelineGradScaler
from .split import StageModule, merge, split
from .stage import CompressedPipelineStage

logger = logging.getLogger(__name__)


class PipelineTrainer:
    """Trains `model`, of which this rank runs its stages.

    train, evaluation: on rank 0, sequences of rows that `collate` makes a batch of: a dict with input_ids or
        pixel_values, labels and side inputs.  The other ranks give None.
    compute_metrics: of an object with `predictions` and `label_ids` (transformers' convention), on the last stage's
        rank.
    """

    def __init__(
        self,
        model: nn.Module,
        args: PipelineArguments,
        *,
        train: Sequence[Any] | None = None,
        evaluation: Sequence[Any] | None = None,
        collate: Callable[[list[Any]], Mapping[str, Tensor]] | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        example_inputs: Any = None,
    ) -> None:
        self.rank, self.size = join(args.timeout, args.secret)
        self.model, self.args, self.train_rows, self.eval_rows = model, args, train, evaluation
        self.collate, self.compute_metrics = collate, compute_metrics
        self.folder = Path(args.output_dir)
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed * 1000 + self.rank)
        count = self.size if args.topology == "linear" else 2 * self.size
        self.own = [self.rank] if args.topology == "linear" else [self.rank, count - 1 - self.rank]
        self.last_rank = count - 1 if args.topology == "linear" else 0
        cuts = args.cuts
        if args.balance == "time":  # measured once, for all
            first = self.rank == 0
            cuts = _cuts(split(model, stages=count, example_inputs=example_inputs, balance="time")) if first else None
            cuts = share(cuts)
        balance = "layers" if cuts else args.balance
        modules = split(
            model, cuts=cuts, stages=None if cuts else count, example_inputs=example_inputs, balance=balance
        )
        if len(modules) != count:
            raise ValueError(
                f"--cuts {' '.join(map(str, args.cuts))} makes {len(modules)} stages; {args.topology} on {self.size} "
                f"ranks has {count}: give {count - 1} cuts."
            )
        self.cuts = _cuts(modules)
        self.modules = {k: modules[k].to(self.device).train() for k in self.own}
        self.all_modules = modules
        codec, grad_codec = (
            spec if spec is None else parse_codec("identity" if spec == "none" else spec)
            for spec in (args.codec, args.grad_codec)
        )
        checksum = over_network() if args.checksum is None else args.checksum
        self.stages = [
            CompressedPipelineStage(
                self.modules[k], k, count, self.device, codec=codec, grad_codec=grad_codec, seed=args.seed,
                timeout=args.timeout, nonfinite=args.nonfinite, checksum=checksum, agree=args.agreed(),
            )
            for k in self.own
        ]  # fmt: skip
        self.schedule = self._schedule()
        self.shapes = Shapes(self.schedule, self.stages)
        self.batch_link = BatchLink(Links(None, args.timeout), self.rank, self.size, self.last_rank, checksum)
        owned = {id(p): p for module in self.modules.values() for p in module.parameters() if p.requires_grad}
        # A group, since a rank with nothing to train takes part as well.
        self.optimizer = torch.optim.AdamW(
            [{"params": list(owned.values())}], lr=args.learning_rate, weight_decay=args.weight_decay
        )
        self.scaler = PipelineGradScaler(self.device.type, enabled=args.fp16)
        if args.save_steps:
            nbytes = sum(p.numel() * p.element_size() for m in self.modules.values() for p in m.parameters())
            check_folder(self.folder / "checkpoints", nbytes + 2 * sum(p.nbytes for p in owned.values()))
        self.per_epoch = share(None if train is None else math.ceil(len(train) / args.batch_size))
        self.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * (self.per_epoch or 0))
        self.step, self.skipped, self.history = 0, 0, []
        self.times = dict.fromkeys(("total", "encode", "decode", "wait"), 0.0)
        self.bytes = {"forward": 0, "backward": 0, "shared": 0, "side": 0}
        self._losses: list[Tensor] = []
        self._valid = 1

    def _schedule(self) -> Any:
        n, name = self.args.micro_batches, self.args.schedule
        if self.args.topology == "client-server":
            return ScheduleZBVZeroBubble(self.stages, n, loss_fn=self._loss)
        if name == "1f1b":
            return Schedule1F1B(self.stages[0], n, loss_fn=self._loss)
        return EarlySchedule1F1B(self.stages[0], n, loss_fn=self._loss, ahead=self.args.ahead)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of one micro-batch, scaled so that the mean over micro-batches is that over the batch's labels."""
        if target.is_floating_point():
            total = F.mse_loss(output.float().view(-1)[~target.isnan()], target[~target.isnan()], reduction="sum")
        else:
            total = _cross_entropy(output, target, reduction="sum", ignore_index=IGNORED)
        return self.scaler.scale(total * self.args.micro_batches / self._valid)

    # -- data ----------------------------------------------------------------------------------------------------
    def _chunks(self, batch: Batch) -> tuple[list[tuple], list[dict], list[Tensor] | None]:
        n, first = self.args.micro_batches, 0 in self.own
        inputs = batch.inputs.to(self.device).chunk(n) if first else None
        named = {**batch.side, **(batch.extra if first else {})}
        pieces = {name: value.to(self.device).chunk(n) for name, value in named.items()}
        targets = None if self.rank != self.last_rank else list(batch.labels.to(self.device).chunk(n))
        arguments = [(inputs[i],) if first else () for i in range(n)]
        return arguments, [{name: value[i] for name, value in pieces.items()} for i in range(n)], targets

    def _autocast(self) -> Any:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    # -- training ------------------------------------------------------------------------------------------------
    def train(self) -> list[dict[str, Any]]:
        """Train from the current step to the last one; returns the log, one entry every `logging_steps`."""
        args = self.args
        if not self.steps:
            raise ValueError("There is nothing to train on: give `train` on rank 0, and --num_train_epochs above 0.")
        warmup = args.warmup_steps

        def rate(step: int) -> float:
            rising = (step + 1) / warmup if step < warmup else 1.0
            return min(rising, max(0.0, (self.steps - step) / max(1, self.steps - warmup)))

        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        if args.resume:
            self.resume()
        for module in self.modules.values():
            module.train()
        with self._bar(self.steps) as bar:
            bar(self.step)
            while self.step < self.steps:
                began = time.perf_counter()
                for batch in self.batch_link.batches(self._training_batches()):
                    self._train_step(batch)
                    self.step += 1
                    self._account(time.perf_counter() - began)
                    if self.step % args.logging_steps == 0 or self.step == self.steps:
                        self._log()
                    bar(self.step)
                    every = args.save_steps
                    if every and (self.step % every == 0 or self.step == self.steps):
                        self.save()
                    began = time.perf_counter()
        return self.history

    def _training_batches(self) -> Iterator[Batch] | None:
        """Of the current epoch, from the current step on; on rank 0."""
        if self.rank != 0:
            return None
        epoch, start = divmod(self.step, self.per_epoch)
        batches = training_batches(
            self.train_rows, self.collate, size=self.args.batch_size, micro_batches=self.args.micro_batches,
            seed=self.args.seed, epoch=epoch, start=start,
        )  # fmt: skip
        return itertools.islice(batches, self.steps - self.step)

    def _evaluation_batches(self) -> Iterator[Batch] | None:
        if self.rank != 0:
            return None
        return evaluation_batches(
            self.eval_rows, self.collate, size=self.args.eval_batch_size, micro_batches=self.args.micro_batches,
            seed=self.args.seed,
        )  # fmt: skip

    def _train_step(self, batch: Batch) -> None:
        arguments, named, targets = self._chunks(batch)
        if targets is not None:
            kept = [~y.isnan() if y.is_floating_point() else y != IGNORED for y in targets]
            self._valid = max(1, sum(int(y.sum()) for y in kept))
        self.shapes.use(("train", batch.shape))
        for stage in self.stages:
            stage.sample_ids(batch.ids, self.args.micro_batches)
        losses: list[Tensor] = []
        with self._autocast():
            self.schedule.step(
                arg_mbs=arguments, kwarg_mbs=named, target_mbs=targets, losses=losses, return_outputs=False
            )
        if losses:
            self._losses.append(torch.stack([x.detach() for x in losses]).mean() / self.scaler.get_scale())
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() < scale:
            self.skipped += 1
            logger.info("step %d has overflowed and is skipped; the loss scale is now %g", self.step + 1,
                        self.scaler.get_scale())  # fmt: skip
        else:
            self.rates.step()

    def _clip(self) -> None:
        """Clip by the norm over the gradients of all stages."""
        if not self.args.max_grad_norm:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        shared = self.stages[0].shared
        norms = torch._foreach_norm([p.grad for p in parameters if shared.counts(p, self.stages[0])])
        square = torch.stack(norms).float().square().sum().cpu() if norms else torch.zeros(())
        began = time.perf_counter()
        try:
            dist.all_reduce(square)
        except RuntimeError as error:
            said = reason(1.0)
            raise LinkError(
                f"Rank {self.rank}, norm of the gradients in step {self.step + 1}: another rank has gone or hangs."
                + (f" Reported before: {said}" if said else "")
            ) from error
        self.times["wait"] += time.perf_counter() - began
        factor = self.args.max_grad_norm / (float(square.sqrt()) + 1e-6)
        if factor < 1 and parameters:
            torch._foreach_mul_([p.grad for p in parameters], factor)

    def _account(self, seconds: float) -> None:
        self.times["total"] += seconds
        self.times["wait"] += self.batch_link.links.waited
        self.batch_link.links.waited = 0.0
        for stage in self.stages:
            for name in ("encode", "decode", "wait"):
                self.times[name] += stage.seconds.pop(name, 0.0)
            for direction in ("forward", "backward", "shared"):
                self.bytes[direction] += stage.bytes.pop(direction, 0)
        self.bytes["side"], self.batch_link.links.bytes = self.bytes["side"] + self.batch_link.links.bytes, 0

    def _log(self) -> None:
        loss = torch.stack(self._losses).mean().item() if self._losses else math.nan
        own = torch.tensor([loss, *self.times.values(), *self.bytes.values()], dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        names = (*self.times, *self.bytes)
        ranks = [dict(zip(names, one[1:].tolist(), strict=True)) for one in every]
        for one in ranks:
            one["compute"] = one["total"] - one["encode"] - one["decode"] - one["wait"]
        entry = {
            "step": self.step, "epoch": self.step / self.per_epoch, "loss": float(every[self.last_rank][0]),
            "learning_rate": self.optimizer.param_groups[0]["lr"], "ranks": ranks,
        }  # fmt: skip
        self.history.append(entry)
        self._losses.clear()
        for counts in (self.times, self.bytes):
            for name in counts:
                counts[name] = 0

    def _bar(self, total: int) -> Any:
        from .progress import Progress

        shown = self.rank == 0 and not self.args.disable_tqdm
        return Progress(total, self) if shown else nullcontext(lambda step: None)

    # -- evaluation ----------------------------------------------------------------------------------------------
    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the evaluation data, sent over the same links; the same on every rank."""
        for module in self.modules.values():
            module.eval()
        outputs, labels = [], []
        for batch in self.batch_link.batches(self._evaluation_batches()):
            arguments, named, _ = self._chunks(batch)
            self.shapes.use(("evaluate", batch.shape))
            with self._autocast():
                found = forward_only(self.schedule, self.stages, arguments, named)
            if found:
                outputs.append(torch.cat(found).float().cpu()[: batch.valid])
                labels.append(batch.labels[: batch.valid])
        for stage in self.stages:
            for counts in (stage.seconds, stage.bytes, stage.raw_bytes):
                counts.clear()
        for module in self.modules.values():
            module.train()
        metrics: dict[str, float] = {}
        if self.rank == self.last_rank and outputs:
            logits, answers = torch.cat(outputs), torch.cat(labels)
            regression = answers.is_floating_point()
            loss = F.mse_loss(logits.view(-1), answers) if regression else _cross_entropy(logits, answers)
            metrics["loss"] = float(loss)
            if self.compute_metrics is not None:
                seen = SimpleNamespace(predictions=logits.numpy(), label_ids=answers.numpy())
                metrics.update(self.compute_metrics(seen))
        return share(metrics, self.last_rank)

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def save(self) -> Path:
        """Write this rank's part of what a resumed run needs; the last two checkpoints are kept."""
        state = {
            "step": self.step, "own": self.own,
            "modules": {k: module.state_dict() for k, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(), "rates": self.rates.state_dict(),
            "codecs": {stage.stage_index: stage.codec_state() for stage in self.stages},
            "rng": torch.get_rng_state(), "history": self.history, "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        return checkpoints.save(self.folder / "checkpoints", self.step, state)

    def resume(self) -> None:
        """Go on from the last step that every rank has; ValueError where there is none, or of other stages."""
        state, path = checkpoints.load(self.folder / "checkpoints")
        if state["own"] != self.own:
            raise ValueError(
                f"{path} holds the stages {state['own']}, this rank runs {self.own}: resume with the same topology."
            )
        for k, module in self.modules.items():
            module.load_state_dict(state["modules"][str(k)])
        # JSON knows no numbers as keys.
        moments = {int(number): values for number, values in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.rates.load_state_dict(state["rates"])
        for stage in self.stages:
            stage.load_codec_state(state["codecs"][str(stage.stage_index)])
        torch.set_rng_state(state["rng"])
        if self.args.fp16 and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]

    def merge(self) -> bool:
        """Collect all trained weights in `model` on rank 0; returns whether this is rank 0."""
        count = len(self.all_modules)
        states = []
        for k in range(count):
            owner = k if self.args.topology == "linear" else min(k, count - 1 - k)
            state = self.all_modules[k].own_state_dict()
            for name in sorted(state):
                if owner != 0 and self.rank == owner:
                    dist.send(state[name].cpu().contiguous(), 0)
                elif owner != 0 and self.rank == 0:
                    value = torch.empty_like(state[name], device="cpu")
                    dist.recv(value, owner)
                    state[name] = value
            states.append(state)
        if self.rank == 0:
            self.model.load_state_dict(merge(states))
        return self.rank == 0


def _cuts(modules: Sequence[StageModule]) -> list[int]:
    """The layers after which stages end."""
    ends = list(itertools.accumulate(len(module.layers) for module in modules))
    return [end - 1 for end in ends[:-1]]


def _cross_entropy(output: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Of classes in the last dimension: of a row, or of each token."""
    return F.cross_entropy(output.float().flatten(0, -2), target.flatten(), **options)
