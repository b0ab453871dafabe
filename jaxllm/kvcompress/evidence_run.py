"""Sizes of the experiment on HeadKV, shared by its parts, and the tasks it is run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxllm.errors import InputError
from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.recall import Task
from jaxllm.kvcompress.recall_methods import METHODS
from jaxllm.kvcompress.recall_protocols import PROTOCOLS, Protocol
from jaxllm.kvcompress.scorers import Window
from jaxllm.kvcompress.tasks import NeedleTask, ReasonNeedleTask, SetGetTask
from jaxllm.training.evidence import check_interval, check_names

TASKS: Mapping[str, Task] = {
    "needle": NeedleTask(keys=8),
    "reason_needle": ReasonNeedleTask(keys=8, values=8),
    "set_get": SetGetTask(operations=60),
}
PARTS = ("compare", "causal", "long", "times")
OWN_SETTINGS = {
    "causal": ("zeroed", "zero_draws"),
    "long": ("long_seeds", "long_budgets"),
    "times": ("timed_length", "timed_budget"),
}
"""What only one part depends on."""
TEST, VALIDATION, HEADS = 2_000_003, 3_000_017, 4_000_037
"""Seeds of sequences; none is a training seed."""


@dataclass(frozen=True)
class CacheEvidenceRun:
    """Sizes of the experiment."""

    models: str = "docs/evidence/headkv_models"
    """Folder of trained models, TASK-SEED each."""
    retrain: bool = False
    """Train the models again, into runs/headkv, from configs/kvcompress."""
    parts: tuple[str, ...] = PARTS
    """What is run; the others are kept from the results that the folder holds."""
    tasks: tuple[str, ...] = ("needle", "reason_needle")
    seeds: tuple[int, ...] = (0, 1, 2)
    protocols: tuple[Protocol, ...] = PROTOCOLS
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Mean entries of a KV head besides the window."""
    methods: tuple[str, ...] = METHODS
    betas: tuple[float, ...] = (1.01, 1.1, 1.5, 2.0, 5.0)
    draws: int = 3
    """Draws of the random and the shuffled scores."""
    sequences: int = 128
    validation: int = 64
    examples: int = 64
    """Sequences that head scores are measured on."""
    window: int = 4
    pool: int = 3
    zeroed: tuple[int, ...] = (1, 2, 4, 8)
    """Heads set to zero in the causal check."""
    zero_draws: int = 10
    long_seeds: tuple[int, ...] = (0, 1, 2)
    """Models of the long decoding task."""
    long_budgets: tuple[int, ...] = (2, 4, 8)
    timed_length: int = 2048
    """Context of the timed caches."""
    timed_budget: int = 64

    def __post_init__(self) -> None:
        check_interval(self.seeds, sequences=self.sequences)
        for name, known in (
            ("parts", PARTS),
            ("tasks", TASKS),
            ("methods", METHODS),
            ("protocols", PROTOCOLS),
        ):
            check_names(name, getattr(self, name), known)
        if not {"full", "uniform"} <= set(self.methods):
            raise InputError("methods must hold full and uniform, which others are compared with")
        if not self.betas or min(self.budgets) < 1:
            raise InputError(f"betas {self.betas} must not be empty, budgets {self.budgets} 1 up")

    @property
    def eviction(self) -> Eviction:
        """What all methods share."""
        return Eviction(window=self.window, scorer=Window(pool=self.pool))
