"""Tokens and keys that are told by their own form, such as `ghp_` and what follows, whoever gave them out."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Final

__all__ = ["find_token", "replace_tokens"]

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"

# fmt: off
_TOKENS: Final[Mapping[str, Mapping[str, str]]] = {
    "JSON web token": {"eyJ": r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"},
    "GitHub token": {
        **{f"gh{letter}_": rf"\bgh{letter}_\w{{16,}}" for letter in "pousr"},
        "github_pat_": r"\bgithub_pat_\w{16,}",
    },
    "GitLab token": {
        f"gl{kind}-": rf"\bgl{kind}-[\w.-]{{16,}}"
        for kind in ("pat", "dt", "rt", "cbt", "ptt", "ft", "imt", "agent", "soat", "ffct")
    },
    "Hugging Face token": {
        "hf_": r"\bhf_[A-Za-z0-9]{16,}",
        "api_org_": r"\bapi_org_[A-Za-z0-9]{16,}",
    },
    "Weights & Biases key": {
        "wandb_v": r"\bwandb_v\d+_\w{16,}",
        "local-": r"\blocal-[0-9a-f]{32,}",
    },
    "key of an LLM provider": {
        "sk-": r"\bsk-(?:proj|ant|or|svcacct|admin|lf)-[\w-]{16,}|\bsk-[A-Za-z0-9]{20,}",
        "sk_": r"\bsk_[0-9a-f]{48}\b",
        "fw_": r"\bfw_[A-Za-z0-9]{22,}\b",
        "tvly-": r"\btvly-(?:dev-|prod-)?\w{28,}",
        **{
            mark: rf"\b{mark}[\w-]{{30,}}"
            for mark in ("gsk_", "xai-", "nvapi-", "r8_", "pplx-", "pcsk_", "tgp_v1_", "csk-", "jina_")
        },
    },
    "AWS key": {
        **{mark: rf"\b{mark}[A-Z0-9]{{16}}\b" for mark in ("AKIA", "ASIA", "AROA", "AIDA")},
        "ABSK": r"\bABSK[\w+/=]{60,}",
    },
    "Azure key": {
        "AccountKey=": r"\bAccountKey=[\w+/=]{40,}",
        "AccessKey=": r"\b\w*AccessKey=[\w+/=]{40,}",
        "sig=": r"[?&]sig=[\w%+/]{40,}",
        "Q~": r"(?<![\w~.-])[\w~.-]{3}\dQ~[\w~.-]{31,34}",
    },
    "Google key": {
        "AIza": r"\bAIza[\w-]{30,}",
        "ya29.": r"\bya29\.[\w-]{16,}",
        "GOCSPX-": r"\bGOCSPX-[\w-]{16,}",
        "1//0": r"\b1//0[\w-]{40,}",
        "AQ.Ab8": r"\bAQ\.Ab8[\w-]{30,}",
    },
    "Slack token": {"xox": r"\bxox[a-z]-[\w-]{10,}", "xapp-": r"\bxapp-[\w-]{10,}"},
    "Discord token": {".": r"\b[MNO](?=[\w-]{0,23}\d)[\w-]{23,25}\.[\w-]{6}\.[\w-]{27,}"},
    "Telegram token": {":": r"\b\d{8,10}:[A-Za-z0-9_-]{35}\b"},
    "webhook": {
        "hooks.slack.com": r"https://hooks\.slack\.com/[\w/-]+",
        "/api/webhooks/": r"https://discord(?:app)?\.com/api/webhooks/[\w/-]+",
        "webhook.office.com/": r"https://[\w.-]*webhook\.office\.com/[\w/@-]+",
    },
    "Stripe key": {
        "k_live_": r"\b[rs]k_live_\w{10,}",
        "k_test_": r"\b[rs]k_test_\w{10,}",
        "whsec_": r"\bwhsec_[\w+/=]{24,}",
    },
    "npm token": {"npm_": r"\bnpm_[A-Za-z0-9]{30,}"},
    "PyPI token": {"pypi-AgE": r"\bpypi-AgE[\w-]{16,}"},
    "SendGrid key": {"SG.": r"\bSG\.[\w-]{16,}\.[\w-]{16,}"},
    "Docker token": {"dckr_": r"\bdckr_[op]at_[\w-]{20,}"},
    "DigitalOcean token": {"_v1_": r"\bdo[opr]_v1_[0-9a-f]{64}"},
    "Databricks token": {"dapi": r"\bdapi[0-9a-f]{32}"},
    "Neptune token": {"eyJhcGlfYWRkcmVzcyI6": r"\beyJhcGlfYWRkcmVzcyI6[\w+/=-]{20,}"},
    "LangSmith key": {"lsv2_": r"\blsv2_(?:pt|sk)_[0-9a-f_]{32,}"},
    "Kaggle key": {"KGAT_": r"\bKGAT_[0-9a-f]{32}"},
    "Prefect key": {"pnu_": r"\bpnu_\w{36}", "pnb_": r"\bpnb_\w{36}"},
    "Modal token": {
        "ak-": r"\bak-(?=[A-Za-z]*\d)[A-Za-z0-9]{22}\b",
        "as-": r"\bas-(?=[A-Za-z]*\d)[A-Za-z0-9]{22}\b",
    },
    "Atlassian token": {
        "TATT3": r"\bATATT3[\w=-]{40,}",
        "TCTT3": r"\bATCTT3[\w=-]{40,}",
        "ATBB": r"\bATBB\w{28,}",
        "BBDC-": r"\bBBDC-[\w+@/]{40,}",
    },
    "Notion token": {
        "ntn_": r"\bntn_[A-Za-z0-9]{40,}",
        "secret_": r"\bsecret_[A-Za-z0-9]{43}\b",
    },
    "Shopify token": {"shp": r"\bshp(?:at|ss|ca|pa)_[0-9a-f]{32}"},
    "Vault token": {"hvs.": r"\bhvs\.[\w-]{20,}", "hvb.": r"\bhvb\.[\w-]{20,}"},
    "Grafana token": {"glsa_": r"\bglsa_\w{32,}", "glc_": r"\bglc_[\w+/=]{32,}"},
    "Sentry token": {"sntry": r"\bsntry[su]_[\w+/=-]{40,}"},
    "Twilio key": {"SK": r"\bSK[0-9a-f]{32}\b"},
    "key of a mail service": {  # Mailgun, Mailchimp, Brevo
        "key-": r"\bkey-[0-9a-f]{32}\b",
        "-us": r"\b[0-9a-f]{32}-us\d{1,2}\b",
        "xkeysib-": r"\bxkeysib-[0-9a-f]{64}-\w{16}",
    },
    "token of a cloud": {
        "HRKU-": r"\bHRKU-[\w-]{36,}",  # Heroku
        "FlyV1": r"\bFlyV1 fm\d_[\w+/=,-]{40,}",
        "fo1_": r"\bfo1_[\w-]{40,}",  # Fly
        "nfp_": r"\bnfp_\w{36,}",  # Netlify
        "sbp_": r"\bsbp_[0-9a-f]{40}",  # Supabase
        "pscale_": r"\bpscale_(?:tkn|oauth|pw)_[\w.=-]{32,}",  # PlanetScale
        "pul-": r"\bpul-[0-9a-f]{40}",  # Pulumi
        ".atlasv1.": r"\b\w{14}\.atlasv1\.[\w=-]{60,}",  # Terraform
        "tskey-": r"\btskey-[a-z]+-[\w-]{20,}",  # Tailscale
        "dp.": r"\bdp\.(?:pt|st|ct|sa|scim|audit)\.(?:[\w-]+\.)?\w{40,}",  # Doppler
        "v1.0-": r"\bv1\.0-[0-9a-f]{24}-[0-9a-f]{146}",  # Cloudflare
        "LTAI": r"\bLTAI(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}",  # Alibaba
        "AKID": r"\bAKID(?=[A-Za-z]*\d)[A-Za-z0-9]{28,}",  # Tencent
    },
    "token of a registry or CI": {
        "AKCp": r"\bAKCp[A-Za-z0-9]{60,}",  # Artifactory
        "rubygems_": r"\brubygems_[0-9a-f]{48}",
        "CLOJARS_": r"\bCLOJARS_\w{60}",
        "bkua_": r"\bbkua_[0-9a-f]{40}",  # Buildkite
        "CCIP": r"\bCCIP(?:AT|RJ)_\w{30,}",  # CircleCI
        "PMAK-": r"\bPMAK-[0-9a-f]{24}-[0-9a-f]{34}",  # Postman
    },
    "token of a service": {
        "lin_api_": r"\blin_api_\w{32,}",  # Linear
        "figd_": r"\bfigd_[\w-]{32,}",  # Figma
        "sl.": r"\bsl\.[\w-]{100,}",  # Dropbox
        "pat": rf"\bpat(?:[A-Za-z0-9]{{14}}\.[0-9a-f]{{64}}|-[a-z]{{2}}\d-{_UUID})",  # Airtable, HubSpot
        "sq0": r"\bsq0(?:csp|atp)-[\w-]{20,}",  # Square
        "EAA": r"\bEAAA[\w-]{60}\b|\bEAAC\w{60,}",  # Square, Facebook
        "access-": rf"\baccess-(?:production|sandbox|development)-{_UUID}",  # Plaid
        "sk.eyJ": r"\bsk\.eyJ\w{40,}\.[\w-]{16,}",  # Mapbox
        "ops_eyJ": r"\bops_eyJ[\w=-]{100,}",  # 1Password
        "NRAK-": r"\bNRAK-[\w-]{19,}",  # New Relic
        "dt0c01.": r"\bdt0c01\.[A-Z0-9]{24}\.[A-Z0-9]{64}",  # Dynatrace
        "phx_": r"\bphx_\w{40,}",  # PostHog
        "tfp_": r"\btfp_[\w-]{50,}",  # Typeform
        "rdme_": r"\brdme_[a-z0-9]{60,}",  # ReadMe
        "FLWSECK": r"\bFLWSECK[\w-]{32,}",  # Flutterwave
        "EZ": r"\bEZ[AT]K\w{54}",  # EasyPost
        "_live_": r"\b[a-z]{2,12}_live_(?=[A-Za-z]*\d)[A-Za-z0-9]{24,}\b",
    },
}
# fmt: on
"""Kind -> what any such token has in it, for a quick look, and its form."""


def find_token(text: str) -> str | None:
    """Return which kind of token *text* holds, `"GitHub token"` say, told by its form; None for none."""
    return next((kind for kind, form in _possible(text) if form.search(text)), None)


def replace_tokens(text: str, replacement: str) -> str:
    """Return *text* with *replacement* in the place of each token."""
    for _, form in _possible(text):
        text = form.sub(lambda _: replacement, text)
    return text


def _possible(text: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Those forms that *text* could hold: most texts hold hardly any of the marks."""
    for kind, forms in _TOKENS.items():
        for mark, form in forms.items():
            if mark in text:
                yield kind, _compiled(form)


_compiled = functools.cache(re.compile)  # when it is first needed: there are a hundred of them
