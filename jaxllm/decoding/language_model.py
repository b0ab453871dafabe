"""A language model ready for use, from a Hugging Face folder or from a run of this library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxllm.data.chat import ChatTemplate, check_messages, encode_chat, tokenizer_chat_template
from jaxllm.data.text_tokenizers import Tokenizer, find_tokenizer
from jaxllm.decoding.generate import TextGenerator
from jaxllm.decoding.text import NewCaches, TextSampler, TextSampling
from jaxllm.decoding.text_cache import dense_cache
from jaxllm.errors import InputError
from jaxllm.hub.hf_folder import is_hf_folder
from jaxllm.models.decoder import Decoder, DecoderConfig, decoder
from jaxllm.nn.module import Blueprint
from jaxllm.nn.precision import compute_dtype
from jaxllm.training import language_model as trained
from jaxllm.training.state import TrainState

Tree = Any


@dataclass(frozen=True)
class LanguageModel:
    """Everything that turns text into ids and ids into probabilities.

    Attributes:
      where: The folder, named in errors.
      config: The architecture.
      blueprint: Builds the model from `params`.
      params: Its parameters.
      tokenizer: None for a model without one; prompts are then given as ids.
      eos: Ids that end a completion.
    """

    where: str
    config: DecoderConfig
    blueprint: Blueprint[Decoder]
    params: Tree
    tokenizer: Tokenizer | None
    eos: tuple[int, ...]

    def need_tokenizer(self, what: str) -> Tokenizer:
        """Returns the tokenizer, or raises InputError saying that `what` needs one."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.where}: has no tokenizer, which {what} needs; give ids instead"
            )
        return self.tokenizer

    def chat_template(self) -> ChatTemplate:
        """Returns the tokenizer's chat template, or raises InputError."""
        return tokenizer_chat_template(self.need_tokenizer("messages"), self.where)

    def prompt_ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        """Returns the ids of a record's `prompt`, `messages` or `prompt_ids`.

        Raises:
          InputError: Not exactly one of them, one of another type, an empty one, or an id out of
            range.
        """
        given = [name for name in ("prompt", "messages", "prompt_ids") if name in row]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise InputError(f"{where}: needs one of prompt, messages, prompt_ids; has {found}")
        value = row[given[0]]
        if given[0] == "prompt":
            if not isinstance(value, str):
                raise InputError(f"{where}: prompt is {value!r:.40}, expected a string")
            tokenizer = self.need_tokenizer("a text prompt")
            if not value:
                # The mark that starts a text is not what an empty variable of a script means.
                raise InputError(f"{where}: the prompt is empty; prompt_ids may hold marks alone")
            ids = tokenizer.encode(value, bos=tokenizer.adds_bos)
        elif given[0] == "messages":
            check_messages(value)
            tokenizer, template = self.need_tokenizer("messages"), self.chat_template()
            ids = encode_chat(tokenizer, template, value, add_generation_prompt=True)
        else:
            ids = check_ids(value, self.config.vocab_size, f"{where}: prompt_ids")
        if not ids:
            raise InputError(f"{where}: the prompt has no tokens; a model needs at least one")
        return ids

    def check_length(self, count: int, where: str, *, chunked: bool = False) -> None:
        """Refuses more tokens than the model has positions for.

        Rotary positions go on beyond those of training, but models do not follow: that is allowed
        to who asks for it by prefilling in chunks, and to models that were stretched.

        Args:
          count: Tokens.
          where: Names them in the error.
          chunked: Whether the prompt is prefilled in chunks.

        Raises:
          InputError: Too many.
        """
        config = self.config
        stretched = config.rope is not None and config.rope.scaling != "none"
        if count <= config.max_positions or (
            not config.learned_positions and (chunked or stretched)
        ):
            return
        advice = "" if config.learned_positions else "; --prefill-chunk N goes beyond them"
        raise InputError(
            f"{where}: {count} tokens, the model has {config.max_positions} positions{advice}"
        )

    def new_caches(self) -> NewCaches:
        """Returns the maker of full caches; a layer with a sliding window holds only that."""
        attention = self.config.attention

        def make(batch: int, prompt_slots: int, slots: int) -> list[Any]:
            del prompt_slots
            return [
                dense_cache(
                    batch,
                    attention.kv_heads,
                    slots,
                    attention.head_dim,
                    self.dtype,
                    window=window,
                    soft_cap=attention.soft_cap,
                    rolling=window is not None and window < slots,
                )
                for window in self.config.layer_windows
            ]

        return make

    @property
    def dtype(self) -> Any:
        """Compute dtype, in which caches are kept."""
        return self.blueprint.build(self.blueprint.abstract_params, {}).dtype  # type: ignore[attr-defined]

    def sampler(
        self, new_caches: NewCaches | None = None, *, prefill_chunk: int | None = None
    ) -> TextSampler:
        """Returns a compiled generator over full caches or those that `new_caches` makes."""
        return TextSampler(
            self.blueprint.build,
            new_caches or self.new_caches(),
            prefill_chunk=prefill_chunk,
            known_ids=None if self.tokenizer is None else self.tokenizer.vocab_size,
        )


def is_language_model(path: str | Path) -> bool:
    """Whether a folder is one that `load_language_model` reads."""
    config = Path(path) / "config.json"
    if is_hf_folder(path):
        return True
    try:
        return trained.is_model_run(json.loads(config.read_text()))
    except (OSError, ValueError):
        return False


def load_language_model(
    path: str | Path, *, mesh: Mesh | None = None, dtype: Any = None
) -> LanguageModel:
    """Returns the model of a Hugging Face folder or of a training run, whichever `path` is.

    Raises:
      InputError: Neither of them, or one that is damaged.
    """
    folder = Path(path)
    config, blueprint, params = trained.read_model(folder, mesh=mesh, dtype=dtype)
    tokenizer, eos = _text_side(folder, config)
    return LanguageModel(str(folder), config, blueprint, params, tokenizer, eos)


def describe_language_model(path: str | Path) -> LanguageModel:
    """As `load_language_model`, without reading any parameters: `params` is None.

    Computation is in the backend's compute dtype.
    """
    folder = Path(path)
    config = trained.model_config(folder)
    tokenizer, eos = _text_side(folder, config)
    blueprint = decoder(config, compute_dtype("auto"))
    return LanguageModel(str(folder), config, blueprint, None, tokenizer, eos)


def _text_side(folder: Path, config: DecoderConfig) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """The tokenizer of a folder, and the ids that end a text."""
    tokenizer = find_tokenizer(folder)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )
    return tokenizer, _eos_of(folder, tokenizer)


def text_sampler(
    run: trained.LanguageModelRun, *, prompt: str = "", max_new_tokens: int = 128
) -> Callable[[TrainState, Tokenizer], str]:
    """Returns the sample hook of a training run: what its model says after `prompt`.

    Args:
      run: The run's config.
      prompt: Where the text begins; nothing but the document's first token by default.
      max_new_tokens: Length of the sample, drawn at temperature 0.8 from a fixed seed.
    """
    blueprint = decoder(run.model, compute_dtype(run.precision))
    sampler: TextSampler | None = None

    def sample(state: TrainState, tokenizer: Tokenizer) -> str:
        nonlocal sampler
        if sampler is None:  # Compiled once, whatever the parameters.
            sampler = LanguageModel("run", run.model, blueprint, None, tokenizer, ()).sampler()
        ids = tokenizer.encode(prompt)
        ids = ids if tokenizer.start is None else [tokenizer.start, *ids]
        generate = TextGenerator(state.best_params, state.extra, sampler, tokenizer)
        stops = () if tokenizer.eos is None else (tokenizer.eos,)
        sampling = TextSampling(max_new_tokens, temperature=0.8, stop_ids=stops)
        ((completion,),) = generate([ids or [0]], sampling)
        return prompt + (completion.text or "")

    return sample


def check_ids(value: Any, vocabulary: int, what: str) -> list[int]:
    """Returns a list of token ids, checked.

    Raises:
      InputError: Not a list of whole numbers, or one outside the vocabulary.
    """
    if not isinstance(value, list):
        raise InputError(f"{what} is a {type(value).__name__}, expected a list of token ids")
    for place, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise InputError(f"{what}: {token!r} at {place} is not an id of 0 .. {vocabulary - 1}")
    return value


def _eos_of(folder: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Ids that end a text: of generation_config.json, else config.json, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: not a JSON object ({error})") from None
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list):
            return tuple(int(token) for token in found)
    return () if tokenizer is None or tokenizer.eos is None else (tokenizer.eos,)
