"""The search: a formula that never drops what fits, an order, and what is made of the compiler's answers."""

import dataclasses
import json

import pytest

from llava_jax import config
from llava_jax.models.llama import LlamaConfig
from llava_jax.plan import search as module
from llava_jax.plan.meshes import plan_mesh
from llava_jax.plan.models import planned_config
from llava_jax.plan.search import Candidate, Found, candidates, policies, search
from llava_jax.plan.step import compile_step
from llava_jax.plan.topologies import parse
from llava_jax.weights.configs import hf_text

WHERE = parse("v5e-4")
GIB = 2**30


@pytest.fixture(scope="module")
def ways(needs_libtpu, tiny, tmp_path_factory):
    # So large that activations do not find room in the chip's own memory.
    folder = tmp_path_factory.mktemp("wide")
    text = LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=2816, num_layers=12, num_heads=8,
                       num_kv_heads=8, head_dim=128)
    (folder / "config.json").write_text(json.dumps(hf_text(text, 512)))
    data = dataclasses.replace(tiny.stages["instruct"].data, sequence_length=1024)
    recipe = dataclasses.replace(
        tiny, model=config.Model(vision=tiny.model.vision, language=str(folder), attention="xla"),
        stages={"instruct": dataclasses.replace(tiny.stages["instruct"], batch_size=16, data=data)})
    return recipe, candidates(recipe, "instruct", WHERE, planned_config(recipe.model)[0])


def test_candidates_are_every_mesh_division_and_policy(ways):
    _, found = ways
    meshes = {(way.mesh.data, way.mesh.fsdp, way.mesh.tensor) for way in found}
    assert meshes == {(1, 4, 1), (1, 2, 2)}  # four do not divide the vision tower's two heads
    assert {way.gradient_accumulation for way in found if way.mesh.fsdp == 4} == {1, 2, 4}
    assert {way.gradient_accumulation for way in found if way.mesh.fsdp == 2} == {1, 2, 4, 8}
    assert {way.remat for way in found} == set(policies())
    assert len(found) == len(set(found)) == 2 * (3 + 4) * len(policies())  # moments here or on the host
    assert [way.seconds for way in found] == sorted(way.seconds for way in found)


def test_the_memory_formula_stays_below_the_compilers_figure_of_a_tiny_model(needs_libtpu, tiny):
    model, _ = planned_config(tiny.model)
    peak = compile_step(tiny, "instruct", WHERE, plan_mesh(tiny, WHERE, model), model).memory.peak
    remat = tiny.stages["instruct"].remat
    way = next(way for way in candidates(tiny, "instruct", WHERE, model)
               if (way.remat, way.gradient_accumulation, way.mesh.fsdp, way.offload) == (remat, 1, 4, False))
    assert 0.2 * peak < way.memory <= peak


@pytest.mark.slow
@pytest.mark.parametrize("remat,micro_batches,least", [("none", 1, 0.15), ("save_dots", 1, 0.3), ("full", 2, 0.3)])
def test_the_memory_formula_stays_below_the_compilers_figure_by_policy(ways, remat, micro_batches, least):
    recipe, found = ways
    way = next(way for way in found
               if (way.remat, way.gradient_accumulation, way.mesh.fsdp, way.offload)
               == (remat, micro_batches, 4, False))
    stage = dataclasses.replace(recipe.stages["instruct"], gradient_accumulation=micro_batches, remat=remat)
    recipe = dataclasses.replace(recipe, mesh=way.mesh, stages={"instruct": stage})
    model, _ = planned_config(recipe.model)
    peak = compile_step(recipe, "instruct", WHERE, plan_mesh(recipe, WHERE, model), model).memory.peak
    assert least * peak < way.memory <= peak


def way(remat: str = "full", gradient_accumulation: int = 1, memory: int = 8 * GIB, seconds: float = 1.0) -> Candidate:
    return Candidate(config.Mesh(1, 4, 1), gradient_accumulation, remat, "auto", False, memory, seconds)


def answer(candidate: Candidate, seconds: float | None) -> Found:
    if seconds is None:
        return Found(candidate, {"fits": False, "memory": {"peak": 20 * GIB}})
    return Found(candidate, {"fits": True, "memory": {"peak": GIB}, "step_seconds": seconds, "mfu": 0.5})


def test_the_fastest_that_fits_is_first_and_what_must_be_larger_is_not_tried(monkeypatch):
    fast, slow = way("save_dots", 2, 9 * GIB, 3.0), way("full", 2, 6 * GIB, 4.0)
    large, larger = way("save_dots", 1, 14 * GIB, 1.0), way("none", 1, 15 * GIB, 2.0)
    asked = []

    def compile_(recipe, overrides, stage, where, candidate):
        asked.append(candidate)
        return answer(candidate, {fast: 0.5, slow: 0.7}.get(candidate))

    monkeypatch.setattr(module, "_compile", compile_)
    lines = []
    found = search("tiny", [], "instruct", WHERE, [large, larger, fast, slow], 8, 1, lines.append)
    assert asked == [large, fast, slow]
    assert [each.candidate for each in found] == [fast, slow, large]
    assert found[0].candidate.flags("instruct") == [
        "--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.tensor", "1", "--stages.instruct.gradient_accumulation", "2",
        "--stages.instruct.remat", "save_dots", "--model.attention", "auto"]
    assert "does not fit (20.0 GiB)" in lines[0] and "500 ms" in lines[1]
    asked.clear()
    search("tiny", [], "instruct", WHERE, [large, fast, slow], 1, 1, lines.append)
    assert asked == [large, fast]
    asked.clear()
    search("tiny", [], "instruct", WHERE, [way("none", 2**i, 15 * GIB - i) for i in range(9)], 1, 2, lines.append)
    assert len(asked) == 4


def test_a_candidate_is_compiled_in_a_process_of_its_own(needs_libtpu, tiny_file):
    found = module._compile(str(tiny_file), [], "align", WHERE, way())
    assert found.fits and found.plan["stage"] == "align" and found.plan["step_seconds"] > 0
    wrong = module._compile(str(tiny_file), ["--stages.align.stpes", "7"], "align", WHERE, way())
    assert not wrong.fits and wrong.error.startswith("error: ") and "stpes" in wrong.error
