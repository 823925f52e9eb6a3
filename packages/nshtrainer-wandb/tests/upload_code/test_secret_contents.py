from __future__ import annotations

import pytest

from nshtrainer_wandb.upload_code.secret_contents import find_secret

from .secrets import BY_CONTENT


@pytest.mark.parametrize("kind", BY_CONTENT)
def test_secret_is_found_in_source_code(kind: str):
    """Whatever stands around it."""
    text = f"import os\n\n# a comment\n{BY_CONTENT[kind]}\nx = 1\n"

    assert find_secret(text.encode()) is not None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_secret_is_found_in_any_encoding(encoding: str):
    """Windows tools write UTF-16."""
    text = f"# Schl\xfcssel\n{BY_CONTENT['github']}\n"

    assert find_secret(text.encode(encoding)) == "a GitHub token"


@pytest.mark.parametrize(
    "code",
    [
        "token = get_token()",
        "api_key = os.environ['API_KEY']",
        "password: str | None = None",
        'password = "password"',
        'parser.add_argument("--api-key", default="your-api-key-123")',
        'token: "${HF_TOKEN}"',
        "api_key: ${oc.env:API_KEY}",
        'url = f"https://{user}:{token}@github.com/x"',
        "https://user:password@host/path",
        "https://github.com/wandb/wandb@" + "0a7b" * 10,
        'if "-----BEGIN PRIVATE ' + 'KEY-----" in text:\n    return None',
        'pad_token = "[PAD]"',
        'pad_token = "<|endoftext|>"',
        "max_tokens = 4096",
        'tokenizer = "bert-base-uncased-2018"',
        "key = 'encoder.layers.0.weight123'",
        "key: 3f786850e387550fdab836ed7e6dc881de23001b",
        "wandb.init(project='x')  # see commit 3f786850e387550fdab836ed7e6dc881de23001b",
        "author = 'someone@example.com'",
        "@pytest.mark.parametrize('secret', [1])",
        "authors = ['a <a@b.c>']",
        'secret_key_name = "the name"',
        "AUTH_URL = 'https://auth.example.com/v1/oauth2'",
    ],
)  # fmt: skip
def test_code_that_talks_of_secrets_holds_none(code: str):
    """Names, placeholders and look-ups alone keep no source file back."""
    assert find_secret(code.encode()) is None


def test_value_of_a_secret_environment_variable_is_found():
    """It is secret whatever it looks like."""
    assert find_secret(b"login('hunter hunter')", ["hunter hunter"]) is not None
    assert find_secret(b"login('hunter')", ["hunter hunter"]) is None
