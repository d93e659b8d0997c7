"""The lines to paste for each method: in a Trainer, with TRL, in a loop of one's own."""

from __future__ import annotations

TRAINER = "trainer = Trainer(model, {args}, train_dataset=data{callbacks})"
TRL = "trainer = SFTTrainer(model, {args}, train_dataset=data{callbacks})"
CALLBACK = ', callbacks=[ActCompressCallback(ActCompressConfig(saved="{spec}"))]'
IMPORT = "from hf_actcompress import ActCompressCallback, ActCompressConfig"


def snippets(spec: str | None, *, checkpointing: bool = False, offload: bool = False, budget: float | None = None,
             rows: int = 8, optimizer: str = "adamw", text: bool = True) -> dict[str, str]:  # fmt: skip
    """{"trainer": code, "trl": code, "loop": code} of a method.

    spec: of saved tensors.  budget: of compiled graphs, torch's activation_memory_budget.
    """
    head = [IMPORT] if spec else []
    callbacks = CALLBACK.format(spec=spec) if spec else ""
    trainer, trl = [f"per_device_train_batch_size={rows}"], [f"per_device_train_batch_size={rows}"]
    if checkpointing:
        trainer.append("gradient_checkpointing=True")
    trl.append(f"gradient_checkpointing={checkpointing}")  # on by default there
    before = []
    if budget is not None:
        before = ["import torch", f"torch._functorch.config.activation_memory_budget = {budget:g}"]
        trainer.append("torch_compile=True")
        trl.append("torch_compile=True")
    made = {
        "trainer": [*head, *before, TRAINER.format(args=_call("TrainingArguments", trainer), callbacks=callbacks)],
        "loop": _loop(spec, checkpointing, offload, budget),
    }
    if text:
        made["trl"] = [*head, *before, TRL.format(args=_call("SFTConfig", trl), callbacks=callbacks)]
    if offload:  # neither has an option for it
        made = {"loop": made["loop"]}
    return {name: "\n".join(lines) for name, lines in made.items()}


def _call(name: str, options: list[str]) -> str:
    inside = ", ".join(['output_dir="out"', *options])
    return f"{name}({inside})"


def _loop(spec: str | None, checkpointing: bool, offload: bool, budget: float | None) -> list[str]:
    lines = []
    if spec:
        lines.append("from hf_actcompress import ActCompressConfig, compress_model")
    if checkpointing:
        lines.append('model.gradient_checkpointing_enable({"use_reentrant": False})')
    if budget is not None:
        lines += [f"torch._functorch.config.activation_memory_budget = {budget:g}", "model.compile()"]
    if spec:
        lines.append(f'with compress_model(model, ActCompressConfig(saved="{spec}")):')
    elif offload:
        lines.append("with torch.autograd.graph.save_on_cpu(pin_memory=True):")
    inside = "    " if spec or offload else ""
    return [*lines, f"{inside}model(**batch).loss.backward()"]
