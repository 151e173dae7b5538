"""Dynamic adapters trained by timm's own train.py, unmodified.

::

    python -m exit_plugins.peft.timm_door PATH/TO/train.py --data-dir DATA --num-classes 100 --model dyn_peft \\
        --model-kwargs backbone=vit_base_patch16_224 method=repadapter r=8 --weight-decay 1e-4 --lr 1e-3 ...
    torchrun --nproc_per_node 2 -m exit_plugins.peft.timm_door PATH/TO/train.py ...

The script gets a model called ``dyn_peft``, a task whose loss is the model's (the script's criterion at every exit, the
weights by the schedule), and a schedule and a gradient mask that follow its updates. When it has finished, the adapter
lies in ``adapter/`` of its output folder, beside timm's checkpoints, which hold the whole model. Where it keeps
a moving average (``--model-ema``), that one is of the average, which timm too takes from its checkpoints, and
``adapter_raw/`` holds the weights as they were last trained. With the learning-rate schedule switched off
(``--sched none``) there is nothing to follow and the script is refused.
"""

import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm.models
import timm.scheduler
import timm.task
import timm.utils
import torch
from peft import LoraConfig, PeftConfig
from timm.models import register_model
from torch import Tensor, nn

from ..timm._progress import follow_updates
from ..timm._scripts import Names, check_script, run_script
from ._host import HostModel
from .bottleneck import BottleneckConfig
from .checkpoints import load_backbone
from .dyn import DynConfig, DynPeftModel, get_dyn_peft_model
from .folders import CONFIG_NAME
from .multi_exit import MultiExitBackbone
from .repadapter import RepAdapterConfig

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DynTask", "dyn_peft", "main"]

# timm asks every registered model's module for these.
default_cfgs: dict[str, Any] = {}

_METHODS: dict[str, Callable[..., PeftConfig]] = {
    "repadapter": lambda r, targets, **kwargs: RepAdapterConfig(r=r, target_modules=targets, **kwargs),
    "lora": lambda r, targets, **kwargs: LoraConfig(
        **{"r": r, "lora_alpha": r, "lora_dropout": 0.1, "target_modules": targets, **kwargs}
    ),
    "bottleneck": lambda r, targets, **kwargs: BottleneckConfig(r=r, target_modules=targets, **kwargs),
}


@register_model
def dyn_peft(
    pretrained: bool = False,
    backbone: str = "vit_base_patch16_224",
    backbone_checkpoint: str | None = None,
    method: str = "repadapter",
    r: int = 8,
    target_modules: list[str] | str | None = None,
    method_kwargs: dict[str, Any] | None = None,
    dyn: dict[str, Any] | None = None,
    adapter: str | None = None,
    merge: bool = True,
    **kwargs: Any,
) -> DynPeftModel | MultiExitBackbone:
    """timm entry point of a dynamic model: a new one to train, or a saved ``adapter`` over its backbone.

    Args:
        pretrained: load the published weights of ``backbone``.
        backbone: name of a timm model of a supported family; ``kwargs`` go to it.
        backbone_checkpoint: file with weights of the backbone, MoCo v3's and MAE's among them; its classifier is left
            out.
        method: ``repadapter``, ``lora`` or ``bottleneck``.
        r, target_modules, method_kwargs: of the method's configuration; without target_modules, the usual layers.
        dyn: fields of ``DynConfig``.
        adapter: folder that ``DynPeftModel.save_pretrained`` wrote; method and exits are then those saved there.
        merge: fold that adapter into the backbone, if its method can be.

    Raises:
        ValueError: the method is unknown; or what ``get_dyn_peft_model`` and ``DynPeftModel.from_pretrained``
            refuse.
    """
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(_METHODS)}.")
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    if adapter:
        kwargs.setdefault("num_classes", json.loads(Path(adapter, CONFIG_NAME).read_text())["num_classes"])
    model = timm.models.create_model(backbone, pretrained=pretrained, **kwargs)
    if backbone_checkpoint:
        load_backbone(model, backbone_checkpoint)
    if adapter:
        loaded = DynPeftModel.from_pretrained(model, adapter)
        return loaded.merge_and_unload() if merge and loaded.peft_type != "BOTTLENECK" else loaded
    return get_dyn_peft_model(
        model, _METHODS[method](r, target_modules, **(method_kwargs or {})), DynConfig(**(dyn or {}))
    )


def _inside(model: HostModel) -> HostModel:
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


class DynTask(timm.task.ClassificationTask):
    """timm's classification task with the loss of a ``DynPeftModel``; other models are trained as timm does."""

    latest: "weakref.ReferenceType[DynPeftModel] | None" = None

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        inner = _inside(model)
        self.dynamic = inner if isinstance(inner, DynPeftModel) else None
        if self.dynamic is not None:
            self.dynamic.criterion = self.criterion
            DynTask.latest = weakref.ref(self.dynamic)

    @classmethod
    def latest_model(cls) -> DynPeftModel | None:
        """The dynamic model of the task made last, as long as it lives."""
        return None if cls.latest is None else cls.latest()

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and last exit's logits of a batch: ``{"loss": (), "output": (B, C)}``."""
        if self.dynamic is None:
            return super().forward(input, target)
        outputs = self.trainable_module(input)
        return {"loss": self.dynamic.loss(outputs, target), "output": outputs[-1]}

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "Self":
        """Wrap the model in DistributedDataParallel; on the CPU, where DDP refuses device ids, without them."""
        super().prepare_distributed(None if self.device.type == "cpu" else device_ids, **ddp_kwargs)
        return self


def _following_scheduler(make: Callable[..., Any]) -> Callable[..., Any]:
    """timm's ``create_scheduler_v2``, whose scheduler moves the model's schedule along with the learning rate."""

    def create_scheduler_v2(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        scheduler, epochs = make(optimizer, *args, **kwargs)
        model = DynTask.latest_model()
        if model is None:
            return scheduler, epochs
        per_epoch = kwargs.get("updates_per_epoch")
        if scheduler is None or not per_epoch:
            raise ValueError("without a learning-rate schedule there is no progress to follow; choose one by --sched.")
        total, mask = epochs * per_epoch, model.attach_mask(optimizer)

        def tell(num_updates: int) -> None:
            model.set_progress(min(num_updates / total, 1.0))
            if mask is not None:
                mask.step = num_updates

        follow_updates(scheduler, per_epoch, tell)
        return scheduler, epochs

    return create_scheduler_v2


def main(argv: list[str] | None = None) -> None:
    """Run one of timm's scripts with dynamic adapters: ``argv`` is its path and its arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or not os.path.isfile(argv[0]):
        raise SystemExit(f"usage: python -m exit_plugins.peft.timm_door PATH/TO/train.py [its options]; got {argv[:1]}")
    try:
        check_script(argv[0])
    except (ImportError, ValueError) as error:
        raise SystemExit(f"exit_plugins.peft.timm_door: {error}") from error
    folders: list[str] = []
    make_folder = timm.utils.get_outdir

    def get_outdir(*args: Any, **kwargs: Any) -> str:
        folders.append(make_folder(*args, **kwargs))
        return folders[-1]

    tasks: list[DynTask] = []

    class KeptTask(DynTask):
        """One that outlives the script's functions, for what it has trained is saved after them."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tasks.append(self)

    names: Names = {
        "timm.task": {"ClassificationTask": KeptTask},
        "timm.scheduler": {"create_scheduler_v2": _following_scheduler(timm.scheduler.create_scheduler_v2)},
        "timm.utils": {"get_outdir": get_outdir},
    }
    run_script(argv[0], argv[1:], names)
    trained = [task for task in tasks if task.dynamic is not None]
    if trained and folders:
        _save(trained[-1], Path(folders[-1]))


def _save(task: DynTask, folder: Path) -> None:
    raw, average = task.dynamic, task.get_trainable_module(ema=True)
    assert raw is not None
    if average is None:
        raw.save_pretrained(str(folder / "adapter"))
        return
    _inside(average).save_pretrained(str(folder / "adapter"))
    raw.save_pretrained(str(folder / "adapter_raw"))


if __name__ == "__main__":
    # As a module of its own, not as __main__, so that timm's registry and the script see one and the same.
    from exit_plugins.peft.timm_door import main as run

    run()
