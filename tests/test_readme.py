"""What README.md and docs/ show: commands that parse, targets, links, pictures and names that exist."""

import argparse
import ast
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT

import eval_cls_imagenet
import eval_svm_voc
import main_pcl
from pcl import export, features, figures, samples

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench
import demo
import faults
import gpu
import large
import replicate
import resnet8

COMMANDS = {
    "main_pcl.py": main_pcl,
    "eval_svm_voc.py": eval_svm_voc,
    "eval_cls_imagenet.py": eval_cls_imagenet,
    "-m pcl.checkpoint": export,
    "-m pcl.figures": figures,
    "-m pcl.samples": samples,
    "-m pcl.features": features,
}
SCRIPTS = [name for name in COMMANDS if name.endswith(".py")]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXTS = [*PAGES, *SCRIPTS, *(f"pcl/{name}.py" for name in ("checkpoint", "features", "figures", "samples"))]
PASS_ON = {"demo": demo, "replicate": replicate, "large": large}  # unknown options go to main_pcl.py
NO_OPTIONS = ["benchmarks/sharded_memory.py", "img/PCL_framework.py"]


def commands_in(text):
    """(what is run, its words) of each indented or quoted command line."""
    text = re.sub(r"\\+\n *", "", text)
    for start, end in ((r"^ +", "$"), ("`", "`")):
        pattern = rf"{start}(?:python|torchrun [^`\n]*?) ({'|'.join(map(re.escape, COMMANDS))}) ([^`\n]*?){end}"
        for name, words in re.findall(pattern, text, flags=re.MULTILINE):
            yield name, shlex.split(words.split("   ")[0])  # what follows is a remark


@pytest.mark.parametrize("file", TEXTS)
def test_every_command_that_is_shown_parses(file):
    shown = list(commands_in((ROOT / file).read_text()))
    for name, words in shown:
        if words != ["--help"]:
            COMMANDS[name].get_parser().parse_args(words)
    names = [name for name, _ in shown]
    if not file.startswith("docs/"):
        for name in COMMANDS if file == "README.md" else [file.removeprefix("pcl/").removesuffix(".py")]:
            assert any(name in found for found in names), f"{file} shows no command of {name}"


def code_in(page):
    """Each indented line, line between fences (but for Python's) and quoted piece of code of a page."""
    text = re.sub(r"\\+\n *", "", page)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.splitlines() if language != "python" else []
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"^ {4}(.*)$", text, flags=re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def runs_in(page):
    """(what is run, its words) of each call of Python wherever it stands in a line of code, as in a loop or after srun."""
    for code in code_in(page):
        for name, words in re.findall(r"(?:\bpython|\btorchrun .*?) +(-m \S+|\S+\.py)([^;|&]*)", code):
            yield name, [word for word in shlex.split(words) if word != "OPTIONS"]


class ParsedError(Exception):
    """The command line was taken."""


def parse(name, words, monkeypatch):
    """Give the words to the parser of what is run; SystemExit where it does not take them."""
    stem = name.removeprefix("benchmarks/").removesuffix(".py")
    if name in COMMANDS:
        COMMANDS[name].get_parser().parse_args(words)
    elif name == "-m pytest":
        assert all((ROOT / word).exists() for word in words if not word.startswith("-")), words
    elif name in NO_OPTIONS:
        assert (ROOT / name).is_file()
        assert words == []
    elif name == "benchmarks/gpu.py":
        gpu.get_parser().parse_args(words)
    elif name == "benchmarks/oracle.py":
        main_pcl.get_parser().parse_args(words)
    elif name == "benchmarks/resnet8.py":
        monkeypatch.setattr(resnet8._api, "BUILTIN_MODELS", {**resnet8._api.BUILTIN_MODELS})
        resnet8.register()
        COMMANDS[words[0]].get_parser().parse_args(words[1:])
    elif stem in PASS_ON:
        _, others = PASS_ON[stem].get_parser().parse_known_args(words)
        main_pcl.get_parser().parse_args(["DIR", *others])
    else:
        module = {"bench": bench, "faults": faults}[stem]
        whole = argparse.ArgumentParser.parse_args

        def parse_and_stop(*arguments):
            whole(*arguments)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(ParsedError):
            module.main()


@pytest.mark.parametrize("file", PAGES)
def test_every_call_of_python_on_a_page_parses(file, monkeypatch):
    page = (ROOT / file).read_text()
    runs = list(runs_in(page))
    assert len(runs) >= len(list(commands_in(page)))
    for name, words in runs:
        with monkeypatch.context() as patch:
            if words != ["--help"]:
                parse(name, words, patch)


@pytest.mark.parametrize(
    "line",
    [
        "python main_pcl.py DIR --no-such-option", "srun python main_pcl.py", "torchrun --nnodes 2 main_pcl.py DIR -b x",
        "while :; do python main_pcl.py DIR --resume; done", "python benchmarks/nothing.py", "python -m pcl.figures",
        "python benchmarks/demo.py --epochs 0", "python benchmarks/replicate.py --no-such-option",
        "python -m pytest tests/no.py",
        "python benchmarks/faults.py --deaths 3", "python benchmarks/resnet8.py main_pcl.py -a resnet9 DIR",
        "python benchmarks/sharded_memory.py --ranks 2", "python benchmarks/oracle.py",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["\n    {}\n", "```sh\n{}\n```\n", "in `{}`."])
def test_a_wrong_call_is_found(line, form, monkeypatch):
    ((name, words),) = runs_in(form.format(line))
    with pytest.raises((SystemExit, AssertionError, KeyError)):
        parse(name, words, monkeypatch)


def anchors_of(path):
    """Those that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", PAGES)
def test_every_target_link_and_picture_is_there(file):
    text = (ROOT / file).read_text()
    assert not re.search(r"@[A-Z0-9]+@", text)  # a figure that is still to be measured
    targets = re.findall(r"(?:^ +|`)make (\w+)", text, flags=re.MULTILINE)
    if file == "README.md":
        assert {"demo", "test", "bench"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > (10 if file == "README.md" else 0)
    for link in links:
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / file).parent / path if path else ROOT / file
            assert target.is_file(), link
            assert target.resolve().is_relative_to(ROOT), link
            assert not anchor or anchor in anchors_of(target), link


def test_every_page_and_picture_has_a_link():
    texts = [(ROOT / page).read_text() for page in PAGES]
    for page in PAGES[1:]:
        assert f"]({page}" in texts[0], page
    for picture in (ROOT / "img").glob("*.png"):
        assert any(picture.name in text for text in texts), picture


@pytest.mark.parametrize("file", PAGES)
def test_every_function_that_is_named_is_there(file):
    for name in re.findall(r"`((?:pcl\.\w+|main_pcl)\.\w+)[`(]", (ROOT / file).read_text()):
        module, _, attribute = name.rpartition(".")
        if attribute != "py":
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("file", PAGES)
def test_every_python_example_compiles(file):
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text(), flags=re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 160


def test_the_readme_has_a_row_for_every_file():
    cells = re.findall(r"^\| ((?:`[\w/]+\.py`(?:, )?)+) \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    rows = re.findall(r"`([^`]+)`", " ".join(cells))
    files = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("pcl/**/*.py")]}
    assert sorted(rows) == sorted(file for file in files if not file.endswith("__init__.py"))


@pytest.mark.parametrize("word", ["words", "edges"])
def test_the_examples_of_other_data_run(word):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "questions.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if f"\n{word} = " in block)
    names = {}
    exec(compile(example, "docs/questions.md", "exec"), names)
    assert names["loss"].isfinite()
    assert 0 <= float(names["accuracy"]) <= 1
