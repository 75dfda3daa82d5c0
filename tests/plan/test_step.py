"""The planned step: what train runs, compiled for TPUs; its figures against closed forms and JAX's own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llava import abstract_params
from llava_jax.parallel import compiler, sharding
from llava_jax.parallel.sharding import make_mesh
from llava_jax.plan import show
from llava_jax.plan.models import known, planned_config
from llava_jax.plan.predict import predict
from llava_jax.plan.replay import profile
from llava_jax.plan.step import abstract_batch, compile_program, compile_step, with_slices
from llava_jax.plan.topologies import parse as parse_slice

WHERE = parse_slice("v5e-4")


def test_memory_is_the_compilers_and_its_parts_are_the_arrays(planned, tiny):
    model, mesh, program = planned
    _, shapes = abstract_params(model)
    sizes = {"trained": 0, "frozen": 0}
    for path, x in shapes.items():
        spec = sharding.parameter_shardings({path: x.shape}, mesh)[path].spec
        axes = [axis for part in spec if part for axis in ([part] if isinstance(part, str) else part)]
        share = math.prod(mesh.shape[axis] for axis in axes)
        trained = not path.startswith("vision/")
        sizes["trained" if trained else "frozen"] += x.size // share * (4 if trained else 2)
    memory, data = program.memory, tiny.stages["instruct"].data
    assert (memory.trained, memory.frozen) == (sizes["trained"], sizes["frozen"])
    assert memory.optimizer == pytest.approx(2 * sizes["trained"], abs=16)  # two moments and counters
    assert memory.batch == 2 * (5 * 4 * data.sequence_length + 2 * 28 * 28 * 3)  # two rows on each device
    assert 0 < memory.temporaries and memory.fits and memory.limit == WHERE.chip.memory


def test_a_prediction_adds_up(planned, tiny):
    model, _, program = planned
    plan = predict(tiny, "instruct", WHERE, model, program, None)
    chip, seconds, step = WHERE.chip, plan["seconds"], plan["step_seconds"]
    assert plan["cycles"] == pytest.approx(seconds["cycles"] * 1.503e9, rel=1e-3)
    assert step == seconds["cycles"] + seconds["kernels"] + seconds["waits"]
    kernels = profile(program.hlo, program.slices).kernels
    runs = sum(op.times for op in kernels)
    assert seconds["kernels"] == pytest.approx(runs * 9000 / chip.clock)
    assert max(op.kernel.flops / chip.flops for op in kernels) < 9000 / chip.clock
    assert plan["mfu"] == plan["model_flops"] / step / (4 * chip.flops)
    assert plan["tokens_per_second_per_chip"] * 4 * step == pytest.approx(8 * 128)
    parts = plan["cycles_by_part"]
    assert sum(parts.values()) == plan["cycles"]
    assert parts.keys() >= {"vision", "projector", "decoder", "loss", "optimizer"}
    assert parts["decoder"] > parts["vision"] > parts["projector"]


def test_a_plan_as_text_is_narrow_and_says_where_figures_are_from(planned, tiny):
    model, mesh, program = planned
    plan = predict(tiny, "instruct", WHERE, model, program, (5000, "the recipe's steps"), 1.5)
    about = {"recipe": "tiny", "mesh": dict(mesh.shape), "versions": {"jax": "1"}, "notes": []}
    text = show.header(about, WHERE) + "\n" + show.text(plan, WHERE, 1.5)
    for word in ("v5e-4: 2x2, 4 chips", "fits", "temporaries", "waits", "MFU", "vision", "chip-hours", " to ",
                 "the compiler", "arithmetic", "formula", "predicted", "Nothing here was measured on a TPU.",
                 "-10% to +23%"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.slow
def test_stage_one_has_no_optimizer_state_of_the_decoder(planned, tiny):
    model, mesh, program = planned
    first = compile_step(tiny, "align", WHERE, mesh, model)
    assert first.memory.optimizer < program.memory.optimizer / 5
    assert first.memory.trained < program.memory.trained / 5 < first.memory.frozen
    assert profile(first.hlo, first.slices).cycles < profile(program.hlo, program.slices).cycles


@pytest.mark.slow
def test_each_stage_computes_again_what_it_says(planned, tiny):
    model, mesh, program = planned
    align = dataclasses.replace(tiny.stages["align"], remat="none")
    first = compile_step(dataclasses.replace(tiny, stages=tiny.stages | {"align": align}), "align", WHERE, mesh, model)
    assert tiny.stages["instruct"].remat == "full"
    assert "rematted_computation" in program.hlo and "rematted_computation" not in first.hlo


def lower(function, *shapes):
    mesh = sharding.make_mesh(config.Mesh(1, 1, 1), parse_slice("v5e-1").jax_devices())
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, P())) for shape in shapes]
    return jax.jit(function).lower(*arrays), mesh


def compiled(function, *shapes):
    lowered, mesh = lower(function, *shapes)
    parts = dict.fromkeys(("trained", "frozen", "optimizer", "batch"), 0)
    return compile_program(lowered, parts, parse_slice("v5e-1"), mesh)


@pytest.mark.slow
def test_temporaries_are_what_the_compiler_says_without_a_dump(needs_libtpu):
    def function(x, y):
        return jnp.tanh(x @ y) @ jnp.tanh(y @ x)

    shapes = (8192, 8192), (8192, 8192)
    found = lower(function, *shapes)[0].compile().memory_analysis()
    assert found.temp_size_in_bytes > 2**24
    assert compiled(function, *shapes).memory.temporaries == found.temp_size_in_bytes + found.output_size_in_bytes


def test_a_scan_counts_all_its_rounds(needs_libtpu):
    def scan(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    once, often = (profile(compiled(scan, (256, 512), (rounds, 512, 512)).hlo, [0]).cycles for rounds in (1, 41))
    assert once < often and 40 * 2 * 256 * 512 * 512 / parse_slice("v5e-1").chip.flops_per_cycle < often - once


def test_what_does_not_fit_says_by_how_much(needs_libtpu):
    program = compiled(lambda x: (x + 1).sum(), (1024, 1024, 1024, 10))
    assert not program.hlo and not program.memory.fits
    assert program.memory.peak == pytest.approx(20 * 2**30, rel=0.01)
    assert program.memory.limit == pytest.approx(parse_slice("v5e-1").chip.memory, rel=1e-3)


@pytest.mark.slow
def test_two_slices_exchange_their_gradients_once(needs_libtpu, tiny):
    where = parse_slice("v5e-4x2")
    model, _ = planned_config(tiny.model)
    recipe, notes = with_slices(tiny, where)
    assert recipe.mesh.data == 2 and "--mesh.data 2" in notes[0]
    program = compile_step(recipe, "instruct", where, make_mesh(recipe.mesh, where.jax_devices()),
                           model)
    assert set(program.slices) == {0, 1}
    found = profile(program.hlo, program.slices)
    # Gradients travel in bfloat16 or float32; small ones are padded to whole tiles, replicated norms come on top.
    gradients = program.memory.trained // 4
    assert 2 * gradients * 0.95 <= found.dcn_bytes <= 4 * gradients * 1.15


def test_the_planned_batch_is_what_the_loop_puts_on_the_devices(tiny, parts, data):
    from llava_jax.train.batches import open_batches, shard_batch
    from llava_jax.train.setup import setup

    stage = dataclasses.replace(tiny.stages["instruct"], gradient_accumulation=2, batch_size=4,
                                data=config.Data(path=str(data), sequence_length=96, tiles_per_sequence=2))
    recipe = dataclasses.replace(tiny, model=config.Model(vision=str(parts[0]), language=str(parts[1])),
                                 stages={"instruct": stage})
    context = setup(recipe)
    rows = next(iter(open_batches(context, stage, stage.data.path)))
    batch = shard_batch(context.mesh, rows, stage.gradient_accumulation)
    planned = abstract_batch(stage, context.mesh, context.model)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in planned.items()}
    assert all(batch[name].sharding.is_equivalent_to(x.sharding, x.ndim) for name, x in planned.items())


def test_published_sizes_stand_in_for_checkpoints_that_are_not_here():
    model = config.Model(vision="checkpoints/clip-vit-large-patch14-336", language="x/Vicuna-13B-v1.5")
    found, notes = planned_config(model)
    count = sum(x.size for x in abstract_params(found)[1].values())
    assert 13.2e9 < count < 13.5e9 and len(notes) == 2  # LLaVA-1.5 13B
    assert sum(x.size for path, x in abstract_params(found)[1].items() if path.startswith("vision/")) == pytest.approx(
        303.5e6, rel=0.01)
    with pytest.raises(UserError, match="my-model.*config.json"):
        known("checkpoints/my-model")


@pytest.mark.parametrize("name,count,tokens", [
    ("llava-v1.6-vicuna-7b", 7.063e9, 2340), ("llava-v1.6-mistral-7b-hf", 7.567e9, 2340),
    ("llama3-llava-next-8b", 8.355e9, 2340), ("llava-onevision-qwen2-0.5b-si", 0.909e9, 2929),
    ("llava-onevision-qwen2-7b-ov-hf", 8.046e9, 2929),
])
def test_later_models_are_known_with_the_layout_of_a_photo(name, count, tokens):
    """Sizes on the hub, and the last layer of SigLIP (15 million), which is not there; reference token counts."""
    model = known(f"checkpoints/{name}")
    assert sum(x.size for x in abstract_params(model)[1].values()) == pytest.approx(count, rel=2e-3)
    assert len(model.processor.layout(640, 480).index) == tokens


@pytest.mark.parametrize("name,count", [
    ("vicuna-7b-v1.5", 6.738e9), ("Llama-2-13b-hf", 13.016e9), ("Meta-Llama-3-8B-Instruct", 8.030e9),
    ("Mistral-7B-Instruct-v0.2", 7.242e9), ("Qwen2-7B-Instruct", 7.616e9), ("Qwen2.5-3B", 3.086e9),
    ("Qwen2-1.5B", 1.544e9), ("Qwen2.5-0.5B-Instruct", 0.494e9),
])
def test_published_sizes_give_the_published_numbers_of_parameters(name, count):
    text = known(name)
    layer = text.hidden_size * text.head_dim * 2 * (text.num_heads + text.num_kv_heads)
    layer += 3 * text.hidden_size * text.intermediate_size
    layer += 2 * text.hidden_size + (text.qkv_bias and text.head_dim * (text.num_heads + 2 * text.num_kv_heads))
    embeddings = text.hidden_size * text.vocab_size * (1 if text.tie_word_embeddings else 2)
    total = text.num_layers * layer + text.hidden_size + embeddings
    assert total == pytest.approx(count, rel=5e-4)


@pytest.mark.parametrize("mesh,rows,expected", [
    (config.Mesh(fsdp=3), 8, "fsdp 3 .* needs 3 devices, and there are 4"),
    (config.Mesh(), 6, "batch_size: 6 sequences .* do not divide .* = 4 devices"),
])
def test_what_does_not_divide_is_one_line(needs_libtpu, tiny, mesh, rows, expected):
    model, _ = planned_config(tiny.model)
    stages = {"instruct": dataclasses.replace(tiny.stages["instruct"], batch_size=rows)}
    with pytest.raises(UserError, match=expected):
        compile_step(dataclasses.replace(tiny, stages=stages), "instruct", WHERE,
                     make_mesh(mesh, WHERE.jax_devices()), model)


@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_the_compiler_knows_the_options_of_every_generation(needs_libtpu, capsys, name):
    mesh = sharding.make_mesh(config.Mesh(), parse_slice(name).jax_devices())
    assert compiler.compiler_options(mesh) == compiler.OPTIONS[mesh.devices.flat[0].device_kind]
    assert not capsys.readouterr().err


def test_a_plan_keeps_the_options_of_the_jitted_function(needs_libtpu):
    where = parse_slice("v6e-4")
    mesh = sharding.make_mesh(config.Mesh(), where.jax_devices())
    x = jax.ShapeDtypeStruct((4096, 4096), "bfloat16", sharding=NamedSharding(mesh, P("fsdp")))
    found = []
    for options in (None, compiler.compiler_options(mesh)):
        lowered = jax.jit(lambda x, y: x @ y, compiler_options=options, out_shardings=x.sharding).lower(x, x)
        program = compile_program(lowered, dict.fromkeys(("trained", "frozen", "optimizer", "batch"), 0), where, mesh)
        found.append('execution_thread="sparsecore"' in program.hlo)
    assert found == [False, True]


def test_options_that_the_compiler_does_not_know_are_left_out_with_a_line(needs_libtpu, capsys, monkeypatch):
    mesh = sharding.make_mesh(config.Mesh(), parse_slice("v6e-4").jax_devices())
    known = compiler.compiler_options(mesh)
    monkeypatch.setitem(compiler.OPTIONS, "TPU v6 lite", {"xla_made_up": 1} | known | {"xla_tpu_another": True})
    assert compiler.compiler_options(mesh) == compiler.compiler_options(mesh) == known
    [line] = capsys.readouterr().err.splitlines()
    assert "xla_made_up, xla_tpu_another" in line
    monkeypatch.setitem(compiler.OPTIONS, "TPU v6 lite", known | {"xla_enable_async_all_reduce": "neither"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_enable_async_all_reduce"):
        compiler.compiler_options(mesh)


def test_a_name_that_was_never_published_has_no_sizes():
    with pytest.raises(UserError, match="'Qwen2-3B' is no published model"):  # but Qwen2.5 has 3B
        known("checkpoints/Qwen2-3B")
