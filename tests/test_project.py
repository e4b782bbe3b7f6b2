"""Rules that hold the whole project: who imports whom, what the IPU's Python can parse, what leaves no trace of a
machine."""

import ast
import os
import subprocess
import sys

import pytest

from tests import ROOT

MAY_IMPORT = {"ops": {"ops"}, "data": {"data"}, "bert": {"bert", "ops", "data"}}
IPU_MODULES = {os.path.join("ops", "ipu.py"), os.path.join("bert", "engines", "ipu.py")}


def sources(*folders):
    for folder in folders:
        for place, _, names in os.walk(os.path.join(ROOT, folder)):
            yield from (
                os.path.relpath(os.path.join(place, name), ROOT) for name in sorted(names) if name.endswith(".py")
            )


def imports(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        for node in ast.walk(ast.parse(file.read())):
            if isinstance(node, ast.Import):
                yield from (one.name for one in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module


@pytest.mark.parametrize("path", list(sources("ops", "data", "bert")))
def test_a_module_imports_only_from_those_to_its_left(path):
    own = {"ops", "data", "bert", "benchmarks", "tests", "run_pretraining"}
    for name in imports(path):
        first = name.split(".")[0]
        assert first not in own or first in MAY_IMPORT[path.split(os.sep)[0]], f"{path} imports {name}"
        assert first != "transformers", path
        assert first not in ("poptorch", "popart") or path in IPU_MODULES, path
        assert first != "torch" or not path.startswith("data"), path


@pytest.mark.parametrize("path", list(sources("ops", "data", "bert")) + ["run_pretraining.py"])
def test_what_runs_on_an_ipu_is_python_3_8(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        ast.parse(file.read(), feature_version=(3, 8))


def test_no_pickle_is_read_anywhere():
    for path in sources("ops", "data", "bert", "benchmarks"):
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            text = file.read()
        assert (
            not {"pickle", "cloudpickle", "dill"} & set(imports(path))
            and "torch.load(" not in text
            and "allow_pickle" not in text
        ), path


def test_help_comes_without_importing_torch():
    code = "import sys, run_pretraining; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
