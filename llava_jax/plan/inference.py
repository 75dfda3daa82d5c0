"""Compiles prefill and decode of a recipe's model for the chips of one host."""

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

EOS_IDS = (2,)
"""Token ids that end an answer; they do not change the program's cost."""

PHOTO = (640, 480)
"""Width and height of the image of every prompt, which `anyres` reads."""


@dataclass(frozen=True)
class Phase:
    """Predicts prefill of a batch, or decoding of one token in every row."""

    name: str
    where: Slice
    memory: Memory
    cache: int
    """Bytes of keys and values of the full context on one device."""
    tokens: int
    """Number of tokens that are read or written."""
    needed: int
    """Lower bound of the bytes of HBM that one device reads: the weights and the cache, once."""
    profile: Profile | None
    times: Times | None
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.times.step

    @property
    def roofline(self) -> float:
        """Tokens/s if reading `needed` bytes took all the time."""
        return self.tokens * self.where.chip.bandwidth / self.where.chip.devices / self.needed

    @property
    def bandwidth(self) -> float:
        """Share of the HBM bandwidth that `needed` takes in the predicted time."""
        return self.tokens_per_second / self.roofline


def plan_inference(model: LlavaConfig, where: Slice, batch: int, context: int) -> list[Phase]:
    """Plans prefill of `batch` prompts of `context` tokens, with one image in every prompt, and decode after them.

    The image is a photo of PHOTO pixels. Parameters are bfloat16 and tensor parallel over all devices of the slice.
    Adapters are merged, as they are where a model answers. Raises UserError if the slice has several
    hosts, if the model is not divisible by its devices, or if `context` has no room for an image.
    """
    if where.hosts > 1:
        raise UserError(f"--inference: {where.name} has {where.hosts} hosts, and inference runs on one; "
                         f"{where.chip.kind} hosts have up to {4 if where.chip.dimensions == 3 else 8} chips")
    image = model.processor.layout(*PHOTO)
    if context < len(image.index):
        raise UserError(f"--context {context}: one image takes {len(image.index)} tokens")
    model = dataclasses.replace(model, lora=None)
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
    visual = {name: array(x.shape, x.dtype) for name, x in model.processor.no_visual_tokens((batch, context)).items()}
    inputs = (array((batch, context), "int32"), array(rows, "int32"),
              array((batch, image.tiles, side, side, 3), "uint8"), visual["visual_index"], visual.get("visual_weight"),
              array(rows, "int32"), sampling)
    prefill_step = jax.jit(
        lambda parameters, *inputs: prefill(from_params(graph, parameters), *inputs, EOS_IDS, context))
    # The engine donates the state to decode too.
    decode_step = jax.jit(lambda parameters, *inputs: decode(from_params(graph, parameters), *inputs, EOS_IDS),
                          donate_argnums=1)
    fixed = {"trained": 0, "frozen": device_bytes(parameters), "optimizer": 0}
    with jax.set_mesh(mesh):
        prefill_program = compile_program(prefill_step.lower(parameters, *inputs),
                                          fixed | {"batch": device_bytes(inputs)}, where, mesh)
        state = jax.eval_shape(prefill_step, parameters, *inputs)[0]
        outputs = prefill_program.outputs
        layouts = outputs[0] if outputs else jax.tree.map(lambda _: everywhere, state)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layouts)
        inputs = (state, array(rows, "bool"), array((), "int32"))
        decode_program = compile_program(decode_step.lower(parameters, *inputs),
                                         fixed | {"batch": device_bytes(inputs)}, where, mesh)
    cache = device_bytes(state.cache)
    return [_phase("prefill", where, prefill_program, cache, batch * context, decoder, loop_only=False),
            _phase("decode", where, decode_program, cache, batch, decoder + cache, loop_only=True)]


def _phase(name: str, where: Slice, program: Program, cache: int, tokens: int, needed: int, loop_only: bool
           ) -> Phase:
    found = profile(program.hlo, program.slices) if program.hlo else None
    if found and loop_only:
        # The loop over tokens counts as one round, because its length is known only at run time. Instructions around
        # it are dropped, because they run once for many tokens.
        found = dataclasses.replace(found, ops=tuple(op for op in found.ops if op.loops))
    return Phase(name, where, program.memory, cache, tokens, needed, found, times(found, where) if found else None,
                 program.seconds)
