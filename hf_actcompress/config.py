"""What to compress, where and when: one dataclass, for Python, JSON and the command line.

Importing this file loads no torch: the command line shows the fields' help texts without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .observe.target import START, SavedTarget, Target, is_auto
from .observe.warning import WARN_ERROR

if TYPE_CHECKING:
    from .codecs import Codec

CONFIG_NAME = "actcompress_config.json"
DEFAULT_CODEC = "block:bits=4"
DIRECTIONS = ("forward", "backward")


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


def _boundary(default: Any, help: str, **metadata: Any) -> Any:
    """An option that means something only where there are boundaries."""
    return _option(default, help, boundary=True, **metadata)


@dataclass
class ActCompressConfig:
    """Which codec compresses which tensors.

    `codec` compresses the activations that cross layer boundaries, and their gradients: the model computes with what a
    receiver would decode, so this tells what compression training survives.  `saved` compresses the tensors that
    autograd keeps for the backward pass: forward values stay exact and training needs less memory.  `reduce`
    compresses the gradients that data-parallel processes add up.  Any of them may be given.  An option of boundaries
    without `codec` (`first=2`) means `codec="block:bits=4"`.

        ActCompressConfig("block:bits=4", first=1, last=2)
        ActCompressConfig(saved="block:bits=4")
        ActCompressConfig(reduce="ef+block:bits=4")

    Each field's `metadata["help"]` describes it; command-line options are made from the fields.  Codecs may be given
    as specs, dicts or `Codec` objects, and are kept as specs.
    Raises ValueError for a value that is not allowed, for options that contradict each other or belong to what is
    switched off, and where nothing would be compressed.
    """

    codec: str | None = _option(
        None, "Codec of the activations at layer boundaries, as a spec: block:bits=4. auto:ratio=8 chooses codecs and "
        "bits for each boundary and direction so that bytes shrink by 8 over all; auto:error=0.1 keeps the relative "
        "error of the gradient below that. On the command line 'none' runs without compression.",
    )  # fmt: skip
    grad_codec: str | None = _boundary(
        None, "Codec of the gradients that come back; default: the same as codec. 'identity' leaves them alone."
    )
    first: int | None = _boundary(
        None, "Compress the outputs of the first k layers (default 1). Layer 0 is a CNN's stem, or a transformer's "
        "embeddings with block 0.",
    )  # fmt: skip
    last: int | None = _boundary(
        None, "Compress the inputs of the last N layers (default 1). The head is the last layer."
    )
    placement: str = _boundary(
        "every", "'every' layer of those, or only the two 'cuts' where a pipeline would be cut: after layer first - 1 "
        "and before the last N layers.", choices=("every", "cuts"),
    )  # fmt: skip
    layers: dict[str, Any] | str | None = _boundary(
        None, "Codecs by glob, as a mapping (JSON on the command line): {\"encoder.layer.3\": \"sort:bits=8\"} or "
        "{\"blocks.*\": {\"codec\": ..., \"grad_codec\": ...}}. They override the others and add boundaries.",
    )  # fmt: skip
    blocks: list[str] | None = _boundary(
        None, "The model's blocks as module paths or globs in the order in which they run, where none are found."
    )
    stack: str | None = _boundary(
        None, "'encoder' or 'decoder': compress only that stack of an encoder-decoder.",
        choices=("encoder", "decoder"),
    )  # fmt: skip
    schedule: dict[int, Any] | str | None = _boundary(
        None, "Codecs by epoch, as a mapping (JSON on the command line): {0: \"sort:bits=8\", 40: \"block\"} or "
        "{4: {\"codec\": ..., \"grad_codec\": ...}}. The latest entry that has begun counts; before the first one "
        "codec and grad_codec do.",
    )  # fmt: skip
    evaluate: str = _boundary(
        "on", "Whether evaluation runs compressed: 'on', 'off', or 'both' (two sets of metrics).",
        choices=("on", "off", "both"),
    )  # fmt: skip
    saved: str | None = _option(
        None, "Codec of the tensors that autograd saves for the backward pass: block:bits=4. auto:budget=0.15 gives "
        "each tensor the bits that it needs so that all take that share of the bytes, auto:memory=8GB so many bytes.",
    )  # fmt: skip
    reduce: str | None = _option(
        None, "Codec of the gradients that data-parallel processes add up (DistributedDataParallel, FSDP2): "
        "ef+block:bits=4 has error feedback; powersgd:rank=4 is torch's PowerSGD.",
    )  # fmt: skip
    keep_freed_memory: bool = _option(
        False, "On a CPU with glibc: let malloc keep freed memory for the next tensors while compression is attached. "
        "Steps are faster; the process's memory does not shrink between them.",
    )  # fmt: skip
    nonfinite: str = _option(
        "pass", "Tensors with NaN, Inf or magnitudes above 2**48: 'pass' lets them through uncompressed and counts "
        "them, 'raise' stops.",
        choices=("pass", "raise"),
    )  # fmt: skip
    seed: int = _option(0, "Seed of stochastic rounding and of codecs' first states.", option="codec_seed")
    meter_every: int = _boundary(10, "Measure the error at every n-th call of a boundary; 0 never.")
    analysis: bool = _option(
        False, "Run every analysis_every-th batch twice more, with and without compression, and record what that does "
        "to every tensor and to the parameters' gradient (docs/analysis.md).",
    )  # fmt: skip
    analysis_every: int = _option(100, "Steps between records of the analysis.")
    warn_error: float = _boundary(
        WARN_ERROR, "Warn once where the relative error at a boundary is above this; 0 never (docs/analysis.md)."
    )
    resolved: dict[str, dict[str, str]] | None = _boundary(
        None, "What codec='auto:...' has chosen, by layer. A run writes it into its checkpoints; a model that is "
        "compressed with it starts from there.", option=None,
    )  # fmt: skip

    def __post_init__(self) -> None:
        self._check_numbers()
        self._settle_sites()
        self._check_codecs()

    # -- checks -----------------------------------------------------------------------------------------------
    def _check_numbers(self) -> None:
        for name, least in (("first", 0), ("last", 0), ("meter_every", 0), ("seed", 0), ("analysis_every", 1)):
            value = getattr(self, name)
            if value is None and name in ("first", "last"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} is not a whole number of {least} or more.")
        for name in ("analysis", "keep_freed_memory"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is neither True nor False.")
        limit = self.warn_error
        if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 <= limit < float("inf"):
            raise ValueError(f"warn_error={limit!r} is not a number of 0 or more (0 never warns).")
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata.get("choices")
            if allowed and value not in allowed and not (value is None and f.default is None):
                raise ValueError(f"{f.name}={value!r} is not known; choose one of: {', '.join(allowed)}.")

    def _settle_sites(self) -> None:
        """Whether there are boundaries, and so what `codec`, `first` and `last` are where they were not given."""
        given = [f.name for f in fields(self) if f.metadata.get("boundary") and getattr(self, f.name) != f.default]
        if self.codec is None and self.saved is None and self.reduce is None:
            if not given:
                raise ValueError(
                    "Nothing is to be compressed. codec='block:bits=4' compresses the activations that cross layer "
                    "boundaries and their gradients (which compression does training survive?); saved='block:bits=4' "
                    "compresses what autograd keeps for the backward pass (training in less memory); "
                    "reduce='ef+block:bits=4' the gradients between data-parallel processes. Give any of them."
                )
            self.codec = DEFAULT_CODEC
        default = 0 if self.codec is None else 1
        numbers = {name: getattr(self, name) for name in ("first", "last")}
        self.first, self.last = (default if value is None else value for value in numbers.values())
        if self.boundaries:
            return
        if self.saved is None and self.reduce is None:
            raise ValueError(
                "first=0 and last=0 leave no layer boundary, and neither layers= nor saved= is given: nothing "
                "would be compressed."
            )
        for name in given:
            if numbers.get(name) != 0:  # first=0, last=0 say the same in other words
                alone = " and ".join(f"{k}={v!r}" for k in ("saved", "reduce") if (v := getattr(self, k)) is not None)
                why = "first=0 and last=0" if self.codec is not None else f"{alone} alone"
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to layer boundaries, and with {why} there are none. "
                    f"Leave it out, or give codec= and the layers to cut at."
                )

    def _check_codecs(self) -> None:
        if self.codec is not None:
            self.codec = str(Target.parse(self.codec) if is_auto(self.codec) else _spec(self.codec, "codec"))
        if is_auto(self.grad_codec):
            raise ValueError(f"grad_codec={self.grad_codec!r}: auto chooses both directions; give it as codec= alone.")
        if self.grad_codec is not None:
            self.grad_codec = str(_spec(self.grad_codec, "grad_codec"))
        if self.saved is not None:
            self.saved = str(self.saved_auto or self.saved_codec())
        if self.reduce is not None:
            from .reduce.spec import parse_reduce

            try:
                self.reduce = str(parse_reduce(self.reduce))
            except ValueError as error:
                raise ValueError(f"reduce: {error}") from None
        if self.blocks is not None:
            blocks = [self.blocks] if isinstance(self.blocks, str) else self.blocks
            named = isinstance(blocks, (list, tuple)) and all(isinstance(b, str) and b.strip() for b in blocks)
            if not named or not blocks:
                raise ValueError(
                    f"blocks={self.blocks!r} is not a list of module paths or globs, such as ['encoder.layer.*']. "
                    "Leave it out to have the blocks found."
                )
            self.blocks = list(blocks)
        if self.layers is not None:
            layers = _mapping(self.layers, "layers", "glob to codec: {'blocks.*': 'sort:bits=8'}")
            for pattern, value in layers.items():
                if not isinstance(pattern, str):
                    raise ValueError(f"layers: the key {pattern!r} is not the name of a layer, or a glob.")
                self.codecs_of(value, f"layers[{pattern!r}]")
            self.layers = {pattern: _plain(value) for pattern, value in layers.items()}
        if self.schedule is not None:
            self.schedule = self._checked_schedule(self.schedule)
        if self.auto is not None and self.schedule is not None:
            raise ValueError(f"codec={self.codec!r} decides by itself when codecs change; leave schedule= out.")
        if self.resolved is not None:
            self._check_resolved(self.resolved)

    def _checked_schedule(self, schedule: Any) -> dict[int, Any]:
        result = {}
        for epoch, value in _mapping(schedule, "schedule", "epoch to codec: {0: 'sort:bits=8'}").items():
            try:
                number = int(epoch)  # JSON has only string keys
            except (TypeError, ValueError):
                number = -1
            if number < 0 or str(number) != str(epoch):
                raise ValueError(f"schedule: the key {epoch!r} is not an epoch (a whole number of 0 or more).")
            self.codecs_of(value, f"schedule[{number}]")
            result[number] = _plain(value)
        return dict(sorted(result.items()))

    def _check_resolved(self, resolved: Any) -> None:
        if self.auto is None:
            raise ValueError(f"resolved= belongs to codec='auto:...', and codec is {self.codec!r}.")
        needed = DIRECTIONS if self.grad_codec is None else ("forward",)
        for name, chosen in _mapping(resolved, "resolved", "layer to {'forward': codec, 'backward': codec}").items():
            if not isinstance(chosen, dict) or not set(needed) <= set(chosen) <= set(DIRECTIONS):
                raise ValueError(
                    f"resolved[{name!r}]={chosen!r} has to name a codec for {' and '.join(map(repr, needed))}. Leave "
                    "resolved= out to have them chosen anew."
                )
            for direction, spec in chosen.items():
                _spec(spec, f"resolved[{name!r}][{direction!r}]")

    # -- what it says ------------------------------------------------------------------------------------------
    @property
    def boundaries(self) -> bool:
        """Whether layer boundaries are compressed."""
        return self.codec is not None and bool(self.first or self.last or self.layers)

    @property
    def auto(self) -> Target | None:
        """The target of codec="auto:...", or None for a codec that is named."""
        return Target.parse(self.codec) if is_auto(self.codec) else None

    @property
    def saved_auto(self) -> SavedTarget | None:
        """The target of saved="auto:budget=...", or None for a codec that is named."""
        return SavedTarget.parse(self.saved) if is_auto(self.saved) else None

    def saved_codec(self) -> Codec | None:
        """The codec of saved tensors, where one is named."""
        return None if self.saved is None or is_auto(self.saved) else _spec(self.saved, "saved", site="saved")

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

    def all_codecs(self) -> Iterator[tuple[str, Codec, Codec]]:
        """(option, codec, grad_codec) of everything that boundaries will ever use, but for what auto chooses."""
        if self.boundaries:
            yield from self.all_scheduled()
        for pattern, value in (self.layers or {}).items():
            yield f"layers[{pattern!r}]", *self.codecs_of(value)

    def all_scheduled(self) -> Iterator[tuple[str, Codec, Codec]]:
        """(option, codec, grad_codec) of the start and of every entry of the schedule."""
        yield "codec", *self.codecs_of()
        for epoch, value in (self.schedule or {}).items():
            yield f"schedule[{epoch}]", *self.codecs_of(value)

    # -- forms ------------------------------------------------------------------------------------------------
    @classmethod
    def of(cls, config: "ActCompressConfig | str | dict | Codec | None") -> "ActCompressConfig":
        """A configuration as it is, or one of boundaries from a codec."""
        if isinstance(config, ActCompressConfig):
            return config
        if isinstance(config, dict) and "name" not in config:
            raise ValueError(
                f"{config!r} is no codec as a dict, which has a 'name'. If it is a configuration, give "
                "ActCompressConfig.from_dict(...)."
            )
        return cls(codec=DEFAULT_CODEC if config is None else config)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ActCompressConfig":
        if not isinstance(values, dict):
            raise ValueError(f"A configuration is a dict such as {{'codec': 'block', 'first': 2}}; got {values!r}.")
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
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
        remedy = "Write it with config.save_pretrained(folder)."
        return cls.from_dict(json_mapping(path.read_text(), str(path), remedy))


def _spec(value: Any, where: str, site: str = "boundary") -> Codec:
    """The codec, which its own spec has to give again: that is what configurations and checkpoints keep."""
    from .codecs import Codec, parse_codec

    try:
        codec = parse_codec(value)
        if isinstance(value, Codec):
            parse_codec(str(codec))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if site in codec.traits.unfit:
        raise ValueError(f"{where}={str(codec)!r}: {codec.traits.unfit[site]}")
    return codec


def json_mapping(text: str, where: str, remedy: str = "") -> dict[str, Any]:
    """The mapping that a JSON text holds.  Raises ValueError, which begins with `where` and ends with `remedy`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}). {remedy}".rstrip()) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{where} holds a {type(values).__name__}, where a mapping of name to value is needed. {remedy}".rstrip()
        )
    return values


def _mapping(value: Any, name: str, what: str) -> dict[Any, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not a mapping of {what}, nor JSON of one ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is not a mapping of {what}.")
    return value


def _plain(value: Any) -> Any:
    """Codecs as specs, so that the configuration is JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
