"""Write the parts of the documentation that are made from docstrings and signatures.

    make docs

A page marks such a part with a pair of comments and leaves the text between them to this script:

    <!-- made: arguments EarlyStopping -->
    ...
    <!-- end -->

Parts are `arguments CLASS` (a table of constructor arguments), `fields CLASS`, `errors` (a table of all exceptions),
`names NAME ...` (signature, first paragraph, and fields or methods), `signatures NAME ...` (the first two),
`objects NAME ...` (the last two, for classes that programs do not construct), `event-list`, `events` and `commands`.

`tests/test_reference.py` fails for a page that is out of date, and for a public name that no page mentions.
"""

import ast
import dataclasses
import enum
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from offloop.engine import (
    CallbackFailed,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointUploaded,
    CommandApplied,
    DataBottleneck,
    EpochEnd,
    EpochStart,
    Evaluated,
    Event,
    EventsDropped,
    LearningRateChanged,
    Metrics,
    Picture,
    PictureSample,
    Resumed,
    Sample,
    Settings,
    StateChanged,
    StepEnd,
    TableSample,
    TextSample,
    TrainEnd,
    TrainerConfig,
    TrainStart,
    UnknownEvent,
    UploadFailed,
    ValidationEnd,
    ValidationStart,
    encode,
)
from offloop.engine.bus.commands import RULES, Place
from offloop.engine.events import known_events

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PART = re.compile(r"(<!-- made: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MODULES = ("offloop", "offloop.engine", "offloop.callbacks", "offloop.dashboard", "offloop.engine.testing")
"""The public modules, those with the shorter names first."""
JSON_WIDTH = 100


# Public names --------------------------------------------------------------------------------------


def public_names() -> dict[str, list[str]]:
    """Return the public names of each public module."""
    names = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names[module_name] = list(getattr(module, "__all__", None) or _defined_in(module))
    return names


def _defined_in(module: types.ModuleType) -> list[str]:
    """Return the public classes, functions and constants that a module without `__all__` defines itself."""
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.append(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
    return [name for name in names if not name.startswith("_") and not _is_type_variable(module, name)]


def _is_type_variable(module: types.ModuleType, name: str) -> bool:
    return isinstance(getattr(module, name), typing.TypeVar | typing.ParamSpec)


def find(name: str) -> tuple[str, Any]:
    """Return the public module of a name, and the object."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        if name in (getattr(module, "__all__", None) or _defined_in(module)):
            return module_name, getattr(module, name)
    raise LookupError(f"{name} is not a public name of {', '.join(MODULES)}")


# Docstrings ----------------------------------------------------------------------------------------


def paragraphs(thing: Any) -> list[str]:
    """Return the paragraphs of a docstring before its first section, one line each."""
    docstring = inspect.getdoc(thing) or ""
    found = []
    for paragraph in docstring.split("\n\n"):
        if re.match(r"(Args|Returns|Yields|Raises|Attributes|Example|Note|Thread|Cancellation):", paragraph):
            break
        # An indented paragraph is an example.
        if not paragraph.startswith(" "):
            found.append(" ".join(paragraph.split()))
    return found


def summary(thing: Any) -> str:
    """Return the first paragraph of a docstring."""
    return (paragraphs(thing) or [""])[0]


def documented_arguments(*things: Any) -> dict[str, str]:
    """Return the entries of the `Args:` sections of docstrings."""
    found: dict[str, str] = {}
    for thing in things:
        _, _, section = (inspect.getdoc(thing) or "").partition("\nArgs:\n")
        name = ""
        for line in section.splitlines():
            if line and not line.startswith(" "):
                break
            entry = re.match(r"    \*{0,2}(\w+)(?: \([^)]*\))?:(?: (.*))?$", line)
            if entry:
                name = entry[1]
                found[name] = entry[2] or ""
            elif name:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def documented_fields(cls: type) -> dict[str, str]:
    """Return the strings below the fields of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("offloop."):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str() as docstring)),
                ):
                    found[name] = " ".join(docstring.split())
    return found


def thread_of(event: type[Event]) -> str:
    """Return what the docstring of an event says after `Thread:`."""
    found = re.search(r"^Thread: (.+?)\.$", inspect.getdoc(event) or "", re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"the docstring of {event.__name__} needs a last paragraph 'Thread: ... .'")
    return " ".join(found[1].split())


# Types, values, signatures -------------------------------------------------------------------------


def describe_type(annotation: Any, namespace: Mapping[str, Any]) -> str:
    """Return a type in words: `int or None`, `"min" or "max"`."""
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, dict(namespace))
        except NameError:
            # Imported for type checkers only.
            return " or ".join(re.sub(r"\b\w+\.", "", part.strip()) for part in annotation.split("|"))
    words = list(dict.fromkeys(_words_of(annotation)))
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _words_of(annotation: Any) -> Iterable[str]:
    if annotation in (None, types.NoneType):
        yield "None"
    elif isinstance(annotation, typing.ForwardRef):
        yield annotation.__forward_arg__
    elif typing.get_origin(annotation) is typing.Literal:
        for value in typing.get_args(annotation):
            yield describe_value(value)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        # None last
        for part in sorted(typing.get_args(annotation), key=lambda part: part is types.NoneType):
            yield from _words_of(part)
    elif isinstance(annotation, type) and not typing.get_args(annotation):
        yield annotation.__name__
    else:
        yield re.sub(r"[~+](?=\w)|\b[a-z_]\w*\.(?=\w)", "", str(annotation)).replace("NoneType", "None")


def describe_value(value: Any) -> str:
    """Return a default as code."""
    match value:
        case str():
            code = '"' + repr(value)[1:-1].replace('"', '\\"') + '"'
        case bool() | None:
            code = str(value)
        case int() if abs(value) >= 10_000:
            code = f"{value:_}"
        case Mapping() if not value:
            code = "{}"
        case enum.Enum():
            code = str(value)
        case type():
            code = value.__name__
        case _:
            code = "..." if repr(value).startswith("<") else repr(value).replace("'", '"')
    return f"`{code}`"


def signature(name: str, function: Callable[..., Any]) -> str:
    """Return a call with the names of its arguments and their defaults, without types."""
    parts = []
    is_keyword_only = False
    parameters = inspect.signature(function).parameters
    knobs = TrainerConfig.__struct_fields__
    has_knobs = parameters.keys() >= {*knobs}
    for parameter in parameters.values():
        if parameter.name == "self" or (has_knobs and parameter.name in knobs):
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            is_keyword_only = True
            parts.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            parts.append(f"**{parameter.name}")
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
                is_keyword_only = True
                parts.append("*")
            has_default = parameter.default is not parameter.empty
            default = f"={describe_value(parameter.default)[1:-1]}" if has_default else ""
            parts.append(parameter.name + default)
    if has_knobs:
        parts.append("**knobs")
    return f"{name}({', '.join(parts)})"


# Parts of pages ------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table; a row is left as it is but for line breaks and pipes."""
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |\n"
        for line in lines
    )


def arguments(cls_name: str) -> str:
    """Return a table of the constructor arguments of a public class."""
    _, cls = find(cls_name)
    namespace = vars(sys.modules[cls.__module__])
    meanings = documented_arguments(cls, cls.__init__)
    rows = []
    for parameter in inspect.signature(cls).parameters.values():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        is_required = parameter.default is parameter.empty and not stars
        default = describe_value(parameter.default) if parameter.default is not parameter.empty else ""
        if parameter.name not in meanings:
            raise LookupError(f"{cls_name}: the docstring of __init__ needs an entry for {parameter.name!r}")
        rows.append(
            [
                f"`{stars}{parameter.name}`",
                describe_type(parameter.annotation, namespace),
                "required" if is_required else default,
                meanings[parameter.name],
            ]
        )
    return table(["argument", "type", "default", "meaning"], rows) if rows else "It takes no arguments.\n"


def fields(cls: type, *, inherited: bool = True) -> str:
    """Return a table of the fields of a record, empty if it has none."""
    meanings = documented_fields(cls)
    namespace = vars(sys.modules[cls.__module__])
    own = inspect.get_annotations(cls)
    rows = []
    for name, annotation, default in _fields_of(cls):
        if name.startswith("_") or not (inherited or name in own):
            continue
        if name not in meanings and issubclass(cls, Event):
            raise LookupError(f"{cls.__name__}.{name} needs a docstring below it")
        rows.append([f"`{name}`", describe_type(annotation, namespace), default, meanings.get(name, "")])
    if not issubclass(cls, Event) and all(default in ("", "required") for _, _, default, _ in rows):
        return (
            table(["field", "type", "meaning"], [[name, kind, text] for name, kind, _, text in rows])
            if rows
            else ""
        )
    return table(["field", "type", "default", "meaning"], rows) if rows else ""


def _fields_of(cls: type) -> Iterable[tuple[str, Any, str]]:
    if issubclass(cls, msgspec.Struct):
        # msgspec.structs.fields() would evaluate annotations, some of which are imported for type checkers only.
        annotations = {name: base for base in reversed(cls.__mro__) for name in inspect.get_annotations(base)}
        missing = len(cls.__struct_fields__) - len(cls.__struct_defaults__)
        defaults = (*(msgspec.NODEFAULT,) * missing, *cls.__struct_defaults__)
        for name, default in zip(cls.__struct_fields__, defaults, strict=True):
            annotation = inspect.get_annotations(annotations[name])[name]
            if default is msgspec.NODEFAULT:
                yield name, annotation, "required"
            else:
                factory = getattr(default, "factory", None)
                yield name, annotation, describe_value(factory() if factory else default)
    elif dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            has_default = field.default is not dataclasses.MISSING
            yield field.name, field.type, describe_value(field.default) if has_default else ""
    elif hasattr(cls, "_fields"):
        for name in cls._fields:
            yield name, cls.__annotations__[name], ""


def methods(cls: type) -> str:
    """Return a table of the public methods and properties of a class, without those of bases with their own entry."""
    public = {name for names in public_names().values() for name in names}
    documented = [
        base for base in cls.__mro__[1:] if base.__name__ in public and base.__module__.startswith("offloop.")
    ]
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("offloop.") and not issubclass(base, msgspec.Struct | BaseException):
            members.update({name: member for name, member in vars(base).items() if not name.startswith("_")})
    for base in documented:
        members = {name: member for name, member in members.items() if not hasattr(base, name)}
    rows = []
    for name, member in members.items():
        if isinstance(member, property):
            rows.append([f"`{name}`", summary(member)])
        elif isinstance(member, classmethod | staticmethod):
            rows.append([f"`{signature(name, getattr(cls, name))}`", summary(member)])
        elif inspect.isfunction(member):
            rows.append([f"`{signature(name, member)}`", summary(member)])
    # Some properties only explain an error.
    rows = [row for row in rows if row[1] and not row[1].startswith("No attribute")]
    found = table(["method or property", "what it does"], rows) if rows else ""
    if documented and not issubclass(cls, msgspec.Struct | BaseException):
        found += ("\n" if found else "") + f"And everything of `{documented[0].__name__}`.\n"
    return found


def names(listed: str) -> str:
    """Return an entry for each public name: signature, first paragraph, fields and methods."""
    return "\n".join(_entry(name) for name in listed.split())


def _entry(name: str, *, with_constructor: bool = True, with_members: bool = True) -> str:
    module_name, thing = find(name)
    lines = [f"### {name}\n"]
    if inspect.isfunction(thing):
        lines.append(f"`{signature(f'{module_name}.{name}', thing)}`\n\n{summary(thing)}\n")
    elif inspect.isclass(thing):
        is_record = (
            issubclass(thing, msgspec.Struct) or dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")
        )
        has_signature = with_constructor and not (
            is_record
            or typing.is_typeddict(thing)
            # Protocols have no constructor; `typing.is_protocol` comes with Python 3.13.
            or getattr(thing, "_is_protocol", False)
            or issubclass(thing, BaseException | dict)
        )
        lines.append(
            f"`{signature(f'{module_name}.{name}', thing) if has_signature else f'{module_name}.{name}'}`\n"
        )
        lines.append(f"{summary(thing)}\n")
        if is_record and with_members:
            lines.append(fields(thing))
        if with_members:
            lines.append(methods(thing))
    else:
        raise LookupError(f"{name} is neither a class nor a function")
    return "\n".join(line for line in lines if line)


def errors() -> str:
    """Return a table of all public exceptions."""
    public = dict.fromkeys(name for names in public_names().values() for name in names)
    rows = []
    for name in sorted(public):
        _, error = find(name)
        if not (inspect.isclass(error) and issubclass(error, BaseException)):
            continue
        bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
        rows.append([f"`{name}`", bases, " ".join(paragraphs(error))])
    return table(["error", "is a", "meaning"], rows)


# Events --------------------------------------------------------------------------------------------


def documented_events() -> list[type[Event]]:
    """Return offloop's events, those of the engine first."""
    import offloop.callbacks

    # Loading its modules defines their events.
    for name in offloop.callbacks.__all__:
        getattr(offloop.callbacks, name)
    # The demo's own event is an example of the user's: it is known only where the demo was imported.
    found = [
        event
        for event in known_events()
        if event.__module__.startswith("offloop.") and not event.__module__.startswith("offloop.cli.")
    ]
    found = [event for event in found if event not in (Event, Sample)]
    # Those of the engine in the order of their definition, then those of the callbacks
    found.sort(key=lambda event: "" if event.__module__ == Event.__module__ else event.__module__)
    return [*found, UnknownEvent]


def event_list() -> str:
    """Return a table of all events."""
    rows = []
    for event in documented_events():
        first_sentence = re.match(r".+?\.(?= |$)", summary(event))
        assert first_sentence, event
        kind = "" if event is UnknownEvent else "sample" if issubclass(event, Sample) else "milestone"
        rows.append(
            [f"[`{event.__name__}`](#{event.__name__.lower()})", kind, first_sentence[0], thread_of(event)]
        )
    return table(["event", "kind", "when", "thread"], rows)


def events() -> str:
    """Return a section for each event: when, thread, fields, example."""
    examples = {type(example).__name__: example for example in make_examples()}
    parts = []
    for event in documented_events():
        name = event.__name__
        parts.append(f"### {name}\n\n" + "\n\n".join(paragraphs(event)) + "\n\n")
        handler = "" if event is UnknownEvent else f"\nHandler: `{event.handler_name}`."
        parts.append(f"Thread: {thread_of(event)}.{handler}\n\n")
        parts.append(fields(event, inherited=False) or "It has only the fields of every event.\n")
        parts.append(_records_in(event))
        parts.append("\n```json\n" + wrapped(encode(examples[name])) + "\n```\n\n")
    return "".join(parts).rstrip("\n") + "\n"


def commands() -> str:
    """Return a table of all commands, as `CommandApplied` shows them."""
    places = {Place.ANYWHERE: "at the next batch, in a validation too", Place.STEP: "at the end of the step"}
    places[Place.VALIDATION | Place.STEP] = "at the end of the step; in a validation at the next batch"
    rows = [
        [
            f"`{command.__struct_config__.tag}`",
            f"`{command.__name__}`",
            ", ".join(f"`{name}`" for name in command.__struct_fields__),
            places[rule.place],
        ]
        for command, rule in RULES.items()
    ]
    return table(["`command`", "class", "`arguments`", "takes effect"], rows)


def _records_in(event: type[Event]) -> str:
    """Return tables for the structs that fields of an event hold."""
    held = re.findall(r"\w+", " ".join(map(str, inspect.get_annotations(event).values())))
    namespace = vars(sys.modules[event.__module__])
    found = ""
    for name in dict.fromkeys(held):
        cls = namespace.get(name)
        if inspect.isclass(cls) and issubclass(cls, msgspec.Struct) and cls.__module__ == event.__module__:
            found += f"\n`{name}`: {summary(cls)}\n\n{fields(cls)}"
    return found


def wrapped(data: bytes) -> str:
    """Return a JSON object with line breaks between its fields."""
    items = [
        f"{msgspec.json.encode(key).decode()}: {_spaced(value)}"
        for key, value in msgspec.json.decode(data).items()
    ]
    lines = [""]
    for number, item in enumerate(items):
        item += "," if number < len(items) - 1 else ""
        if lines[-1] and len(lines[-1]) + 1 + len(item) > JSON_WIDTH:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + item
    return "{" + "\n ".join(lines) + "}"


def _spaced(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def make_examples() -> list[Event]:
    """Return one event of each type."""
    from offloop.callbacks import (
        Alert,
        GpuUsage,
        GradientStatistics,
        LayersMeasured,
        ProfileWritten,
        ResourceUsage,
    )

    started = 1_764_320_400.0

    def at(seq: int, seconds: float, epoch: int, step: int, batch: int | None = None) -> dict[str, Any]:
        where = {"epoch": epoch, "step": step, "batch": step if batch is None else batch}
        return {"run_id": "first", "seq": seq, "time": started + seconds, **where}

    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    picture = Picture(sha256=digest, media_type="image/png", size=312, width=28, height=28)
    return [
        TrainStart(
            **at(0, 0.0, 0, 0),
            config=Settings(epochs=5, precision="32-true", seed=0),
            parameters=1_539,
            batches_per_epoch=12,
            steps_per_epoch=12,
            epochs=5,
        ),
        Resumed(
            **at(1, 0.25, 2, 30),
            checkpoint="runs/first/checkpoints/step-000000030-a0",
            exactness="equivalent",
            reasons="train_loader: what its workers draw is drawn again",
            kept=("lr is 0.1, the script has 0.05",),
        ),
        EpochStart(**at(1, 0.5, 0, 0)),
        StepEnd(
            **at(2, 0.625, 0, 1),
            loss=1.0625,
            lr=0.01,
            grad_norm=2.5,
            samples=32,
            data_time=0.000125,
            step_time=0.0005,
            metrics=Metrics(signal=0.75),
        ),
        ValidationStart(**at(14, 0.75, 0, 12), batches=2),
        ValidationEnd(
            **at(15, 0.875, 0, 12),
            metrics=Metrics(val_loss=0.875, val_accuracy=0.625),
            samples=128,
            seconds=0.125,
        ),
        EpochEnd(
            **at(16, 0.875, 0, 12),
            metrics=Metrics(train_loss=0.9375, lr=0.01, val_loss=0.875, val_accuracy=0.625),
            samples=384,
            seconds=0.375,
        ),
        DataBottleneck(
            **at(17, 0.875, 0, 12),
            share=0.5,
            wait=0.015625,
            advice=("num_workers=2: it loads in the training thread",),
        ),
        TrainEnd(
            **at(81, 2.5, 5, 60),
            status="completed",
            reason="epochs=5",
            metrics=Metrics(train_loss=0.25, lr=0.01, val_loss=0.375, val_accuracy=0.875),
            seconds=2.5,
        ),
        LearningRateChanged(**at(47, 1.5, 2, 36), lr=0.001, previous=0.01, source="schedule"),
        StateChanged(**at(40, 1.25, 2, 30), state="paused", reason="lunch", by="viewer 127.0.0.1"),
        CommandApplied(
            **at(48, 1.5, 3, 37),
            command="set_lr",
            command_id=1,
            by="user",
            arguments=Settings(lr=0.001, group=None, optimizer=None),
        ),
        CheckpointSaved(
            **at(18, 1.0, 1, 13),
            path="runs/first/checkpoints/step-000000012-a0",
            saved_step=12,
            reason="best",
            bytes=24_576,
            seconds=0.0625,
        ),
        CheckpointFailed(
            **at(18, 1.0, 1, 13),
            saved_step=12,
            error="OSError: [Errno 28] No space left on device",
            reason="interval",
        ),
        Evaluated(
            **at(22, 1.25, 1, 16),
            path="runs/first/checkpoints/step-000000012-a0",
            of_step=12,
            of_epoch=0,
            metrics=Metrics({"eval_accuracy": 0.71}),
            seconds=0.6,
        ),
        CheckpointUploaded(
            **at(22, 1.25, 1, 16),
            url="s3://bucket/runs/first/checkpoints/step-000000012-a0",
            uploaded_step=12,
            bytes=24_576,
            seconds=0.25,
        ),
        UploadFailed(
            **at(22, 1.25, 1, 16),
            url="s3://bucket/runs/first",
            error="TimeoutError: the store did not answer",
        ),
        TextSample("code", "def ", "at temperature 0.8", **at(20, 1.0, 1, 13)),
        PictureSample("digits", picture, **at(20, 1.0, 1, 13)),
        TableSample("predictions", ["image", "said", "is"], [[picture, 3, 5]], **at(20, 1.0, 1, 13)),
        CallbackFailed(
            **at(19, 1.0, 1, 13),
            callback="Notify",
            event="EpochEnd",
            error="ConnectionError: connection refused",
            traceback="Traceback (most recent call last):\n...",
        ),
        EventsDropped(
            **at(50, 1.75, 3, 39), subscriber="Notify", count=12, total=12, first_step=20, last_step=31
        ),
        Alert(
            **at(20, 1.0, 1, 13),
            rule="Spike('loss', factor=5)",
            message="loss is 6.5, above 5 times its median 1.25",
            value=6.5,
            metric="loss",
        ),
        GradientStatistics(
            **at(19, 1.0, 1, 13),
            norm=2.5,
            zero_share=0.125,
            infinite_share=0.0,
            nan_share=0.0,
            update_ratio=0.0009765625,
            norms=Metrics({"0.weight": 2.0, "0.bias": 1.5}),
            update_ratios=Metrics({"0.weight": 0.0009765625, "0.bias": 0.00048828125}),
        ),
        LayersMeasured(
            **at(19, 1.0, 1, 13),
            kind="activations",
            mean=Metrics({"0": 0.25}),
            std=Metrics({"0": 0.5}),
            minimum=Metrics({"0": 0.0}),
            maximum=Metrics({"0": 2.0}),
            norm=Metrics({"0": 4.5}),
            histogram=Settings({"0": [48, 10, 5, 1]}),
            dead=Metrics({"0": 0.0625}),
        ),
        ProfileWritten(
            **at(30, 1.125, 1, 20),
            trace="runs/first/trace.json.gz",
            table="runs/first/profile.txt",
            steps=5,
            seconds=Metrics(
                data=0.0005, forward=0.002, backward=0.003, optimizer=0.001, callbacks=0.0, idle=0.0005
            ),
        ),
        ResourceUsage(
            **at(25, 1.0, 1, 17),
            cpu_percent=104.5,
            system_cpu_percent=60.25,
            memory_bytes=402_653_184,
            system_memory_bytes=4_294_967_296,
            system_memory_total_bytes=17_179_869_184,
            threads=9,
            gpus=(
                GpuUsage(
                    index=0, name="NVIDIA H100", utilisation_percent=92.0, memory_used_bytes=1_073_741_824
                ),
            ),
            steps_per_second=2_000.0,
            samples_per_second=64_000.0,
            data_wait_percent=6.25,
            compute_percent=91.5,
            loop_lag=0.0005,
            interpreter_lag=0.001,
            callback_cpu_percent=Metrics(ProgressBar=0.5),
        ),
        UnknownEvent(type="laps.Lap", raw=encode_unknown(at(21, 1.0, 1, 13))),
    ]


def encode_unknown(position: dict[str, Any]) -> bytes:
    """Return the JSON of an event whose class is defined nowhere."""
    return msgspec.json.encode({"type": "laps.Lap", **position, "duration": 0.375})


# Pages ---------------------------------------------------------------------------------------------


def make_part(description: str) -> str:
    """Return the text of one part."""
    kind, _, rest = " ".join(description.split()).partition(" ")
    match kind:
        case "arguments":
            return arguments(rest)
        case "errors":
            return errors()
        case "fields":
            return fields(find(rest)[1])
        case "names":
            return names(rest)
        case "objects":
            return "\n".join(_entry(name, with_constructor=False) for name in rest.split())
        case "signatures":
            return "\n".join(_entry(name, with_members=False) for name in rest.split())
        case "commands":
            return commands()
        case "event-list":
            return event_list()
        case "events":
            return events()
    raise LookupError(f"no part is called {kind!r}")


def make_page(text: str) -> str:
    """Return a page with its parts made again."""
    return PART.sub(lambda part: f"{part[1]}\n{make_part(part[2])}\n{part[4]}", text)


def main() -> None:
    """Rewrite the pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = make_page(text)
        if made != text:
            page.write_text(made, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} is rewritten")


if __name__ == "__main__":
    main()
