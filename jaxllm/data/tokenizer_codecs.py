"""Text to token ids and back, one class per file format.

A codec knows ids and bytes only; which ids begin and end a text, and which files describe them, is
`text_tokenizers`' part. The formats are read by the libraries that define them (`tokenizers`,
`sentencepiece`, `tiktoken`); llama2.c's `tok512.bin` and plain bytes are decoded here.
"""

from __future__ import annotations

import base64
import binascii
import functools
import heapq
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxllm.errors import InputError

# OpenAI's GPT-2 and Whisper.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Meta's Llama 3.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"


class Codec(Protocol):
    """One vocabulary."""

    size: int
    """Ids run from 0 to size - 1."""
    special: Mapping[str, int]
    """Tokens that stand for no text; `decode` leaves them out."""
    defaults: Mapping[str, int]
    """Ids of `bos`, `eos` and `pad` as far as the format itself says."""
    first: int | None
    """The id that the format's own convention puts before a text."""
    runs: frozenset[int]
    """Ids that are decoded together with the neighbours of their kind, so that a later one may
    change the text of an earlier one."""
    pattern: str
    """The regular expression that cuts text before merging, where the user may choose it."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Returns ids; special tokens written in the text become their ids if `special`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids in [0, size); incomplete UTF-8 becomes U+FFFD."""
        ...

    def find(self, token: str) -> int | None:
        """Returns the id of a token by its name in the file."""
        ...


def encode_between(
    text: str, special: Mapping[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Encodes the stretches between special tokens with `encode`."""
    if not special:
        return encode(text)
    names = sorted(special, key=len, reverse=True)
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        if part:
            ids += [special[part]] if part in special else encode(part)
    return ids


class ByteCodec:
    """UTF-8 bytes as ids 0 to 255, then the three special tokens."""

    special: Mapping[str, int] = {"<|bos|>": 256, "<|eos|>": 257, "<|pad|>": 258}
    defaults: Mapping[str, int] = {"bos": 256, "eos": 257, "pad": 258}
    first: int | None = 256
    size, runs, pattern = 259, frozenset[int](), ""

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Codec`."""
        return encode_between(text, self.special if special else {}, lambda t: [*t.encode()])

    def decode(self, ids: Sequence[int]) -> str:
        """See `Codec`."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def find(self, token: str) -> int | None:
        """See `Codec`."""
        return self.special.get(token)


class JsonCodec:
    """A `tokenizer.json` of the `tokenizers` library.

    Args:
      content: The file.
      added: Tokens that tokenizer_config.json or added_tokens.json knows besides, by id, each with
        whether it is special.
      where: Names the file in errors.
    """

    pattern = ""
    defaults: Mapping[str, int] = {}
    runs: frozenset[int] = frozenset()

    def __init__(self, content: bytes, added: Mapping[int, tuple[str, bool]], where: str):
        import tokenizers

        try:
            text = content.decode("utf-8")
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises no narrower type.
            raise InputError(f"{where}: not a tokenizer.json ({_line(error)})") from None
        library.no_truncation()
        library.no_padding()
        self._setup(library, added, where)
        if "ByteFallback" in json.dumps(json.loads(text).get("decoder")):
            names = (f"<0x{byte:02X}>" for byte in range(256))
            self.runs = frozenset(i for i in map(library.token_to_id, names) if i is not None)

    def _setup(self, library: Any, added: Mapping[int, tuple[str, bool]], where: str) -> None:
        import tokenizers

        for number, (token, special) in sorted(added.items()):
            if library.token_to_id(token) is None:
                library.add_tokens([tokenizers.AddedToken(token, special=special)])
            if library.token_to_id(token) != number:
                raise InputError(
                    f"{where}: token {token!r} has id {library.token_to_id(token)}, "
                    f"the tokenizer's other files say {number}"
                )
        self._library = library
        library.encode_special_tokens = True
        self.size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        tokens = library.get_added_tokens_decoder().items()
        self.special: Mapping[str, int] = {
            token.content: number for number, token in tokens if token.special
        }
        whole = library.encode("a").ids
        plain = library.encode("a", add_special_tokens=False).ids
        self.first = whole[0] if whole[:1] != plain[:1] else None

    @classmethod
    def from_pair(cls, encoder: bytes, merges: bytes, where: str) -> JsonCodec:
        """Reads GPT-2's `encoder.json` and `vocab.bpe`."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        try:
            vocabulary = json.loads(encoder)
            lines = merges.decode("utf-8").split("\n")
            rules = [line.split(" ") for line in lines if line and line[:9] != "#version:"]
            pairs = [(first, second) for first, second in rules]
            library = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
        except Exception as error:
            raise InputError(
                f"{where}: not a pair of encoder.json and vocab.bpe ({_line(error)})"
            ) from None
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        codec = cls.__new__(cls)
        end = vocabulary.get(END_OF_TEXT, len(vocabulary))
        codec._setup(library, {end: (END_OF_TEXT, True)}, where)
        # The token is part of the vocabulary; this makes it special.
        library.add_special_tokens([END_OF_TEXT])
        codec.special = {END_OF_TEXT: end}
        codec.defaults = {"bos": end, "eos": end}
        return codec

    @functools.cached_property
    def _with_special(self) -> Any:
        import tokenizers

        # A second copy, since the choice is a property of the object and not of the call.
        return tokenizers.Tokenizer.from_str(self._library.to_str())

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Codec`."""
        library = self._with_special if special else self._library
        return library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Codec`."""
        return self._library.decode(list(ids), skip_special_tokens=True)

    def find(self, token: str) -> int | None:
        """See `Codec`."""
        return self._library.token_to_id(token)


class SentencePieceCodec:
    """A sentencepiece model.

    Special tokens in a text cut it, and each stretch gets the model's dummy prefix. All tokens that
    other files add to the model are special.
    """

    runs, pattern = frozenset[int](), ""

    def __init__(self, content: bytes, added: Mapping[int, tuple[str, bool]], where: str):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            pieces = self._model.vocab_size()
        except Exception as error:
            raise InputError(f"{where}: not a sentencepiece model ({_line(error)})") from None
        if not pieces:
            raise InputError(f"{where}: not a sentencepiece model (it has no pieces)")
        self._pieces = pieces
        special = {
            self._model.id_to_piece(i): i for i in range(pieces) if self._model.is_control(i)
        }
        for number, (token, _) in added.items():
            if number < pieces and self._model.id_to_piece(number) != token:
                raise InputError(
                    f"{where}: id {number} is {self._model.id_to_piece(number)!r}, the tokenizer's "
                    f"other files say {token!r}; this folder needs a tokenizer.json"
                )
            if number >= pieces:
                special[token] = number
        self.special: Mapping[str, int] = special
        self.size = max([pieces - 1, *added]) + 1
        ids = {name: getattr(self._model, f"{name}_id")() for name in ("bos", "eos", "pad")}
        self.defaults: Mapping[str, int] = {name: i for name, i in ids.items() if i >= 0}
        self.first = self.defaults.get("bos")

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Codec`."""
        return encode_between(text, self.special if special else {}, self._model.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Codec`."""
        return self._model.decode([i for i in ids if i < self._pieces])

    def find(self, token: str) -> int | None:
        """See `Codec`."""
        if token in self.special:
            return self.special[token]
        number = self._model.piece_to_id(token)
        return number if self._model.id_to_piece(number) == token else None


class TiktokenCodec:
    """Byte-level BPE from a file of base64 tokens and ranks.

    Args:
      content: The file.
      special: Special tokens by name.
      pattern: Regular expression that cuts the text.
      where: Names the file in errors.
    """

    runs = frozenset[int]()
    defaults: Mapping[str, int] = {}

    def __init__(self, content: bytes, special: Mapping[str, int], pattern: str, where: str):
        import tiktoken

        self.special: Mapping[str, int] = dict(special)
        self.pattern = pattern
        self.first = special.get("<|begin_of_text|>")
        ranks = tiktoken_ranks(content, where)
        for token, number in special.items():
            if number in ranks.values():
                raise InputError(f"{where}: special token {token!r} has the id {number} of a rank")
        try:
            self._encoding = tiktoken.Encoding(
                where, pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(special)
            )
        except Exception as error:
            raise InputError(
                f"{where}: pattern {pattern!r} is not usable ({_line(error)})"
            ) from None
        self.size = self._encoding.max_token_value + 1
        self._hidden = frozenset(self.special.values())

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Codec`."""
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Codec`."""
        try:
            content = self._encoding.decode_bytes([i for i in ids if i not in self._hidden])
        except KeyError as error:
            raise InputError(f"the ranks leave out a token id ({error.args[0]})") from None
        return content.decode("utf-8", "replace")

    def find(self, token: str) -> int | None:
        """See `Codec`."""
        return self.special.get(token)


def looks_like_tiktoken(content: bytes) -> bool:
    """Tells a tiktoken file from a sentencepiece model, both being called tokenizer.model."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content) is not None


def tiktoken_ranks(content: bytes, where: str) -> dict[bytes, int]:
    """Returns the ranks by token.

    Raises:
      InputError: A line of another form, a repeated token or rank, or a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            # Whisper's file ends in an empty token, written "=".
            key = b"" if token == b"=" else base64.b64decode(token, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{where}:{number}: expected a base64 token and its rank") from None
        if key in ranks:
            raise InputError(f"{where}:{number}: token {key!r} occurs twice")
        ranks[key] = value
    if len(set(ranks.values())) != len(ranks):
        raise InputError(f"{where}: two tokens have the same rank")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(f"{where}: no token for byte {missing[0]}; the file is incomplete")
    return ranks


class ScoredMergeCodec:
    """llama2.c's `tok512.bin`: merge the adjacent pair whose piece has the best score, repeatedly.

    The file is an int32 (longest piece), then per piece a float32 score, an int32 length and its
    bytes. Ids: 0 unknown, 1 BOS, 2 EOS, 3 to 258 the bytes, then the pieces. A text gets a leading
    space, and decoding drops the one after BOS or at the start. Equal scores merge from the left.
    """

    runs, pattern = frozenset[int](), ""
    special: Mapping[str, int] = {"<s>": 1, "</s>": 2}
    defaults: Mapping[str, int] = {"bos": 1, "eos": 2}
    first: int | None = 1

    def __init__(self, content: bytes, where: str):
        rows = list(_scored_pieces(content, where))
        marks = [f"<0x{byte:02X}>".encode() for byte in range(256)]
        if [piece for _, piece in rows[3:259]] != marks:
            raise InputError(f"{where}: not a llama2.c tokenizer: ids 3 to 258 are not the bytes")
        self._scores = [score for score, _ in rows]
        byte_pieces = [bytes([byte]) for byte in range(256)]
        self._pieces = [b"", b"", b"", *byte_pieces, *(piece for _, piece in rows[259:])]
        self._ids = {piece: i for i, piece in enumerate(self._pieces) if i >= 259}
        self.size = len(rows)

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Codec`."""
        return encode_between(text, self.special if special else {}, self._encode)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Codec`."""
        content, start = bytearray(), True
        for number in ids:
            if number < 3:
                start = start or number == self.special["<s>"]
                continue
            piece = self._pieces[number]
            content += piece[1:] if start and piece[:1] == b" " else piece
            start = False
        return content.decode("utf-8", "replace")

    def find(self, token: str) -> int | None:
        """See `Codec`."""
        return self.special.get(token)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in " " + text if text else "":
            content = character.encode()
            found = self._ids.get(content)
            ids += [3 + byte for byte in content] if found is None else [found]
        # A linked list of pieces and a heap of candidate merges: the best score first, then the
        # leftmost. A merged piece stays at its left place; `ids` is -1 where nothing is left.
        size = len(ids)
        right, left = list(range(1, size + 1)), list(range(-1, size - 1))
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(place: int) -> None:
            after = right[place] if place >= 0 else size
            if after < size:
                pair = ids[place], ids[after]
                merged = self._ids.get(self._pieces[pair[0]] + self._pieces[pair[1]])
                if merged is not None:
                    heapq.heappush(heap, (-self._scores[merged], place, *pair, merged))

        for place in range(size):
            offer(place)
        while heap:
            _, place, first, second, merged = heapq.heappop(heap)
            after = right[place]
            if ids[place] != first or after >= size or ids[after] != second:
                continue
            ids[place], ids[after] = merged, -1
            right[place] = right[after]
            if right[place] < size:
                left[right[place]] = place
            offer(left[place])
            offer(place)
        return [number for number in ids if number >= 0]


def _scored_pieces(content: bytes, where: str) -> Iterator[tuple[float, bytes]]:
    at = 4
    try:
        (longest,) = struct.unpack_from("<i", content)
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            at += 8 + length
            if not 0 <= length <= longest or at > len(content) or not math.isfinite(score):
                raise ValueError
            yield score, content[at - length : at]
    except (struct.error, ValueError):
        raise InputError(f"{where}: not a llama2.c tokenizer: damaged at byte {at}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
