"""Weights in and out: every kind of source, what does not fit, what must not run, and files that others read."""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from offloop.callbacks import ModelCheckpoint
from offloop.engine import (
    ConfigError,
    ModelNotFoundError,
    ModelRegistry,
    RunResult,
    TrainStart,
    WeightsError,
    WeightsMismatchError,
    export_model,
    load_model,
)
from offloop.engine.checkpoint import CheckpointCorruptError, CheckpointNotFoundError, CheckpointReader
from offloop.engine.run_dir import read_run_json
from offloop.engine.testing import Recorder, tiny_batches, tiny_loader, tiny_model, tiny_trainer


class Tied(torch.nn.Module):
    """An embedding and the output layer that shares its weight, as language models have."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.body = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.tensor(value))


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def a_run(directory: Path, name: str = "first", **arguments: Any) -> Any:
    """Two epochs with a validation and a checkpoint after each; returns trainer and events."""
    recorder = Recorder()
    knobs = arguments.pop("knobs", {})
    trainer = tiny_trainer(
        run_dir=str(directory), run_name=name, callbacks=[ModelCheckpoint(keep_last=None), recorder], **knobs
    )
    trainer.train(tiny_loader(3), tiny_loader(2), **({"epochs": 2} | arguments))
    return trainer, recorder


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    a_run(directory)
    return directory / "first"


# Sources -------------------------------------------------------------------------------------------


def test_checkpoint_is_found_by_run_name_step_and_path(first_run: Path) -> None:
    reader = CheckpointReader(first_run)
    steps = {}
    for info in reader.checkpoints():
        model: Any = reader.load(info.name).state
        steps[info.step] = model["model"]
    assert sorted(steps) == [3, 6]
    last = reader.find("last")
    for source in (first_run, str(first_run), f"{first_run}@last", f"{first_run}:6", last.path, last):
        assert same(load_model(source), steps[6])
    assert same(load_model(f"{first_run}:3"), steps[3])
    assert same(load_model(f"{first_run}@best"), steps[reader.find("best").step])


def test_path_that_holds_marks_is_the_path(first_run: Path, tmp_path: Path) -> None:
    odd = tmp_path / "lr:0.1@home"
    shutil.copytree(first_run, odd)
    assert same(load_model(odd), load_model(first_run))
    assert same(load_model(f"{odd}:3"), load_model(f"{first_run}:3"))


def test_only_the_models_bytes_are_read(first_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first_run, copy)
    checkpoint = CheckpointReader(copy).find("last").path
    expected = load_model(first_run)
    for file in checkpoint.glob("*.safetensors"):
        if file.name != "model.safetensors":
            file.write_bytes(b"gone")
    assert same(load_model(copy), expected)
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        load_model(copy)


def test_tied_weights_of_a_checkpoint_come_back_tied_and_alone(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    state = load_model(registry.register(Tied(1.0).state_dict(), "tied"))
    assert state["head.weight"] is state["embedding.weight"]
    assert state["offset"] == 1.0


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin"])
def test_plain_file_is_read(tmp_path: Path, suffix: str) -> None:
    expected = tiny_model(seed=5).state_dict()
    path = tmp_path / f"weights.{suffix}"
    save_file(expected, path) if suffix == "safetensors" else torch.save(expected, path)
    assert same(load_model(path), expected)
    assert same(load_model(str(path), into=tiny_model()).state_dict(), expected)


def test_folder_of_hugging_face_is_read_whole_or_in_shards(tmp_path: Path) -> None:
    expected = tiny_model(seed=5).state_dict()
    names = list(expected)
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    whole.mkdir()
    shards.mkdir()
    save_file(expected, whole / "model.safetensors")
    index: dict[str, str] = {}
    for number, part in enumerate((names[:1], names[1:])):
        file = f"model-{number}.safetensors"
        save_file({name: expected[name] for name in part}, shards / file)
        index |= dict.fromkeys(part, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert same(load_model(whole), expected)
    assert same(load_model(shards), expected)
    (shards / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../x.safetensors"}})
    )
    with pytest.raises(WeightsError, match="elsewhere"):
        load_model(shards)


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_run: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(WeightsError, match=r"there is no file .*missing\.pt"):
        load_model("missing.pt")
    with pytest.raises(ModelNotFoundError, match=r"no model 'here'.*A path needs a slash: \./here"):
        load_model("here")
    with pytest.raises(CheckpointNotFoundError, match=r"there is: first; did you mean .*/first@best"):
        load_model(f"{first_run.parent / 'frist'}@best")
    (tmp_path / "runs").symlink_to(first_run.parent)
    for name in ("first", "first@best", "frist:3"):
        meant = name.replace("frist", "first")
        with pytest.raises(ModelNotFoundError, match=rf"there is: nothing; did you mean runs/{meant}\?$"):
            load_model(name)
    with pytest.raises(FileNotFoundError, match=r"did you mean runs/first\?$"):
        RunResult.load("first")
    with pytest.raises(CheckpointNotFoundError, match=r"a run is named by its path: resume='.*/runs/first'$"):
        tiny_trainer(run_dir=str(tmp_path / "runs")).train(tiny_batches(1), epochs=1, resume="first")
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint 'v9'"):
        load_model(f"{first_run}@v9")
    with pytest.raises(TypeError, match="a name, a path or a state dict, got int"):
        load_model(3)  # type: ignore[call-overload]  # the error is what is tested
    with pytest.raises(WeightsError, match="state_dict"):
        load_model(tiny_model())  # type: ignore[call-overload]  # likewise


# Files that are not plain ----------------------------------------------------------------------------


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("kind", ["torch", "torch in a state dict", "pickle"])
def test_code_in_a_file_does_not_run(tmp_path: Path, kind: str) -> None:
    witness, path = tmp_path / "witness", tmp_path / "weights.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"weight": Hostile(witness)}, protocol=2))
    elif kind == "torch":
        torch.save(Hostile(witness), path)
    else:
        torch.save({"weight": torch.ones(2), "evil": Hostile(witness)}, path)
    for call in (
        lambda: load_model(path),
        lambda: load_model(path, into=tiny_model(), strict=False),
        lambda: ModelRegistry(tmp_path / "models").register(path, "evil"),
        lambda: tiny_trainer().train(tiny_loader(2), epochs=1, init_from=path),
        lambda: export_model(path, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(WeightsError, match="only running code from the file could read"):
            call()
    assert not witness.exists()
    with open(path, "rb") as file:  # the file does what it is made for where somebody lets it
        pickle.load(file) if kind == "pickle" else torch.load(file, weights_only=False)
    assert witness.exists()


def test_environment_variable_that_forces_unpickling_is_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Hostile(tmp_path / "witness"), tmp_path / "weights.pt")
    with pytest.raises(WeightsError):
        load_model(tmp_path / "weights.pt")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("version", ["2.4.1", "2.5.1+cu121", "2.9.1"])
def test_torch_that_could_be_made_to_run_code_reads_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    torch.save(tiny_model().state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(WeightsError, match="CVE-2026-24747"):
        load_model(tmp_path / "weights.pt")


def test_whole_pickled_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(tiny_model(), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"Sequential.*torch\.save\(model\.state_dict\(\), path\)"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage", b"\x80\x02garbage"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_garbage_is_a_clear_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=path.name):
        load_model(path)


def test_truncated_file_is_a_clear_error(tmp_path: Path) -> None:
    for suffix in ("pt", "safetensors"):
        path = export_model(tiny_model().state_dict(), tmp_path / f"weights.{suffix}")
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(WeightsError, match=path.name):
            load_model(path)


# Wrapped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_state_dict_inside_a_training_checkpoint_is_found(tmp_path: Path, key: str) -> None:
    model = tiny_model(seed=5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    content = {"epoch": 3, key: model.state_dict(), "optimizer": optimizer.state_dict(), "args": {"lr": 0.1}}
    torch.save(content, tmp_path / "checkpoint.pt")
    assert same(load_model(tmp_path / "checkpoint.pt"), model.state_dict())


def test_of_several_state_dicts_one_must_be_named(tmp_path: Path) -> None:
    model, average = tiny_model(seed=1).state_dict(), tiny_model(seed=2).state_dict()
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model, "ema": average}, path)
    with pytest.raises(WeightsError, match="several state dicts, 'model', 'ema': say which"):
        load_model(path)
    assert same(load_model(path, key="ema"), average)
    with pytest.raises(WeightsError, match="no entries to choose from: leave key='ema' out"):
        load_model(export_model(model, tmp_path / "x.safetensors"), key="ema")
    with pytest.raises(WeightsError, match="no weights under key='ema': there are 'model' and"):
        load_model(ModelRegistry(tmp_path).register(model, "m"), key="ema")
    with pytest.raises(WeightsError, match="no entry 'emma': it is a mapping of 'model', 'ema'"):
        load_model(path, key="emma")


@pytest.mark.parametrize("content", [{"epoch": 3, "lr": 0.1}, [1, 2], {}, torch.ones(3), {"a": {}}])
def test_file_without_a_state_dict_says_what_it_is(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="holds no state dict: it is a"):
        load_model(tmp_path / "other.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_names_of_a_wrapped_model_fit_the_bare_one(prefix: str) -> None:
    state = tiny_model(seed=5).state_dict()
    wrapped = {prefix + name: each for name, each in state.items()}
    assert same(load_model(wrapped, into=tiny_model()).state_dict(), state)
    holder = torch.nn.ModuleDict({"module": tiny_model()})  # a model whose names really begin like that
    own = {f"module.{name}": each for name, each in state.items()}
    assert same(load_model(own, into=holder).state_dict(), own)


def test_lightning_checkpoint_needs_its_prefix_and_the_error_says_so(tmp_path: Path) -> None:
    state = tiny_model(seed=5).state_dict()
    path = tmp_path / "epoch=3.ckpt"
    content = {"pytorch-lightning_version": "2.5.0", "epoch": 3, "global_step": 30, "loops": {"a": {}}}
    torch.save({**content, "state_dict": {f"net.{name}": each for name, each in state.items()}}, path)
    with pytest.raises(WeightsMismatchError, match=r"prefix='net\.'"):
        load_model(path, into=tiny_model())
    assert same(load_model(path, into=tiny_model(), prefix="net.").state_dict(), state)
    with pytest.raises(WeightsError, match=r"no name begins with 'model\.'; there are net\."):
        load_model(path, prefix="model.")


def test_weights_of_a_part_are_pointed_to_that_part() -> None:
    holder = torch.nn.ModuleDict({"backbone": tiny_model()})
    with pytest.raises(WeightsMismatchError, match=r"into=model\.backbone"):
        load_model(tiny_model().state_dict(), into=holder)


# Fitting -------------------------------------------------------------------------------------------


def test_mismatch_lists_everything_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model(seed=1)
    names = list(model.state_dict())
    before = {name: each.clone() for name, each in model.state_dict().items()}
    weights = dict(tiny_model(seed=2).state_dict())
    del weights[names[0]]
    weights |= {names[1]: torch.zeros(99), "extra": torch.zeros(1)}
    with pytest.raises(WeightsMismatchError, match="strict=False loads what fits") as caught:
        load_model(weights, into=model)
    error = caught.value
    assert (error.missing, error.unexpected) == ((names[0],), ("extra",))
    assert error.mismatched == {names[1]: ((99,), tuple(before[names[1]].shape))}
    for fact in (f"missing (1): {names[0]}", "unexpected (1): extra", f"{names[1]} (99,) instead of"):
        assert fact in str(error)
    assert same(model.state_dict(), before)


def test_partial_load_takes_what_fits_and_says_what_not(caplog: pytest.LogCaptureFixture) -> None:
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    *kept, head_weight, head_bias = model.state_dict()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    weights = dict(other.state_dict()) | {head_weight: torch.zeros(7, 7), "extra": torch.zeros(1)}
    del weights[head_bias]
    with caplog.at_level(logging.WARNING, "offloop"):
        assert load_model(weights, into=model, strict=False) is model
    after = model.state_dict()
    assert all(torch.equal(after[name], other.state_dict()[name]) for name in kept)
    assert all(torch.equal(after[name], before[name]) for name in (head_weight, head_bias))
    (record,) = caplog.records
    for fact in (f"missing (1): {head_bias}", "unexpected (1): extra", "other shapes (1)", "2 names fit"):
        assert fact in record.getMessage()


def test_partial_load_of_nothing_is_an_error() -> None:
    with pytest.raises(WeightsMismatchError, match="0 names fit"):
        load_model({"other": torch.zeros(1)}, into=tiny_model(), strict=False)


def test_many_names_are_cut_short() -> None:
    with pytest.raises(WeightsMismatchError, match=r"unexpected \(50\): n0, .*n9, and 40 more") as caught:
        load_model({f"n{number}": torch.zeros(1) for number in range(50)}, into=tiny_model())
    assert len(caught.value.unexpected) == 50


def test_name_that_the_model_ties_to_a_given_one_is_not_missing() -> None:
    state = Tied(1.0).state_dict()
    del state["head.weight"]
    model = load_model(state, into=Tied())
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, state["embedding.weight"])
    del state["embedding.weight"]
    with pytest.raises(WeightsMismatchError) as caught:
        load_model(state, into=Tied())
    assert caught.value.missing == ("embedding.weight", "head.weight")


def test_values_are_converted_to_the_models_types() -> None:
    state = {name: each.double() for name, each in tiny_model(seed=5).state_dict().items()}
    model = load_model(state, into=tiny_model().bfloat16())
    assert {each.dtype for each in model.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(each, state[name].bfloat16()) for name, each in model.state_dict().items())


def test_model_without_memory_is_refused_not_left_empty() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(WeightsError, match="to_empty"):
        load_model(torch.nn.Linear(2, 2).state_dict(), into=model)


# Export --------------------------------------------------------------------------------------------


def test_export_is_read_by_safetensors_and_loads_strictly_with_tied_weights(tmp_path: Path) -> None:
    state = Tied(2.0).state_dict()
    ModelRegistry(tmp_path / "models").register(state, "tied")
    path = export_model("tied:1", tmp_path / "tied.safetensors", registry=tmp_path / "models")
    read = load_file(path)
    assert same(read, dict(state))
    Tied().load_state_dict(read, strict=True)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["offloop.model"]) == ("pt", "tied:1")
    assert not any(str(tmp_path) in value for value in metadata.values())
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as readable as any file of this user


def test_export_of_odd_tensors_keeps_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": base,
        "row": base[1],
        "transposed": base.t(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": base.bfloat16(),
        "flags": base > 3,
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
    }
    read = load_file(export_model(state, tmp_path / "odd.safetensors"))
    assert same(read, {name: each.resolve_conj().contiguous() for name, each in state.items()})


def test_export_for_torch_load_keeps_weights_tied(tmp_path: Path) -> None:
    state = Tied(2.0).state_dict()
    read = torch.load(export_model(state, tmp_path / "tied.pt"), weights_only=True)
    assert same(read, dict(state))
    assert read["head.weight"].data_ptr() == read["embedding.weight"].data_ptr()


def test_export_replaces_a_file_only_when_told_to(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    export_model({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="overwrite=True"):
        export_model({"a": torch.ones(1)}, path)
    assert load_file(path)["a"] == 0
    export_model({"a": torch.ones(1)}, path, overwrite=True)
    assert load_file(path)["a"] == 1


def test_export_that_cannot_be_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"must end in \.safetensors"):
        export_model(state, tmp_path / "weights.onnx")
    with pytest.raises(WeightsError, match="no directory"):
        export_model(state, tmp_path / "missing" / "weights.pt")
    with pytest.raises(WeightsError, match=r"cannot hold 'x\._extra_state', a dict: export to \.pt"):
        export_model({**state, "x._extra_state": {"n": 1}}, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"cannot hold 'c', of torch\.complex128"):
        export_model({"c": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "weights.safetensors")
    assert list(tmp_path.iterdir()) == []


# A run that begins from weights ----------------------------------------------------------------------


def start_of(recorder: Recorder) -> TrainStart:
    (start,) = recorder.of(TrainStart)
    return start


def test_run_begins_from_another_runs_weights_and_says_so(first_run: Path, tmp_path: Path) -> None:
    """The first loss is that of the loaded weights: those of a run that began from them by hand."""
    by_hand = load_model(first_run, into=tiny_model(seed=9))
    trainer = tiny_trainer(model=by_hand)
    expected = trainer.train(tiny_loader(3), epochs=1).history[0].metrics["train_loss"]
    source = CheckpointReader(first_run).find("last").path
    _, recorder = a_run(tmp_path, epochs=1, init_from=str(first_run), knobs={"seed_model": 9})
    assert recorder.run is not None
    assert recorder.run.result.history[0].metrics["train_loss"] == expected
    assert start_of(recorder).init_from == str(source)
    assert read_run_json(tmp_path / "first")["init_from"] == str(source)


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["start", "train_async"])
async def test_async_run_begins_from_weights_too(way: str, first_run: Path) -> None:
    recorder = Recorder()
    arguments: dict[str, Any] = {"epochs": 1, "init_from": first_run, "callbacks": [recorder]}
    with anyio.fail_after(30):
        if way == "start":
            async with tiny_trainer().start(tiny_loader(2), **arguments) as run:
                await run.wait()
        else:
            await tiny_trainer().train_async(tiny_loader(2), **arguments)
    assert start_of(recorder).init_from == str(CheckpointReader(first_run).find("last").path)


def test_alias_means_the_version_that_it_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    registry = ModelRegistry()
    made = registry.register(tiny_model(seed=4).state_dict(), "tiny", alias="champion")
    for source in ("tiny@champion", "tiny:1", "tiny", made):
        _, recorder = a_run(tmp_path / "runs", str(source).replace(":", "-"), init_from=source)
        assert start_of(recorder).init_from == f"tiny:1 ({made.identity[:19]})"
        shutil.rmtree(tmp_path / "runs")


def test_resume_wins_over_init_from(
    first_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same script, run again after a preemption: what it began from may even be gone."""
    source = tmp_path / "source"
    shutil.copytree(first_run, source)
    arguments: dict[str, Any] = {"init_from": str(source), "resume": "auto"}
    expected, _ = a_run(tmp_path / "whole", epochs=3, **arguments)
    _, begun = a_run(tmp_path / "runs", epochs=1, **arguments)
    assert start_of(begun).resumed_from is None and start_of(begun).init_from is not None
    shutil.rmtree(source)
    with caplog.at_level(logging.INFO, "offloop"):
        resumed, recorder = a_run(tmp_path / "runs", epochs=3, **arguments)
    assert "init_from is not used: a run is resumed" in caplog.messages
    assert start_of(recorder).resumed_from is not None and start_of(recorder).init_from is None
    assert same(resumed.model.state_dict(), expected.model.state_dict())
    assert read_run_json(tmp_path / "runs" / "first")["init_from"] == start_of(begun).init_from


def test_weights_that_do_not_fit_end_the_run_before_it_leaves_a_trace(tmp_path: Path) -> None:
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsMismatchError, match="init_strict=False loads what fits"):
        a_run(tmp_path / "runs", init_from=tmp_path / "other.pt")
    assert not (tmp_path / "runs").exists()
    a_run(tmp_path / "runs")  # the name is free


def test_partial_start_trains_and_logs_what_did_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = dict(tiny_model(seed=3).state_dict())
    *_, head = weights
    del weights[head]
    with caplog.at_level(logging.WARNING, "offloop"):
        a_run(tmp_path, init_from=weights, init_strict=False)
    assert [f"missing (1): {head}" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("wrong", [3, "", [], {}, True, torch.ones(2)])
def test_what_is_no_source_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="init_from must be a path, a registered model"):
        tiny_trainer().train(tiny_loader(2), epochs=1, init_from=wrong)


def test_model_in_the_place_of_its_weights_is_refused_at_once() -> None:
    trainer = tiny_trainer()
    with pytest.raises(ConfigError, match=r"other_model\.state_dict\(\)"):
        trainer.train(tiny_loader(2), epochs=1, init_from=tiny_model())  # type: ignore[arg-type]  # tested
    with pytest.raises(ConfigError, match="init_strict must be True or False"):
        trainer.train(tiny_loader(2), epochs=1, init_strict=None)  # type: ignore[arg-type]  # tested
    with pytest.raises(ConfigError, match="init_from"):
        trainer.train(tiny_loader(2), epochs=1, pretrained="x")  # type: ignore[call-arg]  # tested
    assert trainer.last_run is None


def test_source_that_is_not_there_is_refused_before_the_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path / "runs"))
    for source, error in (("missing.pt", WeightsError), ("nobody@champion", ModelNotFoundError)):
        with pytest.raises(error):
            trainer.train(tiny_loader(2), epochs=1, init_from=source)
    assert trainer.last_run is None and not (tmp_path / "runs").exists()
