"""What the benchmarks rely on: modes compute the same, forced mixes have their shares, token merging is ToMe's."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import adaptive
import forward
import report
from adaptive import MIXES, forced_policy
from modes import MODES, OneExit, runner, to_exit
from rivals import MergingTransformer, merge_tokens
from timing import interleaved, spread


@pytest.mark.parametrize("num_exits", [2, 3, 4, 7])
def test_forced_mixes_have_their_shares(num_exits):
    confidence = np.random.default_rng(0).random((num_exits, 840)).astype(np.float32)
    for name, mix in MIXES.items():
        shares = mix(num_exits)
        exits = forced_policy(confidence, shares).choose(confidence)
        found = np.bincount(exits, minlength=num_exits) / 840
        np.testing.assert_allclose(found[:-1], shares, atol=1 / 840, err_msg=name)


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("compiled")])
def test_every_mode_times_the_same_network(mode, monkeypatch):
    if mode.startswith(("onnx", "openvino")):
        pytest.importorskip("openvino" if mode == "openvino" else "onnxruntime")
    torch.manual_seed(0)
    plain = OneExit("test_resnet").eval()
    size = (3, 64, 64)
    images = torch.randn(4, *size)
    reduced = mode.endswith(("bfloat16", "int8"))
    with torch.inference_mode():
        expected = plain.network(images)
        model = runner(plain, mode, size, threads=1)
        close = dict(atol=0.2 * expected.abs().max().item(), rtol=0) if reduced else dict(atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(images).logits, expected, **close)
        ran = []
        monkeypatch.setattr(model.runner, "forward_exit", lambda index, state: (ran.append(index), state))
        to_exit(model, 2, images)
    assert ran == [0, 1, 2]


def test_token_merging_equals_its_definition():
    torch.manual_seed(0)
    x, keys, size = torch.randn(2, 9, 4), torch.randn(2, 9, 3), torch.randint(1, 4, (2, 9, 1)).float()
    merged, sizes = merge_tokens(x, keys, size, 2)
    assert merged.shape == (2, 7, 4) and torch.equal(sizes.sum(1), size.sum(1))
    for b in range(2):
        groups = {j: [j] for j in range(9)}
        pairs = []
        for i in range(2, 9, 2):  # even tokens but the class token, each with its nearest odd one
            alike = {j: float(F.cosine_similarity(keys[b, i], keys[b, j], dim=0)) for j in range(1, 9, 2)}
            nearest = max(alike, key=alike.get)
            pairs.append((alike[nearest], i, nearest))
        for _, i, j in sorted(pairs, reverse=True)[:2]:
            groups[j].append(i)
            del groups[i]
        order = [j for j in range(0, 9, 2) if j in groups] + list(range(1, 9, 2))
        weights = size[b]
        expected = torch.stack(
            [(x[b, groups[j]] * weights[groups[j]]).sum(0) / weights[groups[j]].sum() for j in order]
        )
        torch.testing.assert_close(merged[b], expected)


def test_merging_nothing_is_the_plain_transformer():
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5).eval()
    images = torch.randn(2, *network.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(MergingTransformer(network, 0)(images), network(images))
        assert torch.isfinite(MergingTransformer(network, 8)(images)).all()


def test_timings_take_turns():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3, warmup=1)
    assert sorted(times) == ["a", "b", "c"] and all(t.shape == (3,) for t in times.values())
    assert sorted(calls[:3]) == sorted(calls[3:6]) == ["a", "b", "c"] and calls[:3] == calls[3:6][::-1]
    assert spread(np.array([0.001, 0.002, 0.003]))["median_ms"] == pytest.approx(2)


def test_from_runs_to_their_tables_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of the tests that follow
    common = ["--model", "dynperceiver_test", "--threads", "1", "--system-malloc", "--repeats", "2"]
    common += ["--batch", "1", "2"]
    adaptive_file, forward_file, png = (str(tmp_path / name) for name in ("adaptive.json", "forward.json", "all.png"))
    for script, options in (
        (adaptive, ["--mode", "eager", "fused", "--images", "4", "--json", adaptive_file]),
        (forward, ["--mode", "fused", "--plain", "test_resnet", "--json", forward_file]),
        (report, [adaptive_file, forward_file, "--picture", png]),
    ):
        monkeypatch.setattr(sys, "argv", [script.__name__, *(common if script is not report else []), *options])
        capsys.readouterr()
        script.main()
    rows = json.loads(Path(adaptive_file).read_text())["rows"]
    assert len(rows) == 2 * 2 * len(MIXES) and {row["mode"] for row in rows} == {"eager", "fused"}
    for row in rows:
        assert sum(row["share"]) == pytest.approx(1, abs=0.01) and row["per_call"]["p95_ms"] >= 0
        if row["mix"] == "nobody":
            assert row["share"][-1] == 1 and row["ideal"] == row["ideal_macs"] == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == (2 + len(rows)) + (2 + 2 + 1)  # two heads, a line per row, per batch and one of MACs
    assert len({line.count("|") for line in lines[: 2 + len(rows)]}) == 1
    assert Path(png).stat().st_size > 10_000
