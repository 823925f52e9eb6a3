from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nshtrainer.run import redaction
from nshtrainer.run.redaction import REDACTED, is_secret_name, redact, secrets_in_environment

A = "Ab3" * 14  # 42 characters that look random enough

BY_FORM = {
    "github": f"ghp_{A}",
    "github fine-grained": f"github_pat_{A}",
    "gitlab": f"glpat-{A}",
    "hugging face": f"hf_{A}",
    "openai": f"sk-{A}",
    "openai project": f"sk-proj-{A}",
    "anthropic": f"sk-ant-api03-{A}",
    "stripe": f"sk_live_{A}",
    "aws": "AKIA" + "ABCDEFGH23456789",
    "slack": f"xoxb-{A}",
    "slack webhook": "https://hooks.slack.com/services/T0/B0/" + A,
    "google": f"AIza{A}",
    "google oauth": f"ya29.{A}",
    "npm": f"npm_{A}",
    "pypi": f"pypi-AgE{A}",
    "sendgrid": f"SG.{A}.{A}",
    "telegram": "123456789:" + A[:35],
    "wandb": f"wandb_v1_{A}",
    "web token": f"eyJ{A}.eyJ{A}.{A}",
    "bearer": f"Bearer {A}",
    "pem": f"-----BEGIN RSA PRIVATE KEY-----\n{A}\n{A}\n-----END RSA PRIVATE KEY-----",
    "cut pem": f"-----BEGIN PRIVATE KEY-----\n{A}",
    "url": f"https://user:{A}@host/repo.git",
    "url, token only": f"https://{A}@host/repo.git",
    "url with @ in the password": f"postgres://u:x@{A}@host/db",
    "query": f"https://host/path?page=1&token={A}",
    "header": f"Authorization: Basic {A}",
    "cookie": f"Cookie: a=b; session={A}",
    "assignment": f"WANDB_API_KEY={A}",
    "yaml": f"lr: 1e-3\npassword: {A}\n",
    "json": json.dumps({"client_secret": A}),
    "flag": f"train.py --hf-token {A} --lr 1",
    "flag, equals": f"train.py --api-key={A}",
    "leading dash": f"--token=-{A}",
    "atlassian": f"ATATT3{A}",
    "discord": f"M{A[:23]}.G1aBcD.{A}",
    "notion": f"ntn_{A}",
    "grafana": f"glsa_{A}",
    "azure": f"AccountName=x;AccountKey={A}==;y",
}
BY_NAME = (
    *("token", "HF_TOKEN", "hfToken", "access_token", "GITHUB_PAT", "auth", "cookie"),
    *("password", "db_password", "PASSWD", "passphrase", "secret", "client_secret", "credentials"),
    *("apikey", "api_key", "API-KEY", "wandb.api_key", "APIKey", "OPENAI_API_KEY", "authorization"),
    *(
        "private_key",
        "ssh_private_key",
        "AWS_SECRET_ACCESS_KEY",
        "connection_string",
        "webhook_url",
    ),
)


def assert_gone(result: Any) -> None:
    text = json.dumps(result)
    assert A not in text
    assert A[:20] not in text
    assert REDACTED in text


@pytest.mark.parametrize("kind", BY_FORM)
@pytest.mark.parametrize("place", ["alone", "in text", "in a list", "in a mapping", "as a key"])
def test_a_secret_is_recognised_by_its_form(kind: str, place: str):
    """Wherever a token, key, password or credential in a URL stands, it does not survive."""
    secret = BY_FORM[kind]
    data = {
        "alone": secret,
        "in text": f"see {secret}",
        "in a list": [1, ("x", secret)],
        "in a mapping": {"note": {"deep": secret}},
        "as a key": {secret: 1},
    }[place]

    assert_gone(redact(data))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_secret_is_recognised_by_its_name(name: str):
    """Whatever stands under a secret name goes, however deep below it."""
    assert is_secret_name(name)
    assert_gone(redact({name: A}))
    assert_gone(redact({"a": [{name: {"x": [A, {"y": A}]}}]}))
    assert_gone(redact(["train.py", f"--{name}", A]))
    assert_gone(redact([f"--{name}={A}"]))
    assert_gone(redact({"name": name, "value": A}))
    assert_gone(redact({name: A.encode()}))


def test_numbers_under_a_password_go_and_counts_stay():
    """A password may be a number; `token: 5` is a count."""
    assert redact({"password": 1234, "token": 5}) == {"password": REDACTED, "token": 5}


@pytest.mark.parametrize(
    "innocent",
    [
        {"tokenizer": "bpe", "token_count": 5, "num_tokens": 10, "max_tokens": 4096},
        {"pad_token": "<pad>", "eos_token": "</s>", "pad_token_id": 0, "use_auth": True},
        {"password": None, "secret": "", "api_key": False},
        {"commit": "d0465ec8d173bf77aa01d0465ec8d173bf77aa01", "key": "x", "monkey": "y"},
        {"author": "me", "secretary": "you", "keys": ["a"], "passes": 3},
        "git@github.com:org/repo.git",
        "ssh://git@github.com/org/repo.git",
        "https://github.com/org/repo.git",
        "https://host:8080/@scope/pkg",
        "glove-840B-300d-embeddings and sk-learn-random-forest-baseline",
        "train.py --tokenizer bpe --lr 1e-3 --max-tokens 5",
        ["train.py", "--tokenizer", "bpe", "--token", "--lr", "3"],
        "val/loss: 0.5, epoch=3-step=100.ckpt, basic configuration",
        {"optimizer": {"lr": 1e-3, "betas": (0.9, 0.999)}, 3: None, "tags": {"a", "b"}},
    ],
)
def test_innocent_values_survive(innocent: Any):
    """Hyperparameters, tokenizer settings, paths and commits are recorded as they are."""
    assert redact(innocent) == innocent


def test_what_is_around_a_secret_survives():
    """Only the secret part of a text goes, so that the record still tells something."""
    assert redact(f"https://user:{A}@host/repo.git") == f"https://{REDACTED}@host/repo.git"
    assert redact(f"--api-key={A} --lr 3") == f"--api-key={REDACTED} --lr 3"
    assert redact(["--password", A, "--lr", "3"]) == ["--password", REDACTED, "--lr", "3"]


@pytest.mark.parametrize("kind", BY_FORM)
def test_redacting_again_changes_nothing(kind: str):
    """A record may pass through more than once."""
    once = redact({"x": BY_FORM[kind]})

    assert redact(once) == once


def test_the_original_is_untouched():
    """A copy is returned; the data in use keeps its secrets."""
    data = {"a": [{"token": A}], "b": (A,)}
    redact(data)

    assert data == {"a": [{"token": A}], "b": (A,)}


def test_data_that_contains_itself_ends():
    """A cycle is cut, not followed for ever."""
    data: dict[str, Any] = {"x": 1}
    data["self"] = data

    assert redact(data)["self"]["x"] == 1


def test_known_secrets_go_whatever_they_look_like(monkeypatch: pytest.MonkeyPatch):
    """An API key given as a plain argument is recognised by the environment variable beside it."""
    key = "d0465ec8d173bf77aa01d0465ec8d173bf77aa01"
    monkeypatch.setenv("WANDB_API_KEY", key)

    assert key in secrets_in_environment()
    assert redact(["login.py", key], known=secrets_in_environment()) == ["login.py", REDACTED]


@settings(max_examples=300, deadline=None)
@given(st.from_regex(r"[A-Za-z0-9_./]{0,17}", fullmatch=True))
def test_a_short_plain_word_has_no_form_of_a_secret(text: str):
    """Such words are passed by unread, and none of the forms would find anything in them."""
    assert redact(text) == text
    forms = (*redaction._FORMS, redaction._HEADER, redaction._URL_USER)
    assert not any(form.search(text) for form in forms)
