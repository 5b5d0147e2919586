"""The demo's model and its text."""

import math
from pathlib import Path

import pytest
import torch

from offloop.cli.char_gpt import (
    VALIDATION_EVERY,
    VOCABULARY,
    VOCABULARY_SIZE,
    CharGPT,
    Windows,
    char_loss,
    decode,
    encode,
    load_text,
    read_text,
    sample,
    stdlib_files,
)


@pytest.fixture
def model() -> CharGPT:
    """A tiny model that has something to say: its output layers no longer start at zero."""
    torch.manual_seed(0)
    model = CharGPT(context=16, layers=2, heads=2, channels=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY_SIZE, shape, generator=torch.Generator().manual_seed(1))


# The model


@pytest.mark.parametrize("length", [1, 5, 16])
def test_there_are_logits_for_every_position(model: CharGPT, length: int) -> None:
    logits = model(random_tokens(3, length))
    assert logits.shape == (3, length, VOCABULARY_SIZE)
    assert logits.dtype == torch.float32


def test_untrained_model_finds_every_character_equally_likely() -> None:
    tokens = random_tokens(2, 8)
    loss = char_loss(CharGPT()(tokens), tokens)
    assert loss.item() == pytest.approx(math.log(VOCABULARY_SIZE))


def test_later_characters_do_not_change_earlier_logits(model: CharGPT) -> None:
    tokens = random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCABULARY_SIZE
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :10], before[:, :10])
    assert not torch.allclose(after[:, 10:], before[:, 10:])


def test_order_of_earlier_characters_matters(model: CharGPT) -> None:
    there, back = encode("abcdef"), encode("bacdef")
    assert not torch.allclose(model(there.long()[None])[0, -1], model(back.long()[None])[0, -1])


def test_learns_one_batch_by_heart() -> None:
    torch.manual_seed(0)
    model = CharGPT(context=16, layers=1, heads=2, channels=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = random_tokens(4, 17)
    for _ in range(60):
        loss = char_loss(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# Sampling


def test_sample_continues_the_prompt(model: CharGPT) -> None:
    text = sample(model, "def ", length=40)  # more than the context holds
    assert text.startswith("def ")
    assert len(text) == 4 + 40


def test_same_seed_gives_the_same_sample(model: CharGPT) -> None:
    assert sample(model, "x", length=20, seed=3) == sample(model, "x", length=20, seed=3)
    assert sample(model, "x", length=20, seed=3) != sample(model, "x", length=20, seed=4)


def test_sampling_leaves_the_global_generator_alone(model: CharGPT) -> None:
    before = torch.get_rng_state()
    sample(model, "x", length=5)
    assert torch.equal(torch.get_rng_state(), before)


# The text


def test_text_survives_encoding_and_decoding() -> None:
    assert decode(encode(VOCABULARY)) == VOCABULARY
    assert encode(VOCABULARY).tolist() == list(range(VOCABULARY_SIZE))


def test_characters_outside_the_vocabulary_are_dropped() -> None:
    assert decode(encode("a\tb\r\n\x0cé€c\x7f")) == "ab\nc"


def test_files_are_read_up_to_the_limit_without_foreign_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_bytes("pi = 'π'\r\n".encode())
    second.write_bytes(b"x = 1\n")
    assert decode(read_text([first, second], 1000)) == "pi = ''\nx = 1\n"
    assert decode(read_text([first, second], 10)) == "pi = ''\nx "


def test_files_are_listed_in_order_without_tests_and_packages(tmp_path: Path) -> None:
    names = [f"m{i:02}.py" for i in range(VALIDATION_EVERY)]
    for name in [*reversed(names), "test/no.py", "site-packages/no.py", "json/test/no.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in stdlib_files(tmp_path)] == names


def test_interpreter_without_sources_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no standard library") as caught:
        stdlib_files(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_text_of_this_interpreter_is_the_same_every_time() -> None:
    train, val = load_text()
    train_again, val_again = load_text()
    assert torch.equal(train, train_again)
    assert torch.equal(val, val_again)
    assert len(train) > 1_000_000
    assert len(val) > 100_000
    assert int(train.max()) < VOCABULARY_SIZE


# Windows


def test_targets_are_the_inputs_one_character_later() -> None:
    windows = Windows(encode("abcdefghij"), length=4, stride=3)
    items = [windows[index] for index in range(len(windows))]
    pieces = [(decode(inputs), decode(targets)) for inputs, targets in items]
    assert pieces == [("abcd", "bcde"), ("defg", "efgh")]  # "ghij" has no character after it
    with pytest.raises(IndexError):
        windows[2]


def test_last_window_ends_with_the_text() -> None:
    windows = Windows(encode("abcdefghijk"), length=4, stride=3)
    assert decode(windows[len(windows) - 1][1]) == "hijk"


def test_text_shorter_than_a_window_gives_none() -> None:
    assert len(Windows(encode("abcd"), length=4, stride=1)) == 0
    assert len(Windows(encode(""), length=4, stride=7)) == 0
