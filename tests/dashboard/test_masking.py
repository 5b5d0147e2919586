"""dashboard/masking.py: which names and texts hide a secret."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloop.dashboard.masking import MASK, is_secret, masked, masked_command, masked_text

SECRET = [
    "token",
    "--token",
    "TOKEN",
    "hf_token",
    "HF_TOKEN",
    "hfToken",
    "HFToken",
    "token2",
    "model.api-token",
    "--use-auth-token",
    "access_token_secret",
    "password",
    "db.password",
    "dbPassword",
    "MYSQL_PWD",
    "passwd",
    "passphrase",
    "pass",
    "DB_PASS",
    "pw",
    "secret",
    "client_secret",
    "SECRETS",
    "api_key",
    "apiKey",
    "APIKey",
    "apikey",
    "dbpassword",
    "clientsecrets",
    "hftoken",
    "accesskey",
    "--githubtoken",
    "--api-key",
    "OPENAI_API_KEY",
    "WANDB_API_KEYS",
    "AWS_SECRET_ACCESS_KEY",
    "awsSecretAccessKey",
    "private_key",
    "ssh-key",
    "auth",
    "--auth",
    "proxy_auth",
    "Authorization",
    "X-Api-Key",
    "credentials",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GITHUB_PAT",
    "session_cookie",
    "über.token",
]
SHOWN = [
    "tokenizer",
    "--tokenizer",
    "tokenizer_name",
    "tokens",
    "max_tokens",
    "--max-tokens",
    "maxTokens",
    "tokens_per_second",
    "pad_token",
    "eos_token_id",
    "token_type_ids",
    "num_token",
    "token_dropout",
    "detokenize",
    "author",
    "--author",
    "authors",
    "authenticity",
    "passes",
    "two_pass",
    "pass_at_1",
    "bypass",
    "compass",
    "private",
    "key",
    "sort_key",
    "key_size",
    "num_heads_key",
    "keys",
    "monkey",
    "secretary",
    "subtoken",
    "pretoken",
    "keytoken",
    "passwordless",
    "path",
    "pattern",
    "lr",
    "",
    "--",
]


@pytest.mark.parametrize("name", SECRET)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", SHOWN)
def test_names_of_what_is_none(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://me:pw@host/db", f"postgres://me:{MASK}@host/db"),
        ("postgres://me:p@ss/w:rd@host:5432/db", f"postgres://me:{MASK}@host:5432/db"),
        ("postgres://me:1234@host", f"postgres://me:{MASK}@host"),
        ("redis://:pw@host:6379/0", f"redis://:{MASK}@host:6379/0"),
        ("amqp://a:b@x and s3://c:d@y", f"amqp://a:{MASK}@x and s3://c:{MASK}@y"),
        ("https://ghp_abc@github.com/me/repo", f"https://{MASK}@github.com/me/repo"),
        ("git+https://ghp_abc@github.com/me/repo", f"git+https://{MASK}@github.com/me/repo"),
        ("ssh://git@github.com/me/repo", "ssh://git@github.com/me/repo"),
        ("https://host:8080/@me/page", "https://host:8080/@me/page"),
        ("https://host/@me", "https://host/@me"),
        ("http://[::1]:80/@x", "http://[::1]:80/@x"),
        ("https://host/data?token=abc&part=2", f"https://host/data?token={MASK}&part=2"),
        ("https://host/?X-Amz-Security-Token=a%2Fb#x", f"https://host/?X-Amz-Security-Token={MASK}#x"),
        ("https://host/data?sv=1&sig=abc%3D", f"https://host/data?sv=1&sig={MASK}"),
        ("https://host/?key=AIza", f"https://host/?key={MASK}"),
        ("https://host/#access_token=abc", f"https://host/#access_token={MASK}"),
        ("https://host/?tokenizer=bpe&author=ann", "https://host/?tokenizer=bpe&author=ann"),
        ("/data?token=abc", f"/data?token={MASK}"),
        ("host=db user=me password=hunter2 dbname=x", f"host=db user=me password={MASK} dbname=x"),
        ("DRIVER=x;UID=me;PWD=hunter2;", f"DRIVER=x;UID=me;PWD={MASK};"),
        ("password='two words' x=1", f"password={MASK} x=1"),
        ('{"api_key": "sk-1", "lr": 0.1}', f'{{"api_key": {MASK}, "lr": 0.1}}'),
        ("Authorization: Bearer abc.def", f"Authorization: {MASK}"),
        ("lr=0.1 tokens=5", "lr=0.1 tokens=5"),
        ("16:30 a: b", "16:30 a: b"),
        ("C:\\data\\token", "C:\\data\\token"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert masked_text(text) == shown


@pytest.mark.parametrize("part", ["a", "a://b:", "a=", "?a", "token=", "https://a", "@", " "])
def test_a_long_text_takes_linear_time(part: str) -> None:
    """A quadratic search would take minutes, and the suite has a time limit."""
    assert len(masked_text(f"{part * 20_000} @")) > 0


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--api-key", "s3", "--lr", "0.1"], ["--api-key", MASK, "--lr", "0.1"]),
        (["--token=s3"], [f"--token={MASK}"]),
        (["-token", "s3", "s4"], ["-token", MASK, "s4"]),
        (["--auth", "--fast"], ["--auth", "--fast"]),
        (["--auth", "--token", "s3"], ["--auth", "--token", MASK]),
        (["--tokenizer", "bpe"], ["--tokenizer", "bpe"]),
        (["--max-tokens", "512"], ["--max-tokens", "512"]),
        (["--author", "ann"], ["--author", "ann"]),
        (["password=hunter2"], [f"password={MASK}"]),
        (["password=two words"], [f"password={MASK}"]),
        (["OPENAI_API_KEY=sk-1"], [f"OPENAI_API_KEY={MASK}"]),
        (["+hub.token=hf_1", "model.lr=1"], [f"+hub.token={MASK}", "model.lr=1"]),
        (["--db", "postgres://me:pw@host"], ["--db", f"postgres://me:{MASK}@host"]),
        (["--db=postgres://me:pw@host"], [f"--db=postgres://me:{MASK}@host"]),
        (["https://host/?token=s3&part=2"], [f"https://host/?token={MASK}&part=2"]),
        (["--header", "Authorization: Bearer s3"], ["--header", f"Authorization: {MASK}"]),
        (["--set", "host=db password=s3"], ["--set", f"host=db password={MASK}"]),
        (["train.py", "-", "--", "-x", "a=b"], ["train.py", "-", "--", "-x", "a=b"]),
    ],
)
def test_command_lines(arguments: list[str], shown: list[str]) -> None:
    assert masked_command(arguments) == shown


def test_configurations_at_any_depth() -> None:
    settings = {
        "tokenizer": "bpe",
        "max_tokens": 512,
        "token": None,
        "use_auth": True,
        "password": 1234,
        "auth": {"user": "me"},
        "data": [{"url": "s3://me:pw@host", "api_key": "sk-1"}, "password=pw"],
        "rate": float("nan"),
    }
    assert masked(settings) == {
        "tokenizer": "bpe",
        "max_tokens": 512,
        "token": None,
        "use_auth": True,
        "password": MASK,
        "auth": MASK,
        "data": [{"url": f"s3://me:{MASK}@host", "api_key": MASK}, f"password={MASK}"],
        "rate": "NaN",
    }


@given(st.lists(st.text(max_size=60)))
def test_any_command_line_is_shown_in_as_many_arguments(arguments: list[str]) -> None:
    assert len(masked_command(arguments)) == len(arguments)
