"""Training by the stock trainers: transformers' Trainer, accelerate, a plain loop, and two processes."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_backbones import make_backbone, make_images
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from exit_plugins import DynConfig, DynPeftModel, RepAdapterConfig, get_dyn_peft_model
from exit_plugins.peft import DynTrainerCallback, compute_exit_metrics


class Blobs(Dataset):
    """Images of one colour and noise: the class is the colour."""

    def __init__(self, size=48):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(size) % 5
        colours = torch.randn(5, 3, 1, 1, generator=generator)
        self.images = colours[self.labels] + 0.3 * torch.randn(size, 3, 32, 32, generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def make(name="vit", **kwargs):
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "fc1"] if name.startswith("hf_") else ["qkv", "fc1"]
    return get_dyn_peft_model(
        make_backbone(name), RepAdapterConfig(target_modules=targets, r=4), DynConfig(exit_interval=1, **kwargs)
    )


def arguments(folder, **kwargs):
    return TrainingArguments(
        **dict(
            output_dir=str(folder),
            per_device_train_batch_size=12,
            num_train_epochs=3,
            learning_rate=5e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            seed=0,
        )
        | kwargs
    )


def trainer(model, args, **kwargs):
    return Trainer(model, args, train_dataset=Blobs(), callbacks=[DynTrainerCallback(predict_exits=True)], **kwargs)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
def test_trains_evaluates_and_loads_the_best(name, tmp_path):
    model = make(name)
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    args = arguments(
        tmp_path,
        num_train_epochs=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    run = trainer(model, args, eval_dataset=Blobs(), compute_metrics=compute_exit_metrics)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert {"eval_loss", "eval_accuracy", *(f"eval_accuracy_exit_{i}" for i in (1, 2, 3, 4))} <= set(after)
    assert after["eval_loss"] < before["eval_loss"] and after["eval_accuracy"] > 0.8
    assert (
        after["eval_accuracy"]
        == after["eval_accuracy_exit_4"]
        == max(entry["eval_accuracy"] for entry in run.state.log_history if "eval_accuracy" in entry)
    )
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key in frozen)
    model.eval()
    with torch.no_grad():
        expected = model.forward_exits(Blobs().images)
        loaded = DynPeftModel.from_pretrained(make_backbone(name), run.state.best_model_checkpoint)
        assert all(torch.equal(a, b) for a, b in zip(expected, loaded.forward_exits(Blobs().images), strict=True))
    prediction = run.predict(Blobs())
    logits, exit_logits = prediction.predictions
    assert logits.shape == (48, 5) and exit_logits.shape == (48, 4, 5)
    np.testing.assert_allclose(exit_logits[:, 0], expected[0].numpy(), atol=1e-5)


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path):
    whole = make(dropout_shallow=0.0, dropout_deep=0.0)
    trainer(whole, arguments(tmp_path / "whole", save_strategy="epoch")).train()
    resumed = make(dropout_shallow=0.0, dropout_deep=0.0)
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    trainer(resumed, arguments(tmp_path / "resumed", save_strategy="epoch")).train(
        resume_from_checkpoint=str(checkpoint)
    )
    expected, found = trainable(whole), trainable(resumed)
    assert expected.keys() == found.keys()
    for key in expected:  # the mask, the schedule, the optimiser and the order of samples all continue
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-5)


def test_accumulation_equals_the_large_batch(tmp_path):
    results = []
    for batch, steps in ((24, 1), (6, 4)):
        model = make(dropout_shallow=0.0, dropout_deep=0.0)
        args = arguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0
        )
        callback = DynTrainerCallback()
        Trainer(model, args, train_dataset=Blobs(), callbacks=[callback]).train()
        assert callback.mask.step == 6 and not callback.mask._handles
        results.append(trainable(model))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, atol=1e-5, rtol=1e-4)


def test_the_schedule_follows_the_steps(tmp_path):
    model, seen = make(), []

    class Watch(DynTrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.exit_weights.tolist())

    Trainer(model, arguments(tmp_path), train_dataset=Blobs(), callbacks=[Watch()]).train()
    assert len(seen) == 12
    for step, weights in enumerate(seen):
        t = step / 12
        assert weights == pytest.approx([0.1 + 0.4 * t] * 2 + [1 - 0.5 * t] * 2)


def test_bfloat16(tmp_path):
    model = make()
    run = trainer(model, arguments(tmp_path, bf16=True), eval_dataset=Blobs())
    run.train()
    assert np.isfinite(run.evaluate()["eval_loss"])
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
@pytest.mark.parametrize("callback", [True, False])
def test_label_smoothing_of_trainer_is_refused(name, callback, tmp_path):
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    callbacks = [DynTrainerCallback()] if callback else []
    with pytest.raises((ValueError, AttributeError), match=r"DynConfig\(label_smoothing"):
        Trainer(make(name), args, train_dataset=Blobs(), callbacks=callbacks).train()


def test_callback_wants_a_dynamic_model(tmp_path):
    with pytest.raises(TypeError, match="DynPeftModel"):
        Trainer(
            make_backbone("hf_vit"), arguments(tmp_path), train_dataset=Blobs(), callbacks=[DynTrainerCallback()]
        ).train()


def test_without_the_callback_it_is_said_and_usual_metrics_work(tmp_path):
    def accuracy(prediction):
        logits, labels = prediction
        return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}

    model = make()
    run = Trainer(model, arguments(tmp_path), train_dataset=Blobs(), eval_dataset=Blobs(), compute_metrics=accuracy)
    with pytest.warns(UserWarning, match=r"\[0.1, 0.1, 1.0, 1.0\], and no entry.*DynTrainerCallback") as caught:
        run.train()
    assert sum("DynTrainerCallback" in str(warning.message) for warning in caught) == 1
    expected = (model.eval()(Blobs().images).argmax(-1) == Blobs().labels).float().mean()
    assert run.evaluate()["eval_accuracy"] == pytest.approx(float(expected))
    assert run.predict(Blobs()).predictions.shape == (48, 5)
    assert model(pixel_values=Blobs().images).exit_logits.shape == (48, 4, 5)
    run.compute_metrics = compute_exit_metrics
    with pytest.warns(UserWarning, match="predict_exits"):
        assert run.evaluate()["eval_accuracy"] == pytest.approx(float(expected))


@pytest.mark.filterwarnings("ignore:only the last")
@pytest.mark.parametrize("predict_exits", [False, True])
def test_metrics_of_batches_that_are_not_joined_are_those_of_joined_ones(predict_exits, tmp_path):
    found = []
    for joined in (True, False):
        model = make()
        args = arguments(tmp_path, eval_do_concat_batches=joined, per_device_eval_batch_size=13)  # the last is of 9
        run = trainer(model, args, eval_dataset=Blobs(), compute_metrics=compute_exit_metrics)
        model.predict_exits = predict_exits
        found.append({key: value for key, value in run.evaluate().items() if "accuracy" in key})
    assert found[0] == found[1] and len(found[0]) == (5 if predict_exits else 1)


def test_with_the_callback_nothing_is_warned_of(tmp_path, recwarn):
    trainer(make(), arguments(tmp_path, num_train_epochs=1)).train()
    assert not any("leads it" in str(warning.message) for warning in recwarn)


def test_an_adapter_of_another_name_has_no_best_model(tmp_path):
    torch.manual_seed(1)
    model = get_dyn_peft_model(
        make_backbone("vit"), RepAdapterConfig(target_modules=["qkv"]), DynConfig(), adapter_name="task"
    )
    args = arguments(tmp_path, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
    with pytest.raises(ValueError, match="called default, and this one is called 'task'"):
        trainer(model, args, eval_dataset=Blobs())


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
def test_gradient_checkpointing_by_training_arguments(name, tmp_path):
    results = []
    for checkpointing in (False, True):
        model = make(name, dropout_shallow=0.0, dropout_deep=0.0)
        args = arguments(tmp_path, num_train_epochs=1, gradient_checkpointing=checkpointing)
        calls = []
        unit = model.backbone.get_submodule(model.family.units(model.backbone)[0])
        norm = next(module for module in unit.modules() if isinstance(module, torch.nn.LayerNorm))
        norm.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        trainer(model, args).train()
        results.append((trainable(model), len(calls)))
    (plain, once), (thrifty, twice) = results
    assert twice == 2 * once  # every block ran again in the backward pass
    for key, value in plain.items():
        torch.testing.assert_close(thrifty[key], value, atol=1e-6, rtol=1e-5)
    model.gradient_checkpointing_disable()
    model.train()(Blobs().images[:4])[-1].sum().backward()
    assert len(calls) == twice + 1
    if name == "vit":
        with pytest.raises(ValueError, match="takes no settings.*use_reentrant"):
            model.gradient_checkpointing_enable({"use_reentrant": True})


def test_torch_compile_by_training_arguments(tmp_path):
    """With Dynamo alone, for the time it takes; Inductor compiles the same graphs."""
    results = []
    for compiled in ({}, dict(torch_compile=True, torch_compile_backend="eager")):
        torch._dynamo.reset()
        model = make(dropout_shallow=0.0, dropout_deep=0.0)
        run = trainer(model, arguments(tmp_path, num_train_epochs=1, **compiled), eval_dataset=Blobs())
        run.train()
        logits, exit_logits = run.predict(Blobs()).predictions
        assert logits.shape == (48, 5) and exit_logits.shape == (48, 4, 5)
        results.append(trainable(model))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, atol=1e-5, rtol=1e-4)


def test_ten_lines_of_plain_pytorch():
    model, data = make(), Blobs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.attach_mask(optimizer)
    model.train()
    for step in range(60):
        model.set_progress(step / 60)
        index = torch.randint(len(data), (16,), generator=torch.Generator().manual_seed(step))
        loss = model.loss(model(data.images[index]), data.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = [(z.argmax(-1) == data.labels).float().mean() for z in model.eval().forward_exits(data.images)]
    assert min(accuracy) > 0.8


TWO_PROCESSES = """
import os, sys, torch
import torch.distributed as dist
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
dist.init_process_group("gloo")
from test_trainers import Blobs, make
from torch.nn.parallel import DistributedDataParallel
rank, data = dist.get_rank(), Blobs()
torch.manual_seed(rank)
model = make(dropout_shallow=0.0, dropout_deep=0.0).train()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
model.attach_mask(optimizer)
parallel = DistributedDataParallel(model)
for step in range(4):
    model.set_progress(step / 4)
    rows = torch.arange(rank * 6, rank * 6 + 6) + 12 * step
    loss = model.loss(parallel(data.images[rows]), data.labels[rows])
    optimizer.zero_grad(); loss.backward(); optimizer.step()
state = {{k: p.detach() for k, p in model.named_parameters() if p.requires_grad}}
gathered = [None, None]
dist.all_gather_object(gathered, state)
assert all(torch.equal(gathered[0][k], gathered[1][k]) for k in state), "processes differ"
if rank == 0:
    torch.save(state, {out!r})
dist.destroy_process_group()
"""


def test_two_processes_give_what_one_gives(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES.format(folder=str(Path(__file__).parent), out=str(tmp_path / "state.pt")))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen([sys.executable, str(script)], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(300) for process in running] == [0, 0]
    both = torch.load(tmp_path / "state.pt", weights_only=True)

    model, data = make(dropout_shallow=0.0, dropout_deep=0.0).train(), Blobs()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.attach_mask(optimizer)
    for step in range(4):
        model.set_progress(step / 4)
        rows = torch.arange(12) + 12 * step
        loss = model.loss(model(data.images[rows]), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key, value in trainable(model).items():
        torch.testing.assert_close(both[key], value, atol=1e-5, rtol=1e-4)


def test_compiles():
    model, x = make().eval(), make_images()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
        labels = torch.tensor([0, 1, 2])
        torch.testing.assert_close(compiled(x, labels).loss, model(x, labels).loss)
