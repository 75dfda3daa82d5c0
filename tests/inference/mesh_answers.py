"""Answers and likelihoods of a model on each of several meshes: `mesh_answers.py OUT MODEL R,F,T ...` (or `none`)."""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax import config
from llava_jax.inference import llava as inference
from llava_jax.inference.decode import NO_TOKEN
from llava_jax.inference.llava import Request
from llava_jax.inference.slots import PromptChunk, SlotEngine, SlotRequest
from llava_jax.models import layers, slot_kernel
from llava_jax.models.llava import AttentionChoice
from llava_jax.parallel import sharding
from llava_jax.text.encode import IMAGE_TOKEN_ID


def in_slots(llava, requests, cache_dtype) -> list[list[int]]:
    """The tokens of requests that join the slots of a server one after the other, with a decode step between them."""
    engine, slots = SlotEngine(llava, 4, 128, cache_dtype), (3, 0)
    rows = [[] for _ in range(4)]
    for slot, request in zip(slots, requests, strict=True):
        tokens, [layout] = llava._encode(request)
        features = engine.encode_image(llava._tiles(request.images), layout)
        count = int((tokens[:7] == IMAGE_TOKEN_ID).sum())
        engine.write([PromptChunk(slot, 0, tokens[:7], features[:count])])
        last = PromptChunk(slot, 7, tokens[7:], features[count:], SlotRequest(request.max_new_tokens))
        rows[slot] += engine.write([last]).tokens[0].tolist()
        for row, written in zip(rows, engine.decode(np.ones(4, bool), 2).tokens.tolist(), strict=True):
            row += written
    engine.copy(3, 1, 20)
    for row, written in zip(rows, engine.decode(np.ones(4, bool), 8).tokens.tolist(), strict=True):
        row += written
    return [[token for token in rows[slot] if token != NO_TOKEN] for slot in slots]


def in_kernels(model, mesh, requests, **options) -> list[list[int]]:
    """`in_slots`, decoded by the kernels for TPUs, which Pallas interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "choose_attention", lambda *_: AttentionChoice("splash", "xla"))
        for module, name in ((slot_kernel, "attend_slots"), (layers, "layer_matmul")):
            patch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
        return in_slots(llava_jax.load(model, "float32", mesh=mesh, **options), requests, None)


def main(out: str, model: str, *meshes: str) -> None:
    rng, requests = np.random.default_rng(0), []
    for i in range(5):
        images = [Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8))]
        requests.append(Request(f"What is thing {i}?", images, max_new_tokens=8))
    found = {}
    for sizes in meshes:
        mesh = None
        if sizes != "none":
            axes = config.Mesh(*map(int, sizes.split(",")))
            mesh = sharding.make_mesh(axes, jax.devices()[: axes.data * axes.fsdp * axes.tensor])
        llava = llava_jax.load(model, "float32", mesh=mesh)
        found[sizes] = {"slots": {str(name): in_slots(llava, requests[:2], name) for name in (None, "int8")}
                        } if mesh is None or mesh.shape["tensor"] == mesh.size else {}
        if mesh is not None and found[sizes]:
            found[sizes]["kernels"] = in_kernels(model, mesh, requests[:2])
            found[sizes]["int8 kernels"] = in_kernels(model, mesh, requests[:2], quantize="int8")
            continue
        if mesh is None:
            found[sizes]["int8 slots"] = in_slots(llava_jax.load(model, "float32", quantize="int8"), requests[:2], None)
        answers = llava.batch(requests, batch_size=4)
        devices = {len(x.sharding.device_set) for x in llava.parameters.values()}
        shares = min(x.addressable_shards[0].data.size / x.size for x in llava.parameters.values())
        found[sizes] |= {
            "tokens": [answer.tokens for answer in answers],
            "likelihoods": [llava.log_likelihood(request, ["Yes", "No, it is not"]) for request in requests[:1]],
            "int8": llava_jax.load(model, "float32", mesh=mesh, quantize="int8").generate(
                "What is it?", requests[0].images, max_new_tokens=8).tokens,
            "devices": sorted(devices), "smallest_share": shares,
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
