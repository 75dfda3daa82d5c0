"""The search: a formula that never drops what fits, an order, and what is made of the compiler's answers."""

import dataclasses
import json

import pytest

from llava_jax import config
from llava_jax.models.llama import LlamaConfig
from llava_jax.plan import search as module
from llava_jax.plan.meshes import plan_mesh
from llava_jax.plan.models import planned_config
from llava_jax.plan.search import Candidate, CompiledCandidate, candidates, policies, search
from llava_jax.plan.step import compile_step
from llava_jax.plan.topologies import parse
from llava_jax.weights.configs import hf_text

WHERE = parse("v5e-4")
GIB = 2**30


@pytest.fixture(scope="module")
def tried(needs_libtpu, tiny, tmp_path_factory):
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


def test_candidates_are_every_mesh_division_and_policy(tried):
    _, found = tried
    meshes = {(candidate.mesh.data, candidate.mesh.fsdp, candidate.mesh.tensor) for candidate in found}
    assert meshes == {(1, 4, 1), (1, 2, 2)}  # four do not divide the vision tower's two heads
    assert {candidate.gradient_accumulation for candidate in found if candidate.mesh.fsdp == 4} == {1, 2, 4}
    assert {candidate.gradient_accumulation for candidate in found if candidate.mesh.fsdp == 2} == {1, 2, 4, 8}
    assert {candidate.remat for candidate in found} == set(policies())
    assert len(found) == len(set(found)) == 2 * (3 + 4) * len(policies())  # moments here or on the host
    assert [candidate.seconds for candidate in found] == sorted(candidate.seconds for candidate in found)


def test_the_memory_formula_stays_below_the_compilers_figure_of_a_tiny_model(planned, tiny):
    model, _, program = planned
    peak, remat = program.memory.peak, tiny.stages["instruct"].remat
    found = next(found for found in candidates(tiny, "instruct", WHERE, model)
                 if (found.remat, found.gradient_accumulation, found.mesh.fsdp, found.offload) == (remat, 1, 4, False))
    assert 0.2 * peak < found.memory <= peak


@pytest.mark.slow
@pytest.mark.parametrize("remat,micro_batches,least", [("none", 1, 0.15), ("save_dots", 1, 0.3), ("full", 2, 0.3)])
def test_the_memory_formula_stays_below_the_compilers_figure_by_policy(tried, remat, micro_batches, least):
    recipe, found = tried
    candidate = next(candidate for candidate in found
               if (candidate.remat, candidate.gradient_accumulation, candidate.mesh.fsdp, candidate.offload)
               == (remat, micro_batches, 4, False))
    stage = dataclasses.replace(recipe.stages["instruct"], gradient_accumulation=micro_batches, remat=remat)
    recipe = dataclasses.replace(recipe, mesh=candidate.mesh, stages={"instruct": stage})
    model, _ = planned_config(recipe.model)
    peak = compile_step(recipe, "instruct", WHERE, plan_mesh(recipe, WHERE, model), model).memory.peak
    assert least * peak < candidate.memory <= peak


def candidate(remat: str = "full", gradient_accumulation: int = 1, memory: int = 8 * GIB, seconds: float = 1.0
              ) -> Candidate:
    return Candidate(config.Mesh(1, 4, 1), gradient_accumulation, remat, "auto", False, memory, seconds)


def answer(candidate: Candidate, seconds: float | None) -> CompiledCandidate:
    if seconds is None:
        return CompiledCandidate(candidate, {"fits": False, "memory": {"peak": 20 * GIB}})
    return CompiledCandidate(candidate, {"fits": True, "memory": {"peak": GIB}, "step_seconds": seconds, "mfu": 0.5})


def test_the_fastest_that_fits_is_first_and_what_must_be_larger_is_not_tried(monkeypatch):
    fast, slow = candidate("save_dots", 2, 9 * GIB, 3.0), candidate("full", 2, 6 * GIB, 4.0)
    large, larger = candidate("save_dots", 1, 14 * GIB, 1.0), candidate("none", 1, 15 * GIB, 2.0)
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
    search("tiny", [], "instruct", WHERE, [candidate("none", 2**i, 15 * GIB - i) for i in range(9)], 1, 2, lines.append)
    assert len(asked) == 4


@pytest.mark.slow
def test_a_candidate_is_compiled_in_a_process_of_its_own(needs_libtpu, tiny_file):
    found = module._compile(str(tiny_file), [], "align", WHERE, candidate())
    assert found.fits and found.plan["stage"] == "align" and found.plan["step_seconds"] > 0
    wrong = module._compile(str(tiny_file), ["--stages.align.stpes", "7"], "align", WHERE, candidate())
    assert not wrong.fits and wrong.error.startswith("error: ") and "stpes" in wrong.error
