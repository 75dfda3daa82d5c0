"""Answers and likelihoods of a model on each of several meshes: `mesh_answers.py OUT MODEL R,F,T ...` (or `none`)."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import llava_jax
from llava_jax import config
from llava_jax.inference.decode import NO_TOKEN
from llava_jax.inference.llava import Request
from llava_jax.parallel import sharding


def inserted(llava, requests) -> list[list[int]]:
    """The tokens of requests that are inserted one after the other, with a decode step between them."""
    engine, answers = llava._engine, []
    state, rows = engine.empty_state(4, 128), [[] for _ in range(4)]
    for slot, request in zip((3, 0), requests, strict=True):
        prompt = llava._prompt(request, *llava._encode(request), llava._tiles(request.images))
        prefix, first = engine.prefill([prompt])
        rows[slot] += np.asarray(first)[0].tolist()
        state = engine.insert(state, prefix, [slot])
        state, tokens = engine.decode(state, [True] * 4, steps=2)
        answers.append(np.asarray(tokens))
    answers.append(np.asarray(engine.decode(state, [True] * 4)[1]))
    for slot in (3, 0):
        rows[slot] += [int(token) for tokens in answers for token in tokens[slot] if token != NO_TOKEN]
    return [rows[3], rows[0]]


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
            "tokens": [answer.tokens for answer in answers], "inserted": inserted(llava, requests[:2]),
            "likelihoods": [llava.log_likelihood(request, ["Yes", "No, it is not"]) for request in requests[:1]],
            "int8": llava_jax.load(model, "float32", mesh=mesh, quantize="int8").generate(
                "What is it?", requests[0].images, max_new_tokens=8).tokens,
            "devices": sorted(devices), "smallest_share": shares,
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
