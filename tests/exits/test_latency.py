"""Latency as a cost: what calls take by a made clock, and thresholds for a mean time beside all others."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from small_models import ConvExits
from small_tables import costs_of, naive_run, realistic_table

from exit_plugins import AdaptiveModel, ExitPolicy, ExitTable, collect_exits, profile_latency, solve_latency
from exit_plugins.exits.latency import LatencyProfile
from exit_plugins.exits.protocol import batch_size

FIXED, EACH = np.array([3.0, 1.0, 2.0]), np.array([1.0, 2.0, 4.0])  # of a segment: seconds whatever comes, and a sample


def profile_of(sizes, fixed=FIXED, each=EACH, gather=0.0) -> LatencyProfile:
    sizes = np.array(sizes)
    gathers = np.full((len(fixed), len(sizes)), float(gather))
    gathers[0] = 0.0
    return LatencyProfile(sizes, fixed[:, None] + each[:, None] * sizes, gathers, {"batch_size": int(sizes[-1])})


class Clocked(ConvExits):
    """Its segments take the seconds above by its own clock, and no others."""

    now = 0.0

    def clock(self) -> float:
        return self.now

    def forward_exit(self, index, state):
        self.now += FIXED[index] + EACH[index] * batch_size(state)
        return super().forward_exit(index, state)


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.0, 0.6, 0.4), (1.0, 0, 0), (0, 0, 1.0), (0.7, 0.0, 0.3)])
def test_expected_time_is_that_of_all_batches_there_can_be(shares):
    rng = np.random.default_rng(0)
    segment, gather = rng.random((3, 3)), rng.random((3, 3))
    profile = LatencyProfile(np.array([1, 2, 3]), segment, gather, {})
    expected = 0.0
    for exits in product(range(3), repeat=3):
        seconds, there = 0.0, 3
        for k in range(3):
            staying = sum(e >= k for e in exits)
            if staying == 0:
                break
            seconds += segment[k, staying - 1] + (gather[k, staying - 1] if staying < there else 0.0)
            there = staying
        expected += np.prod([shares[e] for e in exits]) * seconds
    assert profile.mean(np.array(shares)) == pytest.approx(expected / 3)
    assert (np.diff(profile.costs(np.array(shares))) > 0).all()


def test_sizes_between_those_measured_are_interpolated():
    shares = np.array([0.2, 0.5, 0.3])
    every = profile_of(range(1, 9), gather=0.5)
    assert profile_of([1, 2, 8], gather=0.5).mean(shares) == pytest.approx(every.mean(shares))
    one = profile_of([1], gather=9.0)  # a sample alone is never gathered, and costs the same whoever else comes
    np.testing.assert_allclose(one.costs(shares), np.cumsum(FIXED + EACH))
    np.testing.assert_allclose(one.costs(shares), one.full_batches())


def test_shares_that_are_none_are_refused():
    for shares in ([0.5, 0.5], [0.5, 0.4, 0.2], [1.5, -0.5, 0.0]):
        with pytest.raises(ValueError, match="expected 3 shares that add up to 1"):
            profile_of([1, 4]).costs(np.array(shares))


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_the_profile_holds_what_calls_take(batch):
    torch.manual_seed(0)
    model = Clocked()
    policy = ExitPolicy([0.5, np.inf, -np.inf], measure="entropy")
    adaptive = AdaptiveModel(model, policy)
    profile = profile_latency(adaptive, torch.randn(batch, 3, 16, 16), repeats=2, warmup=1, clock=model.clock)
    assert profile.batch_size == batch and profile.sizes.tolist() == sorted({1, -(-batch // 4), -(-batch // 2), batch})
    np.testing.assert_allclose(profile.segment, FIXED[:, None] + EACH[:, None] * profile.sizes)
    assert (profile.gather == 0).all() and adaptive.policy is policy
    said = {key: profile.measured[key] for key in ("batch_size", "mode", "threads", "device")}
    assert said == {"batch_size": batch, "mode": "plain", "threads": torch.get_num_threads(), "device": "cpu"}


def test_what_cannot_be_timed_is_said():
    adaptive = AdaptiveModel(ConvExits(), ExitPolicy([0.5, 0.5, -np.inf]))
    with pytest.raises(ValueError, match="repeats >= 1, warmup >= 0 and images"):
        profile_latency(adaptive, torch.zeros(0, 3, 16, 16))
    with pytest.raises(ValueError, match="confidences at exit 1 are NaN"), pytest.warns(RuntimeWarning, match="NaN"):
        profile_latency(adaptive, torch.full((2, 3, 16, 16), torch.nan), repeats=1, warmup=0)
    assert adaptive.policy.thresholds[0] == 0.5


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.8, 1.0])
def test_a_budget_in_seconds_is_kept_and_used(batch, share):
    profile, table = profile_of(range(1, batch + 1), gather=0.3), realistic_table(3, 60, seed=batch)
    everybody, nobody = (profile.mean(np.eye(3)[k]) for k in (0, 2))
    budget = everybody + share * (nobody - everybody)
    policy = solve_latency(table, profile, budget, model=None)
    accuracy, _, exits = naive_run(table, policy.thresholds, costs_of(3))
    shares = np.bincount(exits, minlength=3) / 60
    assert policy.source["cost"] == pytest.approx(profile.mean(shares)) and policy.source["cost"] <= budget
    np.testing.assert_allclose(policy.costs, profile.costs(shares))
    assert policy.source["target"] == {"budget": budget} and policy.source["latency"] == {"batch_size": batch}
    best = 0.0
    first, second = (np.append(np.unique(row), np.inf) for row in table.confidence[:2])
    for a in first:
        for b in second:
            there = np.where(table.confidence[0] >= a, 0, np.where(table.confidence[1] >= b, 1, 2))
            if profile.mean(np.bincount(there, minlength=3) / 60) <= budget:
                best = max(best, table.correct[there, np.arange(60)].mean())
    assert accuracy <= best + 1e-9 and accuracy >= best - 1.01 / 60


def test_an_accuracy_is_reached_in_less_time_than_full_batches_would_have_it():
    profile, table = profile_of(range(1, 9)), realistic_table(3, 300)
    wanted = table.correct[-1].mean() - 0.02
    policy = solve_latency(table, profile, accuracy=wanted)
    assert naive_run(table, policy.thresholds, costs_of(3))[0] >= wanted
    assert policy.source["cost"] < profile.mean(np.array([0.0, 0.0, 1.0]))


def test_budgets_out_of_reach_name_the_least_time():
    profile, table = profile_of([1, 8]), realistic_table(3, 50)
    with pytest.raises(ValueError, match=r"in batches of 8 the least possible mean time is 1375 ms.*it takes 7750 ms"):
        solve_latency(table, profile, budget=1.3)
    with pytest.raises(ValueError, match="cannot be met"):
        solve_latency(table, profile, budget=float("nan"))
    with pytest.raises(ValueError, match="a profile of 3 exits does not fit a table of 4"):
        solve_latency(realistic_table(4, 50), profile, budget=5.0)
    with pytest.raises(ValueError, match="either budget= or accuracy="):
        solve_latency(table, profile)
    with pytest.raises(ValueError, match="holds no samples"):
        solve_latency(ExitTable(np.zeros((3, 0)), np.zeros((3, 0)), np.zeros(0)), profile, budget=5.0)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_run_takes_what_was_asked(batch):
    torch.manual_seed(1)
    model = Clocked().eval()
    images = torch.randn(512, 3, 16, 16) * torch.linspace(0.2, 4.0, 512)[torch.randperm(512)].view(-1, 1, 1, 1)
    table = collect_exits(model, [(images, torch.zeros(512, dtype=torch.long))])
    table = replace(table, target=table.prediction[-1])  # the last exit is right: budgets are worth it
    adaptive = AdaptiveModel(model, ExitPolicy([np.inf, np.inf, -np.inf]))
    profile = profile_latency(adaptive, images[:batch], repeats=1, warmup=0, clock=model.clock)
    full = profile.full_batches()
    for share in (0.2, 0.5, 0.8):
        asked = full[0] + share * (full[-1] - full[0])
        adaptive.policy = solve_latency(table, profile, asked)
        began = model.now
        for part in images.split(batch):
            adaptive(part)
        assert (model.now - began) / len(images) == pytest.approx(adaptive.policy.source["cost"], rel=0.05)
        assert adaptive.policy.source["cost"] == pytest.approx(asked, rel=0.05)
