"""A Ray Serve server of an early-exit network, to be measured beside examples/serve.py (servers.py starts it)."""

import os
import sys

import ray
import torch
from ray import serve
from starlette.requests import Request

from exit_plugins.timm.predictor import BatchPredictor

if __name__ == "__main__":
    source, port, batch_size, wait = sys.argv[1:]
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})

    @serve.deployment(max_ongoing_requests=256)
    class Network:
        """Batches wait for each other before the network."""

        def __init__(self) -> None:
            self.predictor = BatchPredictor(source)

        @serve.batch(max_batch_size=int(batch_size), batch_wait_timeout_s=float(wait))
        async def answer(self, content: list[bytes]) -> list[dict]:
            images = torch.stack([self.predictor.read(one, "the upload") for one in content])
            return self.predictor.rows(self.predictor.run(images))

        async def __call__(self, request: Request) -> dict:
            return await self.answer(await request.body())

    serve.run(Network.bind(), route_prefix="/predict", blocking=True)
