"""Files that are never uploaded because of their name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

__all__ = ["is_archive", "is_secret_file"]

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
    "*.tfstate.backup", "*.tfvars", "kaggle.json", "*.pgpass", "adminsdk*.json", "*-adminsdk-*.json",
    "*-credentials", "*_credentials", ".*credentials", "*.secret", "*.secrets", "*.token", "*.pass",
    "*.cred", "*.creds", "*.passwd", "*.psk", "*.pkcs12", "*.pkcs8", "*.keychain", "*.keychain-db",
    "*.kdb", "*.psafe3", "*.agilekeychain", "cookies.txt", "cookies.sqlite", "logins.json", "key?.db",
    ".*_history", ".dockerconfigjson", ".terraformrc", "terraform.rc", ".modal.toml", "clearml.conf",
    ".clearml.conf", ".comet.config", ".msmtprc", ".esmtprc", ".fetchmailrc", ".ftpconfig",
    "sftp-config.json", "sftp.json", "wp-config.php",
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
# fmt: off
_ARCHIVES: Final = (
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar", ".whl", ".jar", ".egg",
)
# fmt: on


def is_secret_file(path: str) -> bool:
    """Whether *path* (relative, with `/`) has a name under which secrets are kept, in any case."""
    *folders, name = path.lower().split("/")
    if name in _HARMLESS:
        return False
    return not _FOLDERS.isdisjoint(folders) or any(fnmatchcase(name, wanted) for wanted in _NAMES)


def is_archive(path: str) -> bool:
    """Whether *path* is that of a compressed file, in which no secret could be found."""
    return path.lower().endswith(_ARCHIVES)
