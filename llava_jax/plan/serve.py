"""Compiles the programs of a server's slots for the chips of one host: vision tower, chunks of prompts, decode."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.inference.decode import DecodeState, decode, write_chunks
from llava_jax.inference.sampling import Sampling
from llava_jax.inference.shapes import tile_bucket
from llava_jax.inference.slots import CHUNK_TOKENS, MAX_BATCH_TOKENS, MAX_ROWS
from llava_jax.models.llava import LlavaConfig, abstract_params, choose_attention, from_params
from llava_jax.models.quantized import abstract_quantized, is_quantizable
from llava_jax.models.slot_cache import BLOCK, SlotCache
from llava_jax.models.slot_kernel import block_size
from llava_jax.parallel import sharding
from llava_jax.plan.predict import predict_program
from llava_jax.plan.replay import Loop, profile
from llava_jax.plan.step import Program, compile_program, device_bytes
from llava_jax.plan.topologies import Slice

EOS_IDS = (2,)
"""Token ids that end an answer; they do not change the program's cost."""
PHOTO = (640, 480)
"""Width and height of the image of the prompt, which `anyres` reads."""
TEXT_TOKENS = 64
"""Number of the prompt's tokens besides the image's."""


class _Server:
    """Abstract arrays of a server on a slice, and its programs."""

    def __init__(self, model: LlavaConfig, where: Slice, context: int, quantize: str | None, kv_cache: str | None):
        self.model, self.where, self.kv_cache = dataclasses.replace(model, lora=None), where, kv_cache
        self.context = context
        self.mesh = sharding.make_mesh(config.Mesh(1, 1, where.devices), where.jax_devices())
        self.everywhere = NamedSharding(self.mesh, P())
        attention = choose_attention("auto", "tpu", model, "bfloat16")
        self.graph, shapes = abstract_params(self.model, "bfloat16", attention)
        shardings = sharding.parameter_shardings({path: x.shape for path, x in shapes.items()}, self.mesh)
        self.parameters = {path: self.array(x.shape, "bfloat16", shardings[path]) for path, x in shapes.items()}
        kind = "int8_matrices" if quantize else "matrices"  # as llava_jax.load stores them
        self.parameters |= {path: abstract_quantized(path, x, kind)
                            for path, x in self.parameters.items() if is_quantizable(path)}
        self.decoder_bytes = device_bytes({
            path: x for path, x in self.parameters.items()
            if path.startswith("decoder/") and (model.text.tie_word_embeddings or path != "decoder/embedding")})

    def array(self, shape: Sequence[int], dtype: str, layout: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=layout or self.everywhere)

    def state(self, slots: int) -> DecodeState:
        text, heads = self.model.text, NamedSharding(self.mesh, P(None, None, "tensor"))
        sizes = text.num_layers, slots, text.num_kv_heads, self.context, text.head_dim
        cache = jax.eval_shape(lambda: SlotCache.zeros(*sizes, self.kv_cache or "bfloat16"))
        numbers, floats = self.array((slots,), "int32"), self.array((slots,), "float32")
        return DecodeState(jax.tree.map(lambda x: self.array(x.shape, x.dtype, heads), cache), *[numbers] * 3,
                           Sampling(self.array((slots, 2), "uint32"), floats, floats))

    def compile(self, function, state: DecodeState, *inputs, results: int = 0) -> Program:
        """Compiles a function as SlotEngine does.

        `results`: number of results besides a new state; 0 for a function that does not use the state.
        """
        arguments, options = inputs, {}
        if results:
            layouts = jax.tree.map(lambda x: x.sharding, state)
            arguments = state, *inputs
            options = {"donate_argnums": 1, "out_shardings": (layouts, *[self.everywhere] * results)}
        step = jax.jit(lambda parameters, *inputs: function(from_params(self.graph, parameters), *inputs), **options)
        parts = {"trained": 0, "frozen": device_bytes(self.parameters), "optimizer": 0,
                 "batch": device_bytes((state, inputs))}
        with jax.set_mesh(self.mesh):
            return compile_program(step.lower(self.parameters, *arguments), parts, self.where, self.mesh)

    def tower(self, state: DecodeState, tiles: int) -> Program:
        side = self.model.vision.image_size
        images = self.array((1, tile_bucket(tiles), side, side, 3), "uint8")
        return self.compile(lambda model, tiles: model.visual_features(tiles)[0], state, images)

    def chunks(self, state: DecodeState, rows: int, size: int) -> Program:
        numbers, floats = self.array((rows,), "int32"), self.array((rows,), "float32")
        inputs = (*[numbers] * 3, self.array((rows, size), "int32"),
                  self.array((rows, size, self.model.text.hidden_size), "bfloat16"), numbers,
                  Sampling(self.array((rows, 2), "uint32"), floats, floats))
        return self.compile(lambda model, *inputs: write_chunks(model, *inputs, EOS_IDS), state, *inputs, results=2)

    def decode(self, state: DecodeState) -> Program:
        inputs = self.array(state.token.shape, "bool"), self.array((), "int32")
        return self.compile(lambda model, *inputs: decode(model, *inputs, EOS_IDS), state, *inputs, results=1)


def plan_serving(model: LlavaConfig, where: Slice, slots: int, context: int, quantize: str | None = None,
                 kv_cache: str | None = None) -> dict:
    """Plans a server on one host, tensor parallel over its devices. Returns plain data, with bytes of one device.

    The time to the first token is that of a prompt with an image of PHOTO pixels and TEXT_TOKENS tokens of text, on a
    server without other prompts. Parameters are bfloat16 unless `quantize` is "int8". Adapters are merged.

    Args:
      context: number of tokens of a slot.
      kv_cache: "int8" for a cache of 8 bits.

    Raises UserError if the slice has several hosts, if the model is not divisible by its devices, or if `context` has
    no room for the prompt.
    """
    if where.hosts > 1:
        raise UserError(f"--serve: {where.name} has {where.hosts} hosts, and a server runs on one; "
                        f"{where.chip.kind} hosts have up to {4 if where.chip.dimensions == 3 else 8} chips")
    image = model.processor.layout(*PHOTO)
    if context <= (prompt_tokens := len(image.index) + TEXT_TOKENS):
        raise UserError(f"--context {context}: one image takes {len(image.index)} tokens, and its prompt "
                        f"{prompt_tokens}")
    server = _Server(model, where, context, quantize, kv_cache)
    state, slot_bytes = server.state(slots), device_bytes(server.state(1).cache)
    prompt = [_phase("vision tower", where, server.tower(state, image.tiles)), *_chunks(server, state, prompt_tokens)]
    size = max(size for size in CHUNK_TOKENS if size < 2 * context and MAX_ROWS * size <= MAX_BATCH_TOKENS)
    batch = _phase(f"{MAX_ROWS} chunks of {size} tokens", where, server.chunks(state, MAX_ROWS, size),
                   -(-context // BLOCK))
    program = server.decode(state)
    with jax.set_mesh(server.mesh):
        block = block_size(state.cache)
    full, half = (_phase("decode", where, program, 1, slots * -(-filled // block))
                  for filled in (context, context // 2))
    phases = [*prompt, batch, full, half]
    largest = max((phase["memory"] for phase in phases), key=lambda memory: memory["peak"])
    plan = {"slots": slots, "context": context, "slot_bytes": slot_bytes,
            "possible_slots": max(0, slots + (largest["limit"] - largest["peak"]) // slot_bytes),
            "fits": all(phase["fits"] for phase in phases), "prompt_tokens": prompt_tokens, "phases": phases}
    if not plan["fits"]:
        return plan
    for suffix, phase, filled in (("", full, 1), ("_half_full", half, 0.5)):
        step = phase["step_seconds"]
        read = (server.decoder_bytes + filled * slots * slot_bytes) * where.chip.devices / where.chip.bandwidth
        plan |= {f"tokens_per_second_per_chip{suffix}": slots / step / where.chips,
                 f"hbm_bandwidth_fraction{suffix}": read / step}
    return plan | {"first_token_seconds": sum(phase["step_seconds"] for phase in prompt)}


def _chunks(server: _Server, state: DecodeState, prompt_tokens: int) -> list[dict]:
    """Returns the chunks of a prompt in order. Chunks of one size are one program."""
    sizes, programs, phases = [size for size in CHUNK_TOKENS if size < 2 * server.context], {}, []
    for start in range(0, prompt_tokens, sizes[-1]):
        end = min(start + sizes[-1], prompt_tokens)
        size = next(size for size in sizes if size >= end - start)
        programs[size] = programs.get(size) or server.chunks(state, 1, size)
        phases.append(_phase(f"chunk of {size} tokens", server.where, programs[size], -(-end // BLOCK)))
    return phases


def _phase(name: str, where: Slice, program: Program, blocks: int = 1, decode_steps: int = 0) -> dict:
    """Returns what is predicted of a program.

    Args:
      blocks: number of blocks of the cache that attention reads, which is the length of loops that is not constant.
      decode_steps: number of steps of decode's kernel. Only its loop over tokens counts, as one round. Its length is
        known at run time, and what is around it runs once for many tokens.
    """
    found = profile(program.hlo, program.slices, blocks) if program.hlo else None
    if found and decode_steps:
        found = dataclasses.replace(found, schedule=tuple(step for step in found.schedule if isinstance(step, Loop)))
    return {"phase": name} | predict_program(program, where, found, decode_steps)
