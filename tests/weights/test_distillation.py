"""Distillation: the losses against their definitions, and a Trainer that trains the student and nothing else."""

import pytest
import torch
from helpers.small_models import Net, bert, images, inputs, texts
from transformers import TrainingArguments

from hf_actcompress.weights.distillation import DistillationTrainer, distillation_loss, hidden_loss, layer_map
from hf_actcompress.weights.lc import LCCallback
from hf_actcompress.weights.structured import prune


def test_soft_loss_is_the_definition():
    student, teacher, t = torch.randn(5, 7), torch.randn(5, 7), 3.0
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    expected = t**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, t), expected)
    assert float(distillation_loss(teacher, teacher, t)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="same classes"):
        distillation_loss(student, teacher[:, :3])


def test_temperature_leaves_the_size_of_the_gradient():
    norms = []
    for t in (1.0, 4.0):
        student = (0.1 * torch.arange(6.0).view(2, 3)).requires_grad_()
        distillation_loss(student, 0.1 * torch.tensor([[3.0, 1, 0], [0, 2, 1]]), t).backward()
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_hidden_loss_ignores_padding_and_scale():
    a, b = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    changed = a.clone()
    changed[0, 2:] = 9
    torch.testing.assert_close(hidden_loss(changed, b, mask), hidden_loss(a, b, mask))
    torch.testing.assert_close(hidden_loss(5 * a, b), hidden_loss(a, b), rtol=1e-4, atol=1e-5)


def test_layers_of_like_depth():
    assert layer_map(3, 6) == [2, 4, 6] and layer_map(2, 2) == [1, 2] and layer_map(1, 12) == [12]


def trainer(tmp_path, student, teacher, rows, **options):
    steps = options.pop("max_steps", 3)
    accumulate = options.pop("gradient_accumulation_steps", 1)
    args = TrainingArguments(str(tmp_path), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[],
                             logging_steps=1, disable_tqdm=True, learning_rate=1e-2, save_strategy="steps",
                             save_steps=2, gradient_accumulation_steps=accumulate, label_names=["labels"],
                             lr_scheduler_type="constant")  # fmt: skip
    return DistillationTrainer(student, args, teacher=teacher, train_dataset=rows, eval_dataset=rows[:4], **options)


def rows_of(batch):
    return [{name: value[i] for name, value in batch.items()} for i in range(len(batch["labels"]))]


def test_the_loss_is_the_mixture_and_the_teacher_stays(tmp_path):
    student, teacher, batch = bert(layers=2), bert(layers=3).train(), texts(16)
    own = trainer(tmp_path, student, teacher, rows_of(batch), alpha=0.3, temperature=2.0, hidden=0.5)
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    student.train()
    for module in student.modules():  # the same values twice
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    teacher.train()  # somebody's evaluation has left it so
    loss = own.compute_loss(student, dict(batch))
    mine = student(**batch, output_hidden_states=True)
    told = teacher.eval()(**inputs(batch), output_hidden_states=True)
    hidden = torch.stack([hidden_loss(mine.hidden_states[i], told.hidden_states[j], batch["attention_mask"])
                          for i, j in ((1, 2), (2, 3))]).mean()  # fmt: skip
    expected = 0.7 * mine.loss + 0.3 * distillation_loss(mine.logits, told.logits, 2.0) + 0.5 * hidden
    torch.testing.assert_close(loss, expected)
    before = student.classifier.weight.clone()
    own.train()
    assert not torch.equal(student.classifier.weight, before)
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert {"distill/task", "distill/soft", "distill/hidden"} <= set(own.state.log_history[0])
    task = own.evaluate()["eval_loss"]
    assert task == pytest.approx(student.eval()(**{k: v[:4] for k, v in batch.items()}).loss.item(), rel=1e-5)


def test_a_student_of_another_width_learns_its_projection_and_resumes(tmp_path):
    student, teacher = bert(layers=2, hidden=16), bert(layers=2)
    own = trainer(tmp_path, student, teacher, rows_of(texts(16)), hidden=1.0)
    before = own.projections[0].weight.clone()
    own.train()
    assert not torch.equal(own.projections[0].weight, before)
    assert not any("projection" in name for name in student.state_dict())
    again = trainer(tmp_path, bert(layers=2, hidden=16), teacher, rows_of(texts(16)), hidden=1.0, max_steps=2)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert not torch.equal(again.projections[0].weight, before)


def test_accumulation_gives_the_same_step(tmp_path):
    """Two batches of two are one of four: the gradient is that of the mean."""
    torch.manual_seed(0)
    batch = images(8)
    results = []
    for accumulate, size in ((1, 8), (2, 4)):
        torch.manual_seed(1)
        student = Net().eval()
        for module in student.modules():  # BatchNorm would tell batches apart
            module.train = lambda mode=True, module=module: module
        student.training = True
        own = trainer(tmp_path / str(size), student, Net(), rows_of(batch), max_steps=1, alpha=0.5,
                      gradient_accumulation_steps=accumulate)  # fmt: skip
        own.args.per_device_train_batch_size = size
        own._train_batch_size = size
        own.train()
        results.append(own.state.log_history[0]["grad_norm"])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_together_with_pruning_and_learning_compression(tmp_path):
    torch.manual_seed(0)
    student, teacher, batch = bert(layers=2), bert(layers=2), texts(16)
    prune(student, inputs(batch), heads=0.5, neurons=0.5)
    callback = LCCallback({"intermediate.dense": "codebook:k=2"})
    own = trainer(tmp_path, student, teacher, rows_of(batch), callbacks=[callback])
    own.train()
    weight = student.bert.encoder.layer[0].intermediate.dense.weight
    assert weight.shape == (32, 32) and len(weight.unique()) == 2
    assert "distill/soft" in own.state.log_history[0]


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0}, "above 0"), ({"alpha": 2}, "from 0 to 1"), ({"hidden": 1.0}, "num_hidden_layers"),
])  # fmt: skip
def test_options_that_mean_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, Net(), Net(), rows_of(images()), **options)


def test_layers_must_fit(tmp_path):
    with pytest.raises(ValueError, match="0 to 3"):
        trainer(tmp_path, bert(layers=2), bert(layers=3), rows_of(texts()), hidden=1.0, layers=[2, 9])
