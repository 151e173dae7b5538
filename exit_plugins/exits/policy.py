"""ExitPolicy: the thresholds, and where they come from, in one JSON file."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .confidence import check_measure, check_temperatures
from .costs import check_costs
from .digests import describe_checked, describe_model, weights_digest
from .files import atomic_write
from .protocol import AnyModel, MultiExitModule, check_multi_exit
from .reading import reading, strict_json
from .samples import SampleRecord
from .schema import CERTIFICATE, MODEL, SOURCE, Numbers, check_fields, numbers, plain

if TYPE_CHECKING:
    from .table import ExitTable

__all__ = [
    "ExitPolicy",
    "check_path",
    "check_same_confidence",
    "check_same_model",
    "check_same_origin",
    "check_same_weights",
    "describe_model",
    "weights_digest",
]

_FORMAT = "exit_plugins.policy"
_VERSION = 1
# What two models must share for a policy to run on both, where both sides know it.
_SAME = ("architecture", "num_exits", "num_classes", "in_chans")
_SAME_COST = 1e-9  # means of costs that differ by less differ by rounding


def check_same_model(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """ValueError naming what differs between a model and the one ``what`` was made for; None is "not known"."""
    for key in _SAME:
        if expected.get(key) is not None and found.get(key) is not None and found[key] != expected[key]:
            raise ValueError(
                f"{what} was made for {key} {expected[key]} and the model has {found[key]}; solve thresholds for this "
                "model."
            )


def check_same_confidence(made: "ExitPolicy | ExitTable", table: "ExitTable") -> None:
    """ValueError unless ``table`` holds the confidences that a policy's thresholds are for, or another table holds."""
    ours, temperatures = made.measure, np.asarray(made.temperatures).tolist()
    if ours != table.measure or not np.allclose(temperatures, table.temperatures):
        whose = "the policy's thresholds are for" if isinstance(made, ExitPolicy) else "one table holds"
        raise ValueError(
            f"{whose} {ours} at temperatures {temperatures}, the table holds {table.measure} at "
            f"{list(table.temperatures)}; collect it with the same, or use ExitTable.with_confidence."
        )


def check_same_origin(made: "ExitPolicy | ExitTable", table: "ExitTable", weights: bool = True) -> None:
    """ValueError unless a policy, or another table, is for the confidences in ``table`` and of the same model.

    What one side does not know cannot be compared. ``weights=False`` lets other weights of one architecture pass: what
    a policy does on them can be measured, though nothing that was promised for its own holds there.
    """
    check_same_confidence(made, table)
    ours, theirs = _origin(made), _origin(table)
    for key in (*_SAME, "weights") if weights else _SAME:
        if ours.get(key) is not None and theirs.get(key) is not None and ours[key] != theirs[key]:
            kind = "policy" if isinstance(made, ExitPolicy) else "other table"
            raise ValueError(
                f"the table is of a model with {key} {theirs[key]} and the {kind} of one with {ours[key]}; what is "
                "said on one model's table does not hold for another: collect it from the same model and weights."
            )


def _origin(made: "ExitPolicy | ExitTable") -> dict[str, Any]:
    """What is known of the model, its ``weights`` among it."""
    if isinstance(made, ExitPolicy):
        return made.model or {}
    about = made.about or {}
    return {**(about.get("model") or {}), "weights": about.get("weights")}


def check_same_weights(policy: "ExitPolicy", model: AnyModel) -> None:
    """ValueError if the policy was solved with other weights than the model has."""
    solved_with = (policy.model or {}).get("weights")
    if solved_with is not None and solved_with != weights_digest(model):
        raise ValueError("the policy was solved with other weights of this architecture; solve it again with these.")


def check_path(path: Sequence["ExitPolicy"], last: int | None = None) -> None:
    """ValueError unless policies run from cheap to full, where nobody leaves before exit ``last`` (default the last).

    Costs are compared where the policies record theirs.
    """
    if len(path) == 0:
        raise ValueError("a path needs at least one policy.")
    end = path[-1].num_exits - 1 if last is None else last
    if (path[-1].thresholds[:end] != math.inf).any():
        raise ValueError(
            "the path must end with the policy under which nobody leaves early, the cheapest first; use "
            "policy_path(...)."
        )
    known = [(step, policy.source["cost"]) for step, policy in enumerate(path) if policy.source.get("cost") is not None]
    for (before, cheaper), (step, cost) in zip(known, known[1:], strict=False):
        if cost < cheaper * (1 - _SAME_COST):
            raise ValueError(
                f"the path must run from cheap to full, and policy {step} costs {cost:.6g} after {cheaper:.6g} of "
                f"policy {before}; sort it by source['cost'], or use policy_path(...)."
            )


@dataclass(frozen=True, eq=False)
class ExitPolicy:
    """When to leave: a sample leaves at the first exit whose confidence is at least that exit's threshold.

    Attributes:
        thresholds: (K,) float32, as confidences are, so that a tie is a tie everywhere; the last is -inf, since
            whoever is still there leaves. +inf closes an exit.
        measure: the confidence the thresholds are for.
        temperatures: (K,) that logits are divided by before the confidence is taken.
        costs: (K,) cumulative cost per exit the policy was solved for, or None.
        model: what ``describe_model`` said of the model it was made for, with the digest of its ``weights``, the
            ``input_size`` and the names of the ``classes`` where they are known; None for a policy made by hand.
        source: where it comes from: method, budget, samples, expected accuracy and cost. ``source["samples"]`` is a
            ``samples.SampleRecord`` in JSON, so that ``overlap`` can tell which samples were used.
        certificate: a guarantee from ``exits.risk``, or None.
        max_exit: a hard cap: no sample goes beyond this exit (0-based), whatever its confidence, NaN included. None
            for no cap. No sample ever costs more than ``costs[max_exit]``.

    JSON (``format`` "exit_plugins.policy", ``version`` 1): these fields under their names; infinite thresholds are
    the strings "inf" and "-inf". docs/policy.md describes every field.
    """

    thresholds: NDArray[Any]
    measure: str = "max_softmax"
    temperatures: NDArray[Any] = None  # type: ignore[assignment]  # ones, once it is made
    costs: NDArray[Any] | None = None
    model: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    max_exit: int | None = None

    if TYPE_CHECKING:  # what it is made of is wider than what it holds

        def __init__(
            self,
            thresholds: Numbers,
            measure: str = "max_softmax",
            temperatures: Numbers | None = None,
            costs: Numbers | None = None,
            model: Mapping[str, Any] | None = None,
            source: Mapping[str, Any] = ...,
            certificate: Mapping[str, Any] | None = None,
            max_exit: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        wide = numbers(self.thresholds, "thresholds")
        if np.isnan(wide).any():
            raise ValueError(f"thresholds must not be NaN, got {wide.tolist()}; use inf to close an exit.")
        with np.errstate(over="ignore"):
            thresholds = wide.astype(np.float32)
        if (np.isinf(thresholds) & np.isfinite(wide)).any():
            raise ValueError(f"thresholds are compared as float32, which {wide.tolist()} exceed; use inf or -inf.")
        # The last exit answers whatever its confidence: any number written there by hand means the same.
        thresholds[-1] = -math.inf
        if self.max_exit is not None:
            if type(self.max_exit) is not int or not 0 <= self.max_exit < len(thresholds):
                raise ValueError(f"max_exit must be an exit index below {len(thresholds)}, got {self.max_exit!r}.")
            thresholds[self.max_exit :] = -math.inf
        set_(self, "thresholds", thresholds)
        check_measure(self.measure)
        temperatures = None if self.temperatures is None else numbers(self.temperatures, "temperatures").tolist()
        set_(self, "temperatures", np.array(check_temperatures(temperatures, self.num_exits)))
        if self.costs is not None:
            set_(self, "costs", check_costs(numbers(self.costs, "costs", self.num_exits), self.num_exits))
        for array in (self.thresholds, self.temperatures, self.costs):
            if array is not None:
                array.setflags(write=False)
        for name, fields in (("model", MODEL), ("source", SOURCE), ("certificate", CERTIFICATE)):
            block = getattr(self, name)
            if block is None and name != "source":
                continue
            if not isinstance(block, Mapping):
                raise TypeError(f"{name} must be a mapping, got {type(block).__name__}.")
            set_(self, name, plain(block, name))
            check_fields(getattr(self, name), name, fields)
        model, shares = self.model or {}, self.source.get("shares")
        if model.get("num_exits") not in (None, self.num_exits):
            raise ValueError(f"{self.num_exits} thresholds do not fit a model with {model['num_exits']} exits.")
        if shares is not None and len(shares) != self.num_exits:
            raise ValueError(f"source['shares'] holds {len(shares)} shares for {self.num_exits} exits.")
        classes, num_classes = model.get("classes"), model.get("num_classes")
        if classes is not None and num_classes is not None and len(classes) != num_classes:
            raise ValueError(f"model['classes'] names {len(classes)} classes of {num_classes}.")

    @property
    def num_exits(self) -> int:
        return len(self.thresholds)

    @property
    def last_exit(self) -> int:
        """Index of the exit where whoever is still there leaves: ``max_exit``, or the model's last."""
        return self.num_exits - 1 if self.max_exit is None else self.max_exit

    def choose(self, confidence: NDArray[Any]) -> NDArray[Any]:
        """Exit index (N,) each sample leaves at, from confidences (K, N).

        NaN never leaves early, and nobody, a confidence of +inf included, leaves at a closed exit.

        ValueError for another shape.
        """
        confidence = np.asarray(confidence, dtype=np.float32)
        if confidence.ndim != 2 or confidence.shape[0] != self.num_exits:
            raise ValueError(f"a policy of {self.num_exits} exits cannot read confidences of shape {confidence.shape}.")
        leaves = (confidence >= self.thresholds[:, None]) & (self.thresholds < np.inf)[:, None]
        leaves[self.last_exit] = True
        exits: NDArray[Any] = leaves.argmax(0)
        return exits

    def check_model(self, model: AnyModel) -> MultiExitModule:
        """``model``, on which the policy can run: it has as many exits and, where recorded, is the same model.

        TypeError for a module without exits, ValueError for a multi-exit model that the policy does not fit.
        """
        module = check_multi_exit(model)
        found = describe_checked(module)
        if found["num_exits"] != self.num_exits:
            raise ValueError(
                f"the policy has {self.num_exits} thresholds and {found['architecture']} has {found['num_exits']} "
                "exits; solve thresholds for this model."
            )
        check_same_model(found, self.model or {}, "the policy")
        return module

    def overlap(self, table: "ExitTable") -> int | None:
        """How many samples of ``table`` the policy was solved, calibrated, chosen or certified on; 0 for a true test.

        Exact up to 4,096 samples on the policy's side, estimated from a random sample of that size beyond (and at
        least what was seen). None where the table or the policy does not know its samples.
        """
        if table.sample is None:
            return None
        used = [self.source.get(key) for key in ("samples", "holdout_samples", "temperature_samples")]
        used.append((self.certificate or {}).get("samples"))
        records = [SampleRecord.of_json(value) for value in used]
        known = [record for record in records if record is not None and record.digests is not None]
        if not known:
            return None
        return min(len(table.sample), sum(record.overlap(table.sample) for record in known))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file, whole or not at all."""
        checked = replace(self)  # the blocks may have been changed since
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "thresholds": [_to_json(t) for t in checked.thresholds],
            "measure": checked.measure,
            "temperatures": checked.temperatures.tolist(),
            "costs": None if checked.costs is None else checked.costs.tolist(),
            "model": checked.model,
            "source": checked.source,
            "certificate": checked.certificate,
            "max_exit": checked.max_exit,
        }
        # A line per field: indented further, thousands of sample digests would stand on a line each.
        lines = (f'  "{key}": {json.dumps(value, allow_nan=False)}' for key, value in document.items())
        with atomic_write(path) as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExitPolicy":
        """Read a policy; FileNotFoundError, or ValueError in one line for a file that is not a whole policy."""
        missing = f"solve one with solve_thresholds(...).save({str(path)!r})"
        with reading(path, "policy", "write it again", missing):
            document = strict_json(Path(path).read_bytes())
            if not isinstance(document, dict) or document.get("format") != _FORMAT:
                raise ValueError(f"its format field is not {_FORMAT!r}")
            version = document.get("version")
            if type(version) is not int or version != _VERSION:
                raise ValueError(f"it has version {version}, this package reads version {_VERSION}")
            names = {"format", "version", *cls.__dataclass_fields__}
            for kind, wrong in (("unknown", set(document) - names), ("no", names - set(document))):
                if wrong:
                    raise ValueError(f"it holds {kind} fields {', '.join(sorted(wrong))}")
            fields = {key: document[key] for key in cls.__dataclass_fields__}
            if not isinstance(fields["thresholds"], list):
                raise ValueError("thresholds must be a list with one number per exit")
            return cls(**fields | {"thresholds": [_from_json(t) for t in fields["thresholds"]]})


def _to_json(threshold: np.float32) -> float | str:
    # str() of a float32 is the shortest decimal that reads back as the same float32.
    return str(threshold) if np.isinf(threshold) else float(str(threshold))


def _from_json(threshold: float | str) -> float:
    if isinstance(threshold, str) and threshold not in ("inf", "-inf"):
        raise ValueError(f"threshold {threshold!r} is neither a number nor 'inf' nor '-inf'")
    return float(threshold) if isinstance(threshold, str) else threshold
