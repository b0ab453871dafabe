"""The policy of a run, its reference, and where their arrays are kept.

    params   policy     all parameters, or the adapters when only these are trained
             critic     trunk, which starts as the policy, and head, for PPO
    extra    base       the parameters under the adapters
             reference  a copy of the policy, or another model
             running    BCO's running mean of rewards

Everything of `extra` is saved with every checkpoint, so a run folder needs no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm.data.text_tokenizers import Tokenizer
from jaxllm.decoding.language_model import (
    LanguageModel,
    describe_language_model,
    load_language_model,
)
from jaxllm.errors import InputError
from jaxllm.models.decoder import DECODER_KERNELS, DECODER_RULES, Decoder, DecoderConfig, decoder
from jaxllm.models.scalar_head import HEAD_RULES, new_head, token_values
from jaxllm.nn.lora import LoraConfig, init_adapters, lora_rules, merge
from jaxllm.nn.module import Blueprint
from jaxllm.nn.precision import compute_dtype
from jaxllm.parallel.sharding import Rules, leaf_paths
from jaxllm.preference.config import (
    AdaptersOff,
    FrozenReference,
    ModelConfig,
    MovingReference,
    PrecomputedReference,
    PreferenceRun,
    Reference,
    model_folder,
    resolved_reference,
)
from jaxllm.preference.log_probs import Batch, SlotShape, row_hidden
from jaxllm.preference.registry import needs
from jaxllm.training.language_model import check_same_model
from jaxllm.training.run_folder import to_plain

Tree = Any
Adapted = tuple[Decoder, tuple[Tree, float] | None]
"""A model and the adapters of its layers."""


@dataclass(frozen=True)
class Policy:
    """How policy and reference are made of a state's arrays.

    Attributes:
      folder: Where the policy starts.
      reference: The kind of reference.
      blueprint: Of the policy.
      other: Of the reference, where it is another model.
      lora: Adapters, or None when all parameters are trained.
      tokenizer: The policy's, None for models without one.
      eos: Ids that end a completion.
      critic: Whether a critic is trained too.
    """

    folder: Path
    reference: Reference
    blueprint: Blueprint[Decoder]
    config: DecoderConfig
    other: Blueprint[Decoder] | None
    lora: LoraConfig | None
    tokenizer: Tokenizer | None
    eos: tuple[int, ...]
    critic: bool = False

    @property
    def keeps_reference(self) -> bool:
        """Whether `extra` holds a reference."""
        return isinstance(self.reference, FrozenReference | MovingReference)

    @property
    def reference_config(self) -> DecoderConfig:
        """The architecture of the reference."""
        if self.other is None:
            return self.config
        return self.other.build(self.other.abstract_params, {}).config  # type: ignore[attr-defined]

    @property
    def starts_equal(self) -> bool:
        """Whether policy and reference are the same before the first step."""
        named = getattr(self.reference, "folder", None)
        return named is None and isinstance(
            self.reference, FrozenReference | MovingReference | AdaptersOff | PrecomputedReference
        )

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Returns (params, extra) of the right shapes; all but adapters are then loaded."""
        whole = self.blueprint.init(key)[0]
        extra: dict[str, Tree] = {}
        params: dict[str, Tree] = {"policy": whole}
        if self.lora is not None:
            params["policy"] = init_adapters(key, whole, self.lora, DECODER_KERNELS)
            extra["base"] = whole
        if self.critic:
            params["critic"] = {"trunk": whole, "head": new_head(self.config.dim)}
        if self.keeps_reference:
            blueprint = self.other or self.blueprint
            extra["reference"] = blueprint.init(key)[0]
        return params, extra

    def load(self) -> Callable[[Mesh], Tree]:
        """What reads the parts of `params` that come from folders."""

        def load(mesh: Mesh) -> Tree:
            params: dict[str, Tree] = {}
            if self.lora is None:
                params["policy"] = load_language_model(self.folder, mesh=mesh).params
            if self.critic:
                trunk = load_language_model(self.folder, mesh=mesh).params
                params["critic"] = {"trunk": trunk, "head": new_head(self.config.dim)}
            return params

        return load

    def load_extra(self) -> Callable[[Mesh], Tree]:
        """What reads the parts of `extra` that come from folders."""

        def load(mesh: Mesh) -> Tree:
            extra: dict[str, Tree] = {}
            if self.lora is not None:
                extra["base"] = load_language_model(self.folder, mesh=mesh).params
            if self.keeps_reference:
                folder = getattr(self.reference, "folder", None)
                source = self.folder if folder is None else model_folder(folder)
                extra["reference"] = load_language_model(source, mesh=mesh).params
            return extra

        return load

    def build(self, params: Tree, extra: Tree) -> Adapted:
        """The policy as a model."""
        if self.lora is None:
            return self.blueprint.build(params["policy"], {}), None
        model = self.blueprint.build(jax.lax.stop_gradient(extra["base"]), {})
        return model, (params["policy"], self.lora.scale)

    def build_reference(self, params: Tree, extra: Tree) -> Adapted:
        """The reference as a model, without gradient."""
        if isinstance(self.reference, AdaptersOff):
            return self.blueprint.build(jax.lax.stop_gradient(extra["base"]), {}), None
        blueprint = self.other or self.blueprint
        return blueprint.build(jax.lax.stop_gradient(extra["reference"]), {}), None

    def values(self, params: Tree, batch: Batch, shape: SlotShape) -> jax.Array:
        """The critic's value before each token [R, T]."""
        critic = params["critic"]
        model = self.blueprint.build(critic["trunk"], {})
        return token_values(critic["head"], row_hidden(model, batch, shape))

    def merged(self, params: Tree, extra: Tree) -> Tree:
        """The parameters of the policy with its adapters added, for decoding and export."""
        if self.lora is None:
            return params["policy"]
        return merge(extra["base"], params["policy"], self.lora, DECODER_KERNELS)

    def language_model(self) -> LanguageModel:
        """The policy without parameters, for whoever samples from it."""
        return LanguageModel(
            str(self.folder), self.config, self.blueprint, None, self.tokenizer, self.eos
        )

    @property
    def rules(self) -> Rules:
        """Sharding rules of `params` and `extra`."""
        if self.lora is None:
            small: Rules = ()
        else:
            paths = [path for path, _ in leaf_paths(self.blueprint.abstract_params)]  # type: ignore[attr-defined]
            small = lora_rules(DECODER_RULES, DECODER_KERNELS, paths)
        whole = [
            (f"^(policy|base|reference|critic/trunk)/{pattern.removeprefix('^')}", axes)
            for pattern, axes in DECODER_RULES
        ]
        return (*small, *whole, *HEAD_RULES, (r"^running/", ()))

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with; `read_model` makes the policy from it."""
        return {
            "decoder": to_plain(self.config),
            "lora": None if self.lora is None else to_plain(self.lora),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.identity,
        }


def open_policy(run: PreferenceRun) -> Policy:
    """Reads what policy and reference of a run are, but not their parameters.

    Raises:
      InputError: A folder that holds no language model or another than `model.architecture`, or a
        reference of another vocabulary.
    """
    policy = policy_of(run.model, resolved_reference(run), run.precision)
    return replace(policy, critic="values" in needs(run.algorithm))


def policy_of(model: ModelConfig, reference: Reference, precision: Any) -> Policy:
    """As `open_policy`, of the parts."""
    found = describe_language_model(model_folder(model.policy))
    if model.architecture is not None:
        check_same_model(f"model.policy {found.where}", found.config, model.architecture)
    return _assembled(model, reference, precision, found)


def planned_policy(run: PreferenceRun) -> Policy:
    """As `open_policy`, without the policy's folder where the config says the architecture."""
    model, reference = run.model, resolved_reference(run)
    if model.architecture is None:
        return open_policy(run)
    folder = model_folder(model.policy)
    blueprint = decoder(model.architecture, compute_dtype(run.precision))
    found = LanguageModel(folder, model.architecture, blueprint, None, None, ())
    policy = _assembled(model, reference, run.precision, found)
    return replace(policy, critic="values" in needs(run.algorithm))


def _assembled(
    model: ModelConfig, reference: Reference, precision: Any, found: LanguageModel
) -> Policy:
    dtype = compute_dtype(precision)
    config = replace(found.config, remat=model.remat, dropout=0.0)
    other = None
    named = getattr(reference, "folder", None)
    if named is not None:
        second = describe_language_model(model_folder(named))
        _same_vocabulary(found, second)
        other = decoder(replace(second.config, dropout=0.0), dtype)
    return Policy(
        folder=Path(found.where),
        reference=reference,
        blueprint=decoder(config, dtype),
        config=config,
        other=other,
        lora=model.lora,
        tokenizer=found.tokenizer,
        eos=found.eos,
    )


def _same_vocabulary(policy: LanguageModel, reference: LanguageModel) -> None:
    sizes = policy.config.vocab_size, reference.config.vocab_size
    tokenizers = [
        None if m.tokenizer is None else m.tokenizer.identity for m in (policy, reference)
    ]
    if sizes[0] != sizes[1] or (None not in tokenizers and tokenizers[0] != tokenizers[1]):
        found = [f"{size} ids" for size in sizes]
        if sizes[0] == sizes[1]:
            found = [f"tokenizer {str(identity)[:24]}" for identity in tokenizers]
        raise InputError(
            f"reference {reference.where} has another vocabulary: {found[1]}, the policy "
            f"{policy.where} has {found[0]}"
        )
