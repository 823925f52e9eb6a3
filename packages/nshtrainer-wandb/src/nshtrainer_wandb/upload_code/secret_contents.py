"""What in a file makes it a secret: keys, tokens, and passwords that are written out.

Source code talks of secrets all the time (`token = get_token()`), so a name alone is no evidence here:
a literal has to stand beside it. What is taken for a secret in error is left out of an upload and
named, no more; what is missed is out in the world.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Final

from nshtrainer.run.redaction import find_token, is_secret_name

__all__ = ["find_secret"]

# A header alone is code that handles keys. Line ends may be written `\n`, as JSON and code have them.
_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:\s|\\[nr]|[\"'+,]|[A-Za-z-]+: [^\n\\]*(?:\n|\\n))*[A-Za-z0-9+/=]{4}"
    r"|PuTTY-User-Key-File-\d: |---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\s|AGE-SECRET-KEY-1[A-Z0-9]{20}"
)
_SERVICE_ACCOUNT: Final = re.compile(r"\"private_key_id\"\s*:\s*\"[0-9a-f]{20,}\"")
# A user and a password, or over http a long user alone; `{token}`, `$TOKEN` and `<token>` are none.
_URL_PASSWORD: Final = re.compile(
    r"://(?:[^\s/:@\"'`<>{}$%]*:([^\s/@\"'`<>{}$]{4,100})"
    r"|(?:(?<=http://)|(?<=https://))([\w-]{20,100}))@[\w\[]"
)
# 40 hex digits are a git commit as well, so the line or the one before says what they are of.
_WANDB_KEY: Final = re.compile(
    r"wandb[\s\S]{0,80}?(?:key|login|password|token)[^\n0-9a-f]{1,3}[^\n]{0,40}?"
    r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])",
    re.IGNORECASE,
)
_NETRC: Final = re.compile(r"\bmachine\s+\S+\s+(?:login\s+\S+\s+)?password\s+\S")
_FORMS: Final = (
    ("a private key", ("private key", "-user-key-file-", "age-secret-key"), _PRIVATE_KEY),
    ("the key of a service account", ("private_key_id",), _SERVICE_ACCOUNT),
    ("a login for a machine", ("machine",), _NETRC),
    ("a Weights & Biases key", ("wandb",), _WANDB_KEY),
)
"""What it is, what any such secret has in it in lower case, for a quick look, and its form."""

# `name = "value"`, `"name": 'value'`, `name="value"` ...
_QUOTED: Final = re.compile(
    r"(?<![\w.-])([A-Za-z_][\w.-]{2,80})[\"']?\s*(?::\s*\w+\s*)?(?::|=>?)\s*[rbu]?"
    r"(\"[^\"\s]{8,200}\"|'[^'\s]{8,200}')"
)
# ... and a line of YAML, INI, shell or a Dockerfile.
_LINE: Final = re.compile(
    r"^[ \t]*(?:-[ \t]+|export[ \t]+|set[ \t]+|ENV[ \t]+|ARG[ \t]+)?([A-Za-z_][\w.-]{2,80})[ \t]*[:= ][ \t]*"
    r"([A-Za-z0-9+/=_.~-]{16,200})[ \t]*\r?$",
    re.MULTILINE,
)
# What a secret name has in it, in lower case.
_HINTS: Final = ("passw", "passphrase", "secret", "credential", "token", "key", "auth")
_PLACEHOLDER: Final = re.compile(
    r"[{}<>\\\[\]]|\(\)|^\$|%[sd(]|\.\.\.|x{4}|\*{3}"
    r"|^(?:your|my|the|some|an?|example|dummy|fake|test|change|insert|todo|env|os|self)(?![a-z])"
    r"|^(?:my)?(?:passw(?:or)?d|pass|pwd|token|tok|secret|key|repo|none|null|true|false)$",
    re.IGNORECASE,
)
_MIN_DIGITS, _MIN_LETTERS = 3, 3


def find_secret(content: bytes, known: Sequence[str] = ()) -> str | None:
    """Return what secret *content* holds, in a few words; None if it seems to hold none.

    Args:
        content: A file, in UTF-8, UTF-16 or of any other kind.
        known: Texts that are secret whatever they look like.
    """
    if any(text.encode() in content for text in known if text):
        return "the value of a secret environment variable"
    text = _decoded(content)
    if (kind := find_token(text)) is not None:
        return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
    lowered = text.lower()
    for what, marks, form in _FORMS:
        if any(mark in lowered for mark in marks) and form.search(text):
            return what
    if any(not _PLACEHOLDER.search(m[1] or m[2]) for m in _URL_PASSWORD.finditer(text)):
        return "a password in a URL"
    names = (name for line in _telling_lines(text, lowered) for name in _assigned(line))
    name = next((name for name in names if is_secret_name(name)), None)
    return None if name is None else f"a value for {name!r}"


def _decoded(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    # All that is looked for is ASCII, and every byte is a character in Latin-1.
    return content.decode("latin-1")


def _telling_lines(text: str, lowered: str) -> Iterator[str]:
    """The lines in which a secret name may stand, each with the one below it, where a value may be."""
    done = -1
    for start in sorted({p for hint in _HINTS for p in _positions(lowered, hint)}):
        if start < done:
            continue
        first = text.rfind("\n", 0, start) + 1
        end = text.find("\n", start)
        done = len(text) if end < 0 else end
        below = text.find("\n", done + 1)
        yield text[first : len(text) if below < 0 else below]


def _positions(text: str, part: str) -> Iterator[int]:
    start = text.find(part)
    while start >= 0:
        yield start
        start = text.find(part, start + 1)


def _assigned(text: str) -> Iterator[str]:
    """The names beside which *text* has a literal that may be a secret."""
    for match in _QUOTED.finditer(text):
        name, value = match[1], match[2][1:-1]
        is_password = "passw" in name.lower() or "passphrase" in name.lower()
        if not _PLACEHOLDER.search(value) and (is_password or _looks_random(value)):
            yield name
    for match in _LINE.finditer(text):
        if not _PLACEHOLDER.search(match[2]) and _looks_random(match[2]):
            yield match[1]


def _looks_random(value: str) -> bool:
    """Whether *value* mixes digits and letters as keys do and words and paths do not."""
    digits, letters = sum(c.isdigit() for c in value), sum(c.isalpha() for c in value)
    return len(value) >= 12 and digits >= _MIN_DIGITS and letters >= _MIN_LETTERS
