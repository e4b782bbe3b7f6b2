"""Rules that hold the whole project: who imports whom, how long things are, what Python IPUs need, links of its pages.

docs/architecture.md shows the wings and the core path.
"""

import ast
import functools
import glob
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from typing import Dict, Iterator, List, Set

import graphlib
import pytest
from packaging.requirements import Requirement

from tests import ROOT, sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

PACKAGES = ("bert", "data", "ops")
LINES_OF_PACKAGES = 18_400  # that are not blank: the formatter decides how many are
LINES_OF_CORE_PATH = 1_500  # of all kinds
LINES_OF_FUNCTION = 60

CORE = {"data", "ops", "bert"}
# A wing -> the other wings that it may import. A folder is a wing, and so are the groups of files in `wing_of`.
MAY_IMPORT = {
    "ops": set(),
    "data": set(),
    "data/foreign": {"data"},
    "data/loading": {"data", "data/foreign"},
    "data/examples": {"data", "data/foreign", "data/loading", "data/preparing"},
    "data/preparing": {"data", "data/foreign"},
    "data's commands": {"data", "data/foreign", "data/loading", "data/preparing"},
    "bert": {"data", "ops"},
    "bert/model": CORE,
    "bert/tasks": CORE | {"bert/model", "data/examples"},
    "bert's optimizers": CORE,
    "bert's command line": CORE | {"data/examples", "bert/model", "bert/tasks", "bert's optimizers"},
    "bert/engines": CORE | {"data/examples", "bert/model", "bert/tasks", "bert's optimizers", "bert's command line"},
}
BELOW_RUN = set(MAY_IMPORT)
MAY_IMPORT.update({"bert/run": BELOW_RUN, "bert/plan": BELOW_RUN})
MAY_IMPORT["bert/exporting"] = BELOW_RUN | {"bert/run"}
MAY_IMPORT["the command"] = set(MAY_IMPORT)
MAY_IMPORT["benchmarks"] = set(MAY_IMPORT)
FILES_OF_WING = {
    "data's commands": ("data/prepare.py", "data/convert.py", "data/inspect.py"),
    "bert's optimizers": ("bert/optimizers.py", "bert/schedules.py"),
    "bert's command line": ("bert/command_line.py", "bert/validation.py"),
    "the command": (
        "run_pretraining.py",
        "run_finetuning.py",
        "bert/export.py",
        "bert/evaluate.py",
        "bert/fill_mask.py",
    ),
}


@functools.lru_cache(maxsize=None)
def read(path: str) -> str:
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


@functools.lru_cache(maxsize=None)
def tree_of(path: str) -> ast.Module:
    return ast.parse(read(path))


def names_imported(tree: ast.Module) -> Iterator[str]:
    """What is imported, wherever it stands: `a.b` of `import a.b`; `a` and `a.b` of `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports have the whole path of what they import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: str) -> Set[str]:
    return set(names_imported(tree_of(path)))


def file_of(module: str) -> str:
    """The file of one of the project's modules; "" of anything else."""
    path = module.replace(".", "/")
    candidates = (f"{path}.py", f"{path}/__init__.py")
    return next((name for name in candidates if os.path.exists(os.path.join(ROOT, name))), "")


def wing_of(path: str) -> str:
    for wing, files in FILES_OF_WING.items():
        if path in files:
            return wing
    parts = path.split("/")
    return "benchmarks" if parts[0] == "benchmarks" else "/".join(parts[: 2 if len(parts) > 2 else 1])


ALL = [*sources(*PACKAGES, "benchmarks"), "run_pretraining.py", "run_finetuning.py"]
OF_PACKAGES = list(sources(*PACKAGES))


@pytest.mark.parametrize("path", ALL)
def test_a_module_imports_only_from_its_wing_and_those_below(path):
    wing = wing_of(path)
    imported = {file_of(name) for name in imports(path)} - {""}
    assert {file: wing_of(file) for file in imported if wing_of(file) not in MAY_IMPORT[wing] | {wing}} == {}


def test_no_imports_go_in_a_circle_not_even_those_inside_functions():
    graph = {path: {file_of(name) for name in imports(path)} - {"", path} for path in ALL}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


@pytest.mark.parametrize("source", ["import a.b", "from a import b", "def f():\n  from a.b import c"])
def test_imports_of_every_form_are_seen(source):
    assert "a.b" in set(names_imported(ast.parse(source)))


@pytest.mark.parametrize("path", OF_PACKAGES)
def test_packages_are_imported_only_where_they_belong(path):
    packages = {name.split(".")[0] for name in imports(path)}
    assert not packages & {"transformers", "benchmarks", "tests", "run_pretraining"}
    assert not packages & {"pickle", "cloudpickle", "dill"}
    assert "torch" not in packages or not path.startswith("data/")
    if path != "ops/ipu.py" and not fnmatch(path, "bert/engines/ipu*.py"):
        assert not packages & {"poptorch", "popart", "popdist"}


@pytest.mark.parametrize("path", [*OF_PACKAGES, "run_pretraining.py"])
def test_what_runs_on_an_ipu_is_python_3_8(path):
    ast.parse(read(path), feature_version=(3, 8))


def test_no_pickle_is_read_anywhere():
    assert [path for path in ALL if re.search(r"torch\.load\(|allow_pickle", read(path))] == []


CONFIG_FILES = ("bert/config.py", "bert/command_line.py", "bert/validation.py")


def test_devices_are_named_by_engines_operations_and_the_config_only():
    named: Dict[str, List[int]] = {}
    for path in [*sources("bert", "data"), "run_pretraining.py"]:
        if path in CONFIG_FILES or path.startswith("bert/engines/"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and node.value in ("cpu", "cuda", "mps", "ipu"):
                named.setdefault(path, []).append(node.lineno)
    assert named == {}


def test_the_losses_of_pretraining_are_named_by_their_task_only():
    files = [path for path in ALL if path != "bert/tasks/pretraining.py"]
    assert [path for path in files if re.search("(mlm|nsp)_loss", read(path))] == []


def test_functions_are_short():
    long = {}
    for path in ALL:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > LINES_OF_FUNCTION:
                    long[f"{path}:{node.name}"] = lines
    assert long == {}


def test_the_packages_stay_small():
    kernels = [f"ops/{name}" for name in os.listdir(os.path.join(ROOT, "ops")) if name.endswith((".cpp", ".h"))]
    lines: Dict[str, int] = {}
    for path in OF_PACKAGES + kernels:
        written = sum(bool(line.strip()) for line in read(path).splitlines())
        lines[wing_of(path)] = lines.get(wing_of(path), 0) + written
    assert sum(lines.values()) <= LINES_OF_PACKAGES, "\n".join(f"{count:6} {wing}" for wing, count in lines.items())


def test_the_core_path_is_read_in_an_afternoon():
    section = read("docs/architecture.md").split("## The core path\n")[1].split("\n## ")[0]
    files = {link[len("../") :] for link in re.findall(r"\]\((\S+\.py)\)", section)}
    assert {wing_of(path) for path in files} == {"bert/model", "bert/tasks", "bert/run", "ops", "data", "data/loading"}
    assert sum(read(path).count("\n") for path in files) <= LINES_OF_CORE_PATH


def test_help_comes_without_importing_torch():
    code = "import sys, run_pretraining; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


SPIN, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


@pytest.mark.parametrize("given, expected", [({}, "1000"), ({SPIN: "7"}, "7"), ({POLICY: "active"}, "None")])
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(given, expected):
    code = (
        "import os, sys, run_pretraining as command; command.usable_cpus = lambda: 4\n"
        "command.wait_asleep(); print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    )
    others = {name: value for name, value in os.environ.items() if name not in (SPIN, POLICY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**others, **given}, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", expected]


PROJECT = tomllib.loads(read("pyproject.toml"))


def test_an_installed_project_has_all_packages_and_kernels():
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(PACKAGES)
    assert set(PROJECT["tool"]["mypy"]["files"]) == set(PACKAGES)
    for path in OF_PACKAGES:  # a folder without it is left out by tools that look for packages
        assert os.path.exists(os.path.join(ROOT, os.path.dirname(path), "__init__.py")), path


@pytest.mark.parametrize("machine", [("linux", "x86_64"), ("darwin", "arm64"), ("darwin", "x86_64")])
def test_the_pinned_requirements_are_the_projects_dependencies(machine):
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["plots"], *extras["tensorboard"]]
    here = dict(zip(("sys_platform", "platform_machine"), machine), python_version="3.12")

    def on_this_machine(lines):
        requirements = [Requirement(line) for line in lines if not line.startswith("#")]
        needed = [one for one in requirements if one.marker is None or one.marker.evaluate(here)]
        assert len({one.name for one in needed}) == len(needed)
        return {one.name: one for one in needed}

    dependencies, pinned = on_this_machine(lines), on_this_machine(read("requirements.txt").splitlines())
    assert dependencies.keys() == pinned.keys()
    for name, dependency in dependencies.items():
        assert dependency.extras == pinned[name].extras
        (lowest,) = (part for part in pinned[name].specifier if part.operator in ("==", ">="))
        assert lowest.version in dependency.specifier, name
    here["python_version"] = "3.8"  # requirements-ipu.txt
    assert on_this_machine(project["dependencies"]) == {}


def test_what_draws_says_what_to_install_where_matplotlib_is_not(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['matplotlib'] = None")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))

    def run(*words):
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    inspected = run("-m", "data.inspect", "none.h5", "--plot", "lengths.png")
    drawn = run("benchmarks/plot.py", "none.json", "--output", "none.png")
    for done in (inspected, drawn):
        assert done.returncode and done.stderr.count("\n") == 1 and "pip install matplotlib" in done.stderr


def test_the_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    assert re.search(rf"^## \[?{re.escape(version)}\b", read("CHANGELOG.md"), re.MULTILINE)


PAGES = [
    os.path.relpath(path, ROOT)
    for pattern in ("*.md", "docs/*.md", "data/*.md", "benchmarks/*.md", "tests/**/*.md")
    for path in glob.glob(os.path.join(ROOT, pattern), recursive=True)
]


def anchors(page: str) -> Set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_exists(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), file)) if file else page
        assert os.path.exists(os.path.join(ROOT, path)), target
        lines = re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor)
        if lines:
            assert max(int(number) for number in lines.groups() if number) <= read(path).count("\n"), target
        elif anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    """`bert/config.py`, and `bert/config.py:12` or `bert/config.py:Config` for a place in it; with * for several."""
    folders = "bert|ops|data|configs|benchmarks|tests|docs"
    for named, place in re.findall(rf"`((?:{folders})/[\w./*-]*)(?::(\w+))?`", read(page)):
        files = glob.glob(os.path.join(ROOT, named))
        assert files, named
        if place.isdigit():
            assert int(place) <= read(named).count("\n"), f"{named}:{place}"
        elif place:
            assert re.search(rf"^\s*(def |class )?{place}\b", read(named), re.MULTILINE), f"{named}:{place}"


def test_the_picture_names_files_that_exist():
    picture = re.sub(r"<(style|defs)>.*?</\1>", "", read("docs/architecture.svg"), flags=re.DOTALL)
    text = " ".join(re.findall(r">([^<]+)<", picture))
    named = set(re.findall(r"[\w/]+\.py\b|\b(?:bert|data)/\w+\b(?!\.)|\bbenchmarks\b", text))
    assert len(named) > 30
    places = ("", "bert", "data")  # in the row of a wing the picture leaves its name out
    assert {name for name in named if not any(os.path.exists(os.path.join(ROOT, p, name)) for p in places)} == set()
