"""Names of TPU slices: shapes as the makers publish them, and one line for what is none."""

import math
import subprocess
import sys

import pytest

from llava_jax.plan.topologies import CHIPS, parse


# From the makers' tables of slices: name, shape, chips, hosts.
@pytest.mark.parametrize("name,shape,chips,hosts", [
    ("v5e-1", (1, 1), 1, 1), ("v5litepod-8", (2, 4), 8, 1), ("v5e-16", (4, 4), 16, 4), ("v5e-64", (8, 8), 64, 16),
    ("v6e-32", (4, 8), 32, 8), ("v6e-256", (16, 16), 256, 64),
    ("v4-8", (2, 2, 1), 4, 1), ("v4-32", (2, 2, 4), 16, 4), ("v4-128", (4, 4, 4), 64, 16),
    ("v4-384", (4, 4, 12), 192, 48),
    ("v5p-8", (2, 2, 1), 4, 1), ("v5p-256", (4, 4, 8), 128, 32), ("v5p-1536", (8, 8, 12), 768, 192),
    ("v5p-4480", (4, 20, 28), 2240, 560), ("v5p-12288", (16, 16, 24), 6144, 1536),
    ("tpu7x-16", (2, 2, 2), 8, 2), ("tpu7x-128", (4, 4, 4), 64, 16), ("tpu7x-18432", (16, 24, 24), 9216, 2304),
    ("v5e-256x2", (16, 16), 512, 128), ("v4-256x3", (4, 4, 8), 384, 96),
])
def test_published_slices(name, shape, chips, hosts):
    found = parse(name)
    assert (found.shape, found.chips, found.hosts) == (shape, chips, hosts)
    assert parse(found.name) == found


@pytest.mark.parametrize("name,expected", [
    ("v5e-7", "no v5e slice; there are v5e-1, v5e-4, v5e-8, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256"),
    ("v4-9", "multiples of 128 from v4-128 to v4-8192"), ("v5p-12416", "no v5p slice"), ("v5e-", "no v5e slice"),
    ("v5e-256x0", "no v5e slice"), ("v6e", "there are v6e-1"), ("v5x-64", "kinds are v4, v5e,"),
    ("h100", "kinds are"), ("v5e-256x2x2", "several slices: v5e-256x2"), ("v5e-4xx", "several"), ("", "kinds are"),
])
def test_what_is_no_slice_is_one_line_that_lists_those_there_are(name, expected):
    with pytest.raises(ValueError) as caught:
        parse(name)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_clocks_follow_from_the_published_peaks():
    # v4's and v5e's clocks are published elsewhere: 1,050 and 1,500 MHz.
    assert CHIPS["v4"].clock == pytest.approx(1.05e9, rel=0.01)
    assert CHIPS["v5e"].clock == pytest.approx(1.5e9, rel=0.01)
    for chip in CHIPS.values():
        assert chip.clock * chip.flops_per_cycle * chip.devices == pytest.approx(chip.flops)


@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v5e-16", "v6e-8", "v4-16", "v5p-8", "tpu7x-16", "v5e-4x2",
                                  "v4-8x3"])
def test_libtpu_agrees_on_devices_hosts_and_slices(needs_libtpu, name):
    where = parse(name)
    devices = where.jax_devices()
    assert len(devices) == where.devices
    assert len({device.process_index for device in devices}) == where.hosts
    assert len({getattr(device, "slice_index", 0) for device in devices}) == where.count
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    assert {device.device_kind for device in devices} == {kinds[where.chip.kind]}
    assert where.devices == where.chip.devices * where.count * math.prod(where.shape)


def test_planning_keeps_jax_from_opening_a_tpu_and_says_how_to_get_its_compiler():
    code = """
import sys
from llava_jax.plan.topologies import parse
sys.modules["libtpu"] = None
try:
    parse("v5e-4").jax_devices()
except ValueError as error:
    print(error)
import jax
print({device.platform for device in jax.devices()})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["planning needs the TPU compiler: pip install 'llava_jax[plan]'", "{'cpu'}"]
