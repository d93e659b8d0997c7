"""What codecs at the cuts do to the logits and gradients of a fine-tuned MiniLM, without any training in between.

    python benchmarks/logit_noise.py [--model FOLDER]

CoLA: logits of the 1,043 validation sentences, gradients of ten training batches (no dropout), cuts after block 0 and
before the last block.  Without --model the packaged MiniLM is fine-tuned first, as in benchmarks/accuracy.py (seed 0;
some minutes).  Writes benchmarks/results/logit_noise.json: of the logit difference the deviation of the change and its
mean, over the deviation of the logits; of the gradient the mean cosine per batch, and the cosine of the mean gradient.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from typing import Any

import harness
import torch
from accuracy import TASKS
from harness import DATA
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.workloads import load_text, tokenize_splits

CODECS = (
    "block:bits=4", "block:bits=4,equalize=none", "rotated:bits=3", "rotated:bits=2", "rotated:bits=2,prototypes=3",
    "trellis:bits=2,prototypes=0", "trellis:bits=2",
)


def outcome(model: Any, batches: dict[str, list], config: ActCompressConfig | None) -> dict[str, torch.Tensor]:
    with compress_model(model, config) if config else nullcontext():
        with torch.no_grad():
            logits = torch.cat([model(**batch).logits for batch in batches["validation"]])
        gradients = []
        for batch in batches["train"]:
            model.zero_grad()
            model(**batch).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return {"logits": logits[:, 1] - logits[:, 0], "gradients": torch.stack(gradients)}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", help="folder of a fine-tuned model with its tokenizer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            harness.recipe("glue/run_glue").main(
                [*TASKS["cola"][2].split(), "--dataset", str(DATA / "glue/cola"), "--seed", "0", "--codec", "none",
                 "--eval_strategy", "no", "--output_dir", folder]
            )  # fmt: skip
        path = args.model or folder
        model = AutoModelForSequenceClassification.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    splits = tokenize_splits(load_text(str(DATA / "glue/cola"), None), tokenizer, 128)
    chosen = torch.randperm(len(splits[0]), generator=torch.Generator().manual_seed(0))[:320].tolist()
    collate, batches = DataCollatorWithPadding(tokenizer), {}
    for name, data, size in (("train", splits[0].select(chosen), 32), ("validation", splits[1], 64)):
        names = {*tokenizer.model_input_names, "label", "labels"}
        kept = data.remove_columns([c for c in data.column_names if c not in names])
        batches[name] = [collate([kept[i] for i in range(at, min(at + size, len(kept)))])
                         for at in range(0, len(kept), size)]  # fmt: skip
    model.eval()  # no dropout; boundaries compress in evaluation as well
    plain, rows = outcome(model, batches, None), []
    cuts = {"both": (1, 2), "first": (1, 0), "last": (0, 2)}
    runs = [(codec, "both") for codec in CODECS]
    runs += [("rotated:bits=2", cut) for cut in ("first", "last")]
    for codec, cut in tqdm(runs):
        first, last = cuts[cut]
        config = ActCompressConfig(codec, "identity", first=first, last=last, placement="cuts")
        found = outcome(model, batches, config)
        change, scale = found["logits"] - plain["logits"], plain["logits"].std()
        rows.append({
            "codec": codec, "cuts": cut, "noise": float(change.std() / scale), "shift": float(change.mean() / scale),
            "cosine": float(cosine_similarity(found["gradients"], plain["gradients"], dim=1).mean()),
            "cosine_of_mean": float(cosine_similarity(found["gradients"].mean(0), plain["gradients"].mean(0), dim=0)),
        })  # fmt: skip
        tqdm.write(json.dumps(rows[-1]))
    harness.save("logit_noise", rows=rows)


if __name__ == "__main__":
    main()
