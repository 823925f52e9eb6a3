"""What in a file makes it a secret: keys, tokens, and passwords that are written out.

Source code talks of secrets all the time (`token = get_token()`), so a name alone is no evidence here:
a literal has to stand beside it. What is taken for a secret in error is left out of an upload and
named, no more; what is missed is out in the world.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from nshtrainer.run.redaction import is_secret_name
from nshtrainer.run.tokens import find_token

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
_HEADER: Final = re.compile(
    r"authorization[\"']?\]?\s*[:=,]\s*[\"']?(?:basic|bearer|token|digest|apikey)\s+(?=[\w.~+/-]*\d)"
    r"[\w.~+/-]{12,}",
    re.IGNORECASE,
)
_COOKIE: Final = re.compile(
    r"cookie[\"']?\]?\s*[:=,]\s*[\"']?(?:[\w.-]+=[^;\n\"']*;\s*)*[\w.-]+=(?=[\w%+/.-]*\d)[\w%+/.-]{16,}",
    re.IGNORECASE,
)
# crypt's, as in `/etc/shadow` and `.htpasswd`, and those of argon2, scrypt and PBKDF2.
_PASSWORD_HASH: Final = re.compile(
    r"\$(?:apr1|[156y]|2[abxy]|argon2(?:id|i|d)|scrypt|pbkdf2-sha\d+)\$[\w./$=,+-]{20,}"
)
_COMMAND: Final = re.compile(
    r"\b(?:curl|wget)\b[^\n]{0,300}?\s(?:-u|--user)[ =]?[\"']?[\w.@-]+:[^\s$\"'{<:]{4,}"
    r"|\bsshpass\s+-p\s*[\"']?[^\s$\"'{<]{4,}"
    r"|\bmysql(?:dump|admin)?\b[^\n]{0,300}?\s(?:-p|--password=)(?![\"']?[${<])\S{4,}"
)
_JSON_WEB_KEY: Final = re.compile(r"\"(?:d|k)\"\s*:\s*\"[\w-]{32,}\"")
_ONE_TIME: Final = re.compile(r"otpauth://[^\s\"']*secret=[A-Z2-7]{12,}", re.IGNORECASE)
_FORMS: Final = (
    ("a private key", ("private key", "-user-key-file-", "age-secret-key"), _PRIVATE_KEY),
    ("a private key", ('"kty"',), _JSON_WEB_KEY),
    ("the key of a service account", ("private_key_id",), _SERVICE_ACCOUNT),
    ("a login for a machine", ("machine",), _NETRC),
    ("the seed of one-time passwords", ("otpauth:",), _ONE_TIME),
    ("a login in a header", ("authorization",), _HEADER),
    ("a cookie", ("cookie",), _COOKIE),
    ("a login on a command line", ("curl", "wget", "sshpass", "mysql"), _COMMAND),
    ("the hash of a password", ("$",), _PASSWORD_HASH),
    ("a Weights & Biases key", ("wandb",), _WANDB_KEY),
)
"""What it is, what any such secret has in it in lower case, for a quick look, and its form."""

# Only the name is consumed, so that in `note: api_key = "..."` each name is looked at.
_NAME: Final = r"(?<![\w.-])([A-Za-z_][\w.-]{1,80})"
# `name = "value"`, `"name": 'value'`, `name: str = "value"`, `setdefault("name", "value")` ...
_QUOTED: Final = re.compile(
    _NAME + r"(?=[\"']?\]?\s*(?::[\w| \t]{1,60})?(:|=>?|,)\s*[rbu]?"
    r"(\"[^\"\n]{4,200}\"|'[^'\n]{4,200}'))"
)
_ELEMENT: Final = re.compile(r"<([A-Za-z_][\w.-]{1,80})>([^<\s]{4,200})</")
# ... one of several values in a line: `Server=x;Password=y;`, `?user=x&password=y` ...
_PART: Final = re.compile(r"[;&?]\s*([A-Za-z_][\w.-]{1,80})=([^\s;&\"'{}<>$()]{4,200})")
# ... and without quotes, in a line of YAML, INI, shell or a Dockerfile, or in a comment.
_BARE: Final = re.compile(
    _NAME + r"(?=(?:[ \t]*[:=][ \t]*|(?<=[A-Z])[ \t]+)"
    r"([A-Za-z0-9+/=_.~-]{12,200})[ \t,;#\"'`)\]}]*\r?$)",
    re.MULTILINE,
)
_SETTING: Final = re.compile(
    _NAME + r"(?=[ \t]*[:=][ \t]*([^\s\"'#]{4,200})[ \t]*(?:#.{0,200})?\r?$)", re.MULTILINE
)
# What a secret name has in it, in lower case.
_HINTS: Final = ("pass", "pwd", "secret", "credential", "token", "key", "auth", "cookie")
_PASSWORD_NAME: Final = re.compile(
    r"(?:passw(?:or)?d|passphrase|passcode|pwd"  # and not `forward_pass`
    r"|(?:db|user|login|root|admin|sudo|ssh|ftp|smtp|mail|http|proxy|redis|mysql|pg|postgres|mongo)_?pass)s?\d*$",
    re.IGNORECASE,
)
_PLACEHOLDER: Final = re.compile(
    r"[{}<>\\\[\]]|\(\)|^\$|^\.{1,2}/|%[sd(]|\.\.\.|x{4}|\*{3}"
    r"|^(?:your|my|the|some|an?|example|dummy|fake|test|change|changeme|insert|todo|env|os|self)(?![a-z0-9])"
    r"|^(?:my)?(?:passw(?:or)?d|pass|pwd|token|tok|secret|key|repo|none|null|true|false)$"
    # Kinds and states, not values
    r"|^(?:str|string|text|bytes|bool|int|optional|required|hidden|prompt|disabled|enabled|default"
    r"|plain|plaintext|secretstr|any|optional\[.*)$",
    re.IGNORECASE,
)
# Words to people; a password of words has none of these.
_PROSE: Final = re.compile(
    r"\s(?:the|your|an?|is|are|must|please|for|of|or|and|to|not|no|with|in|if|from|as|by|be|was)\s"
    r"|passw|^(?:enter|please|invalid|wrong|the|your|missing|no)\s|[.?!:]$",
    re.IGNORECASE,
)
_MIN_DIGITS, _MIN_LETTERS = 3, 3
# fmt: off
_CODE: Final = (
    ".py", ".pyi", ".pyx", ".ipynb", ".js", ".ts", ".jsx", ".tsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".cuh", ".java", ".go", ".rs", ".jl", ".r", ".m", ".lua", ".rb", ".php", ".scala", ".kt", ".md", ".rst",
    ".tex", ".html", ".css",
)
# fmt: on
"""Endings of files in which what stands without quotes is an expression, or prose."""


def find_secret(
    content: bytes, known: Sequence[str] = (), *, path: str | None = None
) -> str | None:
    """Return what secret *content* holds, in a few words; None if it seems to hold none.

    Args:
        content: A file, in UTF-8, UTF-16 or of any other kind.
        known: Texts that are secret whatever they look like.
        path: Its name; None is that of code. In a file of settings `password: swordfish` is a secret, in
            code it is a name.
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
    is_code = path is None or path.lower().endswith(_CODE)
    lines = _telling_lines(text, lowered)
    names = (name for line in lines for name in _assigned(line, is_code=is_code))
    name = next(
        (name for name in names if is_secret_name(name) or _PASSWORD_NAME.search(name)), None
    )
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


def _assigned(text: str, *, is_code: bool) -> Iterator[str]:
    """The names beside which *text* has a literal that may be a secret."""
    for match in _QUOTED.finditer(text):
        name, value = match[1], match[3][1:-1]
        # After a comma stands a default, or the next name of a list.
        if (match[2] != "," and _is_password(name, value)) or (
            " " not in value and _looks_random(value)
        ):
            yield name
    for match in (*_ELEMENT.finditer(text), *_PART.finditer(text)):
        if _is_password(match[1], match[2]) or _looks_random(match[2]):
            yield match[1]
    for match in _BARE.finditer(text):
        if _looks_random(match[2]):
            yield match[1]
    if not is_code:
        for match in _SETTING.finditer(text):
            if not match[2].startswith(("/", "~", "!", "$")) and _is_password(match[1], match[2]):
                yield match[1]


def _is_password(name: str, value: str) -> bool:
    """Whether *value* may be what people choose for a password, and *name* says that it is one."""
    if not _PASSWORD_NAME.search(name) or _PLACEHOLDER.search(value):
        return False
    if " " in value and _PROSE.search(value):
        return False
    return len(value) >= 8 or (any(map(str.isdigit, value)) and any(map(str.isalpha, value)))


def _looks_random(value: str) -> bool:
    """Whether *value* mixes digits and letters as keys do and words and paths do not."""
    if len(value) < 12 or _PLACEHOLDER.search(value):
        return False
    digits, letters = sum(c.isdigit() for c in value), sum(c.isalpha() for c in value)
    if digits >= _MIN_DIGITS:
        return letters >= _MIN_LETTERS
    kinds = [(c.isdigit(), c.isupper(), c.islower()) for c in value]
    return digits > 0 and 2 * sum(a != b for a, b in pairwise(kinds)) > len(value)
