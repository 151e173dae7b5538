"""Collecting: what is recorded, and that a run interrupted or shared out gives what one run gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import ConvExits, CountedRows, NestedExits
from small_runs import make_data, make_model, same
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from exit_plugins import ExitTable, collect_exits
from exit_plugins.exits.costs import exit_latency, segment_times


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
    model.stages[1].eval()  # as whoever trains with frozen norms keeps them
    modes = [module.training for module in model.modules()]
    collect_exits(model, DataLoader(make_data(8), 4))
    exit_latency(model, make_data(8).tensors[0], repeats=1, warmup=0)
    segment_times(model, make_data(8).tensors[0], repeats=1, warmup=0)
    assert [module.training for module in model.modules()] == modes and any(modes) and not all(modes)
    with pytest.raises(ValueError, match="class 5"):
        collect_exits(model, [(make_data(8).tensors[0], torch.full((8,), 5))])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    "target, message",
    [
        (torch.rand(8) * 4 + 0.1, "whole numbers"),
        (torch.full((8,), float("nan")), "whole numbers"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 0, 0]), "targets hold class 5 .* classes 0 to 4"),
        (torch.tensor([0, -1, 2, 3, 4, 1, 0, 0]), "targets hold class -1"),
        (torch.ones(8, dtype=torch.bool), "must be numbers"),
    ],
)
def test_targets_that_are_no_classes_of_the_model_are_refused(target, message):
    model, images = make_model(), make_data(8).tensors[0]
    with pytest.raises(ValueError, match=message):
        collect_exits(model, [(images, target)])
    if "targets" in message:
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            ExitTable.from_logits(model.forward_exits(images), target, keep_logits=False)
    whole = torch.arange(8.0) % 5
    assert collect_exits(model, [(images, whole)]).target.tolist() == whole.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_are_taken_to_the_precision_of_the_weights(dtype):
    images, target = make_data(8).tensors
    model = make_model().to(dtype)
    found, expected = (collect_exits(model, [(x, target)], keep_logits=True) for x in (images, images.to(dtype)))
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.sample, collect_exits(make_model(), [(images, target)]).sample)
    assert exit_latency(model, images, repeats=1, warmup=0).shape == (3,)
    with pytest.raises(ValueError, match="normalised to floating point numbers, got torch.uint8"):
        collect_exits(model, [(images.byte(), target)])


def test_workers_are_started_as_the_loader_says(monkeypatch):
    data, generator = make_data(8), torch.Generator()
    loader = DataLoader(data, 4, num_workers=1, multiprocessing_context="spawn", generator=generator)
    seen = []
    monkeypatch.setattr(DataLoader, "_get_iterator", lambda self: seen.append(self) or iter([data[:4], data[4:]]))
    collect_exits(make_model(), loader)
    assert [each.multiprocessing_context.get_start_method() for each in seen] == ["spawn"]
    assert seen[0].generator is generator and seen[0].num_workers == 1


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
    # Nor are the done ones read, but for the first and the last batch, by which they are known.
    assert sorted(second.read) == [*range(8), *range(16, 50)]
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
        (dict(model=1), 'weights "[0-9a-f]{15}... there and'),
        (dict(measure="margin"), 'measure "max_softmax" there and "margin" here'),
        (dict(batch=4), "batches 7 there and 13 here; batch_size 8 there and 4 here"),
    ],
)
def test_part_file_of_another_run_is_refused(tmp_path, change, named):
    part = tmp_path / "t.part"
    with pytest.raises(KeyboardInterrupt):
        collect_exits(make_model(), DataLoader(Interrupted(make_data(), at=30), 8), part_file=part)
    with pytest.raises(ValueError, match=rf"of another run: {named}"):
        collect_exits(
            make_model(seed=change.get("model", 0)),
            DataLoader(make_data(), change.get("batch", 8)),
            measure=change.get("measure", "max_softmax"),
            part_file=part,
        )


def interrupt(model: torch.nn.Module, data: Dataset, part, at: int = 30) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect_exits(model, DataLoader(Interrupted(data, at), 8), part_file=part)


def enlarged(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0].repeat(1, 1, 2, 2), data.tensors[1])


def changed(data: TensorDataset, images: dict | None = None, labels: dict | None = None) -> TensorDataset:
    x, y = (tensor.clone() for tensor in data.tensors)
    for index in images or ():
        x[index] += 1
    for index in labels or ():
        y[index] = (y[index] + 1) % 5
    return TensorDataset(x, y)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (enlarged, "its images are 3 x 16 x 16 and this run's 3 x 32 x 32"),
        (lambda data: changed(data, images=range(50)), "its images differ: 8 of 8 in batch 1"),
        (lambda data: changed(data, images=[20, 23]), "its images differ: 2 of 8 in batch 3"),
        (lambda data: changed(data, labels=[20]), "its labels differ in batch 3"),
        (lambda data: TensorDataset(*(t[:49] for t in data.tensors)), "samples 50 there and 49 here"),
    ],
)
def test_part_file_of_other_data_is_refused_and_kept(tmp_path, change, named):
    model, part = make_model(), tmp_path / "t.part"
    interrupt(model, make_data(), part)
    before = part.read_bytes()
    with pytest.raises(ValueError, match=f"of another run: .*{named}"):
        collect_exits(model, DataLoader(change(make_data()), 8), part_file=part)
    assert part.read_bytes() == before


def test_part_file_of_weights_with_equal_sums_is_refused(tmp_path):
    model, part = make_model(), tmp_path / "t.part"
    interrupt(model, make_data(), part)
    with torch.no_grad():
        model.stages[1][0].weight.copy_(model.stages[1][0].weight.flip(0))
    with pytest.raises(ValueError, match="of another run: weights"):
        collect_exits(model, DataLoader(make_data(), 8), part_file=part)


def test_stream_is_resumed_too(tmp_path):
    class Stream(IterableDataset):
        def __init__(self, stop: int = 99) -> None:
            self.stop = stop

        def __iter__(self):
            for index, sample in enumerate(make_data()):
                if index == self.stop:
                    raise KeyboardInterrupt
                yield sample

    model, part = make_model(), tmp_path / "t.part"
    with pytest.raises(KeyboardInterrupt):
        collect_exits(model, DataLoader(Stream(30), 8), part_file=part)
    with CountedRows(model) as counted:
        table = collect_exits(model, DataLoader(Stream(), 8), part_file=part)
    assert counted.rows == [26] * 3
    assert same(table, collect_exits(model, DataLoader(make_data(), 8)))


@pytest.mark.parametrize("keep", [1, 10, 25, 200])
def test_part_file_cut_in_its_header_is_started_again(tmp_path, keep):
    model, part = make_model(), tmp_path / "t.part"
    interrupt(model, make_data(), part)
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.warns(UserWarning, match="cut off in its header; it is started again"):
        table = collect_exits(model, DataLoader(make_data(), 8), part_file=part)
    assert same(table, collect_exits(model, DataLoader(make_data(), 8)))


def test_part_file_damaged_in_its_header_is_kept(tmp_path):
    model, part = make_model(), tmp_path / "t.part"
    interrupt(model, make_data(), part)
    damaged = bytearray(part.read_bytes())
    damaged[60] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(ValueError, match="its header is damaged"):
        collect_exits(model, DataLoader(make_data(), 8), part_file=part)
    assert part.read_bytes() == damaged


def test_damage_between_batches_is_said_and_done_again(tmp_path):
    model, part = make_model(), tmp_path / "t.part"
    interrupt(model, make_data(), part)
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"damaged after \d batches"):
        table = collect_exits(model, DataLoader(make_data(), 8), part_file=part)
    assert same(table, collect_exits(model, DataLoader(make_data(), 8)))


def test_the_table_is_not_written_over_its_part_file(tmp_path):
    (tmp_path / "link").symlink_to("t.npz")
    for save_as in ("t.npz", "link"):
        with pytest.raises(ValueError, match="needed for the same work"):
            collect_exits(
                make_model(), DataLoader(make_data(), 8), part_file=tmp_path / "t.npz", save_as=tmp_path / save_as
            )
    assert not (tmp_path / "t.npz").exists()


def test_part_file_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("exit_plugins.exits.parts._PATIENCE", 0.0)
    model, part = make_model(), tmp_path / "t.part"

    def batches():
        yield next(iter(DataLoader(make_data(), 8)))
        with pytest.raises(ValueError, match="in use by another run"):
            collect_exits(make_model(), DataLoader(make_data(), 8), part_file=part)

    collect_exits(model, batches(), part_file=part)


def test_table_is_written_before_the_part_file_goes(tmp_path, monkeypatch):
    model, part, path = make_model(), tmp_path / "t.part", tmp_path / "t.npz"

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full_disk)
        with pytest.raises(OSError, match=f"No space left on device.*{path.name}"):
            collect_exits(model, DataLoader(make_data(), 8), part_file=part, save_as=path)
    assert part.exists() and not path.exists()
    with CountedRows(model) as counted:
        table = collect_exits(model, DataLoader(make_data(), 8), part_file=part, save_as=path)
    assert counted.rows == [0] * 3 and same(ExitTable.load(path), table)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.npz"]


def test_target_is_checked_before_the_run(tmp_path, monkeypatch):
    model = make_model()
    (tmp_path / "file").write_text("")
    with CountedRows(model) as counted:
        with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
            collect_exits(model, DataLoader(make_data(), 8), save_as=tmp_path)
        with pytest.raises(OSError, match="file"):
            collect_exits(model, DataLoader(make_data(), 8), save_as=tmp_path / "file" / "t.npz")
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(OSError, match="are to be written and 0 MB are free"):
            collect_exits(model, DataLoader(make_data(), 8), save_as=tmp_path / "t.npz", keep_logits=True)
    assert counted.rows == [0] * 3 and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_part_file_that_is_none_is_left_alone(tmp_path):
    part = tmp_path / "notes.txt"
    part.write_text("do not touch")
    with pytest.raises(ValueError, match="not a readable part file"):
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


@pytest.mark.slow
@pytest.mark.slow
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
