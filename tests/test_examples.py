"""Every example runs as it stands, says what it promises, and uses public names only."""

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest

import offloop

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))  # those of several processes run in tests/distributed
SAYS = {
    "async_callback": ["the server received epoch 4: loss 0.", "training took ", "5 answers; "],
    "checkpoint_evaluator": ["step 80: robust accuracy 0.", "the best is that of step "],
    "computing_callback": ["epoch 4: 303 primes", "training took ", "its process used "],
    "fine_tuning": ["0.0.weight: unchanged", "1.0.weight: changed"],
    "gan": ["epoch 9: judge", "mean radius of new points: "],
    "watching": ["watching ", "paused at step ", "set_lr by viewer 127.0.0.1", "stopped after "],
    "service": [", step ", "{'status': 'cancelled'}"],
    "web_service": ["page: control", "pause: 200", ": 'paused, step ", "cancel: {'status': 'cancelled'}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path, warm_python: Any) -> None:
    script = Path(shutil.copy(example, tmp_path))
    done = warm_python.run(script)
    assert done.returncode == 0, done.stderr
    for words in SAYS[example.stem]:
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [script], "an example leaves no files"


@pytest.mark.parametrize("example", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_example_uses_public_names_and_is_short(example: Path) -> None:
    source = example.read_text(encoding="utf-8")
    assert source.count("\n") <= 120
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offloop"):
            assert node.module == "offloop"
            assert {alias.name for alias in node.names} <= set(offloop.__all__)
