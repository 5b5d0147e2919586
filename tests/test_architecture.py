"""Who may import whom, read from the sources; and that every public name is there, once, with a docstring."""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

import offloop.engine
from offloop.engine import CheckpointError, OffloopError

ROOT: Final = Path(__file__).parent.parent
FOLDERS: Final = [name for name in ("engine", "callbacks", "cli", "dashboard") if (ROOT / name).is_dir()]

WITHOUT_TORCH: Final = (
    "events",
    "encoding",
    "errors",
    "argument_hints",
    "checks",
    "config",
    "monitor",
    "callback",
    "bus.waker",
    "bus.event_bus",
    "bus.milestones",
    "bus.subscribers",
    "bus.subscription",
    "bus.step_times",
    "bus.command_mailbox",
    "bus.commands",
    "checkpoint.tags",
    "bus.deadlock",
    "lazy_imports",
    "observers.driver",
    "observers.worker",
    "observers.cost_watch",
    "bus.forked",
    "observers.observer",
    "bus.threads",
    "run_handle",
    "remote_run",
    "paths",
    "visible_text",
    "checkpoint.errors",
    "checkpoint.filesystem",
    "checkpoint.lock",
    "metrics.names",
    "observers.line_file",
    "observers.event_log",
    "sample_numbers",
    "samples.png",
    "samples.content",
    "samples.picture",
    "samples.events",
    "samples.files",
    "catalog.files",
    "catalog.labels",
    "catalog.export",
    "catalog.log_end",
    "catalog.pattern",
    "catalog.run_fields",
    "catalog.run_filter",
    "catalog.summary",
    "catalog.record",
    "catalog.catalog",
    "catalog.tail",
)
"""Modules of the engine that work, and load, without torch."""
SHARED: Final = (
    "errors",
    "argument_hints",
    "checks",
    "config",
    "monitor",
    "events",
    "callback",
    "bus.command_mailbox",
)
"""What the training loop shares with the event loop's side; everything else it uses is its own."""
ABOVE_THE_LOOP: Final = (
    "bus.event_bus",
    "bus.milestones",
    "bus.subscribers",
    "bus.subscription",
    "bus.step_times",
    "observers.driver",
    "observers.worker",
    "observers.cost_watch",
    "observers.observer",
    "run",
    "run_handle",
    "remote_run",
    "runs",
    "session.session",
    "trainer",
    "observers.event_log",
    "testing",
    "session.process",
    "tools.prediction",
    "tools.tuning",
)
"""Modules that the training loop and what it uses never know of."""
LAYERS: Final = (
    "samples",
    "checkpoint",
    "bus",
    "data",
    "metrics",
    "position",
    "observers",
    "catalog",
    "processes",
    "training",
    "weights",
    "distributed",
    "recovery",
    "session",
    "replays",
    "tools",
)
"""Packages of the engine, from the lowest to the highest: each uses only those before it."""
DASHBOARD_LAYERS: Final = ("protocol", "curves", "client", "runs", "viewers", "serving", "saved")
"""The same for the packages of the dashboard."""
FACADES: Final = (
    "offloop",
    "offloop.callbacks",
    "offloop.dashboard",
    "offloop.engine",
    "offloop.engine.checkpoint",
)
"""Packages whose `__init__.py` lists public names, which are loaded when first used."""
LONGEST: Final = 600
"""Lines of a file of the engine."""
MOST_METHODS: Final = 25
"""Methods of a class, without special ones; a class with more gives the reason in its docstring."""
OPEN_MODULES: Final = tuple(
    f"offloop.engine.{name}"
    for name in (
        "argument_hints",
        "bus.threads",
        "bus.waker",
        "checkpoint",
        "checks",
        "lazy_facade",
        "metrics.names",
        "monitor",
        "paths",
        "sample_numbers",
        "remote_run",
        "testing",
        "visible_text",
        "weights.structure",
    )
)
"""Modules of the engine that callbacks, cli and dashboard may import; elsewhere they use `offloop.engine`'s names."""


class Import(NamedTuple):
    """One imported module or name."""

    module: str
    name: str | None
    """What is taken from the module, None for `import module`."""
    for_types_only: bool
    """True under `if TYPE_CHECKING:`."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("offloop", *(parts[:-1] if parts[-1] == "__init__" else parts)))


SOURCES: Final = {
    module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))
}


def is_for_types(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def imports_of(module: str) -> list[Import]:
    """Return all imports of a module, those inside functions too."""
    found: list[Import] = []

    def look(node: ast.AST, for_types_only: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, None, for_types_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            found.extend(Import(source, alias.name, for_types_only) for alias in node.names)
        elif isinstance(node, ast.If) and is_for_types(node):
            for each in node.body:
                look(each, True)
            for each in node.orelse:
                look(each, for_types_only)
        else:
            for child in ast.iter_child_nodes(node):
                look(child, for_types_only)

    look(ast.parse(SOURCES[module].read_text(encoding="utf-8")), False)
    return found


def modules_known_to(module: str) -> set[str]:
    """Return the modules of offloop that a module imports, for whatever purpose."""
    known: set[str] = set()
    for each in imports_of(module):
        if each.package == "offloop":
            inner = f"{each.module}.{each.name}"
            known.add(inner if inner in SOURCES else each.module)
    return known


def in_folder(*folders: str) -> list[str]:
    return [module for module in SOURCES if module.split(".")[1] in folders]


def training_threads_modules() -> set[str]:
    """Return loop.py and every module of the engine that it uses and does not share."""
    shared = {f"offloop.engine.{name}" for name in SHARED}
    reached, waiting = set[str](), ["offloop.engine.training.loop"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(modules_known_to(module) - shared)
    return reached


# Who may import whom -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", SOURCES)
def test_imports_are_absolute_and_under_the_one_true_name(module: str) -> None:
    for each in imports_of(module):
        assert not each.module.startswith("."), each
        assert each.package not in FOLDERS, f"{each}: import offloop.{each.module}"


@pytest.mark.parametrize("module", in_folder("engine"))
def test_engine_knows_nobody_above_it(module: str) -> None:
    above = ("offloop.callbacks", "offloop.cli", "offloop.dashboard")
    assert not [known for known in modules_known_to(module) if known.startswith(above)]


@pytest.mark.parametrize("module", in_folder("callbacks", "cli", "dashboard"))
def test_the_engine_is_used_through_its_public_names(module: str) -> None:
    for each in imports_of(module):
        if each.module.startswith("offloop.engine"):
            if (
                each.module in ("offloop.engine.testing", "offloop.engine.tools.verify_resume")
                or f"{each.module}.{each.name}" in OPEN_MODULES
            ):
                continue
            assert each.module in ("offloop.engine", *OPEN_MODULES), each
            assert each.name in importlib.import_module(each.module).__all__, each


@pytest.mark.parametrize("module", in_folder("cli"))
def test_the_command_line_uses_callbacks_through_their_public_names(module: str) -> None:
    for each in imports_of(module):
        assert not each.module.startswith("offloop.callbacks."), each


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_needs_no_torch_imports_none(name: str) -> None:
    """Nor a module that does."""
    for each in imports_of(f"offloop.engine.{name}"):
        assert each.for_types_only or each.package not in ("torch", "torchmetrics", "numpy"), each
    allowed = {"offloop.engine", *(f"offloop.engine.{each}" for each in WITHOUT_TORCH)}
    assert modules_known_to(f"offloop.engine.{name}") <= allowed


def test_events_errors_and_config_know_nobody() -> None:
    known = {
        "checks": {"visible_text"},
        "monitor": {"events", "checks"},
        "config": {"argument_hints", "checks", "monitor"},
    }
    for name in ("events", "errors", "argument_hints", "checks", "monitor", "config"):
        allowed = {f"offloop.engine.{each}" for each in ("errors", *known.get(name, ()))}
        assert modules_known_to(f"offloop.engine.{name}") <= allowed


def test_training_loop_knows_nothing_of_the_event_loop() -> None:
    modules = training_threads_modules()
    assert {
        "offloop.engine.training.loop",
        "offloop.engine.data.batches",
        "offloop.engine.metrics.metric_set",
    } <= modules
    above = {f"offloop.engine.{name}" for name in ABOVE_THE_LOOP}
    for module in modules:
        assert not modules_known_to(module) & above, module
        assert "anyio" not in {each.package for each in imports_of(module)}, module


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("offloop.engine.checkpoint")])
def test_checkpoint_mechanics_know_nothing_of_the_rest(module: str) -> None:
    rest = {known for known in modules_known_to(module) if not known.startswith("offloop.engine.checkpoint")}
    assert rest <= {
        f"offloop.engine.{name}" for name in ("checks", "errors", "lazy_facade", "monitor", "paths")
    }


@pytest.mark.parametrize("module", SOURCES)
def test_only_the_dashboards_server_knows_one_kind_of_event_loop(module: str) -> None:
    packages = {each.package for each in imports_of(module)}
    assert "trio" not in packages and "uvloop" not in packages
    if module not in (
        "offloop.dashboard.serving.server",
        "offloop.dashboard.serving.requests",
        "offloop.dashboard.client.websocket",
    ):
        assert not packages & {"asyncio", "websockets"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Neither when they run nor in what a type checker reads; the packages' lists of public names are no modules here.

    A circle is one module in several files. Besides, Python resolves a circle between two threads by handing one of
    them a module that is half initialized.
    """
    needs = {
        module: modules_known_to(module) & SOURCES.keys() - FACADES for module in SOURCES.keys() - FACADES
    }
    while free := [module for module, needed in needs.items() if not needed & needs.keys()]:
        for module in free:
            del needs[module]
    assert not needs, f"among these is a circle: {sorted(needs)}"


@pytest.mark.parametrize("module", in_folder("engine", "dashboard"))
def test_packages_use_only_those_below_them(module: str) -> None:
    _, folder, *inside = module.split(".")
    layers = LAYERS if folder == "engine" else DASHBOARD_LAYERS
    package = inside[0] if inside else ""
    if package in layers:
        above = tuple(f"offloop.{folder}.{name}." for name in layers[layers.index(package) + 1 :])
        assert not [each for each in modules_known_to(module) if each.startswith(above)]


@pytest.mark.parametrize("module", in_folder("engine"))
def test_no_file_of_the_engine_is_too_long_to_read(module: str) -> None:
    assert SOURCES[module].read_text(encoding="utf-8").count("\n") <= LONGEST


@pytest.mark.parametrize("module", SOURCES)
def test_a_class_with_many_methods_gives_the_reason(module: str) -> None:
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            methods = {
                each.name
                for each in node.body
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and not each.name.startswith("__")
            }
            is_explained = "methods" in (ast.get_docstring(node) or "")
            assert len(methods) <= MOST_METHODS or is_explained, node.name


def test_the_package_of_several_processes_lists_its_modules() -> None:
    folder = ROOT / "engine" / "distributed"
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    listed = re.findall(r"^ +(\w+)  ", docstring, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def test_every_package_of_the_engine_has_its_layer() -> None:
    packages = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert packages == set(LAYERS)


def test_events_bus_and_control_load_without_torch() -> None:
    script = (
        "import sys\n"
        f"for name in {WITHOUT_TORCH!r}:\n"
        "    __import__(f'offloop.engine.{name}')\n"
        "from offloop.engine import Callback, Event, StepEnd, TrainerConfig, decode\n"
        "loaded = {'torch', 'torchmetrics', 'numpy', 'rich', 'websockets'} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(loaded)}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_trainer_without_metrics_does_not_wait_for_torchmetrics() -> None:
    """Where SciPy is installed, importing it takes as long as importing torch."""
    script = "import sys; from offloop.engine import Trainer; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


@pytest.mark.parametrize("module", SOURCES)
def test_no_file_is_named_like_a_standard_module(module: str) -> None:
    assert module.rpartition(".")[2] not in sys.stdlib_module_names


# Public names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", FACADES)
def test_public_names_of_a_facade_are_sorted_and_stand_once(package: str) -> None:
    facade = importlib.import_module(package)
    names = [name for names in facade._NAMES.values() for name in names.split()]
    assert sorted(set(names)) == sorted(names) == facade.__all__
    for module, of_module in facade._NAMES.items():
        assert of_module.split() == sorted(of_module.split()), module
    assert list(facade._NAMES) == sorted(facade._NAMES)


@pytest.mark.parametrize("package", FACADES)
def test_type_checkers_see_the_names_that_the_interpreter_loads(package: str) -> None:
    source = SOURCES.get(package, ROOT / "offloop" / "__init__.py")
    (block,) = (
        node for node in ast.parse(source.read_text()).body if isinstance(node, ast.If) and is_for_types(node)
    )
    declared = [
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]
    loaded = [
        (f"{package}.{module}", name)
        for module, names in importlib.import_module(package)._NAMES.items()
        for name in names.split()
    ]
    assert sorted(declared) == sorted(loaded)


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in FACADES for name in importlib.import_module(package).__all__],
)
def test_public_name_of_a_facade_loads_and_says_what_it_is(package: str, name: str) -> None:
    facade = importlib.import_module(package)
    value = getattr(facade, name)
    (module,) = (module for module, names in facade._NAMES.items() if name in names.split())
    assert getattr(importlib.import_module(f"{package}.{module}"), name) is value
    assert name in dir(facade)
    assert own_docstring(value), f"{name} has no docstring"


@pytest.mark.parametrize("package", FACADES)
def test_unknown_name_of_a_facade_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Trainr'"):
        importlib.import_module(package).Trainr  # noqa: B018 - the look-up is the test


@pytest.mark.parametrize("name", offloop.engine.__all__)
def test_public_methods_say_what_they_do(name: str) -> None:
    value = getattr(offloop.engine, name)
    if not inspect.isclass(value):
        return
    missing = [
        attribute
        for attribute, member in vars(value).items()
        if not attribute.startswith(("_", "on_"))  # a handler does what its callback's class says
        and (inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod))
        and not inspect.getdoc(getattr(value, attribute))
    ]
    assert not missing


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "engine"])
def test_public_names_of_the_other_folders_are_sorted_and_documented(folder: str) -> None:
    module = importlib.import_module(f"offloop.{folder}")
    names: list[str] = getattr(module, "__all__", [])
    assert names == sorted(set(names))
    for name in names:
        assert own_docstring(getattr(module, name)), name


def own_docstring(value: Any) -> str | None:
    """Return the docstring of a class or function, not one that it inherits."""
    return value.__doc__ if inspect.isclass(value) or inspect.isfunction(value) else "a value"


# Errors --------------------------------------------------------------------------------------------

INTERNAL: Final = (
    "AbandonedError",
    "ClosedError",
    "ForkedProcessError",
    "ProtocolError",
    "RefusedError",
    "TooLargeError",
    "UnusableError",
    "ViewerTooSlowError",
)
"""Exceptions that are always caught inside."""


def exceptions() -> list[type[BaseException]]:
    """Return the exception classes that the sources define."""
    found = []
    for module, path in SOURCES.items():
        if path.parent.name == "web":  # builds the page; never imported
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                value = getattr(importlib.import_module(module), node.name)
                if issubclass(value, BaseException):
                    found.append(value)
    return found


def test_every_exception_is_an_offloop_error_and_public() -> None:
    found = exceptions()
    assert OffloopError in found and CheckpointError in found
    apart = [each.__name__ for each in found if not issubclass(each, OffloopError)]
    assert apart == ["ForkedProcessError", "Preempted"]  # must not be caught by `except Exception`
    names = {each.__name__ for each in found}
    assert names - set(INTERNAL) <= set(offloop.engine.__all__)


def test_the_errors_are_drawn_as_they_derive() -> None:
    text = importlib.import_module("offloop.engine.errors").__doc__
    drawn, above = {"OffloopError": "Exception"}, ["OffloopError"]
    for line in str(text).splitlines():
        if match := re.match(r"    ((?:│   |    )*)[├└]── (\w+)", line):
            depth = len(match[1]) // 4 + 1
            above[depth:] = [match[2]]
            drawn[match[2]] = above[depth - 1]
    derived = {
        each.__name__: each.__bases__[0].__name__
        for each in exceptions()
        if issubclass(each, OffloopError) and each.__name__ not in INTERNAL
    }
    assert drawn == derived


def test_windows_is_refused_at_once() -> None:
    script = "import sys; sys.platform = 'win32'; import offloop.engine"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith(
        "ImportError: offloop runs on Linux and macOS; on Windows, install it in WSL\n"
    )
