"""Compiles the programs of a server's slots for the chips of one host: vision tower, chunks of prompts, decode."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

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
from llava_jax.plan.replay import Loop, Times, profile, times
from llava_jax.plan.step import Memory, Program, compile_program, device_bytes
from llava_jax.plan.topologies import GIB, Slice

EOS_IDS = (2,)
"""Token ids that end an answer; they do not change the program's cost."""
PHOTO = (640, 480)
"""Width and height of the image of the prompt, which `anyres` reads."""
TEXT_TOKENS = 64
"""Number of the prompt's tokens besides the image's."""
MAX_SLOTS = 256
"""Number of slots that is planned at most by default."""
RESERVE = GIB // 2
"""Bytes for temporaries in the first guess of the number of slots."""


@dataclass(frozen=True)
class Phase:
    """Predicts one program of the server."""

    name: str
    memory: Memory
    times: Times | None
    """None if the program does not fit, because then the compiler gives no program."""
    compile_seconds: float


@dataclass(frozen=True)
class Serving:
    """Predicts a server at full slots, and the first token of one prompt with an image on a server without others."""

    where: Slice
    slots: int
    context: int
    slot_bytes: int
    """Bytes of one slot's keys and values on one device."""
    prompt_tokens: int
    prompt: tuple[Phase, ...]
    """The vision tower, and the chunks of the prompt in order."""
    batch: Phase
    """As many chunks at once as the server computes, of the largest size that it batches."""
    decode: Phase
    """One token in every slot, with contexts that are full."""
    decode_half: Phase
    """The same with half of the context filled."""
    weight_bytes: int
    """Bytes of the decoder's weights on one device."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return *self.prompt, self.batch, self.decode

    @property
    def fits(self) -> bool:
        return all(phase.memory.fits for phase in self.phases)

    @property
    def largest(self) -> Memory:
        """Memory of the program with the highest peak."""
        return max((phase.memory for phase in self.phases), key=lambda memory: memory.peak)

    @property
    def possible_slots(self) -> int:
        """Number of slots that the memory holds, if the largest program needs the same temporaries."""
        memory = self.largest
        return max(0, self.slots + int((memory.limit - memory.peak) // self.slot_bytes))

    def tokens_per_second(self, phase: Phase) -> float:
        """Returns tokens/s per chip at full slots."""
        return self.slots / phase.times.step / self.where.chips

    @property
    def first_token_seconds(self) -> float:
        return sum(phase.times.step for phase in self.prompt)

    def bandwidth(self, phase: Phase, filled: float) -> float:
        """Returns the share of the HBM bandwidth that reading weights and cache once takes in the time of a step.

        `filled`: share of the context that is filled.
        """
        needed = self.weight_bytes + filled * self.slots * self.slot_bytes
        return needed * self.where.chip.devices / self.where.chip.bandwidth / phase.times.step


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


def plan_serving(model: LlavaConfig, where: Slice, slots: int | None, context: int, quantize: str | None = None,
                 kv_cache: str | None = None) -> Serving:
    """Plans a server on one host, tensor parallel over its devices.

    The prompt has an image of PHOTO pixels and TEXT_TOKENS tokens of text. Parameters are bfloat16 unless `quantize`
    is "int8". Adapters are merged.

    Args:
      slots: number of slots; by default the largest multiple of 8 that fits, up to MAX_SLOTS (below 8, any number).
      context: number of tokens of a slot.
      kv_cache: "int8" for a cache of 8 bits.

    Raises UserError if the slice has several hosts, if the model is not divisible by its devices, if `context` has no
    room for the prompt, or if no slot fits.
    """
    if where.hosts > 1:
        raise UserError(f"--serve: {where.name} has {where.hosts} hosts, and a server runs on one; "
                         f"{where.chip.kind} hosts have up to {4 if where.chip.dimensions == 3 else 8} chips")
    image = model.processor.layout(*PHOTO)
    if context <= (prompt_tokens := len(image.index) + TEXT_TOKENS):
        raise UserError(f"--context {context}: one image takes {len(image.index)} tokens, and its prompt "
                        f"{prompt_tokens}")
    server = _Server(model, where, context, quantize, kv_cache)
    slot_bytes, given = device_bytes(server.state(1).cache), slots
    if slots is None:
        free = where.chip.memory - device_bytes(server.parameters) - RESERVE
        slots = _whole(min(free // slot_bytes, MAX_SLOTS))
    while True:
        if slots < 1:
            raise UserError(f"--context {context}: the parameters leave no room on {where.name} for a slot of "
                            f"{slot_bytes / GIB:.2f} GiB; --quantize int8 and --kv-cache int8 need less")
        plan = _plan(server, slots, context, slot_bytes, prompt_tokens, image.tiles)
        if given is not None or plan.fits:
            return plan
        slots = _whole(min(slots - 1, plan.possible_slots))


def _whole(slots: int) -> int:
    return slots // 8 * 8 if slots >= 8 else slots


def _plan(server: _Server, slots: int, context: int, slot_bytes: int, prompt_tokens: int, tiles: int) -> Serving:
    state, sizes = server.state(slots), [size for size in CHUNK_TOKENS if size < 2 * context]
    prompt, programs = [_phase("vision tower", server.where, server.tower(state, tiles))], {}
    for start in range(0, prompt_tokens, sizes[-1]):
        end = min(start + sizes[-1], prompt_tokens)
        size = next(size for size in sizes if size >= end - start)
        programs[size] = programs.get(size) or server.chunks(state, 1, size)
        prompt.append(_phase(f"chunk of {size} tokens", server.where, programs[size], -(-end // BLOCK)))
    size = max(size for size in sizes if MAX_ROWS * size <= MAX_BATCH_TOKENS)
    batch = _phase(f"{MAX_ROWS} chunks of {size} tokens", server.where, server.chunks(state, MAX_ROWS, size),
                   -(-context // BLOCK))
    program = server.decode(state)
    with jax.set_mesh(server.mesh):
        block = block_size(state.cache)
    full, half = (_phase("decode", server.where, program, 1, slots * -(-filled // block))
                  for filled in (context, context // 2))
    return Serving(server.where, slots, context, slot_bytes, prompt_tokens, tuple(prompt), batch, full, half,
                   server.decoder_bytes)


def _phase(name: str, where: Slice, program: Program, blocks: int = 1, decode_steps: int = 0) -> Phase:
    """Returns a phase.

    Args:
      blocks: number of blocks of the cache that attention reads, which is the length of loops that is not constant.
      decode_steps: number of steps of decode's kernel. Only its loop over tokens counts, as one round. Its length is
        known at run time, and what is around it runs once for many tokens.
    """
    found = profile(program.hlo, program.slices, blocks) if program.hlo else None
    if found and decode_steps:
        found = dataclasses.replace(found, schedule=tuple(step for step in found.schedule if isinstance(step, Loop)))
    return Phase(name, program.memory, times(found, where, decode_steps) if found else None, program.seconds)
