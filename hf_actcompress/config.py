"""What to compress, where and when: one dataclass, as Python, JSON or command line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .codecs import Codec, parse_codec
from .observe.target import START, Target, is_auto
from .observe.warning import WARN_ERROR
from .saved.budget import parse_share

CONFIG_NAME = "actcompress_config.json"
PLACEMENTS = ("every", "cuts")
EVALUATE = ("on", "off", "both")
NONFINITE = ("pass", "raise")


@dataclass
class ActCompressConfig:
    """Which codec at which boundary.

    codec: forward codec, as a spec ("block:bits=4").  Or "auto:ratio=8": codecs and bits for each boundary and
        direction, chosen by what they do to the gradient, so that bytes shrink by 8 over all; or "auto:error=0.1", a
        relative error of the gradient to stay within.  With a `grad_codec`, only the forward ones are chosen.
    grad_codec: codec of the gradients that come back; None means the same as `codec`, "identity" turns it off.
    first, last: compress the outputs of the first k layers and the inputs of the last N (0 leaves that end alone).
        Layer 0 is a CNN's stem or a transformer's embeddings with block 0; the head is the last layer.
    placement: "every" compresses at each of those layers, "cuts" only where a pipeline would be cut: after layer
        first - 1 and before the last N layers.
    layers: overrides and additions by glob: {"encoder.layer.3": "sort:bits=8"} or
        {"blocks.*": {"codec": ..., "grad_codec": ...}}.
    blocks: the model's blocks as module paths or globs in run order ("net.*"), for models in which none are found.
    saved: codec of the tensors that autograd saves for the backward pass, or "auto:budget=0.15", which gives each the
        bits that it needs within that share of the bytes; None leaves them alone.  With first=0 and last=0 nothing
        else is compressed.
    stack: "encoder" or "decoder", to compress only that stack of an encoder-decoder.
    schedule: {epoch: codec}, or {epoch: {"codec": ..., "grad_codec": ...}}; the latest entry that has begun counts,
        and before the first one `codec` and `grad_codec` do.
    evaluate: whether evaluation runs compressed: "on", "off", or "both" (two sets of metrics).
    nonfinite: "pass" lets tensors with NaN or Inf through uncompressed and counts them; "raise" stops.
    seed: of stochastic rounding and cold starts.
    meter_every: the error is measured at every n-th call of a boundary; 0 never.
    analysis: at every `analysis_every`-th step the batch is run twice on the side, with and without compression, and
        what that does to every tensor and to the parameters' gradient is recorded (docs/analysis.md).
    warn_error: a run is warned of once (by the callback) where the relative error at a boundary, of activations or of
        gradients, is above this; 0 never (docs/analysis.md: how often that is right).
    resolved: what auto has chosen, by layer: {"encoder.layer.0": {"forward": ..., "backward": ...}}.  Written by a
        run; a model that is compressed with it starts from there.
    """

    codec: str = "block:bits=4"
    grad_codec: str | None = None
    first: int = 1
    last: int = 1
    placement: str = "every"
    layers: dict[str, Any] | None = None
    blocks: list[str] | None = None
    saved: str | None = None
    stack: str | None = None
    schedule: dict[int, Any] | None = None
    evaluate: str = "on"
    nonfinite: str = "pass"
    seed: int = 0
    meter_every: int = 10
    analysis: bool = False
    analysis_every: int = 100
    warn_error: float = WARN_ERROR
    resolved: dict[str, dict[str, str]] | None = None

    def __post_init__(self) -> None:
        self.codec = str(Target.parse(self.codec) if is_auto(self.codec) else _spec(self.codec, "codec"))
        if is_auto(self.grad_codec):
            raise ValueError(f"grad_codec={self.grad_codec!r}: auto chooses both directions; give it as codec alone.")
        if self.auto is None and self.resolved is not None:
            raise ValueError(f"resolved belongs to codec='auto:...', and codec is {self.codec!r}.")
        if self.auto is not None and self.schedule is not None:
            raise ValueError(f"codec={self.codec!r} decides by itself when codecs change; leave schedule out.")
        for name, codecs in (self.resolved or {}).items():
            for direction, spec in codecs.items():
                _spec(spec, f"resolved[{name!r}][{direction!r}]")
        if self.grad_codec is not None:
            self.grad_codec = str(_spec(self.grad_codec, "grad_codec"))
        if self.saved is not None:
            auto = isinstance(self.saved, str) and self.saved.strip().lower().startswith("auto")
            codec = None if auto else _spec(self.saved, "saved")
            self.saved = f"auto:budget={parse_share(self.saved):g}" if auto else str(codec)
            if codec is not None and "saved" in codec.traits.unfit:
                raise ValueError(f"saved={self.saved!r}: {codec.traits.unfit['saved']}")
        for name in ("first", "last", "meter_every", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r} is not a whole number of 0 or more.")
        if not isinstance(self.analysis, bool):
            raise ValueError(f"analysis={self.analysis!r} is neither True nor False.")
        every = self.analysis_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"analysis_every={every!r} is not a whole number of 1 or more.")
        limit = self.warn_error
        if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 <= limit < float("inf"):
            raise ValueError(f"warn_error={limit!r} is not a number of 0 or more (0 never warns).")
        for name, allowed in (("placement", PLACEMENTS), ("evaluate", EVALUATE), ("nonfinite", NONFINITE)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of: {', '.join(allowed)}.")
        if self.layers is not None:
            if not isinstance(self.layers, dict):
                raise ValueError(f"layers={self.layers!r} is not a mapping of glob to codec.")
            for pattern, value in self.layers.items():
                self.codecs_of(value, f"layers[{pattern!r}]")
            self.layers = {pattern: _plain(value) for pattern, value in self.layers.items()}
        if self.schedule is not None:
            self.schedule = self._checked_schedule(self.schedule)

    def _checked_schedule(self, schedule: Any) -> dict[int, Any]:
        if not isinstance(schedule, dict):
            raise ValueError(f"schedule={schedule!r} is not a mapping of epoch to codec: {{0: 'sort:bits=8'}}.")
        result = {}
        for epoch, value in schedule.items():
            try:
                number = int(epoch)  # JSON has only string keys
            except (TypeError, ValueError):
                number = -1
            if number < 0 or str(number) != str(epoch):
                raise ValueError(f"schedule: the key {epoch!r} is not an epoch (a whole number of 0 or more).")
            self.codecs_of(value, f"schedule[{number}]")
            result[number] = _plain(value)
        return dict(sorted(result.items()))

    @property
    def auto(self) -> Target | None:
        """The target of codec="auto:...", or None for a codec that is named."""
        return Target.parse(self.codec) if is_auto(self.codec) else None

    # -- codecs -----------------------------------------------------------------------------------------------
    def codecs_of(self, value: Any = None, where: str = "codec") -> tuple[Codec, Codec]:
        """(codec, grad_codec) of an entry of `layers` or `schedule`; None means the config's own two.

        A plain spec keeps the config's `grad_codec` if there is one, else it serves both directions.
        """
        own = START if is_auto(self.codec) else self.codec
        if value is None:
            value = own
        if isinstance(value, dict) and "name" not in value:
            unknown = set(value) - {"codec", "grad_codec"}
            if unknown:
                raise ValueError(f"{where}: unknown entries {sorted(unknown)}; use 'codec' and 'grad_codec'.")
            forward = _spec(value.get("codec", own), where)
            backward = value.get("grad_codec", self.grad_codec)
        else:
            forward, backward = _spec(value, where), self.grad_codec
        return forward, forward if backward is None else _spec(backward, where)

    def scheduled(self, epoch: int) -> tuple[Codec, Codec]:
        """(codec, grad_codec) in that epoch for the layers that `layers` does not name."""
        begun = [e for e in (self.schedule or {}) if e <= epoch]
        return self.codecs_of(self.schedule[max(begun)] if begun else None)  # type: ignore[index]

    # -- forms ------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ActCompressConfig":
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"Unknown configuration entries {unknown}; known are: {', '.join(known)}.")
        return cls(**values)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `actcompress_config.json` into `folder` (made if it is not there); returns the file's path."""
        path = Path(folder) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "ActCompressConfig":
        """Read it back, from the folder or the file."""
        path = Path(folder)
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"There is no {CONFIG_NAME} at {path}. Write one with config.save_pretrained(folder).")
        return cls.from_dict(json.loads(path.read_text()))


def _spec(value: Any, where: str) -> Codec:
    try:
        return parse_codec(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _plain(value: Any) -> Any:
    """Codecs as specs, so that the configuration is JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Codec) else value


@dataclass
class CompressionArguments:
    """The same as command line options, for HfArgumentParser."""

    codec: str = field(
        default="block:bits=4",
        metadata={"help": "Forward codec, e.g. block:bits=4, or auto:ratio=8. 'none' runs without compression."},
    )
    grad_codec: str | None = field(
        default=None, metadata={"help": "Codec of the gradients; default: the same. 'identity' turns it off."}
    )
    first: int = field(default=1, metadata={"help": "Compress the outputs of the first k layers."})
    last: int = field(default=1, metadata={"help": "Compress the inputs of the last N layers."})
    placement: str = field(default="every", metadata={"help": "'every' layer of those, or only the two 'cuts'."})
    layers: str | None = field(
        default=None, metadata={"help": "Overrides by glob as JSON, e.g. '{\"blocks.*\": \"sort:bits=8\"}'."}
    )
    blocks: list[str] | None = field(
        default=None, metadata={"help": "The model's blocks as module paths or globs, where none are found."}
    )
    saved: str | None = field(
        default=None, metadata={"help": "Codec of what autograd saves, e.g. block:bits=4 or auto:budget=0.15."}
    )
    stack: str | None = field(default=None, metadata={"help": "Only this stack of an encoder-decoder."})
    schedule: str | None = field(
        default=None, metadata={"help": "Codecs by epoch as JSON, e.g. '{\"0\": \"sort:bits=8\", \"40\": \"block\"}'."}
    )
    evaluate: str = field(default="on", metadata={"help": "Whether evaluation runs compressed: on, off or both."})
    nonfinite: str = field(default="pass", metadata={"help": "NaN and Inf: 'pass' them on and count, or 'raise'."})
    codec_seed: int = field(default=0, metadata={"help": "Seed of stochastic rounding and cold starts."})
    meter_every: int = field(default=10, metadata={"help": "Measure the error at every n-th call; 0 never."})
    analysis: bool = field(
        default=False, metadata={"help": "Record what compression does to tensors and gradients (docs/analysis.md)."}
    )
    analysis_every: int = field(default=100, metadata={"help": "Steps between records of the analysis."})
    warn_error: float = field(
        default=WARN_ERROR, metadata={"help": "Warn once where boundaries' relative error is above this; 0 never."}
    )

    def to_config(self) -> ActCompressConfig | None:
        """The configuration, or None for `--codec none`."""
        if self.codec.strip().lower() == "none":
            return None
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "codec_seed"}
        for name in ("layers", "schedule"):
            if isinstance(values[name], str):
                try:
                    values[name] = json.loads(values[name])
                except json.JSONDecodeError as error:
                    raise ValueError(f"--{name} is not JSON ({error}); got {values[name]!r}.") from None
        return ActCompressConfig(**values, seed=self.codec_seed)
