"""Options of a pipeline run: a dataclass for transformers' HfArgumentParser."""

from __future__ import annotations

from dataclasses import dataclass, field

TOPOLOGIES = ("linear", "client-server")
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
    micro_batches: int = field(default=4, metadata={"help": "Parts of a batch that are sent one after the other."})
    codec: str = field(
        default="block:bits=4", metadata={"help": "Codec of the activations, e.g. delta+block:bits=2; or 'none'."}
    )
    grad_codec: str | None = field(
        default=None, metadata={"help": "Codec of the gradients, or 'none'; default: the same (with delta+a, a)."}
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
    device: str = field(default="cpu", metadata={"help": "Where this rank computes, e.g. cuda:0."})
    logging_steps: int = field(default=20, metadata={"help": "Steps between entries of the log."})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0: none."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint that all ranks have."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

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
        for name in ("micro_batches", "batch_size", "eval_batch_size", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batches={self.micro_batches}: micro-batches "
                "are equally large."
            )
