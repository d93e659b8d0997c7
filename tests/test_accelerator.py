"""The four sites on a GPU: skipped where there is none.  The rest of the suite runs on the CPU."""

import copy
import dataclasses
import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from helpers import TEXT_MODELS, batch_of, build, loss_of, naming
from helpers.specs import SPECS
from helpers.trainers import make_trainer, same, weights

from hf_actcompress import ActCompressCallback, ActCompressConfig, compress_model
from hf_actcompress.codecs import parse_codec
from hf_actcompress.saved import kept
from hf_actcompress.weights import LCCallback, load_compressed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SHAPES = [(7,), (4, 33, 16), (2, 64, 384), (2, 16, 24, 24)]


def on_gpu(batch):
    if isinstance(batch, dict):
        return {name: value.cuda() for name, value in batch.items()}
    return tuple(value.cuda() for value in batch)


def seeded(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def roundtrip(codec, x):
    return codec.decode(codec.encode(x, codec.init_state("site", 3)))


def moved(payload, device):
    tensors = {name: t.to(device) for name, t in payload.tensors.items()}
    parts = {name: moved(part, device) for name, part in payload.parts.items()}
    return dataclasses.replace(payload, tensors=tensors, parts=parts)


# Codecs


@pytest.mark.parametrize("spec", SPECS)
def test_the_gpu_codes_as_well_as_the_cpu_and_into_as_many_bytes(spec):
    codec = parse_codec(spec)
    for shape, dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        x = seeded(shape).to(dtype)
        try:
            here = codec.encode(x, codec.init_state("site", 3))
        except ValueError:  # a rank above the number of features
            continue
        with naming(shape, dtype):
            payload = codec.encode(x.cuda(), codec.init_state("site", 3))
            assert payload.nbytes == here.nbytes
            y, expected = codec.decode(payload), codec.decode(here)
            assert y.is_cuda and y.dtype == dtype and y.shape == x.shape
            ours, theirs = relative(y.cpu(), x), relative(expected, x)
            # Ties and the order of sums differ, so that single codes do; the error of all does not.
            assert ours <= 1.15 * theirs + 1e-2 if x.numel() > 100 else ours <= 2 * theirs + 0.2


def test_what_one_device_encodes_the_other_decodes():
    x = seeded((4, 64, 96))
    for spec in SPECS:
        codec = parse_codec(spec)
        payload = codec.encode(x.cuda(), codec.init_state("site", 3))
        with naming(spec):
            assert relative(codec.decode(moved(payload, "cpu")), codec.decode(payload).cpu()) < 1e-5


def test_the_same_call_gives_the_same_payload():
    x = seeded((4, 64, 96)).cuda()
    for spec in SPECS:
        codec = parse_codec(spec)
        with naming(spec):
            assert torch.equal(roundtrip(codec, x), roundtrip(codec, x))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernels_and_plain_torch_give_the_same(bits, monkeypatch):
    codec, x = parse_codec(f"block:bits={bits},round=stochastic"), seeded((8, 256, 384)).cuda()
    results = []
    for choice in ("0", "1"):
        monkeypatch.setenv("HF_ACTCOMPRESS_KERNELS", choice)
        results.append(roundtrip(codec, x))
    assert torch.equal(*results)


# The boundary


@pytest.mark.parametrize("spec", ["block:bits=4", "sort:bits=8", "kmeans:bits=4", "lowrank:rank=2", "topk:ratio=0.3",
                                  "ef+uniform:bits=4,round=stochastic", "rotated:bits=3"])  # fmt: skip
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "mobilenetv2_100"])
def test_a_boundary_changes_the_loss_little(name, spec):
    model, batch = build(name).cuda().eval(), on_gpu(batch_of(name))
    plain = float(loss_of(model, batch))
    with compress_model(model, ActCompressConfig(codec=spec, first=1, last=1)) as handle:
        loss = loss_of(model, batch)
        loss.backward()
        rows = handle.stats()
    # A random CNN turns what is left out into anything.
    assert math.isfinite(float(loss)) and (name == "mobilenetv2_100" or abs(float(loss) - plain) < 1.0)
    assert {row["direction"] for row in rows} == {"forward", "backward"} and all(row["ratio"] > 1 for row in rows)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("autocast", [False, True])
def test_identity_boundaries_change_no_bit(autocast):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        batch, traces = on_gpu(batch_of("bert")), []
        for config in (None, ActCompressConfig(codec="identity", first=1, last=1)):
            model = build("bert").cuda().eval()
            around = nullcontext() if config is None else compress_model(model, config)
            with around, torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss_of(model, batch).backward()
            traces.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*traces, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# Saved tensors


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kept, "SMALLEST", 16)


def gradients(model, batch, spec, autocast=False):
    model.zero_grad()
    torch.manual_seed(5)
    config = ActCompressConfig(saved=spec)
    with compress_model(model, config) as handle, torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss_of(model, batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), handle.meters["saved"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [*TEXT_MODELS, "vit", "mobilenetv2_100", "resnet18"])
def test_saved_tensors(name, autocast, small):
    model, batch = build(name).cuda().train(), on_gpu(batch_of(name))
    for module in model.modules():  # dropout's masks are drawn anew in every pass
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.eval()
    exact, _ = gradients(copy.deepcopy(model), batch, "identity", autocast)
    close, record = gradients(copy.deepcopy(model), batch, "block:bits=8", autocast)
    coarse, less = gradients(copy.deepcopy(model), batch, "block:bits=2", autocast)
    assert relative(close, exact) < 0.25 and relative(close, exact) < relative(coarse, exact)
    assert record.payload_bytes < record.raw_bytes / 1.5
    assert less.payload_bytes < record.payload_bytes


def test_less_memory_is_held_between_forward_and_backward():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    model = BertForSequenceClassification(config).cuda().train()
    batch = {"input_ids": torch.randint(1000, 9000, (32, 128)).cuda(), "labels": torch.zeros(32).long().cuda()}

    def held(spec):
        with compress_model(model, ActCompressConfig(saved=spec)):
            model(**batch).loss.backward()
            model.zero_grad()
            before = torch.cuda.memory_allocated()
            loss = model(**batch).loss
            after = torch.cuda.memory_allocated()
            loss.backward()
            model.zero_grad()
        return after - before

    plain = held("identity")
    assert held("block:bits=4") < plain / 6 and held("auto:budget=0.1") < plain / 7


# Trainers


def trained(folder, config, **options):
    callback = ActCompressCallback(config)
    trainer = make_trainer(folder, callback, use_cpu=False, **options)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize("config", [
    {"codec": "block:bits=4"}, {"codec": "auto:ratio=4"}, {"saved": "block:bits=4"},
    {"codec": "ef+topk:ratio=0.2", "grad_codec": "block:bits=8,round=stochastic"},
], ids=str)  # fmt: skip
def test_a_trainer_on_the_gpu(tmp_path, config, small):
    one, _ = trained(tmp_path / "a", ActCompressConfig(**config), bf16=True)
    other, _ = trained(tmp_path / "b", ActCompressConfig(**config), bf16=True)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and all(torch.isfinite(torch.tensor(losses[0])))
    assert next(one.model.parameters()).is_cuda


def test_resuming_on_the_gpu_goes_on_as_before(tmp_path):
    config = ActCompressConfig(codec="ef+block:bits=4")
    whole, _ = trained(tmp_path / "a", config, save_strategy="steps", save_steps=4)
    trainer = make_trainer(tmp_path / "b", ActCompressCallback(config), use_cpu=False)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    difference = [relative(b, a) for a, b in zip(weights(whole).values(), weights(trainer).values(), strict=True)
                  if a.dtype.is_floating_point and a.norm() > 0]  # fmt: skip
    assert max(difference) < 1e-3


def test_learning_compression_on_the_gpu(tmp_path):
    scheme = {"layer.*.dense": "codebook:k=4 + prune:keep=1%", "query": "lowrank:rank=auto,alpha=1e-6"}
    callback = LCCallback(scheme, mu=0.05, growth=1.5)
    trainer = make_trainer(tmp_path, callback, use_cpu=False)
    trainer.train()
    callback.save(tmp_path / "small")
    fresh = build("bert").cuda()
    load_compressed(tmp_path / "small", fresh)
    assert same({k: v.cpu() for k, v in trainer.model.state_dict().items()},
                {k: v.cpu() for k, v in fresh.state_dict().items()})  # fmt: skip


def test_sensitivities_are_measured_on_the_gpu():
    from hf_actcompress.observe.sensitivity import sensitivity

    model, batch = build("bert").cuda(), on_gpu(batch_of("bert"))
    codecs = [parse_codec("block:bits=8"), parse_codec("block:bits=2")]
    with compress_model(model, ActCompressConfig(codec="identity", first=1, last=1)) as handle:
        rows = sensitivity(handle, model, (), batch, {"forward": codecs, "backward": codecs})
    errors = {spec: [row["grad_error"] for row in rows if row["codec"] == str(spec)] for spec in codecs}
    assert all(fine < coarse for fine, coarse in zip(*errors.values(), strict=True)) and len(rows) >= 8
