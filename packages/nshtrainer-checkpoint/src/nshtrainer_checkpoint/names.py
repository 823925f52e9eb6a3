"""File names made from templates: keys are literal, a name never leaves its folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nshtrainer.errors import ConfigError

__all__ = ["Key", "NameTemplate", "duration_text", "slug"]

EXTENSION = ".ckpt"
_MAX_BYTES = 180  # of a stem: with a version, the extension and the sidecar's, below the usual 255
_UNSAFE = re.compile(r'[<>:"|?*/\\\x00-\x1f\x7f]')


def slug(metric: str) -> str:
    """Return *metric* as part of a file name: letters, digits, `_` and `-` stay, all else is `_`."""
    return re.sub(r"[^\w-]", "_", metric)[:80]


def duration_text(seconds: float) -> str:
    """Return a duration such as `1d_2h_3m_4s`; parts that are zero are left out, none is `0s`."""
    minutes, s = divmod(int(max(seconds, 0)), 60)
    hours, m = divmod(minutes, 60)
    d, h = divmod(hours, 24)
    parts = [f"{n}{unit}" for n, unit in ((d, "d"), (h, "h"), (m, "m"), (s, "s")) if n]
    return "_".join(parts) or "0s"


@dataclass(frozen=True)
class Key:
    """A place in a template that a value fills."""

    text: str
    """What stands between the braces: the name of a value, perhaps `:` and a format."""

    def find(self, known: Iterable[str]) -> tuple[str, str] | None:
        """Split the text into a known name and a format; names may hold `:` themselves."""
        names = set(known)
        if self.text in names:
            return self.text, ""
        for colon in reversed([i for i, c in enumerate(self.text) if c == ":"]):
            if self.text[:colon] in names:
                return self.text[:colon], self.text[colon + 1 :]
        return None


@dataclass(frozen=True)
class NameTemplate:
    """A file name, without extension, with places for values."""

    parts: tuple[str | Key, ...]

    @classmethod
    def parse(cls, text: str, examples: Mapping[str, float | str] | None = None) -> NameTemplate:
        """Read a template such as `"{epoch}-{val/loss:.3f}"`; `{{` and `}}` stand for braces.

        Args:
            text: The template. A key is taken literally: `{val.loss}` and `{acc[1]}` are metrics.
            examples: Values that are known to exist; formats given for them are tried.

        Raises:
            ConfigError: Braces do not match, a key is empty, a format does not fit, or the name
                would be hidden, too long, hold a separator or end with the extension.
        """
        template = cls(tuple(_split(text)))
        literal = "".join(part for part in template.parts if isinstance(part, str))
        _check_literal(text, literal)
        for part in template.parts:
            found = part.find(examples or {}) if isinstance(part, Key) else None
            if found is not None and examples:
                _check_format(text, *found, examples[found[0]])
        return template

    def render(self, values: Mapping[str, float | str]) -> tuple[str, list[str]]:
        """Return the name for *values*, and the keys that could not be filled (they read `none`)."""
        out: list[str] = []
        problems: list[str] = []
        for part in self.parts:
            if isinstance(part, str):
                out.append(part)
                continue
            try:
                name, spec = part.find(values) or (None, "")
                out.append("none" if name is None else format(values[name], spec))
                problems += [part.text] * (name is None)
            except (TypeError, ValueError):
                problems.append(part.text)
                out.append("none")
        name = _UNSAFE.sub("_", "".join(out)).encode()[:_MAX_BYTES].decode(errors="ignore")
        return name.rstrip(". ") or "checkpoint", problems


def _split(text: str) -> list[str | Key]:
    parts: list[str | Key] = []
    at = 0
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]", text):
        parts.append(text[at : match.start()])
        at = match.end()
        token = match.group()
        if token in ("{{", "}}"):
            parts.append(token[0])
        elif match.group(1) is None:
            raise ConfigError(
                f"the file name template {text!r} has a lone {token!r}; braces stand around a key. "
                f"Write {token * 2!r} for the character itself."
            )
        elif not match.group(1).strip(": "):
            raise ConfigError(
                f"the file name template {text!r} has an empty key; write what belongs there, "
                "such as {epoch} or {step}"
            )
        else:
            parts.append(Key(match.group(1)))
    parts.append(text[at:])
    return [p for p in parts if p]


def _check_literal(text: str, literal: str) -> None:
    problem = None
    if not text:
        problem = "is empty; leave `filename` out for the default"
    elif bad := _UNSAFE.search(literal):
        problem = (
            f"holds {bad.group()!r}; it names a file in the callback's own folder. "
            "Use `dirpath` to choose another folder."
        )
    elif text.startswith("."):
        problem = "starts with a dot, which hides the file; start it with another character"
    elif text.endswith(EXTENSION):
        problem = f"ends with {EXTENSION!r}, which is added anyway; leave the extension out"
    elif len(literal.encode()) > _MAX_BYTES:
        problem = f"is longer than {_MAX_BYTES} bytes; shorten it"
    if problem is not None:
        raise ConfigError(f"the file name template {text!r} {problem}")


def _check_format(text: str, name: str, spec: str, example: float | str) -> None:
    try:
        format(example, spec)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"in the file name template {text!r} the format {spec!r} does not fit {name!r} "
            f"({error}); use one for {type(example).__name__}, or none"
        ) from None
