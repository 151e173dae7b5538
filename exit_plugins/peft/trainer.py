"""Training by transformers' own Trainer: a callback, and metrics of every exit."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ._host import HostModel
from .dyn import DynPeftModel
from .schedule import GradientMask

__all__ = ["DynTrainerCallback", "compute_exit_metrics"]


class DynTrainerCallback(TrainerCallback):
    """Moves the schedule and attaches the gradient mask; give it to ``Trainer(callbacks=[DynTrainerCallback()])``.

    Args:
        predict_exits: let evaluation and prediction collect the logits of every exit beside the last one's, as
            ``compute_exit_metrics`` wants them: ``predictions`` is then the pair ((N, C), (N, K, C)) and not (N, C).

    Raises:
        ValueError: the arguments would make Trainer train the last exit alone, or load no best model.
    """

    def __init__(self, predict_exits: bool = False) -> None:
        self.predict_exits = predict_exits
        self.mask: GradientMask | None = None

    @staticmethod
    def _inside(model: HostModel) -> DynPeftModel:
        while not isinstance(model, DynPeftModel):
            inner = getattr(model, "module", None)
            inner = getattr(model, "_orig_mod", None) if inner is None else inner
            if inner is None:
                raise TypeError(
                    f"DynTrainerCallback is for a DynPeftModel, and Trainer trains a {type(model).__name__}."
                )
            model = inner
        return model

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        inside = self._inside(model)
        inside.predict_exits = self.predict_exits
        if args.load_best_model_at_end and inside.active_adapter != "default":
            raise ValueError(
                f"load_best_model_at_end looks for an adapter called default, and this one is called "
                f"{inside.active_adapter!r}: Trainer would go on with the last weights as if they were the best. Call "
                "the adapter default, or switch it off and read the best checkpoint by load_adapter(folder, name)."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor makes Trainer take the labels away from the model and train the last exit "
                "alone; set it to 0 and use DynConfig(label_smoothing=...), which smooths at every exit."
            )

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs: Any) -> None:
        self.on_init_end(args, state, control, model)
        self.mask = self._inside(model).attach_mask(optimizer)

    def on_step_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        self._inside(model).set_progress(min(state.global_step / max(state.max_steps, 1), 1.0))
        if self.mask is not None:
            self.mask.step = state.global_step

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        if self.mask is not None:
            self.mask.detach()


def _joined(batches: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(batch) for batch in batches])


def compute_exit_metrics(prediction: Any) -> dict[str, float]:
    """``compute_metrics`` for Trainer: top-1 accuracy, in [0, 1], of the last exit (``accuracy``) and of every exit.

    ``prediction.predictions`` is (logits (N, C), exit_logits (N, K, C)), as outputs arrive here from a dynamic model
    whose ``predict_exits`` is set, which ``DynTrainerCallback(predict_exits=True)`` does. Without it only the last
    exit's logits arrive, and its accuracy alone is returned, with a warning.
    """
    predictions, labels = prediction.predictions, prediction.label_ids
    if isinstance(predictions, list):  # of batches, as they come with TrainingArguments(eval_do_concat_batches=False)
        whole = isinstance(predictions[0], tuple)
        predictions = tuple(map(_joined, zip(*predictions, strict=True))) if whole else _joined(predictions)
        labels = _joined(labels)
    labels = np.asarray(labels)
    if not isinstance(predictions, tuple):
        warnings.warn(
            "only the last exit's logits have arrived: for the accuracy of every exit give Trainer "
            "callbacks=[DynTrainerCallback(predict_exits=True)], or set predict_exits of the model.",
            stacklevel=2,
        )
        return {"accuracy": float((np.asarray(predictions).argmax(-1) == labels).mean())}
    _, exit_logits = predictions
    accuracies = (np.asarray(exit_logits).argmax(-1) == labels[:, None]).mean(0)
    result = {f"accuracy_exit_{index + 1}": float(value) for index, value in enumerate(accuracies)}
    return {"accuracy": float(accuracies[-1]), **result}
