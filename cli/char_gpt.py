"""A small GPT that reads and writes text character by character, and its training text.

The text is available on every machine: the source code of Python's standard library. The model is a decoder-only
transformer with pre-normalisation, rotary position embeddings and no biases. Its residual branches and output layer
start at zero, so an untrained model predicts a uniform distribution with a loss of `log(VOCABULARY_SIZE)`, 4.56 nats.

Tensors carry their shape as a suffix:

    B  batch                        V  vocabulary
    T  time, in characters          H  attention heads
    C  channels of the model        D  channels of one head, C // H
"""

import sysconfig
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

VOCABULARY: Final = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
"""Newline and printable ASCII; all other characters are dropped from the text."""
VOCABULARY_SIZE: Final = len(VOCABULARY)

MAX_CHARACTERS: Final = 8_000_000
"""About the size of Python 3.11's library, so that later versions stay comparable."""
VALIDATION_EVERY: Final = 10
"""Every tenth file is for validation, so that both parts cover all subjects."""
SKIPPED_FOLDERS: Final = frozenset(
    # Installed packages, tests, generated tables, and optional applications.
    "site-packages dist-packages test tests idle_test encodings pydoc_data ensurepip "
    "distutils lib2to3 idlelib tkinter turtledemo".split()
)

_TOKEN_OF_BYTE: Final = bytes(max(VOCABULARY.find(chr(byte)), 0) for byte in range(256))
_DROPPED_BYTES: Final = bytes(byte for byte in range(256) if chr(byte) not in VOCABULARY)


# The text ----------------------------------------------------------------------------------------


def encode(text: str) -> Tensor:
    """Encode text as tokens `(T,) uint8`, indices into `VOCABULARY`. Other characters are dropped."""
    tokens = text.encode("ascii", "ignore").translate(_TOKEN_OF_BYTE, _DROPPED_BYTES)
    return torch.tensor(list(tokens), dtype=torch.uint8)


def decode(tokens_T: Tensor) -> str:
    """Decode tokens to text."""
    return "".join(VOCABULARY[token] for token in tokens_T.tolist())


def stdlib_files(root: Path | None = None) -> list[Path]:
    """List the Python files of the standard library, or below another folder, in a fixed order.

    Raises:
        FileNotFoundError: There are none: some minimal interpreters lack the source code.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (file for file in files if SKIPPED_FOLDERS.isdisjoint(file.parts))
    paths = [root / file for file in sorted(kept, key=Path.as_posix)]
    if len(paths) < VALIDATION_EVERY:
        raise FileNotFoundError(f"this Python has no standard library in source form at {root}")
    return paths


def read_text(files: list[Path], max_characters: int) -> Tensor:
    """Read files in order as tokens `(T,) uint8`, at most `max_characters`."""
    tokens = bytearray()
    for file in files:
        tokens += file.read_bytes().translate(_TOKEN_OF_BYTE, _DROPPED_BYTES)
        if len(tokens) >= max_characters:
            break
    return torch.frombuffer(tokens[:max_characters], dtype=torch.uint8)


def load_text() -> tuple[Tensor, Tensor]:
    """Return the standard library as training tokens and validation tokens, from different files."""
    files = stdlib_files()
    val_files = files[::VALIDATION_EVERY]
    train_files = [file for i, file in enumerate(files) if i % VALIDATION_EVERY != 0]
    val_characters = MAX_CHARACTERS // VALIDATION_EVERY
    return read_text(train_files, MAX_CHARACTERS - val_characters), read_text(val_files, val_characters)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text, `stride` characters apart.

    An item is `(inputs, targets)`, both `(T,) int64`; the targets are the inputs shifted by one character.
    """

    def __init__(self, tokens_T: Tensor, *, length: int, stride: int) -> None:
        self.tokens_T = tokens_T
        self.length = length
        self.stride = stride

    def __len__(self) -> int:
        return max(0, (len(self.tokens_T) - self.length - 1) // self.stride + 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        piece_T = self.tokens_T[start : start + self.length + 1].long()
        return piece_T[:-1], piece_T[1:]


# The model ---------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    """Scale the last dimension to a root mean square of one, without learned parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate pairs of channels by an angle proportional to the position, so that attention sees distances."""
    # cos and sin hold D // 2 angles, one per pair.
    left, right = x_BHTD.chunk(2, dim=-1)
    return torch.cat((left * cos_TD - right * sin_TD, left * sin_TD + right * cos_TD), dim=-1)


class Block(nn.Module):
    """One layer: attention to earlier characters, then an MLP."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.attention_out = nn.Linear(channels, channels, bias=False)
        self.mlp_in = nn.Linear(channels, 4 * channels, bias=False)
        self.mlp_out = nn.Linear(4 * channels, channels, bias=False)
        for layer in (self.qkv, self.mlp_in):
            nn.init.normal_(layer.weight, std=channels**-0.5)
        for layer in (self.attention_out, self.mlp_out):
            nn.init.zeros_(layer.weight)

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attend(norm(x_BTC), cos_TD, sin_TD)
        hidden = F.gelu(self.mlp_in(norm(x_BTC)))  # (B, T, 4 * C)
        x_BTC = x_BTC + self.mlp_out(hidden)
        return x_BTC

    def attend(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """Return the causal self-attention."""
        qkv_BTHD = self.qkv(x_BTC).unflatten(-1, (3 * self.heads, -1))
        q_BHTD, k_BHTD, v_BHTD = qkv_BTHD.transpose(1, 2).chunk(3, dim=1)
        q_BHTD = norm(rotate(q_BHTD, cos_TD, sin_TD))
        k_BHTD = norm(rotate(k_BHTD, cos_TD, sin_TD))
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        mixed_BTC: Tensor = self.attention_out(y_BHTD.transpose(1, 2).flatten(2))
        return mixed_BTC


class CharGPT(nn.Module):
    """Predict the next character at every position: tokens `(B, T) int64` -> logits `(B, T, V) float32`.

    T is from 1 to `context`.
    """

    cos_TD: Tensor
    sin_TD: Tensor

    def __init__(self, *, context: int = 64, layers: int = 3, heads: int = 4, channels: int = 128) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY_SIZE, channels)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(layers))
        self.head = nn.Linear(channels, VOCABULARY_SIZE, bias=False)
        nn.init.zeros_(self.head.weight)

        pairs = channels // heads // 2
        # The usual base of RoPE.
        frequencies = 10_000.0 ** -(torch.arange(pairs) / pairs)
        angles_TD = torch.outer(torch.arange(context), frequencies)
        self.register_buffer("cos_TD", angles_TD.cos(), persistent=False)
        self.register_buffer("sin_TD", angles_TD.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        T = tokens_BT.size(1)
        x_BTC = norm(self.embedding(tokens_BT))
        for block in self.blocks:
            x_BTC = block(x_BTC, self.cos_TD[:T], self.sin_TD[:T])
        logits_BTV: Tensor = self.head(norm(x_BTC))
        return logits_BTV


def char_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


@torch.inference_mode()
def sample(model: CharGPT, prompt: str, *, length: int, temperature: float = 0.8, seed: int = 0) -> str:
    """Continue a prompt by `length` characters, sampled from the model's predictions.

    A `temperature` above 0 and below 1.0 favours likely characters; 1.0 samples the predicted distribution. The same
    seed gives the same text, and torch's global generator is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens_T = encode(prompt).long()
    for _ in range(length):
        context_BT = tokens_T[None, -model.context :].to(model.embedding.weight.device)
        # Device to host, character by character.
        logits_V = model(context_BT)[0, -1].float().cpu()
        next_1 = torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)
        tokens_T = torch.cat((tokens_T, next_1))
    return decode(tokens_T)
