"""Every tokenizer format: known ids, round trips, streaming, and what is refused.

The large tokenizers of real models are read where they lie beside the checkout; each reader is also
tested on a vocabulary of 300 that is trained here.
"""

import base64
import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from jaxllm.data.images import bundled
from jaxllm.data.text_tokenizers import (
    StreamDecoder,
    byte_tokenizer,
    load_tokenizer,
    save_tokenizer,
    shared_prefix,
    tiktoken_tokenizer,
    train_bpe,
)
from jaxllm.data.tokenizer_codecs import GPT2_PATTERN, LLAMA3_PATTERN, looks_like_tiktoken
from jaxllm.errors import InputError

SHARED = Path(__file__).parents[2].parent / "shared/data"
TOK512 = bundled("stories260K") / "tok512.bin"
LINES = [
    line for line in (bundled("text") / "tinyshakespeare.txt").read_text()[:20_000].split("\n")
]
MIXED = "Hello world,  你好 3.14\n\tÄrger 😀👩‍👩‍👧! don't\r\n  end "
REAL = {
    "gpt2": SHARED / "tok_gpt2",
    "whisper": SHARED / "tok_whisper_multilingual",
    "mistral": SHARED / "tok_mistral_v1/tokenizer.model.v1",
}


def real(name):
    if not REAL[name].exists():
        pytest.skip(f"{REAL[name]} is not beside the checkout")
    return load_tokenizer(REAL[name])


def sentencepiece_model(**options) -> bytes:
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in LINES if line]),
        model_writer=target,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
        num_threads=1,
        **options,
    )
    return target.getvalue()


def byte_fallback_json() -> str:
    """A tokenizer.json in the form of Llama 2: the decoder joins byte tokens and drops a space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdehlorw", "he", "ll", "▁w", "▁he"]
    merges = [("h", "e"), ("l", "l"), ("▁", "w"), ("▁", "he")]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library.to_str()


def tiktoken_file() -> bytes:
    """The merges of a small byte-level BPE as ranks."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [
        b"he",
        b"ll",
        b"hell",
        b"hello",
        b" w",
        b"or",
        b" wor",
        b"ld",
        b" world",
        b"12",
        b"123",
    ]
    rows = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    return b"".join(rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per format, with a small vocabulary."""
    root = tmp_path_factory.mktemp("tokenizers")

    def write(name, **files):
        folder = root / name
        folder.mkdir()
        for file, content in files.items():
            path = folder / file.replace("__", ".")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    save_tokenizer(train_bpe(LINES, 300), root / "bpe")
    config = json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None})
    write("json", tokenizer__json=byte_fallback_json(), tokenizer_config__json=config)
    write("sentencepiece", tokenizer__model=sentencepiece_model())
    write("tiktoken", small__tiktoken=tiktoken_file())
    library = json.loads((root / "bpe/tokenizer.json").read_text())["model"]
    merges = "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in library["merges"])
    write("gpt2", encoder__json=json.dumps(library["vocab"]), vocab__bpe=merges)
    (root / "llama2c").mkdir()
    shutil.copy(TOK512, root / "llama2c/tok512.bin")
    save_tokenizer(byte_tokenizer(), root / "bytes")
    return root


KINDS = {
    "bpe": "json",
    "json": "json",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "gpt2": "gpt2",
    "llama2c": "llama2c",
    "bytes": "bytes",
}


# -- known ids -----------------------------------------------------------------------------------


def test_ids_of_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé", bos=True, eos=True) == [256, 97, 0xC3, 0xA9, 257]
    assert tokenizer.vocab_size == 259 and tokenizer.adds_bos
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (256, 257, 258)
    assert tokenizer.encode("a<|eos|>", special=True) == [97, 257]
    assert tokenizer.encode("<|eos|>") == [*b"<|eos|>"]
    assert tokenizer.names == {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
    }


def test_ids_of_gpt2():
    """Ids of OpenAI's encoder.json; the first two are printed in many places."""
    tokenizer = real("gpt2")
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert tokenizer.encode("Not all heroes wear capes.") == [3673, 477, 10281, 5806, 1451, 274, 13]
    assert tokenizer.encode("a<|endoftext|>", special=True) == [64, 50256]
    assert 50256 not in tokenizer.encode("a<|endoftext|>")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (50256, 50256, None)
    assert not tokenizer.adds_bos


def test_ids_of_mistral():
    tokenizer = real("mistral")
    expected = [22557, 1526, 28725, 28705, 29383, 29530, 28705, 28770, 28723, 28740, 28781]
    assert tokenizer.encode("Hello world, 你好 3.14") == expected
    assert tokenizer.encode("Hello world, 你好 3.14", bos=True) == [1, *expected]
    assert tokenizer.vocab_size == 32000 and tokenizer.adds_bos
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, None)
    assert tokenizer.encode("<s>Hello</s>", special=True) == [1, 22557, 2]


def test_ids_of_whisper():
    tokenizer = real("whisper")
    assert tokenizer.kind == "tiktoken" and tokenizer.eos == 50257 and tokenizer.vocab_size == 50258
    # Its first 256 ranks are the bytes in GPT-2's order, so "!" is 0.
    assert tokenizer.encode("!") == [0]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_return_the_bundled_texts(name):
    tokenizer = real(name)
    texts = [bundled("text") / "tinyshakespeare.txt", SHARED / "text/wagahaiwa_nekodearu.txt"]
    for path in texts:
        text = path.read_text(encoding="utf-8")[:60_000]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED


def test_real_sentencepiece_models_without_byte_fallback():
    folder = SHARED / "tok_sentencepiece_test"
    if not folder.exists():
        pytest.skip(f"{folder} is not beside the checkout")
    english = load_tokenizer(folder / "test_model.model")
    japanese = load_tokenizer(folder / "test_ja_model.model")
    assert (english.vocab_size, japanese.vocab_size) == (1000, 8000)
    assert english.decode(english.encode("I saw a girl")) == "I saw a girl"
    with pytest.raises(InputError, match=r"holds test_ja_model.model and test_model.model; name"):
        load_tokenizer(folder)


def naive_merge(pieces, scores, text):
    """The procedure of llama2.c as it stands: look at all pairs, merge the best, again."""
    index = {piece: i for i, piece in enumerate(pieces) if i >= 259}
    ids = []
    for character in " " + text:
        found = index.get(character.encode())
        ids += [3 + byte for byte in character.encode()] if found is None else [found]
    raw = [bytes([i - 3]) if 3 <= i < 259 else piece for i, piece in enumerate(pieces)]
    while True:
        best = (-1e10, None, None)
        for place in range(len(ids) - 1):
            merged = index.get(raw[ids[place]] + raw[ids[place + 1]])
            if merged is not None and scores[merged] > best[0]:
                best = (scores[merged], place, merged)
        if best[1] is None:
            return ids
        ids[best[1] : best[1] + 2] = [best[2]]


def test_ids_of_tok512():
    content, at, pieces, scores = TOK512.read_bytes(), 4, [], []
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        pieces.append(content[at + 8 : at + 8 + length])
        scores.append(score)
        at += 8 + length
    tokenizer = load_tokenizer(TOK512)
    assert tokenizer.vocab_size == 512 and (tokenizer.bos, tokenizer.eos) == (1, 2)
    # The opening of the published sample of stories260K, from its greedy ids.
    ids = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315]
    text = tokenizer.decode(ids)
    assert text.startswith("Once upon a time, there was a little")
    assert tokenizer.encode(text, bos=True) == ids
    for text in (MIXED, LINES[0], " two  spaces", "<0x41> <s>", *LINES[40:60]):
        assert tokenizer.encode(text) == (naive_merge(pieces, scores, text) if text else [])
        assert tokenizer.decode(tokenizer.encode(text)) == text
    once = tokenizer.encode("Once")
    assert tokenizer.decode([1, *once, 1, *once, *once]) == "OnceOnce Once"


def test_ids_of_a_small_tiktoken_file(folders):
    gpt2 = load_tokenizer(folders / "tiktoken")
    assert gpt2.encode("hello world") == [259, 264]
    assert gpt2.encode("x12345") == [120, 266, 52, 53]  # One pre-token: 123, then 4, 5.
    assert gpt2.eos == gpt2.bos == 267 and gpt2.vocab_size == 268 and not gpt2.adds_bos
    assert gpt2.decode([259, 264, 267]) == "hello world"


def test_llama3_style_tiktoken(folders, tmp_path):
    special = {"<|begin_of_text|>": 300, "<|eot_id|>": 309}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    decoder = {str(i): {"content": token, "special": True} for token, i in special.items()}
    config = {**names, "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_file())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "tiktoken" and tokenizer.adds_bos
    assert tokenizer.codec.pattern == LLAMA3_PATTERN and tokenizer.vocab_size == 310
    assert tokenizer.encode("hello<|eot_id|>", bos=True, special=True) == [300, 259, 309]
    given = tiktoken_tokenizer(tiktoken_file(), special, LLAMA3_PATTERN, where="x", **names)
    assert given.identity == tokenizer.identity
    other = tiktoken_tokenizer(tiktoken_file(), special, GPT2_PATTERN, where="x", **names)
    assert other.identity != tokenizer.identity
    save_tokenizer(other, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").identity == other.identity
    with pytest.raises(InputError, match="the ranks leave out a token id .*305"):
        tokenizer.decode([305])


# -- what holds for every format -----------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_round_trip_identity_and_copy(folders, name, tmp_path):
    tokenizer = load_tokenizer(folders / name)
    assert tokenizer.kind == KINDS[name]
    for text in ("", " ", "hello world", MIXED, *LINES[:10]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    ids = tokenizer.encode("he", bos=True, eos=True)
    assert ids == [tokenizer.bos, *tokenizer.encode("he"), tokenizer.eos]
    assert tokenizer.decode(ids) == "he"
    save_tokenizer(tokenizer, tmp_path / "run")
    copy = load_tokenizer(tmp_path / "run")
    assert copy.identity == tokenizer.identity
    assert copy.encode(MIXED) == tokenizer.encode(MIXED)
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary of"):
            tokenizer.decode([bad])
    with pytest.raises(InputError, match="lone surrogate .* at character 1"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("name", KINDS)
def test_streamed_pieces_make_up_the_text(folders, name):
    """For texts, and for random ids, whose bytes are mostly no UTF-8."""
    tokenizer = load_tokenizer(folders / name)
    random = np.random.default_rng(0)
    cases = [tokenizer.encode(text, bos=True) for text in (MIXED, "  a  b", "你好" * 3 + "x")]
    cases += [random.integers(tokenizer.vocab_size, size=n).tolist() for n in (1, 2, 5, 40, 40, 40)]
    low = min(tokenizer.vocab_size, 300)
    cases += [random.integers(low, size=30).tolist() for _ in range(20)]
    for ids in cases:
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
        for cut in (1, len(ids) // 2):
            stream = StreamDecoder(tokenizer, ids[:cut])
            rest = "".join(map(stream.push, ids[cut:])) + stream.finish()
            whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
            assert whole.endswith(rest)
            # Later ids may complete or spoil the bytes that the prompt ends in.
            changed = "\ufffd" in before or not whole.startswith(before)
            assert changed or whole == before + rest


def test_a_character_is_streamed_when_its_last_byte_is_there():
    stream = StreamDecoder(byte_tokenizer())
    assert [stream.push(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    stream = StreamDecoder(byte_tokenizer())
    assert [stream.push(byte) for byte in b"\xf0\x9f"] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_a_run_of_byte_tokens_is_streamed_as_a_whole(folders):
    """The decoder of Llama 2's tokenizer.json spoils a whole run for one bad byte."""
    tokenizer = load_tokenizer(folders / "json")
    good = [3 + byte for byte in "你".encode()]
    (a,) = tokenizer.encode("a")[1:]
    assert tokenizer.decode([*good, a]) == "你a"
    assert tokenizer.decode([*good, 3 + 0xFF, a]) == "\ufffd" * 4 + "a"
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in [*good, a]] == ["", "", "", "你a"]
    stream = StreamDecoder(tokenizer)
    across = [*good, tokenizer.eos, 3 + 0xFF, a]  # Special tokens do not end a run.
    assert "".join(map(stream.push, across)) == tokenizer.decode(across) == "\ufffd" * 4 + "a"


def test_streaming_does_not_get_slower(folders):
    """The context that is decoded again stays short."""
    tokenizer = load_tokenizer(folders / "bpe")
    stream = StreamDecoder(tokenizer, tokenizer.encode("\n".join(LINES[:100])))
    for i in tokenizer.encode("\n".join(LINES[100:130])):
        stream.push(i)
        assert len(stream._ids) <= 2


@pytest.mark.parametrize("name", KINDS)
def test_prompt_and_completion_are_encoded_as_one_text(folders, name):
    tokenizer = load_tokenizer(folders / name)
    ids, count = tokenizer.encode_pair("hello", " world", bos=True, eos=True)
    assert ids == tokenizer.encode("hello world", bos=True, eos=True)
    assert tokenizer.decode(ids[:count]) == "hello"
    ids, count = tokenizer.encode_pair("hello", "", eos=True)
    assert ids[count:] == [tokenizer.eos]
    assert shared_prefix([1, 2, 3], [1, 2]) == 2 and shared_prefix([1], [2]) == 0


def test_pair_gives_a_straddling_token_to_the_completion(folders):
    tokenizer = load_tokenizer(folders / "tiktoken")
    assert tokenizer.encode_pair("hel", "lo world") == ([259, 264], 0)


def test_a_trained_bpe_merges_what_is_frequent():
    tokenizer = train_bpe(["abab abab abab"] * 3, 259)
    assert tokenizer.vocab_size == 259 and tokenizer.bos == tokenizer.eos == 0
    assert tokenizer.adds_bos
    assert len(tokenizer.encode("abab")) == 1  # ab, then abab.
    assert train_bpe(["abab abab abab"] * 3, 259).identity == tokenizer.identity


# -- which file, and bad ones --------------------------------------------------------------------


def test_the_order_of_formats_in_a_folder(folders, tmp_path):
    for name, file in (
        ("llama2c", "tok512.bin"),
        ("gpt2", "encoder.json"),
        ("gpt2", "vocab.bpe"),
        ("tiktoken", "small.tiktoken"),
        ("sentencepiece", "tokenizer.model"),
        ("bpe", "tokenizer.json"),
    ):
        shutil.copy(folders / name / file, tmp_path / file)
        if file != "encoder.json":
            assert load_tokenizer(tmp_path).kind == KINDS[name]


def test_added_tokens_of_the_config_are_added(folders, tmp_path):
    shutil.copytree(folders / "json", tmp_path / "a")
    size = load_tokenizer(tmp_path / "a").vocab_size
    config = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "added_tokens_decoder": {str(size): {"content": "<pad>", "special": True}},
    }
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.pad == size and tokenizer.vocab_size == size + 1 and tokenizer.adds_bos
    assert tokenizer.decode([size]) == ""
    config["added_tokens_decoder"] = {"400": {"content": "<pad>", "special": True}}
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"token '<pad>' has id {size}, .* other files say 400"):
        load_tokenizer(tmp_path / "a")
    shutil.copytree(folders / "sentencepiece", tmp_path / "b")
    (tmp_path / "b/added_tokens.json").write_text('{"<pad>": 500}')
    (tmp_path / "b/special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    tokenizer = load_tokenizer(tmp_path / "b")
    assert tokenizer.pad == 500 and tokenizer.encode("<pad>", special=True) == [500]
    (tmp_path / "b/added_tokens.json").write_text('{"<pad>": 1}')
    with pytest.raises(
        InputError, match="id 1 is '<s>', .* say '<pad>'; .* needs a tokenizer.json"
    ):
        load_tokenizer(tmp_path / "b")


BAD = {
    "tokenizer.json": (b"{}", "not a tokenizer.json"),
    "tokenizer.model": (b"abc", "not a sentencepiece model"),
    "x.model": (b"", "not a sentencepiece model"),
    "x.tiktoken": (b"IQ== 0\n", "no token for byte 0; the file is incomplete"),
    "y.tiktoken": (b"IQ== 0\nIQ== 1\n", "y.tiktoken:2: token b'!' occurs twice"),
    "z.tiktoken": (b"IQ== 0\nnot a line\n", "z.tiktoken:2: expected a base64 token and its rank"),
    "tok512.bin": (TOK512.read_bytes()[:3000], "not a llama2.c tokenizer: damaged at byte"),
    "tok9.bin": (struct.pack("<ifi", 9, 0.0, 1) + b"a", "ids 3 to 258 are not the bytes"),
    "encoder.json": (b"{}", "encoder.json: expected vocab.bpe beside it"),
    "vocab.bpe": (b"a b\n", "vocab.bpe: expected encoder.json beside it"),
    "sentencepiece.bpe.model": (b"", "its models shift these ids; .* needs a tokenizer.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=message) as error:
            load_tokenizer(path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_refusals(folders, tmp_path):
    with pytest.raises(InputError, match="gone: no such tokenizer file or folder"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(InputError, match=r"holds no tokenizer; expected tokenizer.json, "):
        load_tokenizer(tmp_path)
    for name in ("a.tiktoken", "b.tiktoken"):
        (tmp_path / name).write_bytes(tiktoken_file())
    with pytest.raises(InputError, match="holds a.tiktoken and b.tiktoken; name the one"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "a.tiktoken").kind == "tiktoken"
    shutil.copytree(folders / "gpt2", tmp_path / "pair")
    (tmp_path / "pair/vocab.bpe").write_text("#version\nq z\n")
    with pytest.raises(InputError, match="not a pair of encoder.json and vocab.bpe"):
        load_tokenizer(tmp_path / "pair")
    for config, message in (
        ("{", "tokenizer_config.json beside it is not valid JSON"),
        ("[]", "tokenizer_config.json beside it holds a list, expected an object"),
        ('{"eos_token": "<gone>"}', "eos_token '<gone>' is not in the vocabulary"),
        ('{"added_tokens_decoder": {"x": {}}}', "added tokens must be ids with a text each"),
        ('{"added_tokens_decoder": []}', "added tokens must be ids with a text each"),
    ):
        shutil.copy(folders / "json/tokenizer.json", tmp_path / "pair/tokenizer.json")
        (tmp_path / "pair/tokenizer_config.json").write_text(config)
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path / "pair")
    with pytest.raises(InputError, match=r"special token '<x>' has the id 3 of a rank"):
        tiktoken_tokenizer(tiktoken_file(), {"<x>": 3}, GPT2_PATTERN, where="x")
    with pytest.raises(InputError, match=r"pattern '\(' is not usable"):
        tiktoken_tokenizer(tiktoken_file(), {"<x>": 300}, "(", where="x")
    assert not looks_like_tiktoken(sentencepiece_model()[:100])


def test_parity_with_transformers(folders):
    transformers = pytest.importorskip("transformers")
    for name in ("bpe", "json"):
        path = folders / name / "tokenizer.json"
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        ours = load_tokenizer(folders / name)
        for text in (MIXED, *LINES[:5], "<s>he</s>"):
            ids = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text, special=True) == ids
            cleanup = {"clean_up_tokenization_spaces": False}
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, **cleanup)
