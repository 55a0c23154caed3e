"""The rules of the layout: what may import what, where options may be read, how long a file may be."""

import ast

import pytest
from conftest import ROOT

METHOD = sorted((ROOT / "pcl").glob("*.py"))
RUN = sorted((ROOT / "pcl" / "run").glob("*.py"))
SCRIPTS = [ROOT / f"{name}.py" for name in ("main_pcl", "eval_svm_voc", "eval_cls_imagenet")]


def imported(path, anywhere=True):
    """The modules that a file imports, anywhere in it or at its top."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name, package):
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", METHOD, ids=lambda path: path.name)
def test_the_method_knows_no_machinery_and_no_options(path):
    assert not [name for name in imported(path) if within(name, "pcl.run")]
    tree = ast.parse(path.read_text())
    assert "Namespace" not in {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(tree)}
    parsing = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "parse_args" in ast.dump(node)]
    assert set(parsing) <= {"main"}  # of `python -m`


@pytest.mark.parametrize("path", [*METHOD, *RUN], ids=lambda path: path.name)
def test_nothing_imports_a_script_and_faiss_has_two_rooms(path):
    names = imported(path)
    assert not [name for name in names if name in {script.stem for script in SCRIPTS}]
    assert path.name in ("clustering.py", "sharded.py") or not [name for name in names if within(name, "faiss")]


@pytest.mark.parametrize("path", [*METHOD, *RUN, *SCRIPTS], ids=lambda path: path.name)
def test_options_are_not_written_after_parsing_and_files_are_short(path):
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        written = [t for target in targets for t in ast.walk(target) if isinstance(t, ast.Attribute)]
        assert not [t.attr for t in written if isinstance(t.value, ast.Name) and t.value.id == "args"]
    assert source.count("\n") <= 300


def test_no_import_is_a_circle():
    modules = {f"pcl.{path.stem}": path for path in METHOD} | {f"pcl.run.{path.stem}": path for path in RUN}
    known = {name: {other for other in imported(path, anywhere=False) if other in modules} for name, path in modules.items()}

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        for other in known[name]:
            visit(other, [*above, name])

    for name in modules:
        visit(name, [])
