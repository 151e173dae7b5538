"""A script written as timm's train.py is, run through the door."""

import json
import sys

import pytest
import timm
import torch

from exit_plugins import DynPeftModel
from exit_plugins.peft import exit_weights, timm_door

# The order in which timm's train.py makes and calls these.
SCRIPT = """
import argparse, json, torch
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import ParseKwargs, get_outdir

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--output")
parser.add_argument("--sched", default="cosine")
args = parser.parse_args()
torch.manual_seed(0)
model = create_model(args.model, pretrained=False, num_classes=5, **args.model_kwargs)
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(label_smoothing=0.1), device=torch.device("cpu"))
trained = task.get_trainable_module()
optimizer = create_optimizer_v2(trained, opt="adamw", lr=1e-2, weight_decay=1e-4)
output = get_outdir(args.output, "run")
scheduler, epochs = create_scheduler_v2(optimizer, sched=args.sched, num_epochs=2, updates_per_epoch=3)
generator, log = torch.Generator().manual_seed(0), []
for update in range(6):
    images = torch.randn(4, 3, 32, 32, generator=generator)
    labels = torch.randint(5, (4,), generator=generator)
    trained.train()
    result = task(images, labels)
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
    weights = getattr(trained, "exit_weights", torch.zeros(0))
    log.append([result["loss"].item(), list(result["output"].shape), weights.tolist()])
    scheduler.step_update(num_updates=update + 1)
with open(output + "/log.json", "w") as file:
    json.dump(log, file)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return str(tmp_path / "train.py")


@pytest.fixture(autouse=True)
def forget():
    yield
    timm_door.DynTask.latest = None


MODEL = ["--model-kwargs", "backbone=vit_tiny_patch16_224", "img_size=32", "patch_size=8", "embed_dim=32", "depth=4"]


def test_schedule_loss_and_adapter(script, tmp_path):
    arguments = ["--model", "dyn_peft", *MODEL, "num_heads=2", "method=lora", "r=4", "dyn={'exit_interval': 2}"]
    before = timm.task.ClassificationTask, timm.scheduler.create_scheduler_v2, sys.argv
    timm_door.main([script, *arguments, "--output", str(tmp_path)])
    assert before == (timm.task.ClassificationTask, timm.scheduler.create_scheduler_v2, sys.argv)
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    for update, (_, shape, weights) in enumerate(log):
        assert shape == [4, 5]  # the last exit's, for timm's own figures
        assert weights == pytest.approx(exit_weights(2, update / 6))
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    loaded = DynPeftModel.from_pretrained(backbone, tmp_path / "run" / "adapter")
    assert loaded.num_exits == 2 and loaded.peft_config["default"].r == 4
    # The same by timm's name, merged, as command-line tools open models.
    kwargs = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    merged = timm.create_model(
        "dyn_peft",
        backbone="vit_tiny_patch16_224",
        backbone_checkpoint=str(tmp_path / "backbone.pth"),
        adapter=str(tmp_path / "run" / "adapter"),
        **kwargs,
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    for mine, theirs in zip(loaded.forward_exits(images), merged.forward_exits(images), strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-5)
    assert not hasattr(merged, "peft_config")


def test_the_adapter_is_of_the_average_where_the_script_keeps_one(tmp_path):
    kept = {
        'output = get_outdir(args.output, "run")': "task.setup_ema(decay=0.5)",
        "    optimizer.step()": "    task.update_ema()",
        "json.dump(log, file)": "average = task.get_trainable_module(ema=True).module; "
        'torch.save([trained.state_dict(), average.state_dict()], output + "/both.pth")',
    }
    script = SCRIPT
    for line, more in kept.items():
        indent = line[: len(line) - len(line.lstrip())] or ("    " if line.startswith("json") else "")
        script = script.replace(line, f"{line}\n{indent}{more.strip()}")
    # As in timm's own script, nothing of the training is global.
    begin, body = script.split("parser = ", 1)
    script = begin + "def main():\n" + "".join(f"    {line}\n" for line in f"parser = {body}".splitlines()) + "main()\n"
    (tmp_path / "train.py").write_text(script)
    arguments = ["--model", "dyn_peft", *MODEL, "num_heads=2", "method=lora", "r=4", "dyn={'exit_interval': 2}"]
    timm_door.main([str(tmp_path / "train.py"), *arguments, "--output", str(tmp_path)])
    states = torch.load(tmp_path / "run" / "both.pth", weights_only=True)
    kwargs = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    found = []
    for folder, state in zip(("adapter_raw", "adapter"), states, strict=True):
        backbone = timm.create_model("vit_tiny_patch16_224", **kwargs)
        loaded = DynPeftModel.from_pretrained(backbone, tmp_path / "run" / folder).state_dict()
        saved = [key for key in loaded if "lora_" in key or "exit_heads" in key or "modules_to_save" in key]
        assert saved and all(torch.equal(loaded[key], state[key]) for key in saved)
        found.append(torch.cat([loaded[key].flatten() for key in saved]))
    assert not torch.equal(*found)


def test_other_models_are_left_alone(script, tmp_path):
    timm_door.main(
        [script, "--model", "vit_tiny_patch16_224", "--output", str(tmp_path), "--model-kwargs", "img_size=32"]
    )
    assert len(json.loads((tmp_path / "run" / "log.json").read_text())) == 6
    assert not (tmp_path / "run" / "adapter").exists()


def test_without_a_schedule_it_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match="--sched"):
        timm_door.main(
            [script, "--model", "dyn_peft", *MODEL, "num_heads=2", "--output", str(tmp_path), "--sched", "none"]
        )


def test_weights_of_the_backbone_but_not_its_classifier(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=9
    )
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    model = timm.create_model(
        "dyn_peft",
        num_classes=5,
        backbone="vit_tiny_patch16_224",
        backbone_checkpoint=str(tmp_path / "w.pth"),
        method="bottleneck",
        **dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2),
    )
    assert torch.equal(model.backbone.blocks[2].attn.qkv.weight, source.blocks[2].attn.qkv.weight)
    assert model.dyn_config["default"].num_classes == 5
    with pytest.raises(ValueError, match="unknown method"):
        timm.create_model("dyn_peft", method="prefix")


def test_command_line_says_what_it_wants():
    with pytest.raises(SystemExit, match=r"PATH/TO/train.py.*nowhere.py"):
        timm_door.main(["nowhere.py"])


def test_task_has_the_scripts_criterion_at_every_exit():
    model = timm.create_model(
        "dyn_peft",
        num_classes=5,
        backbone="vit_tiny_patch16_224",
        dyn=dict(dropout_shallow=0.0, dropout_deep=0.0, exit_interval=1),
        **dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2),
    ).train()
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 4, 2])
    loss = timm_door.DynTask(model, criterion, device=torch.device("cpu"), verbose=False)(images, labels)["loss"]
    expected = sum(w * criterion(z, labels) for w, z in zip([0.1, 0.1, 1, 1], model(images), strict=True))
    torch.testing.assert_close(loss, expected)
