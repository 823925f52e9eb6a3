"""Secrets as people leave them in repositories; all made up, and put together here so that none stands."""

from __future__ import annotations

import json

__all__ = ["BY_CONTENT", "BY_NAME", "MARK"]

MARK = "Zq7" * 12
"""A part of each secret: 36 characters that stand nowhere else."""

_HEX = "0a7b" * 10
_KEY = "PRIVATE " + "KEY-----"

BY_NAME = (
    *(".env", ".env.local", "prod.env", ".envrc", ".netrc", ".pypirc", ".npmrc", "secrets.toml"),
    *("deploy/id_ed25519", "certs/server.pem", "certs/server.key", "credentials.json"),
    *(".aws/config", "infra/main.tfstate", "service-account-prod.json", "kaggle.json"),
    *(
        ".aws-credentials",
        "api.token",
        ".bash_history",
        "cookies.txt",
        "vault.keychain",
        "ci.creds",
    ),
)
"""Paths that are secret whatever they hold."""

BY_CONTENT = {
    "aws id": "key = 'AKIA" + "ABCDEFGH23456789'",
    "aws secret": f"aws_secret_access_key = {MARK}/+{MARK}"[:63],
    "azure storage": f"'DefaultEndpointsProtocol=https;AccountName=x;AccountKey={MARK}{MARK}=='",
    "gcp service account": json.dumps(
        {"type": "service_account", "private_key_id": _HEX, "private_key": "x"}
    ),
    "gcp key in JSON": json.dumps({"private_key": f"-----BEGIN {_KEY}\n{MARK}\n"}),
    "google api": f"'AIza{MARK}'",
    "github": f"token = 'ghp_{MARK}'",
    "github fine-grained": f"x('github_pat_{MARK}')",
    "gitlab": f"glpat-{MARK}",
    "hugging face": f"login('hf_{MARK}')",
    "openai": f"sk-proj-{MARK}",
    "anthropic": f"sk-ant-api03-{MARK}",
    "wandb call": f"wandb.login(key='{_HEX}')",
    "wandb yaml": f"wandb:\n  project: p\n  api_key: {_HEX}\n",
    "wandb new form": f"wandb_v1_{MARK}",
    "netrc inside": f"machine api.wandb.ai\n  login user\n  password {_HEX}\n",
    "slack": f"xoxb-{MARK}",
    "slack webhook": f"https://hooks.slack.com/services/T0/B0/{MARK}",
    "stripe": f"sk_live_{MARK}",
    "npm": f"//registry.npmjs.org/:_authToken=npm_{MARK}",
    "pypi": f"pypi-AgE{MARK}",
    "web token": f"'eyJ{MARK}.eyJ{MARK}.{MARK}'",
    "rsa key": f"-----BEGIN RSA {_KEY}\n{MARK}\n",
    "openssh key": f"'''-----BEGIN OPENSSH {_KEY}\n{MARK}'''",
    "encrypted key": f"-----BEGIN RSA {_KEY}\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES\n\n{MARK}\n",
    "pgp key": f"-----BEGIN PGP {_KEY.replace('-----', ' BLOCK-----')}\n\n{MARK}\n",
    "key in a literal": f'K = "-----BEGIN EC {_KEY}\\n{MARK}\\n"',
    "putty key": f"PuTTY-User-Key-File-2: ssh-rsa\n{MARK}",
    "age key": "AGE-SECRET-KEY-1" + MARK.upper(),
    "url": f"postgresql://me:{MARK}@db.example.com/x",
    "url, token only": f"git clone https://{MARK}@github.com/me/x.git",
    "url without user": f"redis://:{MARK}@cache:6379",
    "password": 'connect(password="correct-horse-battery")',
    "password, json": json.dumps({"db_password": "Tr0ub4dor&3$x"}),
    "api key, python": f'API_KEY: str = "{MARK}"',
    "token, keyword": f"Client(auth_token='{MARK}')",
    "shell": f"export MY_SERVICE_TOKEN={MARK}\n",
    "dockerfile": f"FROM x\nENV HF_TOKEN {MARK}\n",
    "ini": f"[x]\nclient_secret = {MARK}\n",
    "value on the next line": f'SECRET_KEY = (\n    "x"\n)\napi_key = \\\n  token="{MARK}"',
    "atlassian": f"ATATT3{MARK}{MARK}=1A2B3C4D",
    "notion": f"'ntn_{MARK}{MARK}'",
    "grafana": f"glsa_{MARK}_0a1b2c3d",
    "langsmith": f"lsv2_pt_{_HEX}",
    "microsoft entra": f"x('abc8Q~{MARK[:34]}')",
    "twilio": f"SK{_HEX[:32]}",
    "discord bot": f"client.run('M{MARK[:23]}.G1aBcD.{MARK}')",
    "webhook of teams": f"https://x.webhook.office.com/webhookb2/{MARK}@y/IncomingWebhook/z",
    "shared access": f"https://x.blob.core.windows.net/c?sv=2022&sig={MARK}{MARK}%3D",
    "basic header": f"headers = {{'Authorization': 'Basic {MARK}=='}}",
    "bearer header": f"curl -H 'Authorization: Bearer {MARK}' x.org",
    "cookie": f"headers['Cookie'] = 'a=b; sessionid={MARK}'",
    "login of curl": f"curl -u me:{MARK} https://x.org",
    "sshpass": f"sshpass -p '{MARK}' ssh me@host",
    "mysql": f"mysql -u root -p{MARK} db",
    "htpasswd": f"me:$apr1$abcdefgh${MARK}",
    "shadow": f"root:$6$abcdefgh${MARK}{MARK}:1::",
    "web key": json.dumps({"kty": "RSA", "n": "x", "d": MARK}),
    "one-time passwords": "otpauth://totp/x?secret=" + "JBSWY3DPEHPK3PXP" * 2,
    "connection string": f"'Server=x;User Id=sa;Password={MARK};'",
    "query": f"jdbc:mysql://h/db?user=u&password={MARK}",
    "xml": f"<settings><password>{MARK}</password></settings>",
    "comment": f"# old one: api_key = '{MARK}'",
    "commented out": f"# export MY_SERVICE_TOKEN={MARK}",
    "password of words": 'DB_PASSWORD = "correct horse battery"',
    "password that ends as a sentence does": "password = 'Tr0ub4dor-2024!'",
    "password made of that word": "db_password = 'MyPassw0rd123'",
    "short password": "passwd='hunter2'",
    "few digits": "API_TOKEN = 'kQvBeUlAcZpLxMwRt2YsN'",
    "value that begins like a placeholder": "redis://:a8MTTfhtpAWGTsiq@cache:6379",
    "index": f"os.environ['API_KEY'] = '{MARK}'",
    "default": f"os.environ.setdefault('API_KEY', '{MARK}')",
    "notebook": json.dumps({"cells": [{"source": [f"os.environ['X_TOKEN'] = 'ghp_{MARK}'"]}]}),
}
"""Kind -> what is in the file."""
