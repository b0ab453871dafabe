"""Vector quantizers as pure functions with explicit state.

Each quantizer is a frozen configuration with `init`, `quantize`, `decode` and `total_loss`; see
`Quantizer` for the shared methods and `QuantizeOutput` for what `quantize` returns.
"""

from __future__ import annotations

from jaxllm.quantize.codebook import nearest_code
from jaxllm.quantize.estimators import rotation, straight_through
from jaxllm.quantize.finite import FSQ
from jaxllm.quantize.interface import Params, QuantizeOutput, Quantizer, State
from jaxllm.quantize.kmeans import kmeans_start, residual_kmeans_start
from jaxllm.quantize.lookup_free import BSQ, LFQ
from jaxllm.quantize.residual import ResidualVQ
from jaxllm.quantize.simvq import SimVQ
from jaxllm.quantize.usage import (
    ErrorStats,
    attainable_usage,
    count_codes,
    error_stats,
    merge_errors,
    perplexity,
    usage,
    usage_report,
)

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "ErrorStats",
    "Params",
    "QuantizeOutput",
    "Quantizer",
    "ResidualVQ",
    "SimVQ",
    "State",
    "attainable_usage",
    "count_codes",
    "error_stats",
    "kmeans_start",
    "merge_errors",
    "nearest_code",
    "perplexity",
    "residual_kmeans_start",
    "rotation",
    "straight_through",
    "usage",
    "usage_report",
]
