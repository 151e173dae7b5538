"""What evaluate, solve and report start from: a model, its exit table, the images behind it, the costs of its exits."""

import argparse
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray

from ..exits.costs import exit_costs
from ..exits.latency import LatencyProfile, profile_latency
from ..exits.policy import ExitPolicy
from ..exits.protocol import exit_device
from ..exits.table import ExitTable
from ..timm.data import ImageView
from .common import open_data, start_processes
from .models import Classifier, data_config, known_model, match_classes, model_classes, open_model
from .modes import open_mode
from .tables import check_images, check_table, collect


@dataclass
class Inputs:
    """One model and what its exits said of one data set.

    Attributes:
        known: what arguments, policy, table and card say of the model (see ``known_model``).
        config: timm's preprocessing of the model.
        table: of the data set, without the images that could not be read.
        images: the data set of the table's rows; None where it streams or where only the table was given.
    """

    args: argparse.Namespace
    model: Classifier
    known: dict[str, Any]
    config: dict[str, Any]
    table: ExitTable
    images: ImageView | None

    @cached_property
    def costs(self) -> NDArray[Any]:
        """Cumulative cost (K,) per image in ``unit``, found when first asked for; of latency that of full batches.

        Of several processes only the main one should ask, since latency is measured.
        """
        if self.latency:
            return self.latency[0].full_batches()
        return exit_costs(self.model, self.config["input_size"]).macs

    @property
    def unit(self) -> str:
        return "s" if self.latency else "MACs"

    @cached_property
    def latency(self) -> list[LatencyProfile]:
        """Measured at each ``--cost-batch`` in ``--cost-mode``, when first asked for; none where MACs are the cost."""
        return [self._profile(batch) for batch in self.args.cost_batch] if self.args.cost == "latency" else []

    def _profile(self, batch: int) -> LatencyProfile:
        images = torch.randn((batch, *self.config["input_size"]), generator=torch.Generator().manual_seed(0))
        images = images.to(exit_device(self.model))
        return profile_latency(open_mode(self.args.cost_mode, self.model, images), images)

    @property
    def class_names(self) -> list[str] | None:
        """By index: the model's, else the data's; None where nothing names them."""
        names = model_classes(self.model, self.known)
        return names or (list(self.images.classes) if self.images is not None else None) or None

    def table_of(self, split: str) -> ExitTable:
        """The table of another split of the same data."""
        data = match_classes(open_data(self.args, split)[0], self.model, self.known)
        return collect(self.model, data, self.args, self.config, self.table.measure, split=split)[0]


def open_inputs(args: argparse.Namespace, policy: ExitPolicy | None = None, as_policy: bool = True) -> Inputs:
    """The table in ``--table``, or that of the images of ``--data``, written to ``--save-table`` where there is one.

    Where both are given they must be of the same images.

    Args:
        policy: what it says of the model counts too.
        as_policy: take confidences as the policy does, where the arguments do not say how.

    Raises:
        ValueError: neither of the two is given, or arguments, policy, table and images do not belong together.
    """
    if not args.table and not args.data:
        raise ValueError("give --data to run the model on, or --table with a table that evaluate wrote.")
    start_processes(args)
    table = ExitTable.load(args.table) if args.table else None
    known = known_model(args, policy, table)
    data, names = open_data(args) if args.data else (None, ())
    model = open_model(args, known, num_classes=len(names) or None, needs_weights=table is None)
    config = data_config(args, model, known)
    data = match_classes(data, model, known)
    if table is None:
        measure, temperatures = args.measure or "max_softmax", None
        if policy is not None and as_policy:
            measure, temperatures = args.measure or policy.measure, policy.temperatures.tolist()
        save = getattr(args, "save_table", None)
        table, data = collect(model, data, args, config, measure, temperatures, save=save)
    else:
        check_table(table, model)
    if args.measure and table.measure != args.measure:
        table = table.with_confidence(args.measure)
    images = data if isinstance(data, ImageView) else None
    if args.table and images is not None:
        check_images(table, images, config, args.table)
    return Inputs(args, model, known, config, table, images)
