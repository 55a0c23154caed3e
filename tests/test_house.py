"""The rules of the layout: what may import what, where options may be read, how long a file may be."""

import ast
import re
import subprocess
import sys

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


LIGHT = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torchvision", "PIL", "sklearn", "scipy", "tqdm", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from pcl import clustering, losses, metrics
rows = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
found = clustering.cluster_all(rows, [3, 5], temperature=0.2)
loss, _ = losses.prototype_loss(rows[:4], torch.arange(4), found, r=2)
assert loss.isfinite()
print(metrics.knn_accuracy(rows, torch.arange(40) % 2, rows, torch.arange(40) % 2, k=1))
"""


@pytest.mark.slow
def test_clustering_losses_and_metrics_need_torch_faiss_and_numpy_alone():
    command = [sys.executable, "-c", LIGHT]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ended.stdout, ended.returncode) == ("1.0\n", 0), ended.stderr


def test_the_requirements_are_those_of_the_package_and_its_scripts():
    def names(lines):
        return {re.sub(r"[\"'\s]", "", line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()}

    project = (ROOT / "pyproject.toml").read_text()
    listed = [re.search(rf"^{name} = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1] for name in ("dependencies", "scripts")]
    wanted = re.findall(r'"([^"]*)"', "".join(listed))
    assert names(wanted) == names((ROOT / "requirements.txt").read_text().splitlines())
