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
        "forward_pass = 'activation_quantization_v2'",
        'Url("https", "username:password", "host.example")',
        'fields = ["login", "password", "encoding"]',
        "def login(user: str, password: str) -> None: ...",
        "parser.add_argument('--password', help='Your password for the server.')",
        "raise ValueError('password must not be empty')",
        "config = {'password': 'required', 'token': 'string'}",
        "getpass.getpass('Password: ')",
        "password = args.password or prompt",
        "curl -u $USER:$TOKEN https://x.org",
        "curl -H 'Authorization: Bearer $TOKEN' https://x.org",
        "headers = {'Authorization': f'Bearer {token}'}",
        "mysql -u root -p db",
        "# password: see the wiki",
        "sk_learn_model_test_accuracy = 'sk-learn-random-forest'",
        "data_test_a1b2c3 = 'train_test_split_2024'",
        "as-of-2024 ak-47 SK-8",
    ],
)  # fmt: skip
def test_code_that_talks_of_secrets_holds_none(code: str):
    """Names, placeholders and look-ups alone keep no source file back."""
    assert find_secret(code.encode()) is None


@pytest.mark.parametrize(
    "line", ["password: swordfish", "db:\n  password: hunter-two  # mine", "DB_PASS=EfxTFcBeUlAc"]
)
def test_what_is_a_name_in_code_is_a_password_in_settings(line: str):
    """YAML, INI and `.env` files have no quotes around values."""
    assert find_secret(line.encode(), path="conf/db.yaml") is not None
    assert find_secret(line.encode(), path="src/db.py") is None


@pytest.mark.parametrize(
    "line",
    [
        "password: null",
        "password: ${oc.env:PW}",
        "password_file: /run/x",
        "password: $PW",
        "pass: 3",
    ],
)
def test_settings_that_only_refer_to_a_password_hold_none(line: str):
    """Interpolations, paths and empty values."""
    assert find_secret(line.encode(), path="conf/db.yaml") is None


@pytest.mark.parametrize(
    "line",
    ["curl -x http://a.b/c ", "password = get(a) ", "cookie: a=b; ", "key: a | ", "mysql db "],
)
def test_time_grows_with_the_size_of_a_line_and_not_with_its_square(line: str):
    """A megabyte without line ends, as minified code has; the square would take hours."""
    assert find_secret(line.encode() * (1_000_000 // len(line)), path="x.yaml") is None


def test_value_of_a_secret_environment_variable_is_found():
    """It is secret whatever it looks like."""
    assert find_secret(b"login('hunter hunter')", ["hunter hunter"]) is not None
    assert find_secret(b"login('hunter')", ["hunter hunter"]) is None
