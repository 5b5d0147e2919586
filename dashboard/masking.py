"""Masking: settings, command lines and texts without passwords, tokens and keys. No socket.

What is secret is decided by the words of a name, not by its letters: `token` and `hfToken` are secret, `tokenizer`,
`max_tokens` and `author` are not. A secret without a telling name is shown.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from offloop.dashboard.protocol.encoding import number

MASK: Final = "(masked)"

_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS: Final = frozenset(
    "auth authentication authorization cookie credential credentials passcode pat pw pwd token".split()
)
_SECRET_KEYS: Final = frozenset(
    "access account api auth client deploy encryption license master private secret service session shared signing "
    "ssh storage subscription".split()
)
"""Words that make the `key` or `keys` after them secret."""
_WRITTEN_AS_ONE: Final = re.compile(
    r".*(passphrase|passwd|password|secret)s?|(access|api|auth|bearer|client|git\w+|hf|private|refresh|secret|session|"
    r"user|wandb)(key|token)s?"
)
"""Secret words that contain others: `dbpassword`, `apikey`."""
_PASSWORD_OWNERS: Final = frozenset("admin db ftp http login mail proxy root smtp user".split())
"""Words that make the `pass` after them a password; `two_pass` and `pass_at_1` are none."""
_TOKENS_OF_TEXT: Final = (
    frozenset(
        "bos cls end eos fim image mask max min n next num pad per prompt sep special start unk vocab".split()
    ),
    frozenset(
        "classification count dim drop dropout embedding embeddings id ids length level limit loss merging mixing "
        "ratio shift size type types".split()
    ),
)
"""Words before and after a `token` that is a piece of text: `pad_token`, `token_type_ids`."""
_SECRET_PARAMETERS: Final = frozenset({"code", "key", "pass", "sig", "signature"})
"""Parameters of an address that are secret there, as in signed addresses, and not elsewhere."""

# The password may contain `@` and, unescaped, `/`: it reaches to the last `@`. What begins like a port is a port.
# Starting at the first letter of a word only, and the bound, keep the time linear.
_USER_AND_PASSWORD: Final = re.compile(
    r"(?<![\w+.-])([\w+.-]+://[^\s/?#@:\[\"']{0,1000}):(?!\d{1,5}/)[^\s\"']{0,1000}@"
)
# A token takes the place of the user in addresses of repositories; the user of ssh is no secret.
_LONE_TOKEN: Final = re.compile(r"(https?://)[^\s/?#@:\"']+@", re.IGNORECASE)
_PARAMETER: Final = re.compile(r"([?&;#])([^\s?&;#=\"']+)=([^\s&;#\"']+)")
_ASSIGNMENT: Final = re.compile(r"(?<![\w.-])([A-Za-z_][\w.-]*)([\"']?\s*(?:=|:\s)\s*)")
_VALUE: Final = re.compile(r"(?:(?:Basic|Bearer|Token)\s+)?(\"[^\"]*\"|'[^']*'|[^\s,;&\"'}]+)", re.IGNORECASE)
_ARGUMENT: Final = re.compile(r"(-{0,2}[^\s=:?&-][^\s=:?&]*)(=|:\s)(.+)", re.DOTALL)


def is_secret(name: str) -> bool:
    """True if a name says that its value is secret: `api_key`, `OPENAI_API_KEY`, `db.password`, `authToken`."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if words == ["pass"]:
        return True
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        after = words[place + 1] if place + 1 < len(words) else ""
        if word == "token" and (before in _TOKENS_OF_TEXT[0] or after in _TOKENS_OF_TEXT[1]):
            continue
        if word in _SECRET_WORDS or _WRITTEN_AS_ONE.fullmatch(word):
            return True
        if word in ("key", "keys") and before in _SECRET_KEYS:
            return True
        if word == "pass" and before in _PASSWORD_OWNERS:
            return True
    return False


def masked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, fit for JSON, without the values of secret names and without secrets in texts.

    None, True, False and empty texts are kept: they tell whether there is a secret, and not which.
    """
    return {
        key: MASK if is_secret(key) and _can_be_secret(value) else _masked(value)
        for key, value in settings.items()
    }


def _can_be_secret(value: object) -> bool:
    return not (value is None or isinstance(value, bool) or value == "")


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return masked(value)
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    if isinstance(value, str):
        return masked_text(value)
    return number(value) if isinstance(value, float) else value


def masked_text(text: str) -> str:
    """Return a text without the credentials of addresses and without the values of secret names in it.

    `postgres://me:(masked)@host`, `https://host/?token=(masked)`, `host=db password=(masked)`.
    """
    if "@" in text:
        text = _USER_AND_PASSWORD.sub(rf"\1:{MASK}@", text)
        text = _LONE_TOKEN.sub(rf"\1{MASK}@", text)
    text = _PARAMETER.sub(_masked_parameter, text)
    parts: list[str] = []
    done = 0
    for found in _ASSIGNMENT.finditer(text):
        if found.start() < done or not is_secret(found[1]) or text.startswith(MASK, found.end()):
            continue
        value = _VALUE.match(text, found.end())
        if value is not None:
            parts += text[done : found.end()], MASK
            done = value.end()
    return "".join([*parts, text[done:]])


def _masked_parameter(found: re.Match[str]) -> str:
    before, name, _ = found.groups()
    hides = is_secret(name) or (before in "?&" and name.lower() in _SECRET_PARAMETERS)
    return f"{before}{name}={MASK}" if hides else found[0]


def masked_command(arguments: Sequence[str]) -> list[str]:
    """Return a command line without secrets.

    Hidden are the value of an option with a secret name (`--api-key X`, `--api-key=X`), that of an assignment
    (`password=X`, `OPENAI_API_KEY=X`), and what `masked_text` finds in any argument.
    """
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        if hide_next and not argument.startswith("-"):
            shown.append(MASK)
            hide_next = False
            continue
        hide_next = False
        assignment = _ARGUMENT.fullmatch(argument)
        if assignment is not None and is_secret(assignment[1]):
            # All of it, spaces too: the shell has taken the quotes away.
            shown.append(f"{assignment[1]}{assignment[2]}{MASK}")
        else:
            hide_next = argument.startswith("-") and "=" not in argument and is_secret(argument)
            shown.append(masked_text(argument))
    return shown
