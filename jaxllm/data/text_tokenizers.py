"""Text tokenizers: one `Tokenizer` for every format, found by what a folder holds.

`tokenizer.json` (Hugging Face `tokenizers`), `tokenizer.model` (sentencepiece, or Llama 3's
tiktoken file of the same name), `*.tiktoken`, GPT-2's `encoder.json` with `vocab.bpe`, llama2.c's
`tok512.bin`, and bytes, which need no file. Special tokens are those of tokenizer_config.json,
special_tokens_map.json and added_tokens.json beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.data.tokenizer_codecs import (
    END_OF_TEXT,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    ByteCodec,
    Codec,
    JsonCodec,
    ScoredMergeCodec,
    SentencePieceCodec,
    TiktokenCodec,
    looks_like_tiktoken,
    tiktoken_ranks,
)
from jaxllm.errors import InputError

CONFIG, JSON = "tokenizer_config.json", "tokenizer.json"
SIDE_FILES = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
BYTES_CLASS = "jaxllm.bytes"
TRAINED = "jaxllm_train_bpe"
PAIR = ("encoder.json", "vocab.bpe")


@dataclass(frozen=True)
class TextTokenizerConfig:
    """Which tokenizer a run uses; the run folder keeps a copy of its files."""

    path: str = "bytes"
    """A tokenizer file, a folder that holds one, or `bytes`."""
    train_bpe: int = 0
    """Train a byte-level BPE of this many tokens on the run's training text instead; 0 for none."""

    def __post_init__(self) -> None:
        if self.train_bpe and self.train_bpe < 257:
            raise InputError(
                f"tokenizer.train_bpe {self.train_bpe} has no room for 256 bytes and a separator"
            )


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text in, token ids out, and back."""

    codec: Codec
    kind: str
    """bytes, json, sentencepiece, tiktoken, gpt2 or llama2c."""
    files: Mapping[str, bytes]
    """What `load_tokenizer` needs to make the same tokenizer again, by file name."""
    names: Mapping[str, str]
    """Texts of the special tokens as chat templates know them: bos_token, eos_token, ..."""
    bos: int | None
    eos: int | None
    pad: int | None
    adds_bos: bool
    """Whether the tokenizer's own convention is to begin a text with BOS."""
    identity: str
    """Kind and SHA-256 of everything that decides which ids a text gets."""

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        return self.codec.size

    @property
    def start(self) -> int | None:
        """The id that begins a training document: BOS, or EOS where there is no BOS."""
        return self.eos if self.bos is None else self.bos

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: Any text without lone surrogates.
          bos: Begin with BOS, where the tokenizer has one.
          eos: End with EOS, where the tokenizer has one.
          special: Give special tokens that are written in the text their ids, as chat templates
            need; otherwise they are ordinary text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text holds a lone surrogate (not Unicode) at character {error.start}"
            ) from None
        first = [self.bos] if bos and self.bos is not None else []
        last = [self.eos] if eos and self.eos is not None else []
        return first + self.codec.encode(text, special) + last

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids without special tokens; incomplete UTF-8 becomes U+FFFD."""
        checked = [int(number) for number in ids]
        for number in checked:
            if not 0 <= number < self.vocab_size:
                raise InputError(
                    f"token id {number} is outside the vocabulary of {self.vocab_size}"
                )
        return self.codec.decode(checked)

    def encode_pair(
        self, prompt: str, completion: str, *, bos: bool = False, eos: bool = False
    ) -> tuple[list[int], int]:
        """Returns the ids of prompt + completion, and how many of them are the prompt's.

        The text is encoded as a whole: apart, sentencepiece would put a space before the
        completion. A token across the boundary belongs to the completion.
        """
        whole = self.encode(prompt + completion, bos=bos, eos=eos)
        count = shared_prefix(self.encode(prompt, bos=bos), whole)
        return whole, min(count, len(whole) - (1 if eos and self.eos is not None else 0))

    @property
    def trained_size(self) -> int | None:
        """What `train_bpe` was asked for, when it made this tokenizer."""
        return _json(self.files, CONFIG, self.kind).get(TRAINED)


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many leading ids two sequences share."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


class StreamDecoder:
    """Decodes ids one by one: all pieces, with that of `finish`, make up the text of all ids.

    A piece is held back while later ids may change it: an unfinished UTF-8 character, or a run of
    byte tokens that the format decodes as a whole.

    Args:
      tokenizer: The tokenizer.
      prompt: Ids before the first one pushed, whose text is not returned. Without them a first
        word loses its leading space, as at the start of any text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.codec.special.values())
        self._ids = list(prompt)
        text = tokenizer.decode(self._ids)
        self._sent = len(text) - _unfinished(text)
        self._forget(text)

    def push(self, token: int) -> str:
        """Returns the text that becomes final with one more id."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        sent, self._sent = self._sent, max(self._sent, self._stable(text))
        piece = text[sent : self._sent]
        self._forget(text)
        return piece

    def finish(self) -> str:
        """Returns what was held back."""
        text = self._tokenizer.decode(self._ids)
        sent, self._sent = self._sent, len(text)
        return text[sent:]

    def _stable(self, text: str) -> int:
        """Returns how many leading characters no later id can change."""
        visible = (number for number in reversed(self._ids) if number not in self._special)
        if next(visible, None) in self._tokenizer.codec.runs:
            return self._sent
        return len(text) - _unfinished(text)

    def _forget(self, text: str) -> None:
        """Keeps only the last id when its own text is enough context for the next ones."""
        if self._sent < len(text) or not self._ids:
            return
        last = self._tokenizer.decode(self._ids[-1:])
        if last and "\ufffd" not in last:
            self._ids, self._sent = self._ids[-1:], len(last)


def _unfinished(text: str) -> int:
    # At most three bytes wait for the end of their character, each a U+FFFD of its own.
    return min(len(text) - len(text.rstrip("\ufffd")), 3)


# -- loading and saving --------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a folder or file, or the built-in one for `bytes`.

    In a folder tokenizer.json comes before tokenizer.model, *.tiktoken, GPT-2's pair and tok*.bin.

    Raises:
      InputError: No tokenizer, two of the same kind, or a damaged or contradictory file.
    """
    if str(path) == "bytes":
        return byte_tokenizer()
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such tokenizer file or folder, and not the name 'bytes'")
    found = find_tokenizer(path)
    if found is None:
        raise InputError(
            f"{path}: holds no tokenizer; expected tokenizer.json, tokenizer.model, *.tiktoken, "
            "encoder.json with vocab.bpe, or tok512.bin"
        )
    return found


def find_tokenizer(path: Path) -> Tokenizer | None:
    """Returns the tokenizer of a folder or file, or None where there is none at all."""
    chosen = _companions(path) if path.is_file() else _choose(path)
    folder = path.parent if path.is_file() else path
    side = {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}
    files = {name: file.read_bytes() for name, file in (chosen | side).items()}
    if chosen:
        return tokenizer_from_files(files, str(next(iter(chosen.values()))))
    if _json(files, CONFIG, str(folder)).get("tokenizer_class") == BYTES_CLASS:
        return _assemble(ByteCodec(), "bytes", files, {}, None, str(folder))
    return None


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files of a tokenizer, its main file last, each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in sorted(
        tokenizer.files.items(), key=lambda item: item[0] not in SIDE_FILES
    ):
        temporary = folder / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


def byte_tokenizer() -> Tokenizer:
    """Returns the built-in tokenizer: 256 bytes, BOS, EOS and padding."""
    config = json.dumps({"tokenizer_class": BYTES_CLASS}).encode()
    return _assemble(ByteCodec(), "bytes", {CONFIG: config}, {}, None, "bytes")


def tiktoken_tokenizer(
    ranks: bytes, special: Mapping[str, int], pattern: str, *, where: str, **names: str
) -> Tokenizer:
    """Returns the tokenizer of a tiktoken file whose other half its owner knows.

    Args:
      ranks: The file.
      special: Special tokens by name.
      pattern: Regular expression that cuts text, as in `tiktoken.Encoding`.
      where: Names the file in errors.
      **names: `bos_token`, `eos_token`, `pad_token`.
    """
    config = {
        **names,
        "pat_str": pattern,
        "added_tokens_decoder": {
            str(number): {"content": token, "special": True} for token, number in special.items()
        },
    }
    files = {"tokenizer.tiktoken": ranks, CONFIG: json.dumps(config).encode()}
    return tokenizer_from_files(files, where)


def tokenizer_from_files(files: Mapping[str, bytes], where: str) -> Tokenizer:
    """Returns the tokenizer that files, given by their names, describe."""
    config = _json(files, CONFIG, where)
    added = _added_tokens(files, where)
    codec: Codec
    if JSON in files:
        codec, kind = JsonCodec(files[JSON], added, where), "json"
    elif "vocab.bpe" in files:
        codec = JsonCodec.from_pair(files["encoder.json"], files["vocab.bpe"], where)
        kind = "gpt2"
    elif "tok512.bin" in files:
        codec, kind = ScoredMergeCodec(files["tok512.bin"], where), "llama2c"
    elif "tokenizer.tiktoken" in files:
        codec = _tiktoken_codec(files["tokenizer.tiktoken"], added, config.get("pat_str"), where)
        kind = "tiktoken"
    else:
        codec, kind = SentencePieceCodec(files["tokenizer.model"], added, where), "sentencepiece"
    return _assemble(codec, kind, files, _names(files, where), config.get("add_bos_token"), where)


def _tiktoken_codec(
    content: bytes, added: Mapping[int, tuple[str, bool]], pattern: str | None, where: str
) -> TiktokenCodec:
    special = {token: number for number, (token, _) in added.items()}
    # A bare file is one of OpenAI's GPT-2 family, whose end of text follows the ranks.
    special = special or {END_OF_TEXT: max(tiktoken_ranks(content, where).values()) + 1}
    default = LLAMA3_PATTERN if "<|begin_of_text|>" in special else GPT2_PATTERN
    codec = TiktokenCodec(content, special, pattern or default, where)
    if END_OF_TEXT in special:
        codec.defaults = {"bos": special[END_OF_TEXT], "eos": special[END_OF_TEXT]}
    return codec


def _assemble(
    codec: Codec,
    kind: str,
    files: Mapping[str, bytes],
    names: Mapping[str, str],
    add_bos: bool | None,
    where: str,
) -> Tokenizer:
    ids: dict[str, int | None] = {}
    for role in ("bos", "eos", "pad"):
        name = names.get(f"{role}_token")
        ids[role] = codec.defaults.get(role) if name is None else codec.find(name)
        if name is not None and ids[role] is None:
            raise InputError(f"{where}: {role}_token {name!r} is not in the vocabulary")
    by_id = {number: token for token, number in codec.special.items()}
    known = {f"{role}_token": by_id[i] for role, i in ids.items() if i is not None and i in by_id}
    main = {name: content for name, content in files.items() if name not in SIDE_FILES}
    digest = hashlib.sha256(
        json.dumps([ids, sorted(codec.special.items()), codec.pattern]).encode()
    )
    for name in sorted(main):
        digest.update(hashlib.sha256(main[name]).digest())
    return Tokenizer(
        codec=codec,
        kind=kind,
        files=dict(files),
        names={**known, **names},
        adds_bos=ids["bos"] is not None
        and (codec.first == ids["bos"] if add_bos is None else add_bos),
        identity=f"{kind}:{digest.hexdigest()}",
        **ids,
    )


# -- which files ---------------------------------------------------------------------------------


def _choose(folder: Path) -> dict[str, Path]:
    """Returns the files that define the tokenizer of a folder, by the names they are kept under."""
    if (folder / JSON).is_file():
        return {JSON: folder / JSON}
    models = sorted(folder.glob("*.model"))
    if folder / "tokenizer.model" in models:
        models = [folder / "tokenizer.model"]
    pair = [folder / name for name in PAIR if (folder / name).is_file()][:1]
    tiktoken, scored = (sorted(folder.glob(pattern)) for pattern in ("*.tiktoken", "tok*.bin"))
    for found in (models, tiktoken, pair, scored):
        if len(found) > 1:
            names = " and ".join(file.name for file in found[:2])
            raise InputError(f"{folder}: holds {names}; name the one tokenizer file to use")
        if found:
            return _companions(found[0])
    return {}


def _companions(path: Path) -> dict[str, Path]:
    """Returns a tokenizer file under the name of its format, with the other half of a pair."""
    if path.name in PAIR:
        halves = {name: path.with_name(name) for name in PAIR}
        for name, half in halves.items():
            if not half.is_file():
                raise InputError(f"{path}: expected {name} beside it")
        return halves
    if path.name == "sentencepiece.bpe.model":
        raise InputError(f"{path}: its models shift these ids; this folder needs a tokenizer.json")
    if path.suffix == ".json":
        return {JSON: path}
    if path.suffix == ".bin":
        return {"tok512.bin": path}
    with path.open("rb") as file:
        head = file.read(4096)
    tiktoken = path.suffix == ".tiktoken" or looks_like_tiktoken(head)
    return {"tokenizer.tiktoken" if tiktoken else "tokenizer.model": path}


def _json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{where}: {name} beside it is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{where}: {name} beside it holds a {kind}, expected an object")
    return value


def _names(files: Mapping[str, bytes], where: str) -> dict[str, str]:
    """Returns the texts of named special tokens; tokenizer_config.json decides."""
    names = {}
    for file in ("special_tokens_map.json", CONFIG):
        for key, value in _json(files, file, where).items():
            token = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and not key.startswith("add_") and isinstance(token, str):
                names[key] = token
    return names


def _added_tokens(files: Mapping[str, bytes], where: str) -> dict[int, tuple[str, bool]]:
    added: dict[int, tuple[str, bool]] = {}
    try:
        for token, number in _json(files, "added_tokens.json", where).items():
            added[int(number)] = (str(token), True)
        table = _json(files, CONFIG, where).get("added_tokens_decoder", {})
        for number, entry in table.items():
            added[int(number)] = (str(entry["content"]), bool(entry.get("special", False)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{where}: added tokens must be ids with a text each, as transformers writes them"
        ) from None
    return added


# -- training ------------------------------------------------------------------------------------


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE trained on texts; id 0 separates documents.

    Args:
      texts: The training texts, each short enough to be held in memory.
      vocab_size: Tokens at most; fewer where the texts hold fewer pairs that occur twice.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    roles = ("bos_token", "eos_token", "pad_token")
    # The class by which transformers finds a tokenizer.json whatever the model beside it.
    transformers_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = {**dict.fromkeys(roles, END_OF_TEXT), **transformers_class, TRAINED: vocab_size}
    files = {JSON: library.to_str().encode(), CONFIG: json.dumps(config, indent=2).encode()}
    return tokenizer_from_files(files, "the trained tokenizer")
