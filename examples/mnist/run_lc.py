"""Compress LeNet5 on MNIST by Learning-Compression."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import set_seed

from hf_actcompress.recipes.lenet import Digits, LeNet5, load_digits, make_trainer


def reference(path: Path, train: Digits, evaluation: Digits, epochs: float = 25, seed: int = 0) -> tuple[LeNet5, float]:
    """The dense network and its error in %: loaded from `path`, or trained and saved there."""
    set_seed(seed)
    model = LeNet5()
    trainer = make_trainer(
        model, train, evaluation, str(path.parent / "reference"), epochs=epochs, learning_rate=0.08, seed=seed
    )
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        trainer.train()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model, trainer.evaluate()["eval_error"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    train, evaluation = load_digits(sys.argv[1], shift=2)
    print("error", reference(Path(sys.argv[2]), train, evaluation)[1])
