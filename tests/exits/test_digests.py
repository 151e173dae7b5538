import hashlib

import numpy as np
import pytest
import torch
from small_models import ConvExits, NestedExits
from small_tables import costs_of, realistic_table
from torch.utils.data import DataLoader, Subset, TensorDataset

from exit_plugins import AdaptiveModel, ExitPolicy, ExitTable, collect_exits, solve_thresholds
from exit_plugins.exits.digests import describe_model, sample_digests, weights_digest
from exit_plugins.exits.risk import certify
from exit_plugins.exits.samples import SampleRecord
from exit_plugins.exits.thresholds import policy_path


def images(count: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, 3, 16, 16, generator=generator), torch.randint(5, (count,), generator=generator)
    )


def test_model_says_its_channels():
    assert describe_model(ConvExits(in_chans=1))["in_chans"] == 1
    assert describe_model(NestedExits(in_chans=4))["in_chans"] == 4


def test_weights_digest_tells_weights_whose_sums_agree():
    model, other = ConvExits().eval(), ConvExits().eval()
    other.load_state_dict(model.state_dict())
    assert weights_digest(model) == weights_digest(other)
    with torch.no_grad():
        other.stages[1][0].weight.copy_(model.stages[1][0].weight.flip(0))
    assert other.stages[1][0].weight.double().sum().item() == pytest.approx(
        model.stages[1][0].weight.double().sum().item()
    )
    assert weights_digest(model) != weights_digest(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_digest_depends_on_values_and_not_on_their_layout(dtype):
    model = ConvExits().to(dtype)
    digest = weights_digest(model)
    assert weights_digest(model.to(memory_format=torch.channels_last)) == digest
    with torch.no_grad():
        model.heads[2].bias[0].add_(1)
    assert weights_digest(model) != digest


def test_what_is_wrapped_around_a_model_is_no_part_of_who_it_is():
    model = ConvExits().eval()
    digest, described = weights_digest(model), describe_model(model)
    compiled = torch.compile(model, backend="eager")
    assert weights_digest(compiled) == weights_digest(torch.nn.DataParallel(compiled)) == digest
    assert describe_model(compiled) == described
    data = images(6)
    policy = solve_thresholds(collect_exits(model, DataLoader(data, 3)), costs_of(3), budget=3.0, model=model)
    assert collect_exits(compiled, DataLoader(data, 3)).about["weights"] == policy.model["weights"] == digest
    adaptive = AdaptiveModel(compiled, policy)
    assert torch.equal(adaptive(data.tensors[0]).logits, AdaptiveModel(model, policy)(data.tensors[0]).logits)
    model.stages[0] = torch.compile(model.stages[0], backend="eager")
    assert weights_digest(model) == digest


def test_sample_digests_are_of_the_sample_alone():
    data = images(6).tensors[0]
    whole = sample_digests(data)
    assert whole.dtype == np.uint64 and len(set(whole.tolist())) == 6
    np.testing.assert_array_equal(whole[2:3], sample_digests(data[2:3].to(memory_format=torch.channels_last)))
    # Said once more, with hashlib over numpy's bytes.
    head = b"torch.float32 (3, 16, 16)"
    expected = hashlib.blake2b(head + data[4].numpy().tobytes(), digest_size=8).digest()
    assert int(whole[4]) == int.from_bytes(expected, "little")
    assert set(sample_digests(data.double()).tolist()).isdisjoint(whole.tolist())


def test_table_knows_where_it_comes_from(tmp_path):
    model, data = ConvExits().eval(), images(20)
    about = {"transform": "resize 16", "classes": ["a", "b", "c", "d", "e"]}
    table = collect_exits(model, DataLoader(data, 8), about=about, keep_logits=True)
    np.testing.assert_array_equal(table.sample, sample_digests(data.tensors[0]))
    assert table.about == {
        "model": describe_model(model),
        "weights": weights_digest(model),
        "input_size": [3, 16, 16],
        "transform": "resize 16",
        "data": None,
        "split": None,
        "classes": ["a", "b", "c", "d", "e"],
    }
    table.save(tmp_path / "t.npz")
    loaded = ExitTable.load(tmp_path / "t.npz")
    assert loaded.about == table.about and loaded.digest() == table.digest()
    for made in (loaded.with_confidence("margin"), loaded.running_ensemble(costs_of(3))):
        np.testing.assert_array_equal(made.sample, table.sample)
        assert made.about == table.about
    first, second = loaded.split(0.4)
    assert sorted([*first.sample, *second.sample]) == sorted(table.sample)
    assert first.about == second.about == table.about


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(sample=np.zeros(3)), "do not fit 4 samples"),
        (dict(about={"x": float("nan")}), "JSON holds finite numbers only"),
        (dict(about={"weights": "abc"}), "must be a SHA-256"),
        (dict(about={"model": {"num_exits": 3}}), "not of a model with 3"),
        (dict(about="resnet"), "mapping of plain values"),
    ],
)
def test_table_that_contradicts_itself_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ExitTable(np.zeros((2, 4)), np.zeros((2, 4)), np.zeros(4), **wrong)


def test_policy_counts_the_samples_it_has_seen(tmp_path):
    model, data = ConvExits().eval(), images(40)
    solving = collect_exits(model, DataLoader(Subset(data, range(25)), 8))
    test = collect_exits(model, DataLoader(Subset(data, range(20, 40)), 8))
    policy = solve_thresholds(solving, costs_of(3), budget=4.0)
    assert policy.model["weights"] == weights_digest(model) and policy.model["input_size"] == [3, 16, 16]
    policy.save(tmp_path / "p.json")
    policy = ExitPolicy.load(tmp_path / "p.json")
    assert policy.overlap(test) == 5 and policy.overlap(solving) == 25
    assert policy.overlap(test.subset(np.arange(5, 20))) == 0
    assert ExitPolicy([0.5, 0.5, 0]).overlap(test) is None
    assert policy.overlap(realistic_table(3, 10)) is None


def test_certifying_samples_count_as_seen_and_may_not_be_those_solved_on():
    model, data = ConvExits().eval(), images(60)
    table = collect_exits(model, DataLoader(data, 20))
    solving, apart = table.subset(np.arange(30)), table.subset(np.arange(30, 50))
    path = policy_path(solving, costs_of(3), steps=3)
    policy = certify(path, apart, 0.3)
    assert policy.overlap(table) == 50
    with pytest.raises(ValueError, match="solved on 10 of these 30 samples"):
        certify(path, table.subset(np.arange(20, 50)), 0.3)


def test_solving_for_another_model_than_the_tables_is_refused():
    table = collect_exits(ConvExits().eval(), DataLoader(images(10), 5))
    with pytest.raises(ValueError, match="the table was made for num_classes 5 and the model has 7"):
        solve_thresholds(table, costs_of(3), budget=4.0, model=ConvExits(num_classes=7))


@pytest.mark.parametrize("shared", [0, 500, 6000])
def test_overlap_of_many_samples_is_estimated(shared):
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**64, size=30_000, dtype=np.uint64)
    record = SampleRecord.of(numbers[:20_000], 20_000)
    assert len(record.digests) == 4096 and record.limit == int(record.digests[-1])
    record = SampleRecord.of_json(record.to_json())
    test = np.concatenate([numbers[:shared], numbers[20_000:]])
    assert record.overlap(test) == pytest.approx(shared, abs=4 * (shared * 4) ** 0.5)


@pytest.mark.parametrize("value", [-1, True, "12", {"count": 1.5}, {"count": 1, "digests": ["xyz"]}, {"more": 1}])
def test_record_that_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError):
        SampleRecord.of_json(value)


@pytest.mark.parametrize("digests", [5, "0" * 16, ["-" + "0" * 14 + "f"], ["0_" + "0" * 14], ["F" * 16]])
def test_digests_that_are_none_are_refused_in_words(digests):
    with pytest.raises(ValueError, match="digest"):
        SampleRecord.of_json({"count": 1, "digests": digests, "limit": None})


def test_a_policy_keeps_what_its_table_knows_and_the_given_model_does_not_say():
    data = images(40)
    model = ConvExits()
    model.model_kwargs = {"num_classes": 5}
    table = collect_exits(model, DataLoader(data, 8))
    del model.model_kwargs
    policy = solve_thresholds(table, costs_of(3), budget=2 * costs_of(3)[0], model=model)
    assert policy.model["model_kwargs"] == {"num_classes": 5}
