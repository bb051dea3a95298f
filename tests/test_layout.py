"""How the code is laid out: imports run one way, and both scripts say the same of a constant."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

CHAPTERS = ["GenerativeModel", "TrainingInstances", "Generator", "GenerativeReplay"]
FILES = [*ROOT.glob("*.py"), *ROOT.glob("figures/*.py"), *ROOT.glob("figures/lab/*.py")]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


def storey(module):
    """figures.lab is the ground floor, then come the chapters, then the rest of figures."""
    if module.startswith("figures.lab"):
        return 0
    return 1 + CHAPTERS.index(module) if module in CHAPTERS else 1 + len(CHAPTERS)


def imports(tree):
    """All that a syntax tree imports: modules, and what is imported from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def tree(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def test_imports_run_one_way():
    assert {*CHAPTERS, "figures.lab.constants", "figures.draw"} < MODULES.keys()
    graph = {module: MODULES.keys() & {*imports(tree(module))} for module in MODULES}
    for module, others in graph.items():
        for other in others - ({"figures.draw"} if module in CHAPTERS else set()):
            same = storey(other) == storey(module) and module not in CHAPTERS
            assert storey(other) < storey(module) or same, f"{module} imports {other}"
    for module in ("figures.draw", "figures.schematics"):
        assert {storey(other) for other in graph[module]} <= {0}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_stands_inside_a_function(module):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = [list(imports(f)) for f in ast.walk(tree(module)) if isinstance(f, functions)]
    assert not sum(inside, [])


def test_a_constant_of_both_scripts_stands_there_in_the_same_words():
    lines = [
        dict(re.findall(r"^([A-Z0-9_]+)(: .*)$", MODULES[script].read_text(), re.MULTILINE))
        for script in ("Generator", "GenerativeReplay")
    ]
    common = lines[0].keys() & lines[1].keys()
    assert len(common) >= 20 and len(lines[1]) > len(common)
    for name in common:
        assert lines[0][name] == lines[1][name], name
