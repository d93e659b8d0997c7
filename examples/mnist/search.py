"""Search compressions of LeNet5 for the best trade of error against size (two objectives), by optuna.

    python examples/mnist/search.py --dataset ../shared/data/mnist --trials 30
    python examples/mnist/search.py --dataset ../shared/data/mnist --trials 30 --sampler random

A trial chooses what the convolutions and the linear layers become (share kept and codebook of what stays, codebook
entries k, price alpha of low rank, bits of block quantization) and the temperature of distillation from the dense
reference.  The study lies in --output_dir (study.log): the same command goes on where an earlier one stopped, until
there are --trials.  Writes front.md, front.png and trials-SAMPLER.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from run_lc import Distill, reference
from torch import nn

from hf_actcompress.weights import LCCallback, parse_scheme
from hf_actcompress.workloads.lenet import LeNet5, load_digits, make_trainer
from hf_actcompress.workloads.pareto import Point, pareto, plot, table

SAMPLERS = ("tpe", "random")


def part(trial: Any, where: str, most: float, kinds: tuple[str, ...]) -> str:
    """The compression of one group of layers."""
    kind = trial.suggest_categorical(f"{where}_kind", kinds)
    if kind == "prune":
        keep = trial.suggest_float(f"{where}_keep", most / 50, most, log=True)
        k = trial.suggest_categorical(f"{where}_kept_k", (0, 4, 8, 16))
        return f"prune:keep={keep:.3f}%" + (f",k={k}" if k else "")
    if kind == "codebook":
        return f"codebook:k={2 ** trial.suggest_int(f'{where}_log2_k', 1, 4)}"
    if kind == "lowrank":
        return f"lowrank:rank=auto,alpha={trial.suggest_float(f'{where}_alpha', 2e-7, 1e-5, log=True):.3g}"
    return f"block:bits={trial.suggest_int(f'{where}_bits', 2, 6)}"


class Search:
    """One Trainer for all trials: each gets a fresh copy of the dense model and a scheme of its own."""

    def __init__(self, dense: LeNet5, train: Any, evaluation: Any, folder: Path, epochs: float, seed: int) -> None:
        self.dense, self.callback = dense, LCCallback("codebook:k=2")
        self.distill = Distill(dense)
        steps = -(-len(train) // 256) * epochs
        self.every = max(1, round(steps / (10 * epochs)))
        tune = 0.2
        growth = 30 ** (1 / max((1 - tune) * steps / self.every - 1, 1))  # mu from 1e-2 to 0.3
        self.callback.mu, self.callback.growth, self.callback.every = 1e-2, growth, self.every
        self.callback.tune = tune
        self.trainer = make_trainer(
            None, train, evaluation, str(folder), epochs=epochs, learning_rate=0.03, weight_decay=0.0,
            callbacks=[self.callback], loss=self.distill, model_init=self.model_init, eval_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=seed,
        )  # fmt: skip

    def space(self, trial: Any) -> dict[str, Any]:
        """What a trial chooses: no TrainingArguments, so it is set here, and nothing is left for the Trainer."""
        scheme = {
            "conv*": part(trial, "conv", 30.0, ("prune", "codebook", "block")),
            "fc*": part(trial, "linear", 10.0, ("prune", "codebook", "lowrank")),
        }
        temperature = trial.suggest_categorical("temperature", (0, 2, 4, 8))
        trial.set_user_attr("scheme", scheme)
        self.callback.scheme = parse_scheme(scheme)
        self.distill.weight, self.distill.temperature = (0.7, temperature) if temperature else (0.0, 1.0)
        return {}

    def model_init(self) -> nn.Module:
        model = LeNet5()
        model.load_state_dict(self.dense.state_dict())
        model.register_forward_pre_hook(self.distill.watch, with_kwargs=True)
        return model

    def objectives(self, metrics: dict[str, float]) -> list[float]:
        assert self.callback.lc is not None
        return [metrics["eval_error"], self.callback.lc.ratio]

    def run(self, folder: Path, trials: int, sampler: str, seed: int) -> Any:
        """The study, with `trials` finished trials, older ones included."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
        options = {"study_name": sampler, "storage": storage, "load_if_exists": True}
        directions = ["minimize", "maximize"]
        study = optuna.create_study(directions=directions, **options)
        done = sum(t.state.is_finished() for t in study.trials)
        # Seeded by what is there: a continued search should not repeat its own beginning.
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        if done < trials:
            self.trainer.hyperparameter_search(
                hp_space=self.space, compute_objective=self.objectives, direction=directions, backend="optuna",
                n_trials=trials - done, sampler=kinds[sampler](seed=seed + done), **options,
            )  # fmt: skip
        return study


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", help="a folder or hub id with MNIST (default: the hub's mnist)")
    parser.add_argument("--output_dir", default="outputs/mnist-search", type=Path)
    parser.add_argument("--reference", type=Path, help="a dense model of run_lc.py (default: in --output_dir)")
    parser.add_argument("--reference_epochs", type=float, default=25)
    parser.add_argument("--sampler", choices=SAMPLERS, default="tpe")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=float, default=5, help="of each trial")
    parser.add_argument("--max_train_samples", type=int, help="rows that each trial trains on")
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        import optuna
    except ImportError as error:
        raise ValueError('The search needs optuna: pip install "hf_actcompress[search]".') from error
    optuna.logging.set_verbosity(optuna.logging.INFO)
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    train, evaluation = load_digits(
        options.dataset, shift=2, max_train=options.max_train_samples, max_eval=options.max_eval_samples
    )
    path = options.reference or folder / "reference.safetensors"
    dense, error = reference(path, train, evaluation, options.reference_epochs, options.seed)
    search = Search(dense, train, evaluation, folder / "trials", options.epochs, options.seed)
    study = search.run(folder, options.trials, options.sampler, options.seed)
    records = [{"number": t.number, "error": t.values[0], "ratio": t.values[1], "params": t.params,
                "scheme": t.user_attrs["scheme"], "temperature": t.params["temperature"], "sampler": options.sampler,
                "epochs": options.epochs, "images": len(train), "reference_error": error}
               for t in study.trials if t.values]  # fmt: skip
    (folder / f"trials-{options.sampler}.json").write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    points = [point(record) for record in records]
    front = table(pareto(points))
    (folder / "front.md").write_text(front + "\n")
    plot({f"{options.sampler}, {len(points)} trials": sorted(points)}, folder / "front.png", dense=error, joined=False)
    print(front)
    print(f"Table, figure, all trials: {folder}/front.md, front.png, trials-{options.sampler}.json")
    return records


def point(record: dict[str, Any]) -> Point:
    """A finished trial for tables and figures."""
    words = "; ".join(f"`{pattern}` {spec}" for pattern, spec in record["scheme"].items())
    words += f"; temperature {record['temperature']}" if record["temperature"] else ""
    return record["ratio"], record["error"], f"{record['sampler']} {record['number']}: {words}"


if __name__ == "__main__":
    main()
