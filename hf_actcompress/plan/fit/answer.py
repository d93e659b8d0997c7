"""Does a model train in so much memory, with which method, and how far can it go?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...observe.target import UNITS
from .counts import Count, Unlike, at, combine, largest, through
from .methods import METHODS, Plan
from .models import TOKENS, Subject, find_model
from .session import Counter, Setting
from .snippets import snippets
from .speed import Speed, speed_of
from .speed import calibrate as speeds_of_this_machine
from .step import OPTIMIZERS

MOST_ROWS, MOST_TOKENS = 1 << 16, 1 << 20


@dataclass(frozen=True)
class Row:
    """One method.

    held, peak: bytes; held between forward and backward, besides parameters, optimizer state and the batch.
    fits: whether the peak is within the memory; rows, size: the most rows, and the longest example, for which it is.
    step: time over that without a method, estimated.
    """

    method: str
    held: float
    peak: float
    peak_in: str
    step: float
    fits: bool | None = None
    rows: int | None = None
    size: int | None = None
    note: str = ""
    snippets: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Fit:
    """What `fit` found.  Bytes throughout."""

    model: str
    batch_size: int
    size: int
    unit: str  # what `size` counts
    dtype: str
    autocast: bool
    optimizer: str
    device: str
    memory: float | None
    parameters: float
    gradients: float
    optimizer_state: float
    rows: list[Row]
    notes: list[str]
    speed: str
    counter: Counter = field(repr=False)

    @property
    def best(self) -> Row | None:
        """The fastest that fits; without a memory, that which holds least for at most 1.1 times the plain step."""
        if self.memory is not None:
            return min((row for row in self.rows if row.fits), key=lambda row: (row.step, row.peak), default=None)
        return min((row for row in self.rows if row.step <= 1.1), key=lambda row: row.peak, default=None)

    def row(self, method: str) -> Row:
        return next(row for row in self.rows if row.method == method)

    def to_dict(self) -> dict[str, Any]:
        best = self.best
        head = {key: value for key, value in vars(self).items() if key not in ("counter", "rows")}
        return {**head, "best": None if best is None else best.method, "methods": [vars(row) for row in self.rows]}


def parse_memory(value: Any) -> float | None:
    """Bytes of "24GB", "16GiB" or a number of bytes.  Raises ValueError."""
    if value is None or isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return value
    text = str(value).strip().lower().replace(" ", "")
    number, unit = text.rstrip("kmgib"), text[len(text.rstrip("kmgib")) :]
    try:
        if unit in UNITS and float(number) > 0:
            return float(number) * UNITS[unit]
    except ValueError:
        pass
    raise ValueError(f"memory={value!r} is no size; write it as 24GB, 500MB or 16GiB.")


def fit(
    model: Any, *, memory: Any = None, batch_size: int = 8, seq_len: int | None = None,
    image_size: int | None = None, dtype: str = "fp32", autocast: bool = False, optimizer: str = "adamw",
    lora: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None,
    methods: Sequence[str] | None = None, device: str = "cuda", compile: bool = False, calibrate: bool = False,
    local_files_only: bool = True,
) -> Fit:  # fmt: skip
    """What training a model takes, by each method, without allocating it.

        from hf_actcompress.plan.fit import fit

        fit("llama", memory="24GB", seq_len=2048, dtype="bf16", lora={"r": 16}).best

    model: a folder with config.json, a kind that transformers knows ("llama"), a model's or configuration's class by
        name, a timm model, a hub id whose configuration is at hand, or a configuration.
    memory: "24GB", "16GiB" or bytes; None: nothing is said of what fits.
    batch_size: rows.  seq_len, image_size: of a row, by default up to 512 tokens, or the model's own size.
    dtype: of parameters, gradients and optimizer state: "fp32", "bf16" or "fp16".  autocast: the step runs under bf16
        autocast, as with the Trainer's bf16=True.
    optimizer: "adamw", "adafactor", "sgd" or "sgd-momentum".
    lora: options of peft's LoraConfig ({"r": 16}); all linear layers unless `target_modules` says others.
    config: settings of the model's configuration, {"num_hidden_layers": 32}.
    methods: some of METHODS.
    device: "cuda" counts what a GPU's operations keep, "cpu" what a CPU's do; it need not be there.
    compile: also torch's activation_memory_budget.
    calibrate: take the speeds of this machine, within seconds, and keep them; without, the last ones that were taken,
        or those of a data-centre GPU.  Only the estimate of the step depends on them.
    Raises ValueError for what is not known.
    """
    limit = parse_memory(memory)
    known = [name for name, plan in METHODS.items() if compile or plan.budget is None]
    for name, value, allowed in (
        ("optimizer", optimizer, list(OPTIMIZERS)), ("device", device, ["cuda", "cpu"]),
        *(("methods", method, known) for method in methods or []),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not known; choose from: {', '.join(allowed)}.")
    for name, number in (("batch_size", batch_size), ("seq_len", seq_len), ("image_size", image_size)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name}={number!r} is not a whole number of 1 or more.")
    subject = find_model(model, seq_len=seq_len, image_size=image_size, config=config, dtype=dtype, lora=lora,
                         local_files_only=local_files_only)  # fmt: skip
    if subject.most is not None and subject.size > subject.most and subject.absolute:
        raise ValueError(f"seq_len={subject.size}: {subject.name} has positions for {subject.most} tokens.")
    setting = Setting(optimizer, autocast, device)
    counter = Counter(subject, setting)
    speed = speeds_of_this_machine(device, dtype) if calibrate else speed_of(device, "bf16" if autocast else dtype)
    return _Answer(subject, counter, batch_size, limit, speed).all(
        [name for name in known if methods is None or name in methods or name == "none"], dtype
    )


class _Answer:
    def __init__(
        self, subject: Subject, counter: Counter, rows: int, limit: float | None, speed: Speed
    ) -> None:
        self.subject, self.counter, self.rows, self.limit, self.speed = subject, counter, rows, limit, speed
        self.notes: list[str] = []

    def all(self, names: list[str], dtype: str) -> Fit:
        subject, setting = self.subject, self.counter.setting
        plain = self.plain = self.count("none", self.rows, subject.size)
        self.seconds = self.speed.seconds(plain)
        found = []
        for name in names:
            try:
                found.append(self.row(name, METHODS[name]))
            except ValueError as error:
                self.notes.append(f"{name}: {error}")
        if self.counter.reduced:
            self.notes.append(f"Counted with 3 and with 4 layers, which are all alike, for {subject.depth}.")
        if subject.unit == TOKENS:
            self.notes.append("Rows are full, without padding.")
        return Fit(
            subject.name, self.rows, subject.size, subject.unit, dtype, setting.autocast, setting.optimizer,
            setting.device, self.limit, plain.parameters, plain.gradients, plain.optimizer, found, self.notes,
            self.speed.where, self.counter,
        )  # fmt: skip

    # -- counts -----------------------------------------------------------------------------------------------
    def count(self, name: str, rows: int, size: int) -> Count:
        """The count of a method; of bits from those of others, since bytes are affine in them."""
        plan = METHODS[name]
        if plan.bits is None:
            return self.counter(name, plan.method, rows, size)
        few, more = (self.count(f"saved {bits}", rows, size) for bits in (4, 8))
        bits = plan.bits or self.bits_of_auto()[0]
        try:
            return combine([few, more], through((4, 8), bits))
        except Unlike:
            return self.counter(name, plan.method, rows, size)

    def bits_of_auto(self) -> tuple[float, float]:
        """(mean bits, share of the bytes) of a budget of a tenth, or of the least that can be met."""
        few, more = (self.count(f"saved {bits}", self.rows, self.subject.size) for bits in (4, 8))
        slope = (more.held - few.held) / 4
        least = few.held - 3 * slope
        share = max(0.1, -(-100 * least // self.plain.held) / 100)
        return min(8.0, max(1.0, 4 + (share * self.plain.held - few.held) / slope)), share

    # -- a row ------------------------------------------------------------------------------------------------
    def row(self, name: str, plan: Plan) -> Row:
        size, rows = self.subject.size, self.rows
        count = self.count(name, rows, size)
        peak, spec, note = count.peak, plan.spec, ""
        if plan.bits == 0:
            share = self.bits_of_auto()[1]
            spec = f"auto:budget={share:g}"
            peak = max(peak, self.measuring())
            note = f"bits by what each tensor needs, within {share:g} of the bytes"
        code = snippets(spec, checkpointing=plan.checkpointing, offload=plan.offload, budget=plan.budget, rows=rows,
                        text=self.subject.unit == TOKENS)  # fmt: skip
        offloaded = self.plain.held - count.held if plan.offload else 0.0
        step = self.speed.seconds(count, max(0.0, offloaded)) / self.seconds
        row = {"method": name, "held": count.held, "peak": peak, "peak_in": count.peak_in(), "step": step,
               "note": note, "snippets": code}  # fmt: skip
        if self.limit is not None:
            row["fits"] = peak <= self.limit
            row["rows"] = self.most_rows(name)
            row["size"] = self.most_tokens(name) if self.subject.unit == TOKENS else None
        return Row(**row)

    def measuring(self) -> float:
        """The peak while a budget measures what bits do: two rows with everything held."""
        pair = [self.count("none", rows, self.subject.size) for rows in (self.rows, 2 * self.rows)]
        return at((self.rows, 2 * self.rows), pair, min(2, self.rows)).peak

    def most_rows(self, name: str) -> int:
        points = (self.rows, 2 * self.rows)
        counts = [self.count(name, rows, self.subject.size) for rows in points]
        return largest(points, counts, self.limit, MOST_ROWS)

    def most_tokens(self, name: str) -> int:
        """By two lengths where bytes grow with the tokens, by three where there are tensors of tokens by tokens."""
        size, most = self.subject.size, self.subject.most or MOST_TOKENS
        factors = (1, 2, 4) if size * 4 <= most else (1, 0.5, 0.25)
        points = [max(1, int(size * factor)) for factor in factors[: 3 if self.squares() else 2]]
        if len(set(points)) < len(points):
            return size if self.count(name, self.rows, size).peak <= self.limit else 0
        counts = [self.count(name, self.rows, tokens) for tokens in points]
        return largest(points, counts, self.limit, most)

    def squares(self) -> bool:
        """Whether a step makes tensors of tokens by tokens."""
        if not hasattr(self, "_squares"):
            session = (self.counter.sessions or [self.counter.whole])[0]
            size = self.subject.size
            counted = session.step(METHODS["none"].method, 1, size)
            self._squares = any(shape.count(size) > 1 for shape in counted.shapes)
        return self._squares
