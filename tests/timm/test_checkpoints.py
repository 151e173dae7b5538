"""Pretrained files: what is downloaded, read and refused. The network is a server on this machine's loopback."""

import argparse
import http.server
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from exit_plugins.timm._checkpoints import fetch_checkpoint, read_checkpoint, unwrap_state_dict
from exit_plugins.timm._dynperceiver_weights import checkpoint_filter_fn, public_names

NAME = "dynperceiver_test"


class Server(http.server.BaseHTTPRequestHandler):
    """Answers a share link with ``body``; ``mode`` makes it misbehave."""

    body = b""
    mode = "file"
    requests = 0

    def do_GET(self) -> None:
        cls = type(self)
        cls.requests += 1
        if cls.mode == "missing" or self.path != "/f/0123abcd/?dl=1":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header(
            "Content-Type", "text/html; charset=utf-8" if cls.mode == "page" else "application/octet-stream"
        )
        self.send_header("Content-Length", str(len(cls.body)))
        self.end_headers()
        self.wfile.write(cls.body[: len(cls.body) // 2] if cls.mode == "broken" else cls.body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[type[Server], str]]:
    handler = type("Handler", (Server,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{httpd.server_port}/f/0123abcd/?dl=1"
        httpd.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def make(seed: int = 0, **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(NAME, **kwargs).eval()


def public_layout(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights as the authors store them."""
    state = model.state_dict()
    return {
        name: part.clone()
        for key, names in public_names(model).items()
        for name, part in zip(names, state[key].chunk(len(names)) if len(names) > 1 else [state[key]], strict=True)
    }


def as_bytes(checkpoint: object) -> bytes:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


@contextmanager
def same_weights(expected: torch.nn.Module) -> Iterator[list]:
    models: list[torch.nn.Module] = []
    yield models
    assert models
    for model in models:
        state = model.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(state[key].equal(value) for key, value in expected.state_dict().items())


# --- download --------------------------------------------------------------------------------------------------------


def test_share_link_arrives_under_a_name_in_the_usual_cache(server, cache, capfd):
    handler, url = server
    model = make()
    handler.body = as_bytes({"model": public_layout(model), "args": argparse.Namespace(lr=0.1), "epoch": 3})
    with same_weights(model) as models:
        for _ in range(2):  # the second time from the cache
            models.append(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(url=url)))
    assert [path.name for path in cache.iterdir()] == [f"{NAME}.untrained.pth"]
    assert (cache / f"{NAME}.untrained.pth").read_bytes() == handler.body
    assert handler.requests == 1
    assert f"{NAME}.untrained.pth: 100%" in capfd.readouterr().err
    assert "state_dict" not in models[0].pretrained_cfg


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("missing", "404|Not Found"), ("page", "web page"), ("broken", "broke off after|IncompleteRead")],
)
def test_failed_download_leaves_nothing_and_says_where_to_put_the_file(server, cache, mode, reason):
    handler, url = server
    handler.body, handler.mode = as_bytes(make().state_dict()), mode
    with pytest.raises(OSError, match=reason) as caught:
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(url=url))
    assert str(cache / f"{NAME}.untrained.pth") in str(caught.value)
    assert "pretrained_cfg_overlay=dict(file=" in str(caught.value)
    assert not list(cache.iterdir())


def test_without_a_network_the_message_says_where_to_put_the_file(tmp_path):
    with pytest.raises(OSError, match="put it at") as caught:
        fetch_checkpoint("http://127.0.0.1:1/f/0/?dl=1", "weights.pth", cache_dir=tmp_path, progress=False)
    assert str(tmp_path / "weights.pth") in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_three_public_models_have_their_share_links():
    urls = {name: timm.get_pretrained_cfg(name).url for name in timm.list_models("dynperceiver_*")}
    assert {name: url for name, url in urls.items() if url} == {
        "dynperceiver_regnety_800mf": "https://cloud.tsinghua.edu.cn/f/ca3c8a808d504fdfa2c8/?dl=1",
        "dynperceiver_resnet50_0_375x": "https://cloud.tsinghua.edu.cn/f/844ac164a62246eb9ce8/?dl=1",
        "dynperceiver_mobilenetv3_0_75x": "https://cloud.tsinghua.edu.cn/f/a86c56e3076146ad8748/?dl=1",
    }
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(NAME, pretrained=True)


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["own", "public"])
@pytest.mark.parametrize(
    "wrapping", ["plain", "model", "model_state_dict", "state_dict", "ema", "DataParallel", "compiled", "safetensors"]
)
def test_layouts(tmp_path, layout, wrapping):
    model, other = make(0), make(1)
    state, old = [public_layout(m) if layout == "public" else m.state_dict() for m in (model, other)]
    args = argparse.Namespace(model="reg400m_perceiver_t128", lr=6e-4, betas=(0.9, 0.999))
    training = {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 7, "scaler": {}, "args": args}
    path = tmp_path / "weights.pth"
    if wrapping == "plain":
        torch.save(state, path)
    elif wrapping == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    elif wrapping == "DataParallel":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, **training}, path)
    elif wrapping == "compiled":
        torch.save({"model": {f"module._orig_mod.{key}": value for key, value in state.items()}, **training}, path)
    elif wrapping == "ema":
        torch.save({"model": old, "model_ema": state, **training}, path)
    else:
        torch.save({wrapping: state, "model_ema": None, **training}, path)
    with same_weights(model) as models:
        models.append(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))))
        models.append(make(2))
        models[-1].load_state_dict(checkpoint_filter_fn(read_checkpoint(path), models[-1]), strict=True)


def test_other_classes_and_channels_start_from_the_same_body(tmp_path):
    path = tmp_path / "weights.pth"
    model = make()
    torch.save(public_layout(model), path)
    pretrained = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    for classes in (0, 5):
        loaded = timm.create_model(NAME, num_classes=classes, in_chans=1, **pretrained)
        body = {key for key in model.state_dict() if key.startswith(("stages.", "latent"))}
        assert all(loaded.state_dict()[key].equal(model.state_dict()[key]) for key in body)
    backbone = timm.create_model(NAME, features_only=True, **pretrained)
    assert backbone.model.stages[0].x2z.q.weight.equal(model.stages[0].x2z.q.weight)
    assert "state_dict" not in backbone.model.pretrained_cfg


def test_unwrapping_keeps_what_is_no_wrapper():
    weights = {"stages.0.weight": torch.zeros(1)}
    assert unwrap_state_dict(weights) == weights
    assert unwrap_state_dict({"model": {"module.module.a": torch.ones(1)}}).keys() == {"a"}
    with pytest.raises(ValueError, match="dictionary of weights, got list"):
        unwrap_state_dict([torch.zeros(1)])


# --- bad files -------------------------------------------------------------------------------------------------------


def load(path: Path) -> torch.nn.Module:
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path / "nowhere.pth")
    whole = as_bytes(make().state_dict())
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\x00not a checkpoint" * 99}.items():
        for suffix in (".pth", ".safetensors"):
            path = tmp_path / (name + suffix)
            path.write_bytes(content)
            with pytest.raises(ValueError, match="not a readable checkpoint"):
                load(path)


class Exploit:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": make().state_dict(), "extra": Exploit(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="objects that are not weights"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_model_names_the_keys(tmp_path):
    path = tmp_path / "weights.pth"
    for layout in (lambda model: model.state_dict(), public_layout):
        state = layout(make())
        removed = sorted(state)[-1]
        del state[removed]
        state["stray.weight"] = torch.zeros(1)
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"1 missing keys .*; 1 unexpected keys \(stray.weight\)") as caught:
            load(path)
        assert removed in str(caught.value)
    torch.save(timm.create_model("regnety_002").state_dict(), path)
    with pytest.raises(ValueError, match="no checkpoint of this model"):
        load(path)
