"""Prefill and decode of a recipe's model, compiled for the chips of one host."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.inference.decode import decode, prefill
from llava_jax.inference.sampling import Sampling
from llava_jax.models.llava import LlavaConfig, abstract_params, choose_attention, from_params
from llava_jax.parallel import sharding
from llava_jax.plan.cycles import Profile, profile
from llava_jax.plan.predict import Times, times
from llava_jax.plan.step import Memory, Program, compile_program, device_bytes
from llava_jax.plan.topologies import Slice

ENDS = (2,)
"""A token that ends an answer; which one changes nothing."""


@dataclass(frozen=True)
class Phase:
    """Prefill of a batch, or the writing of one token in each of its rows."""

    name: str
    where: Slice
    memory: Memory
    cache: int
    """bytes of keys and values on one device, for the whole context"""
    tokens: int
    """that it reads or writes"""
    needed: int
    """bytes of HBM that one device must read at least: the weights and the cache, once"""
    profile: Profile | None
    times: Times | None
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.times.step

    @property
    def roof(self) -> float:
        """Tokens/s if `needed` bytes took all the time."""
        return self.tokens * self.where.chip.bandwidth / self.where.chip.devices / self.needed

    @property
    def bandwidth(self) -> float:
        """The part of the chip's HBM bandwidth that `needed` takes in the predicted time."""
        return self.tokens_per_second / self.roof


def plan_inference(model: LlavaConfig, where: Slice, batch: int, context: int) -> list[Phase]:
    """Prefill of `batch` prompts of `context` tokens with an image each, and decode with that many in the cache.

    Parameters are bfloat16, matrices shared by all devices of the slice (`mesh.tensor`). UserError if these are of
    several hosts, or the model does not divide over them, or `context` has no room for an image.
    """
    if where.hosts > 1:
        raise UserError(f"--inference: {where.name} has {where.hosts} hosts, and inference runs on one; "
                         f"{where.chip.kind} hosts have up to {4 if where.chip.dimensions == 3 else 8} chips")
    if context < model.tokens_per_image:
        raise UserError(f"--context {context}: one image takes {model.tokens_per_image} tokens")
    mesh = sharding.make_mesh(config.Mesh(1, 1, where.devices), where.jax_devices())
    graph, shapes = abstract_params(model, "bfloat16", choose_attention("auto", "tpu", model, "bfloat16"))
    shardings = sharding.parameter_shardings({path: x.shape for path, x in shapes.items()}, mesh)
    parameters = {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=shardings[path])
                  for path, x in shapes.items()}
    decoder = device_bytes({path: x for path, x in parameters.items()
                            if path.startswith("decoder/")
                            and (model.text.tie_word_embeddings or path != "decoder/embedding")})
    everywhere = NamedSharding(mesh, P())

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=everywhere)

    rows = (batch,)
    sampling = Sampling(array((batch, 2), "uint32"), array(rows, "float32"), array(rows, "float32"))
    side = model.vision.image_size
    inputs = (array((batch, context), "int32"), array(rows, "int32"), array((batch, 1, side, side, 3), "uint8"),
              array(rows, "int32"), sampling)
    # As the engine calls them: the state is given away to decode.
    first = jax.jit(lambda parameters, *inputs: prefill(from_params(graph, parameters), *inputs, ENDS, context))
    rest = jax.jit(lambda parameters, state, going, steps: decode(
                       from_params(graph, parameters), state, going, steps, ENDS),
                   donate_argnums=1)
    with jax.set_mesh(mesh):
        bytes_of = {"trained": 0, "frozen": device_bytes(parameters), "optimizer": 0}
        reading = compile_program(first.lower(parameters, *inputs), bytes_of | {"batch": device_bytes(inputs)}, where,
                                  mesh)
        state = jax.eval_shape(first, parameters, *inputs)[0]
        layouts = reading.outputs[0] if reading.outputs else jax.tree.map(lambda _: everywhere, state)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layouts)
        more = (array(rows, "bool"), array((), "int32"))
        bytes_of["batch"] = device_bytes((state, more))
        writing = compile_program(rest.lower(parameters, state, *more), bytes_of, where, mesh)
    cache = device_bytes(state.cache)
    return [_phase("prefill", where, reading, cache, batch * context, decoder, whole=True),
            _phase("decode", where, writing, cache, batch, decoder + cache, whole=False)]


def _phase(name: str, where: Slice, program: Program, cache: int, tokens: int, needed: int, whole: bool) -> Phase:
    found = profile(program.hlo, program.slices) if program.hlo else None
    if found and not whole:
        # The loop over tokens, whose length is known at run time alone, counts as one round; what is around it runs
        # once for many tokens.
        found = dataclasses.replace(found, ops=tuple(op for op in found.ops if op.loops))
    return Phase(name, where, program.memory, cache, tokens, needed, found, times(found, where) if found else None,
                 program.seconds)
