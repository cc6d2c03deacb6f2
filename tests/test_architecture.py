"""Rules that can be checked automatically: dependency order, lazy imports, docstrings of public functions."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("spjax", "data_pipelines", "configs")
HEAVY = {
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "matplotlib",
    "sklearn",
    "librosa",
    "apache_beam",
    "espeakng_loader",
    "google",
    "qwix",
    "tensorboardX",
    "huggingface_hub",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "gradio",
}  # slow
PACKAGE_OF_MODULE = {  # what pip calls it, where that is not the module's name
    "absl": "absl-py",
    "apache_beam": "apache-beam",
    "espeakng_loader": "espeakng-loader",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "prometheus_client": "prometheus-client",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}


class Import(NamedTuple):
    """One import of a module, on one line of a file."""

    name: str  # dotted, of the imported module
    line: int
    at_start: bool  # runs when the file is imported: not in a function, nor for type checkers only


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every import of a file, inside functions too; `from a import b` names a.b if that is a module of ours."""
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING")  # never runs
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) not in inside)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(name if is_module(name) else base, node.lineno, id(node) not in inside)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def package(module: str) -> str:
    """spjax.models.unit_lm -> models, spjax -> spjax (the public API), data_pipelines.x -> data_pipelines."""
    parts = module.split(".")
    return parts[1] if parts[0] == "spjax" and len(parts) > 1 else parts[0]


def ranks() -> dict[str, int]:
    """Rank of every package, from the figure in docs/design.md: a package imports its own rank and lower ones."""
    section = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Dependency order", 1)[1]
    figure = section.split("```mermaid", 1)[1].split("```", 1)[0]
    boxes = {box: names.split(", ") for box, names in re.findall(r"(\w+)\[\"(.+?)\"\]", figure)}
    arrows = {above: [below] for above, below in re.findall(r"(\w+) --> (\w+)", figure)}
    assert len(arrows) == len(boxes) - 1, "the figure must be one chain of boxes"
    rank = {name: n for n, box in enumerate(graphlib.TopologicalSorter(arrows).static_order()) for name in boxes[box]}
    rank["spjax"] = rank["main"]  # spjax/__init__.py, the public API: above all packages, imported by none of them
    return rank


def wrong_way(module: str, tree: ast.Module, rank: dict[str, int]) -> list[str]:
    """What `module` imports against the dependency order, a line each."""
    here = package(module)
    found = []
    for name, line, _ in imports(tree):
        there = package(name)
        if there not in rank or there == here or (module, there) == ("spjax.main", "data_pipelines"):
            continue
        if rank[there] > rank[here] or (there == "spjax" and here != "data_pipelines"):
            found.append(f"{module}:{line} ({here}) imports {name} ({there})")
    return found


def test_every_package_has_a_rank():
    packages = {package(module_name(path)) for path in files("spjax", "data_pipelines")}
    assert packages == set(ranks()), "the figure in docs/design.md, Dependency order, must name every package"


def test_imports_follow_the_dependency_order():
    rank = ranks()
    found = [
        line for path in files("spjax", "data_pipelines") for line in wrong_way(module_name(path), parse(path), rank)
    ]
    assert not found, "\n".join(found)


def test_packages_do_not_import_in_a_circle():
    graph = defaultdict(set)
    for path in files("spjax", "data_pipelines"):
        here = package(module_name(path))
        graph[here] |= {package(name) for name, _, _ in imports(parse(path))} & set(ranks()) - {here}
    graph["main"].discard("data_pipelines")
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_files_do_not_import_in_a_circle():
    """Of imports inside functions too: a circle that is only broken at start is one."""
    paths = {module_name(path): path for path in files(*CODE)}
    graph = {
        module: {name for name, _, _ in imports(parse(path))} & paths.keys() - {module}
        for module, path in paths.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("spjax.models.unit_lm", "from spjax import vocab", False),
        ("spjax.models.unit_lm", "import spjax", True),
        ("spjax.models.unit_lm", "from spjax.training import losses", True),
        ("spjax.models.unit_lm", "from spjax import training", True),
        ("spjax.models.unit_lm", "def late():\n    import spjax.evaluation.metrics", True),
        ("spjax.training.train", "from spjax.models import unit_lm", False),
        ("spjax.data.records", "import data_pipelines.import_units", True),
        ("spjax.main", "import data_pipelines.import_units", False),
        ("data_pipelines.import_units", "import spjax", False),
    ],
)
def test_the_check_detects_a_wrong_import(module: str, source: str, wrong: bool):
    assert bool(wrong_way(module, ast.parse(source), ranks())) == wrong


def test_heavy_libraries_are_imported_where_they_are_used():
    found = [
        f"{module_name(path)}:{line} imports {name}"
        for path in files(*CODE)
        for name, line, at_start in imports(parse(path))
        if at_start and name.split(".")[0] in HEAVY
    ]
    assert not found, "import inside the function that needs it:\n" + "\n".join(found)


def test_import_spjax_is_light():
    code = f"import sys, spjax; print(*(name for name in {sorted(HEAVY)!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == []


def test_requirements_list_what_is_imported():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {re.split(r"[\[<>=;! ]", line)[0].lower() for line in lines if line[0] != "#"}
    used = {name.split(".")[0] for path in files(*CODE) for name, _, _ in imports(parse(path))}
    used -= set(sys.stdlib_module_names) | set(CODE) | {"__future__"}
    missing = {name for name in used if PACKAGE_OF_MODULE.get(name, name).lower() not in listed}
    assert not missing, f"imported but not in requirements.txt: {sorted(missing)}"


def test_no_code_of_a_file_is_run():
    """Unpickling runs code from the file: only spjax.convert may read pickles, with its safe reader."""
    found = []
    for path in files("spjax", "data_pipelines", "configs"):
        tree, module = parse(path), module_name(path)
        for name, line, _ in imports(tree):
            if name.split(".")[0] in {"torch", "joblib", "dill", "cloudpickle", "marshal", "shelve"}:
                found.append(f"{module}:{line} imports {name}")
            if name == "pickle" and package(module) != "convert":
                found.append(f"{module}:{line} imports pickle outside spjax.convert")
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in {"pickle.load", "pickle.loads", "eval", "exec", "yaml.load"}:
                found.append(f"{module}:{node.lineno} calls {called}")
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                found.append(f"{module}:{node.lineno} allows pickles")
    assert not found, "\n".join(found)


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions of the module and methods of its public classes, as (name, node)."""
    scopes: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    for prefix, body in scopes:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                scopes.append((f"{node.name}.", node.body))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield prefix + node.name, node


@pytest.mark.parametrize("path", files(*CODE), ids=module_name)
def test_public_functions_are_explained(path: Path):
    tree = parse(path)
    found = [] if ast.get_docstring(tree) or not tree.body else ["the module has no docstring"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(f"{node.lineno} class {node.name} has no docstring")
    for name, node in public_functions(tree):
        if not ast.get_docstring(node) and not name.endswith(".setup"):  # flax's setup needs no docstring
            found.append(f"{node.lineno} {name} has no docstring")
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if bare:
            found.append(f"{node.lineno} {name} leaves {bare} without annotation")
        if node.returns is None:
            found.append(f"{node.lineno} {name} does not say what it returns")
    assert not found, "\n".join(found)


NOTES = {"".join(word) for word in (("TO", "DO"), ("FIX", "ME"), ("XX", "X"))}  # spelled so as not to be found here


@pytest.mark.parametrize("path", files(*CODE, "benchmarks", "tests"), ids=module_name)
def test_nothing_is_left_to_be_done(path: Path):
    text = path.read_text(encoding="utf-8")
    notes = [number for number, line in enumerate(text.splitlines(), 1) if NOTES & set(re.findall(r"\w+", line))]
    assert not notes, f"notes to self on lines {notes}"
    tree = ast.parse(text)
    protocols = [
        node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
    ]
    promised = {id(node) for protocol in protocols for node in protocol.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "NotImplemented" not in ast.unparse(node.exc), f"line {node.lineno}: not implemented"
        if isinstance(node, ast.FunctionDef) and id(node) not in promised:
            body = node.body[1:] if ast.get_docstring(node) else node.body
            empty = not body or any(ast.unparse(statement) in ("pass", "...") for statement in body)
            assert not empty, f"line {node.lineno}: {node.name} does nothing"
