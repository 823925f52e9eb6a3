"""Takes secrets out of what is recorded: by the name they stand under, and by their own form.

It is a net with a fine mesh, no proof: a secret without a telling name or form passes (40 hex digits
are a git commit as well as an API key). Where a name or form is in doubt, the value goes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from .tokens import replace_tokens

__all__ = ["REDACTED", "is_secret_name", "redact", "secrets_in_environment"]

REDACTED: Final = "[redacted]"
"""What stands in the place of a secret."""

_MAX_DEPTH = 60
"""Deeper data is dropped: it is a cycle, or nothing that a record needs."""

# Names are compared as their words, in lower case, between underscores: `dbPassword` is
# `_db_password_`. These make a name secret wherever they stand in it ...
_ANYWHERE = re.compile(
    r"_(?:password|passwd|passphrase|secrets?|credentials?|authorization|apikey|privatekey"
    r"|secretkey|accesskey|cookies?|webhook|connection_string|(?:db|user|smtp|ftp|root|admin)_pass"
    r"|(?:api|private|secret|access|signing|ssh|encryption|account|auth|deploy|license|master"
    r"|service)_key)_"
)
# ... and these only at the end (`token_count` is no secret), and only for text, unless an innocent
# word stands before: `pad_token` is a word of a tokenizer.
_AT_END = re.compile(r"_(?:tokens?|pat|auth|bearer|jwt|dsn|netrc|authtoken|accesstoken)_$")
_INNOCENT = re.compile(
    r"_(?:pad|eos|bos|unk|sep|cls|mask|special|start|end|stop|begin|image|video|audio|class|decoder"
    r"|new|max|min|num|n|per|prompt|forced|suppress|next|last|first|additional|register|prefix"
    r"|added)_tokens?_$"
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_FORMS: Final = (
    re.compile(
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [^-]*-----|\Z)", re.DOTALL
    ),
    re.compile(r"\bbearer\s+(?:(?=\S*\d)[\w.~+/=-]{8,}|[\w.~+/=-]{20,})", re.IGNORECASE),
    re.compile(r"\bbasic\s+(?=\S*[\d=])[A-Za-z0-9+/]{12,}={0,2}(?!\S)", re.IGNORECASE),
)
# What most keys and values are: too short for any of these forms, and no header, URL or option.
_HARMLESS = re.compile(r"[\w./]{0,17}")
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|(?:set-)?cookie)([\"']?\s*:\s*)[^\r\n\"']+", re.I
)
_URL_USER = re.compile(r"\b([a-z][a-z0-9+.-]{0,20}://)([^\s/?#\"']*)@", re.IGNORECASE)
# `name=value`, `name: value`, `"name": "value"` and `--name value` inside a longer text. The value is
# matched apart: in `https://host?token=x` the name `https` must not swallow the rest.
_NAME = re.compile(
    r"(?<![\w.-])(?:-{0,2}[A-Za-z_][\w.-]{0,80}[\"']?\s*[=:]|--?[A-Za-z][\w.-]{0,80})\s*"
)
_VALUE = re.compile(r"\[redacted\]|\"[^\"]*\"|'[^']*'|[^\s&;,\"'}\])]+")


def redact(value: Any, *, known: Iterable[str] = ()) -> Any:
    """Return a copy of *value* in which `"[redacted]"` stands for each secret.

    Mappings, lists, tuples, sets and strings are searched; other objects are kept as they are.
    Everything below a secret name goes; elsewhere only the secret part of a text does, so that
    `https://user:tok@host/repo` still tells the host. Booleans and `None` are never secrets.

    Args:
        value: Data to record. It is not changed.
        known: Texts that are secret whatever they look like (see `secrets_in_environment`).
    """
    literals = sorted({text for text in known if text}, key=len, reverse=True)
    return _redact(value, literals, 0)


def is_secret_name(name: str) -> bool:
    """Whether a value of this name is taken for a secret: `WANDB_API_KEY`, but not `tokenizer`."""
    return _secrecy(name) is not None


def secrets_in_environment() -> list[str]:
    """Return the values of environment variables with a secret name, from 8 characters on.

    For `redact`: a program may have been given the same value as an argument.
    """
    return [value for name, value in os.environ.items() if len(value) >= 8 and is_secret_name(name)]


def _secrecy(name: str) -> str | None:
    """Return `"all"` if any value of this name is secret, `"text"` if only text is, else `None`."""
    words = f"_{'_'.join(_WORD.findall(name))}_".lower()
    if _ANYWHERE.search(words):
        return "all"
    if _AT_END.search(words) and not _INNOCENT.search(words):
        return "text"
    return None


def _redact(value: Any, known: list[str], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        return REDACTED
    if isinstance(value, str):
        return _redact_text(value, known)
    if isinstance(value, (bytes, bytearray)):
        text = value.decode("latin-1")
        clean = _redact_text(text, known)
        return value if clean == text else clean.encode("latin-1")
    if isinstance(value, Mapping):
        return _redact_mapping(cast("Mapping[Any, Any]", value), known, depth)
    if isinstance(value, (list, tuple)):
        items = _redact_sequence(cast("list[Any]", value), known, depth)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (set, frozenset)):
        return {_redact(item, known, depth + 1) for item in cast("set[Any]", value)}
    return value


def _redact_mapping(value: Mapping[Any, Any], known: list[str], depth: int) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    # `{"name": "API_KEY", "value": "..."}`, as container descriptions have it
    label = value.get("name", value.get("key"))
    labelled = isinstance(label, str) and is_secret_name(label)
    for key, item in value.items():
        secrecy = _secrecy(key) if isinstance(key, str) else None
        if labelled and key == "value":
            secrecy = "all"
        clean_key = _redact_text(key, known) if isinstance(key, str) else key
        result[clean_key] = (
            _redact(item, known, depth + 1)
            if secrecy is None
            else _redact_all(item, depth + 1, numbers=secrecy == "all")
        )
    return result


def _redact_sequence(value: Iterable[Any], known: list[str], depth: int) -> list[Any]:
    """Redact items; the one after `--password` too, unless it is a flag itself."""
    result: list[Any] = []
    after_secret_flag = False
    for item in value:
        if after_secret_flag and isinstance(item, str) and not item.startswith("--"):
            result.append(REDACTED)
            after_secret_flag = False
            continue
        result.append(_redact(item, known, depth + 1))
        after_secret_flag = (
            isinstance(item, str)
            and item.startswith("-")
            and "=" not in item
            and is_secret_name(item)
        )
    return result


def _redact_all(value: Any, depth: int, *, numbers: bool) -> Any:
    """Keep the shape of *value*, and of its leaves only those that cannot be the secret."""
    if value is None or isinstance(value, bool) or value == "":
        return value
    if isinstance(value, (int, float)):
        return REDACTED if numbers else value
    if depth > _MAX_DEPTH:
        return REDACTED
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {key: _redact_all(item, depth + 1, numbers=numbers) for key, item in items}
    if isinstance(value, (list, tuple)):
        sequence = cast("list[Any]", value)
        return [_redact_all(item, depth + 1, numbers=numbers) for item in sequence]
    return REDACTED


def _redact_text(text: str, known: list[str]) -> str:
    for literal in known:
        text = text.replace(literal, REDACTED)
    if _HARMLESS.fullmatch(text):
        return text
    text = replace_tokens(text, REDACTED)
    for form in _FORMS:
        text = form.sub(REDACTED, text)
    text = _URL_USER.sub(_without_user, text)
    text = _HEADER.sub(rf"\1\2{REDACTED}", text)
    return _redact_named(text)


def _redact_named(text: str) -> str:
    """Replace the values that follow a secret name in running text."""
    parts: list[str] = []
    done = 0
    for match in _NAME.finditer(text):
        if match.start() < done or not is_secret_name(match[0]):
            continue
        value = _VALUE.match(text, match.end())
        is_next_flag = text.startswith("-", match.end()) and match[0].strip()[-1] not in "=:"
        if value is not None and not is_next_flag:
            parts += text[done : match.end()], REDACTED
            done = value.end()
    return "".join((*parts, text[done:]))


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match.groups()
    # `ssh://git@host` names a user and no secret; over http a user alone is a token.
    if ":" not in user and not scheme.lower().startswith("http"):
        return match[0]
    return f"{scheme}{REDACTED}@"
