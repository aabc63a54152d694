"""No secret, by its name or its shape, stays in what is written; all else does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import yaml

from qratk.core.secrets import HIDDEN, text_without_secrets, without_secrets

TOKENS = (
    "hf_" + "aB3" * 11, "sk-" + "proj-a1" * 5, "ghp_" + "x9" * 18, "github_pat_" + "1a" * 20, "glpat-" + "z1" * 10,
    "AKIA" + "Q7" * 8, "AIza" + "Sy-1" * 9, "xoxb-" + "12-ab" * 5, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0x.c2lnbmF0dXJl",
)  # fmt: skip
NAMES = (
    "password", "db_password", "api-key", "apiKey", "X-Api-Key", "hf_token", "accessToken", "client_secret", "secret",
    "private_key", "credentials", "Authorization", "aws_secret_access_key", "passphrase", "secrets", "OPENAI_API_KEY",
)  # fmt: skip
INNOCENT: dict[str, Any] = {
    "pad_token": "<pad>",
    "max_tokens": 5,
    "tokens": 512,
    "tokenizer": "hf-internal-testing/tiny-random-LlamaForCausalLM",
    "secretary": "x",
    "use_auth_token": True,
    "private_key_file": "~/.ssh/id",
    "model": "sk-learn",
    "rate": 1e-4,
    "prompt": "The secret ingredient. Password: {{ password }} token={{ t }}",
    "train": "hf://datasets/me/rows@main/a.jsonl",
    "url": "https://host:8080/path@x?page=2&lang=en#token",
    "git": "ssh://git@github.com/a/b",
    "like": [4, 8],
    "no": None,
    "quantizers": {4: "hqq"},
    "columns": {"key": "value", "author": "x"},
    "digest": "9058e24e3aee9d7edd7f0463437fe15b",
}


def test_what_is_no_secret_stays_as_it_is() -> None:
    assert without_secrets(INNOCENT) == INNOCENT
    for name, value in INNOCENT.items():
        assert without_secrets([{name: value}]) == [{name: value}]


@pytest.mark.parametrize(
    "given",
    [
        {"password": 8675309},
        {"tokens": ["8675309"]},
        {"token": "8675309"},
        {"headers": {"Authorization": "Bearer 8675309"}},
        {"anything": "Bearer 8675309"},
        {"api-key": "8675309"},
        {"secret": {"value": 8675309}},
        {"credentials": ["a", "8675309"]},
        {"url": "https://me:8675309@host/x"},
        {"url": "https://8675309@host/x"},
        {"url": "https://host/x?a=1&token=8675309&b=2"},
        {"url": "postgres://me:8675309@host:5432/x"},
        {"url": "https://host/x?X-Amz-Signature=8675309"},
        {"dsn": "host=x password=8675309 port=1"},
        {"key": "-----BEGIN PRIVATE KEY-----\n8675309\n-----END PRIVATE KEY-----"},
        {"json": '{"password": 8675309}'},
        {"note": "{'api_key': '8675309'}"},
    ],
    ids=str,
)
def test_secret_is_left_out_whatever_its_shape(given: dict[str, Any]) -> None:
    assert "8675309" not in json.dumps(without_secrets(given))


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:6])
def test_token_of_a_known_shape_is_left_out_under_any_name_and_hidden_within_a_text(token: str) -> None:
    assert without_secrets({"name": token, "other": 1}) == {"other": 1}
    assert without_secrets([token]) == [HIDDEN]
    assert text_without_secrets(f"cannot load x with {token}, sorry") == f"cannot load x with {HIDDEN}, sorry"


def test_rest_of_an_address_stays_so_that_it_can_be_opened_with_a_secret_from_elsewhere() -> None:
    assert text_without_secrets("https://me:pw@host:80/x?a=1&token=b&c=2#d") == "https://host:80/x?a=1&c=2#d"
    assert text_without_secrets("https://host/x?token=b") == "https://host/x"


def planted(rng: np.random.Generator, depth: int, found: list[str]) -> Any:
    """Random plain data with secrets in it; each of them holds one of the texts in `found`."""
    if depth and rng.random() < 0.7:
        if rng.random() < 0.3:
            return [planted(rng, depth - 1, found) for _ in range(rng.integers(0, 4))]
        made = {f"plain_{i}": planted(rng, depth - 1, found) for i in range(rng.integers(0, 4))}
        if rng.random() < 0.5:
            found.append(f"S3cr{rng.integers(10**9, 10**10)}")
            shape = [found[-1], [found[-1]], {"value": found[-1]}, {"a": [{"b": found[-1]}]}][rng.integers(4)]
            made[str(rng.choice(NAMES))] = shape
        return made
    if rng.random() < 0.3:
        found.append(f"S3cr{rng.integers(10**9, 10**10)}")
        texts = ("https://me:{}@host/x", "Bearer {}", "https://host/?a=b&api_key={}", "x --data.password={} y")
        return str(rng.choice(texts)).format(found[-1])
    return [1, 2.5, True, None, "text", str(rng.choice(list(INNOCENT)))][rng.integers(6)]


@pytest.mark.parametrize("seed", range(40))
def test_no_planted_secret_stays_and_a_second_time_changes_nothing(seed: int) -> None:
    found: list[str] = []
    document = planted(np.random.default_rng(seed), 5, found)
    kept = without_secrets(document)
    text = json.dumps(kept)
    assert not [secret for secret in found if secret in text]
    assert without_secrets(kept) == kept
    assert yaml.safe_load(yaml.safe_dump(kept)) == kept


def test_no_setting_of_a_component_is_taken_for_a_secret() -> None:
    from qratk.components import REGISTRIES

    options = {o.name: "x" for registry in REGISTRIES.values() for name in registry for o in registry.options(name)}
    assert without_secrets(options) == options
