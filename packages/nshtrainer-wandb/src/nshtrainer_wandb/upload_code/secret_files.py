"""Files that are never uploaded, by their name or by what is in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

__all__ = ["holds_secret", "is_secret_file"]

# Compared with the file's name in lower case.
# fmt: off
_NAMES: Final = (
    ".env", ".env.*", "*.env", ".env-*", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.p8",
    "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.gpg", "*.age", "*.asc", "*.ovpn", "id_rsa*",
    "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".htpasswd",
    ".pypirc", ".npmrc", ".yarnrc.yml", ".git-credentials", ".dockercfg", ".boto", ".s3cfg",
    ".rclone.conf", "rclone.conf", ".databrickscfg", ".condarc", "pip.conf", ".vault-token",
    "credentials", "credentials.*", "*_credentials.*", "*-credentials.*",
    "application_default_credentials.json", "secret", "secret.*", "secrets", "secrets.*",
    "*_secret.*", "*-secret.*", "*_secrets.*", "*-secrets.*", "client_secret*",
    "service-account*.json", "service_account*.json", "token", "token.json", "token.txt",
    "tokens.json", "*_token.txt", "*-token.txt", "api_key*", "api-key*", "apikey*", "*_api_key.*",
    "*.apikey", "passwords.*", "password.*", "passwd", "kubeconfig*", "*.kubeconfig", "*.tfstate",
    "*.tfstate.backup", "*.tfvars",
)
# fmt: on
_HARMLESS: Final = (".env.example", ".env.sample", ".env.template", ".env.dist")
# fmt: off
_FOLDERS: Final = frozenset(
    {
        ".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", ".gcloud", ".huggingface",
        "secrets", ".secrets", ".git",
    }
)
# fmt: on
_PRIVATE_KEY: Final = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----\s+[A-Za-z0-9+/=]"
)


def is_secret_file(path: str) -> bool:
    """Whether *path* (relative, with `/`) has a name under which secrets are kept, in any case."""
    *folders, name = path.lower().split("/")
    if name in _HARMLESS:
        return False
    return not _FOLDERS.isdisjoint(folders) or any(fnmatchcase(name, wanted) for wanted in _NAMES)


def holds_secret(content: bytes, known: Sequence[str] = ()) -> bool:
    """Whether *content* has a private key in it, or one of the texts *known* to be secret."""
    if _PRIVATE_KEY.search(content):
        return True
    return any(text.encode() in content for text in known if text)
