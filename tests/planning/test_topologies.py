"""Names, sizes and links of topologies."""

import pytest

from jaxllm.errors import InputError
from jaxllm.planning.topologies import CHIPS, find_topology, names


def test_names_of_one_topology():
    assert find_topology("v5e:4x4") == find_topology("v5litepod-16") == find_topology("V5E-16")
    assert find_topology("v5p-64").shape == (2, 4, 4) and find_topology("v5p-64").chips == 32
    assert find_topology("v6e-256").shape == (16, 16)
    assert find_topology("v4:4x4x8").accelerator_type == "v4-256"
    assert find_topology("v5e:16x16").hosts == 64 and find_topology("v5e:2x4").hosts == 1
    assert find_topology("cpu:8").chips == 8
    for chip in CHIPS:
        assert (
            max(find_topology(name).chips for name in names() if name.startswith(f"{chip}:")) >= 256
        )


def test_several_slices():
    two = find_topology("2xv5litepod-16")
    assert two == find_topology("2xv5e:4x4") and two.name == "2xv5e:4x4"
    assert (two.slices, two.chips, two.hosts, two.accelerator_type) == (2, 32, 8, "v5litepod-16")
    assert two.ring_bandwidth(16) == find_topology("v5e:4x4").ring_bandwidth(16)
    with pytest.raises(InputError, match="v4:2x2x1 no network between slices is published"):
        find_topology("2xv4:2x2x1")


@pytest.mark.parametrize(
    ("name", "near"), [("v5e:4x5", "v5e:4x4"), ("v5litepod-15", "v5litepod-16"), ("v5p-65", "v5p-")]
)
def test_a_typo_is_told_what_is_near(name, near):
    with pytest.raises(InputError, match=f"{name}.*near it: .*{near}"):
        find_topology(name)


def test_rings_use_both_ways_round_only_where_ends_are_joined():
    pod, part, cube = (find_topology(name) for name in ("v5e:16x16", "v5e:4x4", "v5p:4x4x4"))
    assert pod.ring_bandwidth(16) == 2 * 50e9 and pod.ring_bandwidth(256) == 4 * 50e9
    assert part.ring_bandwidth(4) == 50e9 and part.ring_bandwidth(16) == 2 * 50e9
    assert cube.ring_bandwidth(64) == 6 * 100e9
