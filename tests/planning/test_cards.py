"""Peaks of cards: exact names, and figures that a user gives."""

import pytest

from jaxllm.errors import InputError
from jaxllm.planning.cards import find_card


def test_a_known_card_has_its_figures_unless_others_are_given():
    assert find_card("NVIDIA H200").peak_flops == 989e12
    assert find_card("NVIDIA H200").bandwidth == 4.8e12
    given = find_card("NVIDIA L4", bandwidth_tbs=0.25)
    assert (given.peak_flops, given.bandwidth) == (121e12, 0.25e12)


def test_an_unknown_card_needs_both_figures():
    card = find_card("NVIDIA H100 PCIe", 756, 2.0)
    assert (card.name, card.peak_flops, card.bandwidth) == ("NVIDIA H100 PCIe", 756e12, 2e12)
    for figures in ((None, None), (756, None), (None, 2.0)):
        with pytest.raises(InputError, match="'NVIDIA H100 PCIe' are not known; give .*--bandw"):
            find_card("NVIDIA H100 PCIe", *figures)
    for figures in ((0, 1), (1, -1), (float("nan"), 1)):
        with pytest.raises(InputError, match="must be a positive number"):
            find_card("NVIDIA L4", *figures)
