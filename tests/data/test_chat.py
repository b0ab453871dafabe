"""Chat templates: the text of known templates, assistant spans, the sandbox, and bad input."""

import json

import pytest

from jaxllm.data.chat import (
    ChatTemplate,
    encode_chat,
    encode_turns,
    load_chat_template,
    tokenizer_chat_template,
)
from jaxllm.data.text_tokenizers import byte_tokenizer, load_tokenizer, save_tokenizer, train_bpe
from jaxllm.errors import InputError

CHATML = """{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('no role ' + message.role) }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' -}}
{% endif %}"""
INST = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
GENERATION = """{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}
{% generation %}{{ m.content }}<end>{% endgeneration %}
{% else %}{{ m.content }}{% endif %}
;{% endfor %}"""
TOOLS = """{%- set ns = namespace(count=0) %}
{%- for tool in tools or [] %}{% set ns.count = ns.count + 1 %}{{ tool | tojson }}
{% endfor %}{{ ns.count }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}
[{{ m.content | trim }}]{% endfor %}{{ [1, 2] | tojson(indent=1) }}"""
TALK = [
    {"role": "user", "content": "Hi <there> & 'you'"},
    {"role": "assistant", "content": "Hello, 你好!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
TOOL = {"name": "é", "parameters": {"<": "'&'"}}
TEMPLATES = {"chatml": CHATML, "inst": INST, "generation": GENERATION, "tools": TOOLS}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def template(name):
    return ChatTemplate(TEMPLATES[name], NAMES, f"folder/{name}")


def test_text_of_chatml():
    expected = (
        "<|im_start|>user\nHi <there> & 'you'<|im_end|>\n"
        "<|im_start|>assistant\nHello, 你好!<|im_end|>\n"
    )
    assert template("chatml").render(TALK[:2]) == expected
    prompt = template("chatml").render(TALK[:2], add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"


def test_text_of_a_template_with_special_tokens():
    text = template("inst").render(TALK[:3])
    expected = "<s> [INST] Hi <there> & 'you' [/INST] Hello, 你好!</s> [INST] Bye [/INST]"
    assert text == expected


def test_tojson_keeps_what_html_would_escape():
    text = template("tools").render(TALK[:2], tools=[TOOL])
    expected = '{"name": "é", "parameters": {"<": "\'&\'"}}\n1[Hi <there> & \'you\'][\n 1,\n 2\n]'
    assert text == expected


def test_assistant_spans_with_and_without_marks():
    text, spans = template("chatml").assistant_spans(TALK)
    assert text == template("chatml").render(TALK)
    found = [text[a:b] for a, b in spans]
    assert found == ["Hello, 你好!<|im_end|>\n", "So long.<|im_end|>\n"]
    text, spans = template("inst").assistant_spans(TALK)
    assert [text[a:b] for a, b in spans] == [" Hello, 你好!</s>", " So long.</s>"]
    text, spans = template("generation").assistant_spans(TALK)
    assert text == template("generation").render(TALK)
    assert [text[a:b] for a, b in spans] == ["Hello, 你好!<end>", "So long.<end>"]
    assert template("chatml").assistant_spans(TALK[:1])[1] == []


def test_spans_that_cannot_be_told_are_refused():
    shouting = (
        "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"message 1 changes .* needs {% generation %} marks"):
        ChatTemplate(shouting, {}).assistant_spans(TALK)


def test_ids_of_a_conversation_and_of_its_turns():
    tokenizer = byte_tokenizer()
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    inst = ChatTemplate(INST, names)
    ids = encode_chat(tokenizer, inst, TALK[:1], add_generation_prompt=True)
    assert ids == [256, *b" [INST] Hi <there> & 'you' [/INST]"]
    ids, turns, size = encode_turns(tokenizer, inst, TALK)
    assert [tokenizer.decode(ids[a:b]) for a, b in turns] == [" Hello, 你好!", " So long."]
    assert [ids[b - 1] for _, b in turns] == [257, 257]
    assert size == len(" Hello, 你好! So long.".encode()) + 2 * len("<|eos|>")
    # A token of several characters that begins before the turn is the assistant's.
    bpe = train_bpe([": a: a: a", "x: a"] * 3, 262)
    (pair,) = bpe.encode(": a")[:1]
    marked = ChatTemplate("x:{% generation %} {{ messages[0].content }}{% endgeneration %}", {})
    ids, turns, _ = encode_turns(bpe, marked, [{"role": "x", "content": "a"}])
    assert ids[turns[0][0] : turns[0][1]] == bpe.encode("x: a")[turns[0][0] :]
    assert turns[0][1] == len(ids) and pair in bpe.encode("x: a")


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_where_templates_are_found(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R{{ bos_token }}"}]
    config = {"bos_token": {"content": "<s>"}, "chat_template": named}
    folder = write(tmp_path / "a", tokenizer_config__json=config)
    assert load_chat_template(folder).source == "D"
    assert load_chat_template(folder, "rag").render(TALK) == "R<s>"
    with pytest.raises(InputError, match="a: has no chat template 'x'; it has default, rag"):
        load_chat_template(folder, "x")
    write(
        folder, chat_template__jinja="J{{ eos_token }}", special_tokens_map__json={"eos_token": "E"}
    )
    assert load_chat_template(folder).render(TALK) == "JE"
    assert load_chat_template(folder / "chat_template.jinja").source == "J{{ eos_token }}"
    save_tokenizer(byte_tokenizer(), tmp_path / "b")
    write(tmp_path / "b", chat_template__jinja="{{ bos_token }}{{ pad_token }}")
    tokenizer = load_tokenizer(tmp_path / "b")
    assert tokenizer_chat_template(tokenizer, "b").render(TALK) == "<|bos|><|pad|>"
    save_tokenizer(tokenizer, tmp_path / "c")
    assert load_chat_template(tmp_path / "c").source == "{{ bos_token }}{{ pad_token }}"
    for path, message in (
        (tmp_path / "gone", "gone: no such folder or .jinja file"),
        (write(tmp_path / "d"), "d: has no chat template 'default'$"),
        (write(tmp_path / "e", tokenizer_config__json="{"), "tokenizer_config.json is damaged"),
        (write(tmp_path / "f", tokenizer_config__json={"chat_template": [1]}), "is damaged"),
        (write(tmp_path / "g", tokenizer_config__json={"chat_template": 3}), "no chat template"),
        (write(tmp_path / "h", chat_template__jinja="{% if %}"), "h: not a Jinja template"),
    ):
        with pytest.raises(InputError, match=message):
            load_chat_template(path)
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="bad.jinja: not UTF-8 text at byte 0"):
        load_chat_template(tmp_path / "bad.jinja")


def test_wrong_messages_are_one_line():
    for messages, message in (
        (TALK[1:], r"folder/inst: Roles must alternate user/assistant/user/assistant/\.\.\."),
        ("hello", "messages is a str, expected a list of objects"),
        (["hello"], "message 0 is 'hello', expected an object with a role"),
        ([{"content": "x"}], "message 0 is .* expected an object with a role"),
        ([{"role": "user"}], "folder/inst: .*content"),
        ([{"role": "user", "content": 3}], "folder/inst: can only concatenate str"),
        ([{"role": "user", "content": "\ufdd0"}], "message 0 holds U"),
        ([{"role": "user", "content": object()}], "must be JSON values"),
    ):
        with pytest.raises(InputError, match=message) as error:
            template("inst").render(messages)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="folder/chatml: no role x"):
        template("chatml").render([{"role": "x", "content": ""}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.fromkeys.__self__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
        "{{ open('/etc/passwd') }}",
    ],
)
def test_nothing_reaches_outside_the_sandbox(source):
    with pytest.raises(InputError, match="^chat template: "):
        ChatTemplate(source, {}).render(TALK)


@pytest.mark.parametrize("name", TEMPLATES)
def test_parity_with_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(train_bpe(["Hi there, hello! Bye, so long."], 270), tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **NAMES,
    )
    theirs.chat_template = TEMPLATES[name]
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(tmp_path / "theirs")
    loaded = load_chat_template(tmp_path / "theirs")
    for talk, prompt in ((TALK, False), (TALK[:3], True)):
        options = {"add_generation_prompt": prompt, "tools": [TOOL] if name == "tools" else None}
        text = theirs.apply_chat_template(talk, tokenize=False, **options)
        assert loaded.render(talk, **options) == text
        ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False, **options)
        assert encode_chat(ours, loaded, talk, **options) == ids
