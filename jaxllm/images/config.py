"""Configs of the three training stages: classifier, tokenizer, code model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.data.images import ImageDataConfig, check_balance
from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.errors import InputError
from jaxllm.models.discriminator import DiscriminatorConfig
from jaxllm.models.dnd import DnDConfig
from jaxllm.models.image_classifier import ClassifierConfig
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.models.rq_transformer import RQTransformerConfig
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class ClassifierRun:
    """Trains a small classifier that scores samples, or whose features make a loss."""

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class PerceptualConfig:
    """The feature network of the perceptual loss."""

    kind: Literal["none", "classifier", "lpips"] = "none"
    path: str | None = None
    """`classifier`: the run folder of a trained classifier. `lpips`: a folder with vgg16 and lpips
    weight files."""
    weight: float = 1.0


@dataclass(frozen=True)
class AdversarialConfig:
    """The discriminator's part in tokenizer training; weight 0 trains without one."""

    weight: float = 0.0
    """0.75 in RQ-VAE's configs."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    start_step: int = 0
    adaptive: bool = True
    """Scale by the ratio of last-layer gradient norms."""
    r1_weight: float = 0.0
    """Weight of the R1 gradient penalty on real images."""
    model: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


@dataclass(frozen=True)
class TokenizerRun:
    """Trains the residual-VQ image tokenizer."""

    model: ImageTokenizerConfig
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: Precision = "auto"
    reconstruction: Literal["l1", "l2"] = "l2"
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    kmeans_start: int = 0
    """Images whose latents start the codebook by k-means; 0 starts it at random."""

    def __post_init__(self) -> None:
        if self.model.image_size != self.data.image_size:
            raise InputError(
                f"model.image_size {self.model.image_size} and data.image_size "
                f"{self.data.image_size} differ"
            )
        if self.model.channels != self.data.channels:
            raise InputError(
                f"model.channels {self.model.channels} and data.channels {self.data.channels} "
                "differ"
            )
        if self.optimizer.accumulate != 1:
            raise InputError("tokenizer training does not accumulate; set optimizer.accumulate 1")


@dataclass(frozen=True)
class CodeDataConfig:
    """Codes that a tokenizer extracted, and how they are drawn."""

    cache: str = ""
    """Folder of a code cache, made by `train/extract_codes.py`."""
    batch_size: int = 64
    random_crop: bool = True
    """Draw one of the stored crops per visit; otherwise always the first."""
    balance: float = 1.0
    """How far classes of unequal size are evened out, between 0, which draws every image equally
    often, and 1, every class: a class of n images is drawn in proportion to n^(1 - balance)."""

    def __post_init__(self) -> None:
        check_balance(self.balance)


@dataclass(frozen=True, kw_only=True)
class CodeTraining:
    """What training any code model takes besides the model."""

    data: CodeDataConfig = field(default_factory=CodeDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: Precision = "auto"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, kw_only=True)
class CodeModelRun(CodeTraining):
    """Trains a DnD-Transformer (or its vertical, parallel or flat structure) on codes."""

    model: DnDConfig


@dataclass(frozen=True, kw_only=True)
class RQTransformerRun(CodeTraining):
    """Trains an RQ-Transformer on the same codes."""

    model: RQTransformerConfig
