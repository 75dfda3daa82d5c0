"""Answers and likelihoods of a model on each of several meshes: `mesh_answers.py OUT MODEL R,F,T ...` (or `none`)."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import llava_jax
from llava_jax import config
from llava_jax.inference.llava import Request
from llava_jax.parallel import sharding


def main(out: str, model: str, *meshes: str) -> None:
    rng, requests = np.random.default_rng(0), []
    for i in range(5):
        images = [Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8))]
        requests.append(Request(f"What is thing {i}?", images, max_new_tokens=8))
    found = {}
    for sizes in meshes:
        mesh = None if sizes == "none" else sharding.make_mesh(config.Mesh(*map(int, sizes.split(","))))
        llava = llava_jax.load(model, "float32", mesh=mesh)
        answers = llava.batch(requests, batch_size=4)
        devices = {len(x.sharding.device_set) for x in llava.parameters.values()}
        shares = min(x.addressable_shards[0].data.size / x.size for x in llava.parameters.values())
        found[sizes] = {
            "tokens": [answer.tokens for answer in answers],
            "likelihoods": [llava.log_likelihood(request, ["Yes", "No, it is not"]) for request in requests[:1]],
            "devices": sorted(devices), "smallest_share": shares,
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
