"""NVIDIA cards by the name that the driver gives them: peak rate and memory bandwidth.

Peaks are of dense bfloat16 products with float32 sums, without the sparsity that data sheets like
to count in. A name must match whole: cards of one generation differ by form factor.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.errors import InputError


@dataclass(frozen=True)
class Card:
    """One card."""

    name: str
    peak_flops: float
    """bfloat16 matrix products, FLOP/s."""
    bandwidth: float
    """Of its memory, bytes per second."""


# Figures of NVIDIA's data sheets of the H100, H200, A100 and L4.
CARDS = {
    card.name: card
    for card in (
        Card("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        Card("NVIDIA H200", 989e12, 4.8e12),
        Card("NVIDIA A100-SXM4-80GB", 312e12, 2.04e12),
        Card("NVIDIA A100-SXM4-40GB", 312e12, 1.55e12),
        Card("NVIDIA A100-PCIE-40GB", 312e12, 1.55e12),
        Card("NVIDIA L4", 121e12, 0.3e12),
    )
}


def find_card(
    name: str, peak_tflops: float | None = None, bandwidth_tbs: float | None = None
) -> Card:
    """Returns the card of a name, with what is given in place of the table's figures.

    Args:
      name: As JAX's `device_kind` and `nvidia-smi` say it.
      peak_tflops: Dense bfloat16 TFLOP/s.
      bandwidth_tbs: TB/s.

    Raises:
      InputError: A card that is not in the table without both figures, or one that is not positive.
    """
    for option, value in (("--peak-tflops", peak_tflops), ("--bandwidth", bandwidth_tbs)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{option} {value} must be a positive number")
    known = CARDS.get(name)
    if known is None and (peak_tflops is None or bandwidth_tbs is None):
        raise InputError(
            f"the peaks of {name!r} are not known; give its dense bfloat16 rate and its memory "
            "bandwidth: --peak-tflops TFLOP/s --bandwidth TB/s"
        )
    return Card(
        name,
        known.peak_flops if peak_tflops is None and known else 1e12 * (peak_tflops or 0),
        known.bandwidth if bandwidth_tbs is None and known else 1e12 * (bandwidth_tbs or 0),
    )
