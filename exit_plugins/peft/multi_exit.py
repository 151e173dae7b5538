"""A backbone and its early heads as one plain module: what adapters are merged into."""

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from .._modules import ModuleList
from ..exits.clips import over_clips
from ..timm._networks import check_not_fused
from ..timm.kernels import check_evaluating
from ._host import AuxiliaryTrainingWrapper, BaseTunerLayer, HostModel
from .card import update_card
from .exit_model import ExitModel
from .families import Family, find_family
from .folders import load_merged, save_merged
from .heads import EarlyHead, widen_classifiers

__all__ = ["MultiExitBackbone"]


class MultiExitBackbone(ExitModel, nn.Module):
    """A backbone and its early heads as one plain multi-exit module, without any adapter of its own.

    Attributes it does not have itself are the backbone's, as in PEFT's wrappers; methods only where they mean the same
    with exits.
    """

    backbone: HostModel
    early_heads: "ModuleList[EarlyHead]"
    exit_after: tuple[int, ...]
    token: str
    fused = False

    def __init__(
        self,
        backbone: HostModel,
        early_heads: "ModuleList[EarlyHead]",
        exit_after: Sequence[int],
        token: str,
        family: Family | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.early_heads = early_heads
        self.exit_after = tuple(exit_after)
        self.token = token
        self.family = family or find_family(backbone)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":
                raise
            return self._of_backbone(name)

    def fuse(self) -> "MultiExitBackbone":
        """Put the form for inference in place, with the same outputs up to rounding; return ``self``.

        Products over positions are done by the kernels that are fastest here, and in timm's networks batch norms are
        folded, with which the state dict changes. Where there are still adapters in the backbone, nothing is changed.

        Raises:
            RuntimeError: the model is in training mode.
        """
        check_evaluating(self)
        if not self.fused and not self._has_adapters():
            self.fused = True
            self.family = self.family.fuse(self.backbone)
        return self

    def _has_adapters(self) -> bool:
        return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in self.modules())

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        accuracies: Sequence[float] | None = None,
        dataset: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write backbone, exits and early heads into a folder, whole or not at all; ``from_pretrained`` reads it.

        The backbone's own files are its host's: ``AutoModelForImageClassification.from_pretrained(folder)`` or
        ``timm.create_model("local-dir:FOLDER", pretrained=True)`` give the model of the last exit, without the others.

        Args:
            is_main_process: write; other processes do nothing.
            accuracies: for the model card, top-1 accuracy of every exit in percent.
            dataset: for the model card, what they were measured on.
            kwargs: of transformers' ``save_pretrained``, or ``model_args`` of timm's ``save_for_hf``.

        Raises:
            ValueError: there are adapters in the backbone, which ``merge_and_unload`` of the adapted model folds in; or
                the model is in its form for inference.
        """
        check_not_fused(self)
        if self._has_adapters():
            raise ValueError(
                "there are adapters in this model: save the DynPeftModel it comes from, or fold them in by its "
                "merge_and_unload() and save what that returns."
            )
        if is_main_process:
            save_merged(
                self, save_directory, lambda folder: update_card(folder, self, None, accuracies, dataset), **kwargs
            )

    @classmethod
    def from_pretrained(
        cls, model_id: str | os.PathLike, model: nn.Module | None = None, **hub: Any
    ) -> "MultiExitBackbone":
        """Read what ``save_pretrained`` wrote, from a folder or the Hugging Face hub; in evaluation mode.

        Args:
            model_id: folder, or name on the hub.
            model: backbone to fill, of the saved one's class and classes. Left out: made anew as its host describes it
                in the folder.
            hub: ``subfolder``, ``revision``, ``cache_dir``, ``token``.

        Raises:
            ValueError: the folder holds no such model, or it does not fit ``model``; what is missing is named.
        """
        backbone, family, record, heads = load_merged(model_id, model, widen_classifiers, **hub)
        early = ModuleList(
            EarlyHead(width, record["num_classes"], hidden)
            for width, hidden in zip(record["widths"], record["hidden_widths"], strict=True)
        )
        merged = cls(backbone, early, record["exit_after"], record["token"], family)
        early.to(next(backbone.parameters()).device, next(iter(heads.values())).dtype).load_state_dict(heads)
        if record.get("num_frames"):
            over_clips(merged, record["num_frames"], keep_forward=True)
        return merged.eval()
