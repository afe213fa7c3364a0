"""Costs and collectives read from compiled programs and, with libtpu, from programs for TPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.hlo import elements, num_bytes, parse
from experiments.benchmarks.program_costs import PEAKS, costs, kernel_work
from skyformer_jax import attention

ROOT = Path(__file__).parents[1]

# HLO text as XLA for TPUs writes it: a loop without a known trip count, a collective spread over
# two fusions, arrays in the core's own memory (S(1)), and a kernel.
TEXT = """HloModule jit_step

%fused_product (param_0: f32[8,4], param_1: f32[4,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[4,4]{1,0:T(8,128)} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0:T(8,128)} convolution(%param_0, %param_1), dim_labels=bf_io->bf
}

%fused_slice (param_2: f32[100,4], param_3: s32[]) -> f32[1,4] {
  %param_2 = f32[100,4]{1,0:T(8,128)} parameter(0)
  %param_3 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,4]{1,0} dynamic-slice(%param_2, %param_3, %zero), dynamic_slice_sizes={1,4}
}

%begun (param_4: f32[2,4]) -> (f32[2,4], f32[8,4]) {
  %param_4 = f32[2,4]{1,0} parameter(0)
  %all-gather.1 = f32[8,4]{1,0} all-gather(%param_4), channel_id=2, dimensions={0}
  ROOT %start = (f32[2,4]{1,0}, f32[8,4]{1,0}) custom-call(%param_4, %all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%ended (param_5: f32[2,4]) -> f32[8,4] {
  %param_5 = f32[2,4]{1,0} parameter(0)
  %all-gather.2 = f32[8,4]{1,0} all-gather(%param_5), channel_id=2, dimensions={0}
  ROOT %done = f32[8,4]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (arg: (s32[], f32[100,4])) -> (s32[], f32[100,4]) {
  %arg = (s32[], f32[100,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[100,4]{1,0} get-tuple-element(%arg), index=1
  %row = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_slice, \
metadata={op_name="jit(step)/Classifier/block_0/attention_layer/gather"}, \
backend_config={"estimated_cycles":"50"}
  %sum = f32[1,4]{1,0} all-reduce(%row), to_apply=%add
  ROOT %next = (s32[], f32[100,4]{1,0}) tuple(%i, %x)
}

%condition (arg.1: (s32[], f32[100,4])) -> pred[] {
  %arg.1 = (s32[], f32[100,4]{1,0}) parameter(0)
  %turns = s32[]{:T(128)} constant(7)
  %j = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%j, %turns), direction=LT
}

ENTRY %main (p: f32[8,4], q: f32[4,4], r: f32[2,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %q = f32[4,4]{1,0:T(8,128)S(1)} parameter(1)
  %r = f32[2,4]{1,0} parameter(2)
  %init = (s32[], f32[100,4]{1,0}) tuple(%zero.1, %p)
  %loop = (s32[], f32[100,4]{1,0}) while(%init), condition=%condition, body=%body
  %product = f32[8,4]{1,0:T(8,128)S(1)} fusion(%p, %q), kind=kOutput, calls=%fused_product, \
metadata={op_name="jit(step)/Classifier/block_0/attention_layer/query/dot_general"}, \
backend_config={"estimated_cycles":"1000"}
  %async-collective-start = (f32[2,4]{1,0}, f32[8,4]{1,0}) fusion(%r), kind=kCustom, calls=%begun
  %async-collective-done = f32[8,4]{1,0} fusion(%r), kind=kCustom, calls=%ended
  ROOT %kernel = f32[8,4]{1,0} custom-call(%product), \
custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/attention_layer/gaussian/pallas_call"}, \
backend_config={"cost_estimate":{"flops":"1","transcendentals":"2048","bytes_accessed":"3"}}
}
"""


def test_loops_turn_as_their_conditions_say():
    program = parse(TEXT)
    times = {one.name: (number, known) for one, number, known in program.executed()}
    assert times["row"] == (7, True)
    assert times["product"] == (1, True)
    unknown = parse(TEXT.replace("constant(7)", "constant(true)"))
    assert {one.name: known for one, _, known in unknown.executed()}["row"] is False


def test_spread_collectives_count_once_and_those_in_loops_by_turns():
    assert collectives(TEXT) == {
        "all-reduce": {"count": 7, "bytes": 7 * 16},
        "all-gather": {"count": 1, "bytes": 8 * 4 * 4},
    }
    with pytest.raises(ValueError, match="an unknown number of turns"):
        collectives(TEXT.replace("constant(7)", "constant(true)"))


def test_costs_by_hand():
    row = costs(parse(TEXT), PEAKS["TPU v5 lite"])
    assert row["estimated_cycles"] == 1000 + 7 * 50
    assert row["loops"] == [7]
    # The kernel's cost estimate is bound by its exponentials, 1,024 per cycle.
    assert row["kernels"] == {"gaussian": {"runs": 1, "modelled_cycles": 2, "estimated": 1}}
    by = row["by_purpose"]
    assert list(by)[:2] == ["other products", "gathers and scatters"]
    # Only one row of x is read. Arrays in the core's own memory cause no main memory traffic.
    assert by["gathers and scatters"] == {"runs": 7, "bytes": 7 * (16 + 4 + 16), "cycles": 350}
    assert by["other products"] == {"runs": 1, "bytes": 8 * 4 * 4, "cycles": 1000}
    assert by["kernels"]["bytes"] == 8 * 4 * 4


def test_kernels_for_gpus_by_hand():
    """HLO text for GPUs has no cost estimates, so the costs come from the shapes.

    Each of 3 examples and 2 heads has 64 x 16 pairs of query and key.
    """
    arrays = {"s": "1", "c": "3,1,2,8", "q": "3,64,2,8", "g": "3,64,2,4", "k": "3,16,2,8"}
    arrays |= {"v": "3,16,2,4"}
    lines = [f"  %{name} = f32[{sizes}]{{0}} parameter(0)" for name, sizes in arrays.items()]
    call = (
        "  ROOT %r = f32[1,3,64,2,8]{0} custom-call(%s, %c, %q, %g, %k, %v), "
        'custom_call_target="__gpu$xla.gpu.triton", '
        'metadata={op_name="jit(f)/gaussian_dq/pallas_call"}'
    )
    text = "\n".join(["ENTRY %main (s: f32[1]) -> f32[1] {", *lines, call, "}"])
    program = parse(text)
    types = {one.name: one.type for one in program.computations["main"]}
    (one,) = (one for one in program.computations["main"] if one.opcode == "custom-call")
    pairs, moved = 3 * 2 * 64 * 16, 4 * (1 + 48 + 2 * 3072 + 1536 + 768 + 384)
    work = kernel_work(program, one, types)
    assert work == {
        "operations": 2 * 2 * (2 * 8 + 4) * pairs,
        "exponentials": pairs,
        "bytes": moved,
    }
    row = costs(program, PEAKS["NVIDIA H100 80GB HBM3"])
    assert row["kernels"]["gaussian_dq"] == {
        "runs": 1,
        "modelled_cycles": max(-(-pairs // (132 * 16)), round(moved * 1.98 / 3352 + 0.5)),
        "estimated": 1,
    }


def test_types():
    assert num_bytes("(f32[2,3]{1,0}, bf16[5]{0}, pred[3], f8e4m3fn[4], s4[4])") == 24 + 10 + 3 + 6
    assert num_bytes("(f32[2]{0:T(128)S(1)}, f32[3]{0:T(128)})", in_memory=True) == 12
    assert elements("(f32[2,3]{1,0}, (s32[], /*index=2*/u8[4]))") == [
        "f32[2,3]{1,0}",
        "(s32[], u8[4])",
    ]


@pytest.fixture(scope="module")
def compiled():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('compiling for TPUs needs libtpu: pip install -e ".[aot]"')
    environment = {name: v for name, v in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "tests/aot_programs.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_attentions_compile_for_tpus(compiled):
    assert set(compiled["attentions"]) == set(attention.NAMES)
    for name, row in compiled["attentions"].items():
        assert row["estimated_cycles"] + len(row["kernels"]) > 0, name
        # Only performer has a loop: it draws its directions block by block.
        assert len(row["loops"]) == (name == "performer"), name


def test_what_skyformer_sends_does_not_grow_with_the_length_on_tpus(compiled):
    short, long = compiled["steps"]
    assert short["collectives"] == long["collectives"]
    assert not short["loops"] and not long["loops"]
    assert short["estimated_cycles"] < long["estimated_cycles"] < 1_500_000


def test_what_causal_skyformer_sends_does_not_grow_with_the_length_on_tpus(compiled):
    short, long = compiled["causal"]
    assert short == long
    assert 0 < sum(x["bytes"] for x in long.values()) < 1_000_000
