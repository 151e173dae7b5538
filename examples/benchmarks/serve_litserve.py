"""A LitServe server of an early-exit network, to be measured beside examples/serve.py (servers.py starts it)."""

import base64
import sys

import litserve
import torch

from exit_plugins.timm.predictor import BatchPredictor


class Api(litserve.LitAPI):
    """Batches wait for each other before the network; pictures come in base64, for LitServe reads JSON."""

    def __init__(self, source: str, batch_size: int, wait: float) -> None:
        super().__init__(max_batch_size=batch_size, batch_timeout=wait)
        self.source = source

    def setup(self, device: str) -> None:
        self.predictor = BatchPredictor(self.source)

    def decode_request(self, request: dict) -> torch.Tensor:
        return self.predictor.read(base64.b64decode(request["image"]), "the upload")

    def predict(self, images: torch.Tensor) -> list[dict]:
        return self.predictor.rows(self.predictor.run(images))

    def unbatch(self, output: list[dict]) -> list[dict]:
        return output

    def encode_response(self, output: dict) -> dict:
        return output


if __name__ == "__main__":
    source, port, batch_size, wait = sys.argv[1:]
    server = litserve.LitServer(Api(source, int(batch_size), float(wait)), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="error")
