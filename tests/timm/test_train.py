"""The training task, and the launcher's doors: with timm's real scripts where ``TIMM_SCRIPTS`` names their folder, with
a small script of the same shape everywhere."""

import csv
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.task
import timm.utils
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from exit_plugins import MultiExitLoss
from exit_plugins.timm import list_models, train
from exit_plugins.timm._exit_metrics import ValidationLog
from exit_plugins.timm._host import check_timm
from exit_plugins.timm._scripts import check_script
from exit_plugins.timm.train import ExitLossOptions, MultiExitTask

SMALL = [name for name in list_models(clips=False) if name.endswith("_test")]
MODEL = SMALL[-1]


def make(name: str = MODEL, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs)


def batch(model: torch.nn.Module, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = model.default_cfg["input_size"][-1]
    return torch.randn(size, 3, side, side, generator=generator), torch.arange(size) % 3


# --- the task --------------------------------------------------------------------------------------------------------


# What each architecture's paper trains it with: the weight of an early exit's cross-entropy, and of its distillation.
PAPERS = {"dynperceiver": (0.5, 0.5), "dvt": (1.0, 0.0), "msdnet": (1.0, 0.0), "chase": (1.0, 0.0), "with": (1.0, 0.0)}
PAPERS["cascade"] = (1.0, 0.0)


@pytest.mark.parametrize("name", SMALL)
def test_every_architecture_is_trained_with_its_papers_loss(name, caplog):
    model = make(name)
    x, target = batch(model)
    with caplog.at_level("INFO"):
        task = MultiExitTask(model, LabelSmoothingCrossEntropy(0.1))
    assert f"loss {model.exit_loss}, what {type(model).__name__} is published with: " in caplog.text
    torch.manual_seed(2)
    result = task(x, target)
    torch.manual_seed(2)
    *early, last = model(x)
    smooth = 0.9 * F.one_hot(target, 3) + 0.1 / 3
    teacher = last.detach().softmax(-1)
    expected = -(smooth * last.log_softmax(-1)).sum(-1).mean()
    ce, kl = PAPERS[name.split("_")[0]]
    for logits in early:
        log_p = logits.log_softmax(-1)
        expected += ce * -(smooth * log_p).sum(-1).mean() + kl * (teacher * (teacher.log() - log_p)).sum(-1).mean()
    torch.testing.assert_close(result["loss"], expected)
    torch.testing.assert_close(result["output"], last)
    result["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.manual_seed(2)
    torch.testing.assert_close(MultiExitLoss.for_model(model, label_smoothing=0.1)(model(x), target), expected)


def test_what_was_asked_for_comes_first_and_is_logged(caplog):
    model = make("dvt_test")
    with caplog.at_level("INFO"):
        task = MultiExitTask(model, exit_loss=ExitLossOptions("released", kl=(0.0, 0.1, 0.0)))
    assert task.exit_loss.weights.ce == MultiExitLoss(3, "released").weights.ce
    assert "loss released, as asked for, with exit_loss_kl as asked for: " in caplog.text
    with pytest.raises(ValueError, match="DVT is trained with dvt"):
        MultiExitTask(model, exit_loss=ExitLossOptions(alpha=0.3))


def test_a_dropout_that_is_not_the_models_own_is_logged(caplog):
    def logged(**options) -> str:
        caplog.clear()
        with torch.device("meta"):
            model = timm.create_model("dynperceiver_mobilenetv3_0_75x", latent_depths=(1, 1, 1, 1), **options)
        with caplog.at_level("INFO"):
            MultiExitTask(model)
        return caplog.text

    assert "dropout 0.0, and DynPerceiver's own is 0.2; " in logged(drop_rate=0.0)
    assert "dropout" not in logged(drop_rate=0.2) + logged()


@pytest.mark.parametrize("criterion", [SoftTargetCrossEntropy(), BinaryCrossEntropy()])
def test_timms_criterion_judges_every_exit(criterion):
    model = make()
    x, target = batch(model)
    soft = torch.full((4, 3), 0.1).scatter_(1, target[:, None], 0.8)
    options = ExitLossOptions(ce=(1.0,) * model.num_exits, kl=(0.0,) * model.num_exits)
    loss = MultiExitTask(model, criterion, verbose=False, exit_loss=options)(x, soft)["loss"]
    torch.testing.assert_close(loss, sum(criterion(logits, soft) for logits in model(x)))


def test_a_model_without_exits_trains_as_in_timm():
    model = timm.create_model("test_resnet", num_classes=3)
    x, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    ours, theirs = (
        task(model, torch.nn.CrossEntropyLoss(), verbose=False)
        for task in (MultiExitTask, timm.task.ClassificationTask)
    )
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    assert ours.get_eval_model() is model
    assert len(ours.get_clip_parameters(exclude_head=True)) == len(theirs.get_clip_parameters(exclude_head=True))
    assert type(ours.create_evaluator()) is timm.task.ClassificationEvaluator


def test_what_does_not_fit_the_model_is_refused_at_once():
    model, plain = make(), timm.create_model("test_resnet")
    k = model.num_exits
    with pytest.raises(ValueError, match=f"made for {k + 1} exits and .* has {k}"):
        MultiExitTask(model, verbose=False, exit_loss=MultiExitLoss(k + 1))
    with pytest.raises(ValueError, match=f"1 weights and the model {k} exits"):
        MultiExitTask(model, verbose=False, exit_loss=ExitLossOptions(ce=(1.0,)))
    with pytest.raises(ValueError, match="exit 1 has no weight"):
        weights = (0.0,) + (1.0,) * (k - 1)
        MultiExitTask(model, verbose=False, exit_loss=ExitLossOptions(ce=weights, kl=(0.0,) * k))
    with pytest.raises(TypeError, match="ResNet has no exits"):
        MultiExitTask(plain, verbose=False, exit_loss=ExitLossOptions("paper"))
    with pytest.raises(TypeError, match="keeps only the last exit"):
        MultiExitTask(torch.jit.script(make(scriptable=True)), verbose=False)


@pytest.mark.parametrize("name", SMALL)
def test_adaptive_clipping_leaves_out_every_classifier(name):
    model = timm.create_model(name, num_classes=17)
    kept = {id(p) for p in MultiExitTask(model, verbose=False).get_clip_parameters(exclude_head=True)}
    left_out = {key for key, p in model.named_parameters() if id(p) not in kept}
    linear = {key for key, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.out_features == 17}
    assert len(linear) == model.num_exits
    assert {f"{key}.{part}" for key in linear for part in ("weight", "bias")} <= left_out
    # Nothing but what stands beside a classifier, a norm say.
    assert {key.rpartition(".")[0].rpartition(".")[0] for key in left_out} <= {key.rpartition(".")[0] for key in linear}


@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_model_is_the_model_and_counts_every_exit(compiled):
    torch._dynamo.reset()
    model = make()
    task = MultiExitTask(model, verbose=False)
    task.setup_ema(decay=0.5)
    if compiled:
        task.compile(backend="eager")
        task.compile_ema(backend="eager")
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert state["state_dict"].keys() == state["state_dict_ema"].keys() == model.state_dict().keys()

    x, target = batch(model, 9)
    for ema in (False, True):
        evaluator, evaluated = task.create_evaluator(max_samples=7), task.get_eval_model(ema=ema).eval()
        with torch.no_grad():
            for part in (slice(0, 4), slice(4, 9)):
                evaluator.update(evaluated(x[part]), target[part])
            metrics = evaluator.compute()
            expected = [100 * (logits.argmax(-1) == target)[:7].sum().item() / 7 for logits in model.forward_exits(x)]
        assert [metrics[f"top1_exit{k + 1}"] for k in range(model.num_exits)] == pytest.approx(expected)
        assert metrics["top1"] == pytest.approx(expected[-1])
        assert set(metrics) == set(evaluator.metric_names)
    # Logits of another origin say nothing about the other exits.
    evaluator = task.create_evaluator()
    evaluator.update(torch.eye(3), torch.tensor([0, 1, 0]))
    assert evaluator.compute()["top1"] == pytest.approx(200 / 3) and "top1_exit1" not in evaluator.compute()


# --- what it relies on -----------------------------------------------------------------------------------------------


def test_the_installed_timm_has_every_name_this_relies_on():
    check_timm()
    expected = {"model", "criterion", "criterion_kwargs", "device", "dtype", "verbose"}
    parameters = set(inspect.signature(timm.task.ClassificationTask.__init__).parameters) - {"self"}
    assert parameters == expected
    assert expected < set(inspect.signature(MultiExitTask.__init__).parameters)


@pytest.mark.parametrize("owner", ["task", "task.ClassificationTask", "utils"])
def test_a_name_that_is_gone_is_named_with_timms_version(monkeypatch, owner):
    target = timm.task.ClassificationTask if "." in owner else getattr(timm, owner)
    name = {"task": "ClassificationTask", "utils": "update_summary"}.get(owner, "create_evaluator")
    if "." in owner:
        # An inherited method has to go where it is defined.
        monkeypatch.delattr(next(cls for cls in target.__mro__ if name in vars(cls)), name)
    else:
        monkeypatch.delattr(target, name)
    with pytest.raises(ImportError, match=rf"timm\.{owner}\.{name}, which timm {timm.__version__} lacks"):
        check_timm()


# --- the launcher, with scripts of our own ---------------------------------------------------------------------------

TRAIN = """
import argparse, importlib, os, sys
import torch
import yaml
from timm import utils
from timm.models import create_model
from timm.task import ClassificationTask, LogitDistillationTask

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("-c", "--config", default="")
parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--output")
parser.add_argument("--teacher", action="store_true")
parser.add_argument("--device-modules", nargs="+")


def train_one_epoch(task, optimizer, x, target):
    task.get_trainable_module().train()
    loss = task(x, target)["loss"]
    loss.backward()
    optimizer.step()
    return loss.item()


def main():
    config, remaining = config_parser.parse_known_args()
    if config.config:
        with open(config.config) as file:
            parser.set_defaults(**yaml.safe_load(file))
    args = parser.parse_args(remaining)
    for module in args.device_modules or ():
        importlib.import_module(module)
    distributed = "WORLD_SIZE" in os.environ
    if distributed:
        torch.distributed.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=3, **args.model_kwargs)
    if args.teacher:
        LogitDistillationTask(model, "test_resnet", verbose=False)
    task = ClassificationTask(model=model, criterion=torch.nn.CrossEntropyLoss(), device=torch.device("cpu"))
    eval_model = task.get_eval_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if distributed:
        task.prepare_distributed(device_ids=[torch.device("cpu")])
    side = model.default_cfg["input_size"][-1]
    x = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(rank))
    target = torch.arange(4) % 3
    for _ in range(2):
        loss = train_one_epoch(task, optimizer, x, target)
    eval_model.eval()
    with torch.inference_mode():
        acc1, = utils.accuracy(eval_model(x), target)
    if distributed:
        mean = [p.detach().clone() for p in model.parameters()]
        for p in mean:
            torch.distributed.all_reduce(p)
        same = all(torch.allclose(p, m / 2, atol=1e-6) for p, m in zip(model.parameters(), mean))
        assert same, "the processes went apart"
    if rank == 0:
        folder = utils.get_outdir(args.output, "run")
        metrics = {"top1": acc1.item()}
        utils.update_summary(0, {"loss": loss}, metrics, os.path.join(folder, "summary.csv"), write_header=True)
        torch.save(model.state_dict(), os.path.join(folder, "model.pth"))


if __name__ == "__main__":
    main()
"""

MEASURE = """
import sys
import torch
from timm.models import create_model

model = create_model(sys.argv[1]).train()
side = model.default_cfg["input_size"][-1]
output = model(torch.randn(2, 3, side, side))
if isinstance(output, tuple):
    output = output[0]
output.sum().backward()
open(sys.argv[2], "w").write(str(all(p.grad is not None for p in model.parameters())))
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return path


def summary(folder: Path) -> dict[str, float]:
    with open(folder / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    return {key: float(value) for key, value in row.items()}


@pytest.mark.parametrize("name", SMALL)
def test_launcher_takes_the_models_own_loss(name, script, tmp_path):
    train.main([str(script), "--model", name, "--output", str(tmp_path)])
    check_own_loss(name, tmp_path / "run")


def test_a_network_with_one_exit_trains_through_the_launcher(script, tmp_path):
    options = "--model dynperceiver_test --model-kwargs early_exits=none fkt=False --output"
    train.main([str(script), *options.split(), str(tmp_path)])
    row = summary(tmp_path / "run")
    assert row["eval_top1_exit1"] == row["eval_top1"] and "eval_top1_exit2" not in row


def check_own_loss(name: str, run: Path) -> None:
    options = yaml.safe_load((run / "exit_args.yaml").read_text())
    (ce, kl), early = PAPERS[name.split("_")[0]], make(name).num_exits - 1
    assert options["exit_loss_ce"] == [ce] * early + [1.0]
    assert options["exit_loss_kl"] == [kl] * early + [0.0]


def test_launcher_trains_every_exit_and_writes_down_how(script, tmp_path):
    before = timm.task.ClassificationTask, timm.utils.accuracy, list(sys.argv)
    assert train.main([str(script), "--exit-loss", "released", "--model", MODEL, "--output", str(tmp_path)]) == 0
    assert (timm.task.ClassificationTask, timm.utils.accuracy, list(sys.argv)) == before

    options = yaml.safe_load((tmp_path / "run" / "exit_args.yaml").read_text())
    assert options["exit_loss"] == "released" and options["timm"] == timm.__version__
    weights = MultiExitLoss(make().num_exits, "released").weights
    assert (tuple(options["exit_loss_ce"]), tuple(options["exit_loss_kl"])) == (weights.ce, weights.kl)
    # The same again.
    assert ExitLossOptions.read(options).loss(make(), torch.nn.CrossEntropyLoss()).weights == weights
    row = summary(tmp_path / "run")
    model = make().eval()
    model.load_state_dict(torch.load(tmp_path / "run" / "model.pth", weights_only=True))
    side = model.default_cfg["input_size"][-1]
    x = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        correct = [
            (logits.argmax(-1) == torch.arange(4) % 3).float().mean().item() for logits in model.forward_exits(x)
        ]
    assert [row[f"eval_top1_exit{k + 1}"] for k in range(model.num_exits)] == [100 * share for share in correct]
    assert row["eval_top1"] == 100 * correct[-1]


def test_yaml_keys_act_and_the_command_line_comes_first(script, tmp_path):
    k = make().num_exits
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": MODEL, "exit_loss": "paper", "exit_loss_alpha": 0.25}))
    for asked, expected in (
        ([], MultiExitLoss(k, "paper", 0.25)),
        (["--exit-loss-alpha", "0.75"], MultiExitLoss(k, "paper", 0.75)),
        (["--exit-loss", "released"], MultiExitLoss(k, "released")),
    ):
        train.main([str(script), "--conf", str(config), *asked, "--output", str(tmp_path)])
        written = tmp_path / "run" / "exit_args.yaml"
        options = yaml.safe_load(written.read_text())
        assert (tuple(options["exit_loss_ce"]), tuple(options["exit_loss_kl"])) == (
            expected.weights.ce,
            expected.weights.kl,
        )
        assert options["exit_loss"] == expected.preset
    # What a run wrote down is a configuration itself.
    shutil.copy(written, config)
    train.main([str(script), "-c", str(config), "--model", MODEL, "--output", str(tmp_path)])
    assert yaml.safe_load(written.read_text()) == options


@pytest.mark.parametrize(
    "text, error",
    [
        ("exit_los: paper", "unknown key 'exit_los'; those of the exits are exit_loss, "),
        ("exit-loss: paper", "unknown key 'exit-loss'"),
        ("exit_loss: best", "exit_loss: expected one of paper, "),
        ("exit_loss: [paper]", "exit_loss: expected one of paper, "),
        ("exit_loss_alpha: 2", "exit_loss_alpha: expected a number in"),
        ("exit_loss_ce: many", "exit_loss_ce: expected numbers"),
        ("exit_loss_ce: {1: 2}", "exit_loss_ce: expected numbers"),
        ("exit_loss: dvt\nexit_loss_alpha: 0.5", "belongs to the preset paper"),
        ("- 1", "holds no options"),
        ("a: [", "is no YAML file"),
        (None, "No such file"),
    ],
)
def test_yaml_files_that_make_no_sense_are_refused_before_training(script, tmp_path, capsys, text, error):
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        train.main([str(script), "--model", MODEL, "--output", str(tmp_path), "-c", str(config)])
    assert exit_.value.code == 2 and error in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def run(*command, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, timeout=300)


def test_second_door_reads_the_yaml_file(script, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("exit_loss: released\n")
    command = (script, "--device-modules", "exit_plugins.timm.train", "--model", MODEL, "--output", tmp_path)
    done = run(*command, "--config", config)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "exit_args.yaml").read_text())["exit_loss"] == "released"
    config.write_text("exit_los: released\n")
    assert "unknown key 'exit_los'" in run(*command, "--config", config).stderr


@pytest.mark.parametrize("change, kept", [
    (lambda z: z.float(), True), (lambda z: z.half(), True), (lambda z: z.bfloat16(), True), (lambda z: z[:5], True),
    (lambda z: z.unfold(0, 2, 2).mean(2), False), (lambda z: z.flip(0), False),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracies_of_exits_survive_casts_and_slices_or_say_so(change, kept, dtype, caplog):
    inner = make("msdnet_test")
    task, x = MultiExitTask(inner, verbose=False), torch.randn(6, *inner.pretrained_cfg["input_size"])
    model, target = task.get_eval_model().eval(), torch.randint(3, (6,))
    saved = {}
    log = ValidationLog(timm.utils.accuracy, lambda epoch, _, metrics: saved.update(metrics))
    evaluator = task.create_evaluator()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = change(model(x))
        log.accuracy(output, target[: len(output)])
        evaluator.update(change(model(x)), target[: len(output)])
        exits = [z[: len(output)].argmax(1) for z in task.get_trainable_module().forward_exits(x)]
    log.update_summary(0, {}, saved)
    assert ("no accuracy per exit" in caplog.text) != kept
    found = evaluator.compute()
    for k, answer in enumerate(exits, start=1):
        right = 100 * (answer == target[: len(output)]).float().mean().item()
        assert saved[f"top1_exit{k}"] == pytest.approx(right if kept else float("nan"), nan_ok=True)
        assert found.get(f"top1_exit{k}", float("nan")) == pytest.approx(right if kept else float("nan"), nan_ok=True)


def test_second_door_needs_no_launcher(script, tmp_path):
    done = run(script, "--device-modules", "exit_plugins.timm.train", "--model", MODEL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "eval_top1_exit1" in summary(tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "exit_args.yaml").read_text())["exit_loss"] == make().exit_loss


def test_two_processes_stay_together(script, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "exit_plugins.timm.train")
    done = run(*launch, script, "--model", MODEL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    # Eight samples in all, four in each process.
    row = summary(tmp_path / "run")
    assert all(value * 8 / 100 == round(value * 8 / 100) for key, value in row.items() if "exit" in key)


def test_a_measured_training_step_goes_back_through_every_exit(tmp_path):
    script = tmp_path / "benchmark.py"
    script.write_text(MEASURE)
    train.main([str(script), MODEL, str(tmp_path / "result")])
    assert (tmp_path / "result").read_text() == "True"


@pytest.mark.parametrize(
    "text, error",
    [
        ("import timm\ndef train_one_epoch(): ...\n", "does not train through timm.task.ClassificationTask"),
        ("from timm.task import TaskOfTomorrow\n", f"timm.task.TaskOfTomorrow, which timm {timm.__version__} lacks"),
        ("this is no Python", "is not a Python script"),
        ('{"format": "exit_plugins.policy", "thresholds": [0.9, 0.5]}', "is not a Python script"),
        ("\0", "is not a Python script"),
        (None, "no script at"),
    ],
)
def test_scripts_that_do_not_fit_are_refused_before_they_run(tmp_path, capsys, text, error):
    path = tmp_path / "train.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises((FileNotFoundError, ImportError, ValueError), match=error):
        check_script(str(path))
    with pytest.raises(SystemExit) as exit_:
        train.main([str(path), "--model", MODEL])
    assert exit_.value.code == 2 and error in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, error",
    [
        (["--exit-loss", "unheard-of"], "invalid choice: 'unheard-of'"),
        (["--exit-loss", "dvt", "--exit-loss-alpha", "0.3"], "belongs to the preset paper"),
        (["--exit-loss-alpha", "2"], "expected a number in"),
        (["--exit-loss-ce", "1;2"], "expected numbers between commas"),
    ],
)
def test_options_that_make_no_sense_are_refused(script, capsys, options, error):
    with pytest.raises(SystemExit) as exit_:
        train.main([str(script), *options])
    assert exit_.value.code == 2 and error in capsys.readouterr().err


def test_models_that_do_not_fit_are_refused_before_training(script, tmp_path):
    common = [str(script), "--output", str(tmp_path)]
    with pytest.raises(TypeError, match="has no exits"):
        train.main([*common, "--exit-loss", "paper", "--model", "test_resnet"])
    with pytest.raises(ValueError, match="give one per exit"):
        train.main([*common, "--exit-loss-ce", "1", "--model", MODEL])
    with pytest.raises(TypeError, match="LogitDistillationTask trains models with one output"):
        train.main([*common, "--teacher", "--model", MODEL])
    assert train.main([*common, "--model", "test_resnet"]) == 0


FOLLOWED = """
import sys
import torch
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask

resumed, sched, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.manual_seed(0)
model = create_model("with_exits", backbone="test_resnet", exits=3, num_classes=3, heads_first=0.5)
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=torch.device("cpu"))
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
scheduler, epochs = create_scheduler_v2(optimizer, sched=sched, num_epochs=4, warmup_epochs=0, updates_per_epoch=2)
if resumed:
    scheduler.step(resumed)
moved = []
for epoch in range(resumed, epochs):
    for update in range(2):
        before = [p.detach().clone() for p in (model.backbone.conv1[0].weight, model.heads[0].fc.weight)]
        task.get_trainable_module().train()
        loss = task(torch.randn(4, 3, 64, 64), torch.arange(4) % 3)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after = model.backbone.conv1[0].weight, model.heads[0].fc.weight
        moved.append("".join(str(int(not torch.equal(b, a))) for b, a in zip(before, after)))
        scheduler.step_update(num_updates=epoch * 2 + update + 1, metric=None)
    scheduler.step(epoch + 1, None)
open(output, "w").write(" ".join(moved))
"""


def test_heads_first_follows_the_scripts_updates_also_when_resumed(tmp_path):
    (tmp_path / "train.py").write_text(FOLLOWED)
    for resumed, expected in ((0, "01 01 01 01 11 11 11 11"), (1, "01 01 11 11 11 11"), (2, "11 11 11 11")):
        train.main([str(tmp_path / "train.py"), str(resumed), "cosine", str(tmp_path / "moved")])
        assert (tmp_path / "moved").read_text() == expected  # whether the network moved, and whether a head did
    with pytest.raises(ValueError, match="no progress to follow; choose one by --sched"):
        train.main([str(tmp_path / "train.py"), "0", "none", str(tmp_path / "moved")])


def test_progress_that_nobody_tells_is_no_silent_training_of_everything():
    model = timm.create_model("with_exits", backbone="test_resnet", exits=3, num_classes=3, heads_first=0.5)
    task = MultiExitTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    x, target = torch.randn(4, 3, 64, 64), torch.arange(4) % 3
    with pytest.raises(RuntimeError, match="how far training is"):
        task(x, target)
    model.set_progress(0.0)
    task(x, target)["loss"].backward()
    assert model.backbone.conv1[0].weight.grad is None and model.heads[0].fc.weight.grad is not None


# --- the doors, with timm's scripts ----------------------------------------------------------------------------------

SCRIPTS = Path(os.environ.get("TIMM_SCRIPTS", ""))
needs_scripts = pytest.mark.skipif(
    "TIMM_SCRIPTS" not in os.environ, reason="set TIMM_SCRIPTS to the folder of timm's train.py to run it"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three colours under noise as ImageFolder."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 8)):
        for name, colour in (("blue", (40, 60, 200)), ("green", (40, 200, 60)), ("red", (200, 60, 40))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}{number}.png")
    return root


def options(data: Path, output: Path, model: str = MODEL) -> list[str]:
    text = f"--model {model} --data-dir {data} --num-classes 3 --device cpu --workers 0 -b 8 --epochs 1 --lr 0.02"
    return [*text.split(), "--warmup-epochs", "0", "--output", str(output), "--experiment", "run"]


CASES = {
    "mixup": "--mixup 0.8 --cutmix 1.0 --smoothing 0.1",
    "bce": "--bce-loss --mixup 0.2",
    "ema-accumulation": "--model-ema --model-ema-decay 0.9 --grad-accum-steps 2",
    "bf16": "--amp --amp-dtype bfloat16",
    "fp16": "--amp --amp-dtype float16",
    "agc": "--clip-grad 0.01 --clip-mode agc",
    "norm": "--clip-grad 1.0 --opt adamw --layer-decay 0.7",
    "channels-last": "--channels-last --grad-checkpointing",
    "compile": "--torchcompile eager --model-ema",
}


@needs_scripts
@pytest.mark.parametrize("case", CASES)
def test_train_py(case, data, tmp_path):
    train.main([str(SCRIPTS / "train.py"), "--exit-loss", "released", *options(data, tmp_path), *CASES[case].split()])
    row = summary(tmp_path / "run")
    assert row["eval_top1"] == pytest.approx(row[f"eval_top1_exit{make().num_exits}"])
    assert "eval_top1_exit1" in row


@needs_scripts
@pytest.mark.parametrize("name", SMALL)
def test_train_py_on_every_architecture_then_resume_by_yaml(name, data, tmp_path):
    script = str(SCRIPTS / "train.py")
    train.main([script, *options(data, tmp_path / "a", name)])
    check_own_loss(name, tmp_path / "a" / "run")
    (tmp_path / "config.yaml").write_text("epochs: 2\nexperiment: run\n")
    arguments = [a for a in options(data, tmp_path / "b", name) if a not in ("--epochs", "1", "--experiment", "run")]
    last = tmp_path / "a" / "run" / "last.pth.tar"
    train.main([script, *arguments, "-c", str(tmp_path / "config.yaml"), "--resume", str(last)])
    assert summary(tmp_path / "b" / "run")["epoch"] == 1


@needs_scripts
def test_train_py_trains_heads_first(data, tmp_path):
    """Half of four epochs heads alone: the network's batch norms have counted the batches of the other half."""
    arguments = options(data, tmp_path, "with_exits")
    arguments[arguments.index("--epochs") + 1] = "4"
    kwargs = ["--model-kwargs", "backbone=test_resnet", "exits=3", "heads_first=0.5", "--input-size", "3", "32", "32"]
    train.main([str(SCRIPTS / "train.py"), *arguments, *kwargs])
    weights = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)["state_dict"]
    counts = {k: int(v) for k, v in weights.items() if k.endswith("num_batches_tracked")}
    assert counts and {v for k, v in counts.items() if k.startswith("backbone.")} == {12}
    assert {v for k, v in counts.items() if k.startswith("heads.")} == {24}


@needs_scripts
def test_train_py_in_two_processes(data, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "exit_plugins.timm.train")
    done = run(*launch, SCRIPTS / "train.py", *options(data, tmp_path), "--grad-accum-steps", "2", "--model-ema")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_top1_exit1" in summary(tmp_path / "run")


@needs_scripts
def test_train_py_through_the_second_door(data, tmp_path):
    # Beside a checkout's timm/ it would import that one instead of the installed timm.
    script = shutil.copy(SCRIPTS / "train.py", tmp_path / "train.py")
    done = run(script, *options(data, tmp_path), "--device-modules", "exit_plugins.timm.train")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_top1_exit1" in summary(tmp_path / "run") and "Acc@1 of every exit" in done.stderr + done.stdout


@needs_scripts
def test_validate_benchmark_and_inference(data, tmp_path):
    train.main([str(SCRIPTS / "train.py"), *options(data, tmp_path)])
    trained = f"--model {MODEL} --num-classes 3 --checkpoint {tmp_path / 'run' / 'last.pth.tar'} --device cpu -b 8"
    results = tmp_path / "validation.csv"
    more = ["--workers", "0", "--data-dir", str(data), "--results-file", str(results)]
    train.main([str(SCRIPTS / "validate.py"), *trained.split(), *more])
    with open(results) as file:
        (row,) = csv.DictReader(file)
    assert float(row["top1"]) == pytest.approx(summary(tmp_path / "run")["eval_top1"], abs=1e-3)
    steps = "--bench both --num-warm-iter 1 --num-bench-iter 5 --device cpu -b 2"
    train.main([str(SCRIPTS / "benchmark.py"), "--model", MODEL, *steps.split()])
    pytest.importorskip("pandas", reason="timm's inference.py needs pandas")
    more = ["--workers", "0", "--data-dir", str(data / "validation"), "--results-dir", str(tmp_path)]
    train.main([str(SCRIPTS / "inference.py"), *trained.split(), "--topk", "2", *more])
    assert list(tmp_path.glob(f"{MODEL}*.csv"))
