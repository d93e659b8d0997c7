"""Training whose saved tensors are compressed, without dropout, so that attention runs fused: what the loss and the
accuracy come to.

    python benchmarks/saved_training.py                  # everything that is not there yet
    python benchmarks/saved_training.py --tasks llama gpt2 --seeds 0 1 2
    python benchmarks/saved_training.py --list

sst2     MiniLM on 5,000 rows of SST-2, settings as in benchmarks/accuracy.py
cifar10  EfficientNet-Lite0 on 5,000 images of CIFAR-10, settings as there
gpt2, llama  a causal language model of that shape (4 layers, width 192) from scratch on sentences of docstrings, 300
         steps of 8 x 128 tokens, AdamW; the loss on held-out text

No layer boundaries.  Writes benchmarks/results/saved_training/<task>/*.json.  Resumable; several calls may share the
work.
"""

from __future__ import annotations

import functools
import json
import random
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy
import harness
import torch

RESULTS = harness.RESULTS / "saved_training"
RECIPES = ("sst2", "cifar10")
SPECS = {
    **dict.fromkeys(RECIPES, ("none", "block:bits=4", "block:bits=2", "block:bits=2,round=stochastic")),
    **dict.fromkeys(
        ("llama", "gpt2"),
        ("none", "block:bits=4", "block:bits=2", "block:bits=2,round=stochastic", "block:bits=8", "block:bits=3",
         "auto:budget=0.07"),
    ),
}
STEPS, ROWS, LENGTH, VOCABULARY = 300, 8, 128, 4096


@dataclass(frozen=True)
class Run:
    task: str
    saved: str
    seed: int

    @property
    def path(self) -> Path:
        return RESULTS / self.task / harness.file_name(self.saved, f"seed{self.seed}")

    def __str__(self) -> str:
        return f"{self.task} {self.saved} seed {self.seed}"


# Fine-tuning by the recipes


def recipe(run: Run, data: Path) -> dict[str, Any]:
    script, folder, options = accuracy.TASKS[run.task]
    options = re.sub(r"--(first|last|placement) \w+ ?", "", options)  # of layer boundaries
    saved = ["--codec", "none"] if run.saved == "none" else ["--saved", run.saved]
    argv = [*options.split(), "--dataset", str(data / folder), "--logging_steps", "20", "--evaluate", "on", *saved]
    with tempfile.TemporaryDirectory() as folder:
        if run.task == "sst2":
            argv += ["--model", without_dropout(Path(folder))]
        return accuracy.train(script, argv, run.seed)


def without_dropout(folder: Path) -> str:
    """A copy of MiniLM whose configuration has none."""
    from hf_actcompress.workloads import load_text_model

    for part in load_text_model("minilm", 2):
        part.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    return str(folder)


# A language model from scratch


@functools.cache
def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of training and held-out text [blocks, LENGTH]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from hf_actcompress.workloads.embedded import LIBRARIES, _library_sentences

    sentences = [s for library in LIBRARIES for s in _library_sentences(library)]
    random.Random(0).shuffle(sentences)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    ids = torch.tensor([token for text in tokenizer.encode_batch(sentences) for token in text.ids])
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return blocks[:-64], blocks[-64:]


def language_model(name: str) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
            intermediate_size=512, max_position_embeddings=LENGTH,
        ))  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_embd=192, n_layer=4, n_head=6, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    ))  # fmt: skip


def pretrain(run: Run) -> dict[str, Any]:
    from hf_actcompress import ActCompressConfig, compress_model

    began, (blocks, held_out) = time.time(), corpus()
    torch.manual_seed(run.seed)
    model = language_model(run.task).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 1.0) * (1 - 0.9 * step / STEPS)
    )
    config = ActCompressConfig(saved="identity" if run.saved == "none" else run.saved, seed=run.seed)
    order, losses = torch.Generator().manual_seed(run.seed), []
    with compress_model(model, config) as handle:
        for _ in range(STEPS):
            batch = blocks[torch.randint(len(blocks), (ROWS,), generator=order)]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        ratio = handle.meters["saved"].record()["ratio"]
    with torch.no_grad():
        found = sum(float(model.eval()(input_ids=part, labels=part).loss) for part in held_out.split(16)) / 4
    return {
        "losses": losses, "metrics": {"loss": found}, "ratio": ratio, "seconds": round(time.time() - began, 1),
        "tokens": blocks.numel(), **harness.about("saved_training.py"),
    }  # fmt: skip


def main() -> None:
    parser = harness.arguments(__doc__, data=True, force=True, plan=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--only", nargs="+", help="these ways of saving only ('none' is one)")
    args = parser.parse_args()
    runs = [Run(task, spec, seed) for seed in args.seeds for task in args.tasks for spec in SPECS[task]
            if args.only is None or spec in args.only]  # fmt: skip
    runs.sort(key=lambda run: SPECS[run.task].index(run.saved) > 3)  # the most telling ones first
    if args.list:
        return harness.list_runs(runs)
    if set(args.tasks) & set(RECIPES):
        harness.require_data(args.data)

    def execute(run: Run) -> dict[str, Any]:
        record = recipe(run, args.data) if run.task in RECIPES else pretrain(run)
        return {**record, "task": run.task, "saved": run.saved, "seed": run.seed,
                "command": "python benchmarks/saved_training.py"}  # fmt: skip

    harness.run_all(runs, execute, args.force)


if __name__ == "__main__":
    main()
