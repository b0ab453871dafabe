"""Chat templates: messages to the text a chat model was trained on.

A template is a Jinja2 program that comes with a model. It runs in an immutable sandbox with the
settings and helpers that transformers gives it, so the same template gives the same text; nothing
it does reaches outside the sandbox.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxllm.data.text_tokenizers import Tokenizer, shared_prefix
from jaxllm.errors import InputError

Message = Mapping[str, Any]
# Noncharacters of Unicode, which no text holds, around what {% generation %} marks.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class ChatTemplate:
    """One template and the special tokens it may name."""

    source: str
    names: Mapping[str, str]
    """bos_token, eos_token, ... as variables of the template."""
    where: str = "chat template"
    """Names the template in errors."""

    def __post_init__(self) -> None:
        self._compiled()  # A syntax error is found here.

    @property
    def identity(self) -> str:
        """SHA-256 of what decides the text."""
        return hashlib.sha256(json.dumps([self.source, dict(self.names)]).encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """Returns the text of a conversation.

        Args:
          messages: Objects with `role` and usually `content`.
          add_generation_prompt: End with what comes before an assistant's turn.
          tools: JSON schemas of functions, for templates that know tools.
          **variables: Any others the template asks for.

        Raises:
          InputError: Messages of another form, an order of roles that the template refuses, or a
            template that fails or reaches outside the sandbox.
        """
        text = self._render(messages, add_generation_prompt, tools, variables)
        return text.replace(OPEN, "").replace(CLOSE, "")

    def assistant_spans(
        self, messages: Sequence[Message], **variables: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of a conversation and which characters [start, end) the assistant wrote.

        These are what the template marks by {% generation %}; without such marks, each assistant
        message with its end-of-turn mark, found by rendering the conversation up to it.

        Raises:
          InputError: See `render`; also a template whose text up to a message depends on later
            ones, so that the assistant's part cannot be told.
        """
        marked = self._render(messages, False, None, variables)
        if OPEN in marked:
            return _unmark(marked)
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:place], add_generation_prompt=True, **variables)
            through = self.render(messages[: place + 1], **variables)
            if not (through.startswith(before) and marked.startswith(through)):
                raise InputError(
                    f"{self.where}: the text of message {place} changes with what is around it, so "
                    "the assistant's part cannot be told; the template needs {% generation %} marks"
                )
            spans.append((len(before), len(through)))
        return marked, spans

    def _render(
        self, messages: Sequence[Message], prompt: bool, tools: Any, variables: Mapping[str, Any]
    ) -> str:
        check_messages(messages)
        # The template sees plain JSON values only: methods of anything richer may reach outside.
        values = {**self.names, **variables, "messages": list(messages), "tools": tools}
        try:
            plain = json.loads(json.dumps(values))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.where}: messages must be JSON values: {_line(error)}"
            ) from None
        try:
            return self._compiled().render(**plain, add_generation_prompt=prompt, documents=None)
        except Exception as error:  # A template may fail in any way that Python can.
            raise InputError(f"{self.where}: {_line(error)}") from None

    def _compiled(self) -> Any:
        try:
            return _environment().from_string(self.source)
        except Exception as error:
            raise InputError(f"{self.where}: not a Jinja template: {_line(error)}") from None


def load_chat_template(path: str | Path, name: str = "default") -> ChatTemplate:
    """Returns the chat template of a tokenizer folder, or of one .jinja file.

    In a folder chat_template.jinja comes before the `chat_template` of tokenizer_config.json.

    Raises:
      InputError: No template, or none of that name.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".jinja":
        return ChatTemplate(_text(path), {}, str(path))
    if not path.exists():
        raise InputError(f"{path}: no such folder or .jinja file")
    folder = path if path.is_dir() else path.parent
    wanted = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    files = {file: folder / file for file in wanted}
    found = {file: _text(where) for file, where in files.items() if where.is_file()}
    return chat_template_from_files(found, str(path), name)


def tokenizer_chat_template(tokenizer: Tokenizer, where: str) -> ChatTemplate:
    """Returns the chat template that came with a tokenizer."""
    wanted = ("tokenizer_config.json", "chat_template.jinja")
    files = {name: tokenizer.files[name].decode() for name in wanted if name in tokenizer.files}
    template = chat_template_from_files(files, where)
    return ChatTemplate(template.source, tokenizer.names, where)


def chat_template_from_files(
    files: Mapping[str, str], where: str, name: str = "default"
) -> ChatTemplate:
    """Returns the template that the texts of files, given by their names, hold."""
    names: dict[str, str] = {}
    templates: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            config = json.loads(files.get(file, "{}"))
            for key, value in config.items():
                token = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(token, str):
                    names[key] = token
            value = config.get("chat_template")
            if isinstance(value, list):
                templates |= {entry["name"]: entry["template"] for entry in value}
            elif value:
                templates["default"] = value
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: {file} is damaged: {_line(error)}") from None
    if "chat_template.jinja" in files:
        templates["default"] = files["chat_template.jinja"]
    if name not in templates or not isinstance(templates[name], str):
        known = f"; it has {', '.join(templates)}" if templates else ""
        raise InputError(f"{where}: has no chat template {name!r}{known}")
    return ChatTemplate(templates[name], names, where)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> list[int]:
    """Returns the ids of a conversation; BOS is the template's affair."""
    text = template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
    return tokenizer.encode(text, special=True)


def encode_turns(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]], int]:
    """Returns the ids of a conversation, which of them [start, end) the assistant wrote, and bytes.

    The conversation is encoded as a whole. A token across the start of a turn is the assistant's,
    one across its end is not. The bytes are those of the assistant's text.
    """
    text, spans = template.assistant_spans(messages)
    ids = tokenizer.encode(text, special=True)

    def tokens_before(character: int) -> int:
        return shared_prefix(tokenizer.encode(text[:character], special=True), ids)

    turns = [(tokens_before(start), tokens_before(end)) for start, end in spans]
    size = sum(len(text[start:end].encode()) for start, end in spans)
    return ids, [turn for turn in turns if turn[1] > turn[0]], size


def check_messages(messages: Any) -> None:
    """Raises InputError unless `messages` is a list of objects with a role."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"messages is a {type(messages).__name__}, expected a list of objects")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {place} is {message!r:.60}, expected an object with a role")
        for value in message.values():
            if isinstance(value, str) and (OPEN in value or CLOSE in value):
                raise InputError(f"message {place} holds U+FDD0 or U+FDD1, which are no characters")


def _unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    first, *parts = marked.split(OPEN)
    text += first
    for part in parts:
        inside, _, after = part.partition(CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans


# -- the sandbox ---------------------------------------------------------------------------------


@functools.cache
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Names(Namespace):
        """`namespace(...)` without attributes that Python itself uses."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                _raise(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    def namespace(*pairs: Any, **values: Any) -> Names:
        names = Names()
        for name, value in dict(*pairs, **values).items():
            names[name] = value
        return names

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant wrote."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Callable[[], str]) -> str:
            return OPEN + caller() + CLOSE

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = namespace
    environment.globals["dict"] = lambda *pairs, **values: dict(*pairs, **values)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
