"""A boundary inside torch.compile does what it does in eager mode: values, gradients, states, counters and errors."""

import copy

import pytest
import torch
from helpers import batch_of, build, loss_of, points, stack
from helpers.boundaries import STATEFUL, values
from helpers.trainers import callback, make_trainer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_actcompress import ActCompressConfig, compress_model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.norm(x)).tanh()


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(12)), nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


MODELS = ["bert", "llama", "vit", "resnet18", "mobilenetv2_100"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted():
    return CompileCounterWithBackend("aot_eager")


def exact(name):
    """A model in training mode without dropout: compiled code may draw its random numbers in another order."""
    model = build(name).train()
    for module in model.modules():
        for option in ("p", "drop_prob", "attention_dropout", "dropout_prob", "drop_rate"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    return model


def steps(model, run, batches):
    """Loss and gradients of each batch."""
    found = []
    for batch in batches:
        loss_of(run, batch).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    return found


def close(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_with_two_boundaries_and_the_gradients_of_eager(name):
    model, batches, backend = exact(name), [batch_of(name, seed) for seed in range(2)], counted()
    twin = copy.deepcopy(model)
    with compress_model(twin, "block:bits=4") as handle:
        eager, rows = steps(twin, twin, batches), handle.stats()
    model.config = getattr(twin, "config", None)  # transformers notes the kind of the loss in its first pass
    with compress_model(model, "block:bits=4") as handle:
        compiled = steps(model, torch.compile(model, backend=backend, fullgraph=True), batches)
        close(compiled, eager, rtol=1e-4, atol=1e-5)
        assert backend.frame_count == 1
        for found, expected in zip(handle.stats(), rows, strict=True):
            assert found["calls"] == expected["calls"] == 2
            assert found["rel_error"] == pytest.approx(expected["rel_error"], rel=1e-3)


@pytest.mark.parametrize("codec", ["identity", *STATEFUL])
def test_states_go_on_and_identity_is_exact(codec):
    batches, found = [points(seed=seed) for seed in range(3)], []
    for compiled in (False, True):
        model = stack(dropout=0.0).train()
        with compress_model(model, codec, example_inputs=batches[0][0]) as handle:
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
            found.append((steps(model, run, batches), handle.state_dict()))
    close(*(gradients for gradients, _ in found), rtol=0, atol=0)
    assert repr(found[0][1]) == repr(found[1][1])


@pytest.mark.parametrize("regional", [False, True])
def test_a_model_that_was_compiled_and_run_before(regional):
    """Whole, and layer by layer, where all layers share one graph: those with a boundary need their own."""
    model, batches, backend = stack(dropout=0.0).train(), [points()], counted()
    if regional:
        for layer in model.blocks:
            layer.compile(backend=backend, fullgraph=True)
    run = model if regional else torch.compile(model, backend=backend)
    plain, twin = steps(model, run, batches), stack(dropout=0.0).train()
    with compress_model(twin, "uniform:bits=2", example_inputs=batches[0][0]):
        eager = steps(twin, twin, batches)
    with compress_model(model, "uniform:bits=2", example_inputs=batches[0][0]) as handle:
        close(steps(model, run, batches), eager)
        before = backend.frame_count
        close(steps(model, run, batches), eager)
        assert backend.frame_count == before
        assert {row["calls"] for row in handle.stats()} == {2}
    close(steps(model, run, batches), plain)
    assert {row["calls"] for row in handle.stats()} == {2}


@pytest.mark.parametrize("plain_first", [False, True])
def test_another_model_of_the_same_class_shares_no_graph(plain_first):
    model, other, batches = stack(dropout=0.0).train(), stack(dropout=0.0).train(), [points()]
    with compress_model(model, "uniform:bits=1", example_inputs=batches[0][0]) as handle:
        for each in (other, model) if plain_first else (model, other):
            found = steps(each, torch.compile(each, backend="aot_eager"), batches)
            if each is other:
                close(found, steps(other, other, batches))
        assert {row["calls"] for row in handle.stats()} == {1}


def test_the_setting_of_the_compiler_is_put_back():
    model, config = stack(), torch._dynamo.config
    assert config.skip_nnmodule_hook_guards
    first = compress_model(model, "identity", example_inputs=values(2, 8))
    second = compress_model(stack(), "identity", example_inputs=values(2, 8))
    assert not config.skip_nnmodule_hook_guards
    first.remove()
    assert not config.skip_nnmodule_hook_guards
    second.remove()
    first.remove()
    assert config.skip_nnmodule_hook_guards


def test_lengths_that_change_do_not_compile_again():
    model, backend, first = stack(dropout=0.0).train(), counted(), 0
    with compress_model(model, "block:bits=4", example_inputs=points()[0]):
        run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        for rows in (6, 4, 9, 11):
            batches = [points(rows=rows)]
            close(steps(model, run, batches), steps(model, model, batches))
            first = backend.frame_count if rows == 6 else first
        assert backend.frame_count == first


def test_switching_off_and_evaluation_take_effect_in_graphs():
    model, batch = stack(dropout=0.0).train(), points()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    config = ActCompressConfig("uniform:bits=1", evaluate="off")
    with compress_model(model, config, example_inputs=batch[0]) as handle:
        for _ in range(2):
            compressed = loss_of(run, batch)
            with handle.disabled():
                plain = loss_of(run, batch)
            with torch.no_grad():
                assert torch.equal(loss_of(run, batch), plain.detach())
            assert not torch.equal(compressed, plain)
    assert {row["calls"] for row in handle.stats() if row["direction"] == "forward"} == {2}


def test_second_derivatives():
    """The rounding is a constant in them."""
    model, x = stack(dropout=0.0).train(), values(4, 8)

    def penalty():
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    exactly = penalty()
    with compress_model(model, "identity", example_inputs=x):
        close(penalty(), exactly)


def test_layers_with_a_boundary_share_one_graph():
    """A graph does not hold which boundary it is: with more layers than torch compiles graphs of one function."""
    model, backend = Deep(), counted()
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    x = values(4, 8)
    config = ActCompressConfig("block:bits=4", first=10, last=1)
    with compress_model(model, config, example_inputs=x) as handle:
        model(x).sum().backward()
        assert {row["calls"] for row in handle.stats()} == {1}
        assert backend.frame_count <= 3  # layers without a boundary, the first input (without a gradient), the others


@pytest.mark.parametrize("codec", ["identity", "ef+topk:ratio=0.3"])
def test_checkpointing_inside_of_a_graph(codec):
    """The recomputed forward pass sees the state of the first."""
    batches, found = [points(seed=seed) for seed in range(3)], []
    for segments in (0, 1):
        model = stack(segments=segments, dropout=0.0).train()
        with compress_model(model, codec, example_inputs=batches[0][0]) as handle:
            run = torch.compile(model, backend="aot_eager") if segments else model
            found.append(steps(model, run, batches))
            assert {row["calls"] for row in handle.stats()} == {3}
    close(*found, rtol=0, atol=0)


def test_nonfinite_raise_in_a_graph():
    model, (x, _) = stack(dropout=0.0).train(), points()
    with compress_model(model, ActCompressConfig("block:bits=4", nonfinite="raise"), example_inputs=x):
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        run(x)
        with pytest.raises(FloatingPointError, match="forward: NaN"):
            run(x.detach() * float("inf"))


def test_the_compile_option_of_a_trainer(tmp_path):
    """The Trainer has compiled the model before the callback attaches, and evaluates the graph in between."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        compression = callback("block:bits=4", evaluate="off", meter_every=1)
        options = {"torch_compile": compiled} | ({"torch_compile_backend": "aot_eager"} if compiled else {})
        trainer = make_trainer(tmp_path, compression, model=exact("bert"), max_steps=3, **options)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert {row["calls"] for row in compression.stats} == {3}
        found.append((before, trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(strict):
    model, (x, _) = stack().eval(), points()
    config = compress_model(model, "block:bits=4", example_inputs=x)
    with config, pytest.raises(Exception, match="an exported program holds no compression"):
        torch.export.export(model, (x,), strict=strict)


def test_vmap_is_refused_and_func_grad_works():
    model, (x, _) = stack(dropout=0.0).train(), points()
    parameters = dict(model.named_parameters())

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    plain = torch.func.grad(loss)(parameters)
    with compress_model(model, "identity", example_inputs=x):
        torch.testing.assert_close(torch.func.grad(loss)(parameters), plain, rtol=0, atol=0)
        with pytest.raises(ValueError, match="vmap: a codec takes the tensor of a whole batch"):
            torch.vmap(model)(x[:, None])
