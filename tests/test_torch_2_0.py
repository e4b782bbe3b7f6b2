"""What IPUs run uses only what torch 2.0 has: PopTorch is built for it, under Python 3.8.

tests/torch_2_0_names.json has the names of torch 2.0.1, made by tests/list_torch_names.py. The environment variable
BERT_TORCH_2_0_PYTHON may name a Python 3.8 with torch 2.0.1 and requirements-ipu.txt: then the modules are imported
there too.
"""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from bert.engines.torch_devices import Cpu, choose_precision, wants_compile
from data.errors import InputError
from tests import ROOT, sources

with open(os.path.join(ROOT, "tests", "torch_2_0_names.json"), encoding="utf-8") as listed:
    NAMES = {place: set(" ".join(lines).split()) for place, lines in json.load(listed).items()}
TENSOR_NAMES = {name for name in dir(torch.Tensor) if not name.startswith("__")}
NEW_TENSOR_NAMES = TENSOR_NAMES - NAMES["torch.Tensor"] - {"index"}  # which lists have too

# Only CPU and CUDA run what is in them, but the training loop imports them: what is done at import counts.
IMPORTED_ONLY = {f"bert/engines/{name}.py" for name in ("torch_devices", "torch_engine", "micro_batch")}
IMPORTED_ONLY |= {"ops/float8.py", "ops/shards.py", "bert/run/shards.py", "bert/run/sharded_checkpoint.py"}
IMPORTED_ONLY |= {"bert/exporting/onnx_file.py"}
IMPORTED_ONLY |= set(sources("bert/engines/parallel"))
# Imported where Triton is found, by CUDA alone.
TRITON = "attention", "cross_entropy", "dropout", "float8", "gelu", "lamb", "norm"
NEVER_IMPORTED = {f"ops/{name}_triton.py" for name in TRITON}
FILES = [path for path in [*sources("ops", "data", "bert"), "run_pretraining.py"] if path not in NEVER_IMPORTED]


def at_import(tree):
    """The nodes that are evaluated when the module is imported: all but the bodies of functions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += [*node.decorator_list, node.args, *([node.returns] if node.returns else [])]
        elif isinstance(node, ast.Lambda):
            waiting.append(node.args)
        else:
            waiting += ast.iter_child_nodes(node)


def dotted(node):
    """`a.b.c` of an attribute chain that starts with a name; None for another."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return None


def uses(source, whole):
    """(names of torch as dotted paths, attributes of anything that no import gave) in a module's source."""
    tree = ast.parse(source)
    imported = {}  # a name here -> what it stands for; of other packages too
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                imported[alias.asname or package] = alias.name if alias.asname else package
        elif isinstance(node, ast.ImportFrom):
            imported.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    paths, attributes = set(), set()
    for node in ast.walk(tree) if whole else at_import(tree):
        if isinstance(node, ast.Import):
            paths.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            paths.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            first, _, rest = (dotted(node) or "").partition(".")
            if first in imported:
                paths.add(f"{imported[first]}.{rest}")
            else:
                attributes.add(node.attr)
    return {path for path in paths if path.startswith("torch.")}, attributes


def is_in_2_0(path):
    """Whether torch 2.0 has a dotted path, as far as modules and Tensor go: not what torch.ops and classes have."""
    place, _, rest = path.partition(".")
    while rest:
        attribute, _, rest = rest.partition(".")
        if attribute not in NAMES[place]:
            return attribute.startswith("__")
        place = f"{place}.{attribute}"
        if place not in NAMES:
            listed = not rest or place == "torch.ops" or place not in sys.modules
            assert listed, f"{path}: list {place} in tests/list_torch_names.py"
            return True
    return True


def newer_than_2_0(source, whole=True):
    paths, attributes = uses(source, whole)
    return {path for path in paths if not is_in_2_0(path)} | {"." + name for name in attributes & NEW_TENSOR_NAMES}


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith("data/")])  # which imports no torch
def test_what_an_ipu_runs_uses_only_names_of_torch_2_0(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        assert newer_than_2_0(file.read(), path not in IMPORTED_ONLY) == set()


@pytest.mark.parametrize(
    "source, newer",
    [
        ("import torch\ntorch.compiler.is_compiling()", {"torch.compiler.is_compiling", "torch.compiler"}),
        ("import torch\ntorch.autograd.graph.increment_version(x)", {"torch.autograd.graph.increment_version"}),
        ("import torch.nn.functional as F\nF.rms_norm(x, 4)", {"torch.nn.functional.rms_norm"}),
        ("from torch import nn\nnn.RMSNorm(4)", {"torch.nn.RMSNorm"}),
        ("from torch.nn.attention import varlen", {"torch.nn.attention.varlen"}),
        ("import torch\ndef f():\n  try: pass\n  except torch.OutOfMemoryError: pass", {"torch.OutOfMemoryError"}),
        ("import torch, jsonargparse\njsonargparse.to_padded_tensor_\nx.y.unflatten(0, (1,)).relu()", set()),
        ("import torch\ntorch.ops.mkldnn._linear_pointwise(x)\ntorch.Generator.manual_seed\nx.weight", set()),
    ],
)
def test_newer_names_are_found(source, newer):
    assert newer_than_2_0(source) == newer


def test_new_methods_of_tensors_are_found_on_anything_but_a_module():
    name = "module_load"  # of 2.3
    if name not in NEW_TENSOR_NAMES:
        pytest.skip("this torch has no newer ones")
    assert newer_than_2_0("a.b[0].module_load(c)") == {".module_load"}
    assert newer_than_2_0("import a\na.module_load(c)") == set()


def test_only_what_is_done_at_import_counts_where_nothing_is_run():
    at_import = "import torch\nx = torch.float8_e5m2\ndef f(y=torch.float8_e4m3fn):"
    source = f"{at_import}\n  return torch._scaled_mm\nlambda: torch._scaled_mm"
    assert newer_than_2_0(source, whole=False) == {"torch.float8_e5m2", "torch.float8_e4m3fn"}


def test_what_torch_2_0_lacks_is_a_clear_error(monkeypatch):
    monkeypatch.delattr(torch, "float8_e4m3fn", raising=False)
    monkeypatch.delattr(nn.Module, "compile", raising=False)
    with pytest.raises(InputError, match="training.precision.*no float8.*requirements.txt"):
        choose_precision(Cpu(), "float8")
    with pytest.raises(InputError, match="training.compile.*Module.compile.*requirements.txt"):
        wants_compile(Cpu(), "on")
    assert wants_compile(Cpu(), "auto") == (False, "not compiled")


@pytest.fixture
def python_3_8():
    path = os.environ.get("BERT_TORCH_2_0_PYTHON")
    if not path:
        pytest.skip("BERT_TORCH_2_0_PYTHON names no Python 3.8 with torch 2.0.1")
    return path


def test_everything_an_ipu_run_needs_is_imported_under_python_3_8_and_torch_2_0(python_3_8):
    modules = [path[: -len(".py")].replace("/", ".").replace(".__init__", "") for path in FILES]
    versions = "assert (torch.__version__[:5], sys.version_info[:2]) == ('2.0.1', (3, 8))"
    code = f"import importlib, sys, torch\n{versions}\nfor name in {modules!r}: importlib.import_module(name)"
    done = subprocess.run([python_3_8, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr


def test_the_list_is_that_of_torch_2_0(python_3_8):
    command = [python_3_8, os.path.join("tests", "list_torch_names.py")]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    with open(os.path.join(ROOT, "tests", "torch_2_0_names.json"), encoding="utf-8") as file:
        assert done.stdout == file.read()
