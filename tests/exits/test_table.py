import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import ConvExits, CountedRows, NestedExits, settle
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from exit_plugins import ExitTable, collect_exits


def make_model(kind: type = ConvExits, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return settle(kind(), torch.randn(32, 3, 16, 16))


def make_data(count: int = 50) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(count, 3, 16, 16, generator=generator), torch.randint(5, (count,), generator=generator)
    )


def same(first: ExitTable, second: ExitTable) -> bool:
    return first.digest() == second.digest() and (
        first.logits is None or np.array_equal(first.logits, second.logits, equal_nan=True)
    )


# What it collects


@pytest.mark.parametrize("kind", [ConvExits, NestedExits])
def test_collects_what_the_exits_say_in_the_order_of_the_loader(kind):
    model, data = make_model(kind), make_data()
    table = collect_exits(model, DataLoader(data, 16), keep_logits=True)
    images, target = data.tensors
    with torch.no_grad():
        expected = torch.cat([torch.stack(model.forward_exits(x)) for x in images.split(16)], 1)
    np.testing.assert_array_equal(table.logits, expected.numpy())
    np.testing.assert_array_equal(table.prediction, expected.argmax(-1).numpy())
    np.testing.assert_allclose(table.confidence, expected.softmax(-1).amax(-1).numpy(), rtol=1e-6)
    np.testing.assert_array_equal(table.target, target.numpy())
    np.testing.assert_array_equal(table.correct, (expected.argmax(-1) == target).numpy())


def test_model_is_left_in_the_mode_it_was_in():
    model = make_model().train()
    collect_exits(model, DataLoader(make_data(8), 4))
    assert model.training


def test_temperatures_divide_the_logits():
    model, loader = make_model(), DataLoader(make_data(), 25)
    plain = collect_exits(model, loader, keep_logits=True)
    warm = collect_exits(model, loader, temperatures=(2.0, 0.5, 1.0))
    np.testing.assert_allclose(
        warm.confidence, plain.with_confidence(temperatures=(2.0, 0.5, 1.0)).confidence, rtol=1e-6
    )
    p = torch.tensor(plain.logits[0] / 2).softmax(-1).amax(-1)
    np.testing.assert_allclose(warm.confidence[0], p, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_float32_confidences(dtype):
    model = make_model().to(dtype)
    images, target = make_data(20).tensors
    table = collect_exits(model, [(images.to(dtype), target)], keep_logits=True)
    assert table.confidence.dtype == np.float32 and table.logits.dtype == np.float32
    expected = torch.tensor(table.logits).softmax(-1).amax(-1)
    np.testing.assert_allclose(table.confidence, expected, rtol=1e-6)


def test_nan_images_have_nan_confidence():
    images, target = make_data(4).tensors
    images[1] = float("nan")
    table = collect_exits(make_model(), [(images, target)])
    assert np.isnan(table.confidence).tolist() == [[False, True, False, False]] * 3


def test_stream_without_length_is_collected():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(make_data())

    model = make_model()
    assert same(collect_exits(model, DataLoader(Stream(), 16)), collect_exits(model, DataLoader(make_data(), 16)))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no batch"),
        ([torch.zeros(2, 3, 16, 16)], r"batches of \(images, target\)"),
        ([(torch.zeros(2, 3, 16, 16), torch.zeros(3, dtype=torch.int64))], "2 images and 3 targets"),
        ([(torch.zeros(2, 3, 16, 16), torch.zeros(2, 5))], r"class indices \(B,\)"),
    ],
)
def test_loader_that_yields_something_else_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        collect_exits(make_model(), loader)


def test_model_that_has_no_exits_is_refused():
    with pytest.raises(TypeError, match="Linear is not a multi-exit model: it has no num_exits"):
        collect_exits(torch.nn.Linear(2, 2), [])


# Interrupted and resumed


class Interrupted(Dataset):
    """Fails once the sample ``at`` is asked for, as a pulled plug would."""

    def __init__(self, data: Dataset, at: int) -> None:
        self.data, self.at, self.read = data, at, []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int):
        if item == self.at:
            raise KeyboardInterrupt
        self.read.append(item)
        return self.data[item]


@pytest.mark.parametrize("keep_logits", [False, True])
def test_interrupted_run_goes_on_where_it_was(tmp_path, keep_logits):
    model, part = make_model(), tmp_path / "t.part"
    whole = collect_exits(model, DataLoader(make_data(), 8), keep_logits=keep_logits)
    with pytest.raises(KeyboardInterrupt):
        collect_exits(model, DataLoader(Interrupted(make_data(), at=30), 8), keep_logits=keep_logits, part_file=part)
    assert part.exists()
    second = Interrupted(make_data(), at=-1)
    with CountedRows(model) as counted:
        table = collect_exits(model, DataLoader(second, 8), keep_logits=keep_logits, part_file=part)
    assert same(table, whole)
    assert counted.rows == [26] * 3  # 50 samples, 24 of them done before
    assert min(second.read) == 24  # nor are the done ones read
    assert not part.exists()


def test_torn_last_record_is_done_again(tmp_path):
    model, part = make_model(), tmp_path / "t.part"
    with pytest.raises(KeyboardInterrupt):
        collect_exits(model, DataLoader(Interrupted(make_data(), at=30), 8), part_file=part)
    part.write_bytes(part.read_bytes()[:-5])
    with CountedRows(model) as counted:
        table = collect_exits(model, DataLoader(make_data(), 8), part_file=part)
    assert counted.rows == [34] * 3
    assert same(table, collect_exits(model, DataLoader(make_data(), 8)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(model=1), "model"),
        (dict(measure="margin"), "measure"),
        (dict(batch=4), "batches, batch_size"),
    ],
)
def test_part_file_of_another_run_is_refused(tmp_path, change, named):
    part = tmp_path / "t.part"
    with pytest.raises(KeyboardInterrupt):
        collect_exits(make_model(), DataLoader(Interrupted(make_data(), at=30), 8), part_file=part)
    with pytest.raises(ValueError, match=rf"of another run \(its {named} differs\)"):
        collect_exits(
            make_model(seed=change.get("model", 0)),
            DataLoader(make_data(), change.get("batch", 8)),
            measure=change.get("measure", "max_softmax"),
            part_file=part,
        )


def test_part_file_that_is_none_is_left_alone(tmp_path):
    part = tmp_path / "notes.txt"
    part.write_text("do not touch")
    with pytest.raises(ValueError, match="not a part file"):
        collect_exits(make_model(), DataLoader(make_data(), 8), part_file=part)
    assert part.read_text() == "do not touch"


def test_shuffled_loader_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="shuffled loader cannot be resumed"):
        collect_exits(make_model(), DataLoader(make_data(), 8, shuffle=True), part_file=tmp_path / "t.part")


# Several processes


def _collect_in_process(rank: int, world: int, folder: str, shuffle: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(rank)
    loader = DataLoader(make_data(), 8, shuffle=shuffle)
    part = None if shuffle else f"{folder}/t.part"
    collect_exits(make_model(), loader, keep_logits=True, part_file=part).save(f"{folder}/{rank}.npz")
    dist.destroy_process_group()


def test_two_processes_get_the_numbers_of_one(tmp_path):
    mp.spawn(_collect_in_process, (2, str(tmp_path), False), nprocs=2)
    whole = collect_exits(make_model(), DataLoader(make_data(), 8), keep_logits=True)
    for rank in range(2):
        assert same(ExitTable.load(tmp_path / f"{rank}.npz"), whole)


def test_loader_that_is_sharded_already_is_refused():
    data = make_data()
    loader = DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="sharded already"):
        collect_exits(make_model(), loader)


# The table itself


def test_save_and_load_give_the_same_table(tmp_path):
    table = collect_exits(make_model(), DataLoader(make_data(), 8), measure="entropy", keep_logits=True)
    table.save(tmp_path / "t.npz")
    loaded = ExitTable.load(tmp_path / "t.npz")
    assert same(table, loaded) and loaded.measure == "entropy" and loaded.temperatures == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"hello", lambda b: b""])
def test_damaged_table_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "t.npz"
    collect_exits(make_model(), DataLoader(make_data(), 8)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is not a readable exit table"):
        ExitTable.load(path)
    with pytest.raises(FileNotFoundError, match="no exit table at"):
        ExitTable.load(tmp_path / "none.npz")


def test_saved_logits_of_any_model_make_a_table():
    logits = np.random.default_rng(0).normal(size=(3, 20, 4)).astype(np.float16)
    table = ExitTable.from_logits(list(logits), np.zeros(20))
    assert table.confidence.shape == (3, 20) and table.confidence.dtype == np.float32
    np.testing.assert_array_equal(table.prediction, logits.argmax(-1))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one shape \(exits, samples\)"):
        ExitTable(np.zeros((2, 3)), np.zeros((3, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="does not fit 3 samples"):
        ExitTable(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(4))
    with pytest.raises(ValueError, match="holds no logits"):
        ExitTable(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(3)).with_confidence("margin")


def test_split_parts_are_disjoint_and_whole():
    table = ExitTable(np.arange(10)[None], np.zeros((1, 10)), np.zeros(10))
    first, second = table.split(0.3, seed=1)
    assert len(first) == 3 and sorted([*first.confidence[0], *second.confidence[0]]) == list(range(10))
