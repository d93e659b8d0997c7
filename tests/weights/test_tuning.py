"""Fixed structures: projections onto the space that the floats span, and training within it."""

import pytest
import torch
from helpers.trainers import accuracy, make_trainer, same, weights

from hf_actcompress.weights import LCCallback, LearningCompression, load_compressed
from hf_actcompress.weights.compressions import parse_compression
from hf_actcompress.weights.tuning import project, structure

SPECS = ["codebook:k=4", "codebook:k=3,joint=true", "binary", "ternary", "prune:keep=30", "prune:keep=40,k=4",
         "prune:keep=10%,joint=false", "lowrank:rank=2", "codebook:k=4 + prune:keep=10", "block:bits=4",
         "lowrank:rank=1 + prune:keep=20"]  # fmt: skip


def tensors(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(12, 8)] if "lowrank" in spec or "block" in spec else [(12, 8), (20,)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def basis(form, spec):
    """The slow, obvious twin: how the tensors change with each float, by finite differences."""
    flat = torch.cat([v.reshape(-1) for v in form.values()])
    directions = []

    def along(change):
        return torch.cat([v.reshape(-1) for v in change.values()]) - flat

    import dataclasses

    def bumps(part, rebuild):
        for name in ("floats", "values_", "flat", "right"):
            value = getattr(part, name, None)
            if value is None:
                continue
            for i in range(value.numel()):
                moved = value.clone()
                moved.view(-1)[i] += 1.0
                directions.append(along(rebuild(dataclasses.replace(part, **{name: moved}))))
        for i, inner in enumerate(getattr(part, "parts", ())):
            bumps(inner, lambda new, i=i, part=part: rebuild(
                dataclasses.replace(part, parts=(*part.parts[:i], new, *part.parts[i + 1:]))))  # fmt: skip

    bumps(form, lambda new: new)
    return torch.stack(directions, 1).double() if directions else torch.zeros(len(flat), 0).double()


@pytest.mark.parametrize("spec", SPECS)
def test_the_projection_is_that_onto_the_space_of_the_floats(spec):
    form = parse_compression(spec).compress(tensors(spec))
    found = structure(form, torch.device("cpu"))
    x = tensors(spec, seed=1)
    flat = torch.cat([v.reshape(-1) for v in x]).double()
    for _ in range(6):  # a sum of parts that overlap comes nearer with every call
        ours = torch.cat([v.reshape(-1) for v in project(found, x)]).double()
    if "block" in spec:  # codecs stay as they are
        expected = torch.cat([v.reshape(-1) for v in form.values()]).double()
    else:
        space = basis(form, spec)
        expected = space @ torch.linalg.lstsq(space, flat[:, None], driver="gelsd").solution[:, 0]
    assert torch.allclose(ours, expected, atol=1e-3 if "+" in spec else 1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_form_of_a_projected_tensor_has_the_same_bits_and_values(spec):
    form = parse_compression(spec).compress(tensors(spec))
    found = structure(form, torch.device("cpu"))
    inside = project(found, tensors(spec, seed=1))
    flat = torch.cat([v.reshape(-1) for v in inside])
    again = found.form(flat)
    assert again.bits == form.bits and type(again) is type(form)
    assert torch.allclose(torch.cat([v.reshape(-1) for v in again.values()]), flat, atol=1e-4)


SCHEME = {"layer.0.*.dense": "codebook:k=4 + prune:keep=1%", "layer.1.*.dense": "prune:keep=20%,k=8",
          "query": "lowrank:rank=2"}  # fmt: skip


def settled(folder, **options):
    callback = LCCallback(SCHEME, mu=0.05, growth=1.5, tune=0.5)
    return make_trainer(folder, callback, compute_metrics=accuracy, eval_strategy="epoch", **options), callback


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_settled_model_is_trained_and_stays_within_its_structure(tmp_path, optim):
    trainer, callback = settled(tmp_path, optim=optim)
    structures, losses = [], []
    plain = LearningCompression.hold

    def hold(self):
        plain(self)
        structures.append([form.bits for form in self.forms])
        for task in self.tasks:
            if "codebook" in str(task.compression):
                for name in task.names:
                    assert len(self.parameters[name].unique()) <= 4 + 0.01 * self.parameters[name].numel() + 1
            if "prune:keep=20%,k=8" in str(task.compression):
                values = torch.cat([self.parameters[name].flatten() for name in task.names])
                assert (values == 0).float().mean() > 0.79 and len(values.unique()) <= 9
        losses.append(torch.cat([p.flatten() for p in self.parameters.values()]).clone())

    LearningCompression.hold = hold
    try:
        trainer.train()
    finally:
        LearningCompression.hold = plain
    assert len(structures) == 4 and structures[0] == structures[-1]
    assert not torch.equal(losses[0], losses[-1])  # it does learn
    callback.save(tmp_path / "small")
    from helpers import build

    fresh = build("bert")
    load_compressed(tmp_path / "small", fresh)
    assert same(weights(trainer), {k: v.clone() for k, v in fresh.state_dict().items()})


def test_a_settled_run_resumes_exactly(tmp_path):
    whole, _ = settled(tmp_path / "a", save_strategy="steps", save_steps=6)
    whole.train()
    again, _ = settled(tmp_path / "b", save_strategy="steps", save_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert same(weights(whole), weights(again))


def test_form_is_taken_once_for_all_batches_of_an_evaluation(monkeypatch):
    lc, seen = LearningCompression(torch.nn.Linear(8, 4), "codebook:k=2"), []
    plain = LearningCompression._take_over
    monkeypatch.setattr(LearningCompression, "_take_over", lambda self: seen.append(1) or plain(self))
    lc.settle()
    for expected in (1, 2):
        with torch.no_grad():
            lc.parameters["weight"].add_(torch.randn(4, 8))
        lc.hold()
        for _ in range(3):
            lc.use_compressed()
            lc.use_trained()
        assert len(seen) == expected
        assert torch.equal(lc.parameters["weight"], lc.delta["weight"]) and len(lc.delta["weight"].unique()) == 2


def test_training_the_floats_lowers_the_loss_that_the_compressed_model_has():
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 4, bias=False)
    x, target = torch.randn(64, 16), torch.randn(64, 4)
    lc = LearningCompression(model, "codebook:k=3")
    lc.settle()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean() + lc.penalty()
        loss.backward()
        lc.add_gradients()
        optimizer.step()
        lc.hold()
        losses.append(float(loss))
    codes = lc.forms[0].codes
    lc.finish()
    assert losses[-1] < losses[0] - 1e-3 and losses == sorted(losses, reverse=True)
    assert (lc.forms[0].codes == codes).all() and len(model.weight.unique()) <= 3


@pytest.mark.parametrize("tune", [-0.1, 1.0, 2])
def test_a_share_that_is_none(tune):
    with pytest.raises(ValueError, match="a share of the training"):
        LCCallback("codebook:k=2", tune=tune)
