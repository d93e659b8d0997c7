"""Options of a pipeline run: a dataclass for transformers' HfArgumentParser."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

TOPOLOGIES = ("linear", "client-server")
BALANCES = ("layers", "parameters", "flops", "time")
SCHEDULES = ("early", "1f1b", "zbv")


@dataclass
class PipelineArguments:
    """Raises ValueError for values that are not allowed, and says which are."""

    output_dir: str = field(default="outputs/pipeline", metadata={"help": "Checkpoints, the merged model, results."})
    topology: str = field(
        default="linear",
        metadata={
            "help": "'linear': stage i on rank i; 'client-server': rank 0 keeps the first and the last stage, with "
            "the data and labels, and the others the middle."
        },
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "'early' (1F1B that runs --ahead micro-batches further; default for linear), '1f1b', or 'zbv' "
            "(zero bubble, V-shaped; the one for client-server)."
        },
    )
    ahead: int = field(
        default=2, metadata={"help": "Micro-batches that 'early' runs ahead; each costs its activations."}
    )
    cuts: list[int] | None = field(
        default=None, metadata={"help": "Layers after which to cut, e.g. 0 4; default: about as many layers each."}
    )
    balance: str = field(
        default="layers",
        metadata={
            "help": "Without --cuts, what stages have about as much of: 'layers', 'parameters', 'flops', or 'time' "
            "(of a forward pass, measured on rank 0)."
        },
    )
    micro_batches: int = field(default=4, metadata={"help": "Parts of a batch that are sent one after the other."})
    codec: str = field(
        default="block:bits=4", metadata={"help": "Codec of the activations, e.g. delta+block:bits=2; or 'none'."}
    )
    grad_codec: str | None = field(
        default=None, metadata={"help": "Codec of the gradients, or 'none'; default: the same (with delta+a, a)."}
    )
    nonfinite: str = field(
        default="pass",
        metadata={"help": "'pass' sends NaN and Inf on; 'raise' stops and names stage and micro-batch."},
    )
    checksum: bool | None = field(
        default=None, metadata={"help": "Of every message; default: where they leave this machine."}
    )
    secret: str | None = field(
        default=None,
        metadata={
            "help": "A token that every rank must know to join; better given as the environment variable "
            "HF_ACTCOMPRESS_SECRET, which the list of processes does not show."
        },
    )
    timeout: float = field(default=300.0, metadata={"help": "Seconds that a rank waits for another one."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Epochs."})
    max_steps: int = field(default=-1, metadata={"help": "Steps, instead of epochs."})
    batch_size: int = field(default=32, metadata={"help": "Samples a step, over all micro-batches."})
    eval_batch_size: int = field(default=64, metadata={"help": "Samples at once in evaluation."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of AdamW; falls linearly to 0."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps in which the learning rate rises."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Bound of the norm over all stages; 0: none."})
    seed: int = field(default=0, metadata={"help": "Of order, dropout, new weights and stochastic rounding."})
    bf16: bool = field(default=False, metadata={"help": "Compute, and send, in bf16 autocast."})
    fp16: bool = field(
        default=False, metadata={"help": "Compute, and send, in fp16 autocast, with loss scaling; steps that overflow "
                                 "are skipped."}
    )  # fmt: skip
    device: str = field(default="cpu", metadata={"help": "Where this rank computes, e.g. cuda:0."})
    logging_steps: int = field(default=20, metadata={"help": "Steps between entries of the log."})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0: none."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint that all ranks have."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def agreed(self) -> dict[str, object]:
        """What must be alike on all ranks."""
        own = ("output_dir", "device", "timeout", "disable_tqdm", "secret")
        compared = ("checksum", "nonfinite", "codec", "grad_codec")  # by the stages themselves
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*own, *compared)}

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology={self.topology!r} is not known; choose one of: {', '.join(TOPOLOGIES)}.")
        if self.schedule is None:
            self.schedule = "zbv" if self.topology == "client-server" else "early"
        if self.schedule not in SCHEDULES or (self.schedule == "zbv") != (self.topology == "client-server"):
            raise ValueError(
                f"schedule={self.schedule!r} with topology={self.topology!r}: linear takes early or 1f1b, "
                "client-server zbv."
            )
        if self.balance not in BALANCES:
            raise ValueError(f"balance={self.balance!r} is not known; choose one of: {', '.join(BALANCES)}.")
        if self.cuts and self.balance != "layers":
            raise ValueError(f"balance={self.balance!r} chooses cuts, and cuts={self.cuts} are given: leave one out.")
        if self.nonfinite not in ("pass", "raise"):
            raise ValueError(f"nonfinite={self.nonfinite!r} is not known; choose 'pass' or 'raise'.")
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True and fp16=True exclude each other: give one.")
        for name in ("micro_batches", "batch_size", "eval_batch_size", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batches={self.micro_batches}: micro-batches "
                "are equally large."
            )
