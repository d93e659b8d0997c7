"""Sensitivity maps: which layer tolerates which codec, of MiniLM on CoLA, and of two image models on CIFAR-10.

    python benchmarks/sensitivity.py                # the studies that are not there yet, then all figures
    python benchmarks/sensitivity.py --figures      # only the figures

One JSON per model under benchmarks/results/sensitivity/, figures in docs/figures/.  What
`hf-actcompress analyze MODEL DATA` does, with the settings below.  MobileNetV2 has random weights (none are packaged),
the other two are pretrained; no model is fine-tuned.
"""

from __future__ import annotations

import harness
import torch
from harness import FIGURES
from tqdm import tqdm

from hf_actcompress.cli.analyze import ANALYZE_CODECS
from hf_actcompress.plan.study import study
from hf_actcompress.report.figures import error_against_bits, error_growth, histograms, sensitivity_map
from hf_actcompress.workloads.batches import training_batches

RESULTS = harness.RESULTS / "sensitivity"
STUDIES = {
    "minilm": {"data": "cola", "batches": 1, "batch_size": 16},
    "mobilenetv2_100": {"data": "cifar10", "batches": 1, "batch_size": 16, "image_size": 64},
    "efficientnet-lite0": {"data": "cifar10", "batches": 1, "batch_size": 16, "image_size": 64},
}
CODECS = (*ANALYZE_CODECS, "topk:ratio=0.2|block:bits=8")


def main() -> None:
    parser = harness.arguments(__doc__, data=True, force=True)
    parser.add_argument("--models", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--figures", action="store_true", help="draw what is there, study nothing")
    args = parser.parse_args()
    for name in args.models:
        path = RESULTS / f"{name}.json"
        if not args.figures and (args.force or not path.exists()):
            settings = dict(STUDIES[name])
            data = settings.pop("data")
            model, batches, about = training_batches(name, data, root=args.data, **settings)
            with tqdm(desc=name) as bar:
                found = study(
                    model, batches, CODECS, advance=bar.update, begin=lambda total, bar=bar: bar.reset(total)
                )
            record = {**about, "data_name": data, "threads": torch.get_num_threads(), **found}
            record["command"] = f"python benchmarks/sensitivity.py --models {name}"
            harness.write(path, record)
        if path.exists():
            record = harness.read(path)
            for draw in (sensitivity_map, error_against_bits, error_growth, histograms):
                draw(record, FIGURES / f"{draw.__name__}_{name.replace('-', '_')}.png")


if __name__ == "__main__":
    main()
