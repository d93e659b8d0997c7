"""How the error of the gradient depends on the rows that it is measured on: why `auto` takes whole batches.

    python benchmarks/auto_rows.py --data ../shared/data

MiniLM on CoLA, a batch of 32: the error of each layer's gradient (root mean square) with one gradient compressed, on
the first 8, 16 and all 32 rows.  Writes benchmarks/results/auto_rows.json.
"""

from __future__ import annotations

import harness

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.codecs import parse_codec
from hf_actcompress.observe.sensitivity import sensitivity
from hf_actcompress.workloads.batches import training_batches

CODECS = ("block:bits=4", "kmeans:bits=4", "rotated:bits=6", "rotated:bits=4", "rotated:bits=3", "rotated:bits=2")
ROWS = (8, 16, 32)


def main() -> None:
    args = harness.arguments(__doc__, data=True).parse_args()
    model, (batch,), _ = training_batches("minilm", "cola", root=args.data, batches=1, batch_size=max(ROWS))
    example = {key: value for key, value in batch.items() if key != "labels"}
    specs = {str(parse_codec(spec)): spec for spec in CODECS}
    codecs = {"backward": list(map(parse_codec, CODECS))}
    found: dict[str, dict[str, list[float]]] = {}
    config = ActCompressConfig("identity", placement="cuts", first=1, last=2)
    with compress_model(model, config, example_inputs=example) as handle:
        model.train()
        for rows in ROWS:
            few = {key: value[:rows] for key, value in batch.items()}
            for row in sensitivity(handle, model, (), few, codecs):
                found.setdefault(row["name"], {}).setdefault(specs[row["codec"]], []).append(row["layer_error"])
    harness.save("auto_rows", rows=ROWS, errors=found)
    for name, errors in found.items():
        for spec, values in errors.items():
            print(f"{name:24s} {spec:16s}", *(f"{value:.4f}" for value in values))


if __name__ == "__main__":
    main()
