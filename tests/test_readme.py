import re
import shlex

import pytest
from conftest import ROOT

import eval_cls_imagenet
import eval_svm_voc
import main_pcl
from pcl import export, figures, samples

COMMANDS = {
    "main_pcl.py": main_pcl,
    "eval_svm_voc.py": eval_svm_voc,
    "eval_cls_imagenet.py": eval_cls_imagenet,
    "-m pcl.checkpoint": export,
    "-m pcl.figures": figures,
    "-m pcl.samples": samples,
}
SCRIPTS = [name for name in COMMANDS if name.endswith(".py")]
TEXTS = ["README.md", *SCRIPTS, *(f"pcl/{name}.py" for name in ("checkpoint", "figures", "samples"))]


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
    for name in COMMANDS if file == "README.md" else [file.removeprefix("pcl/").removesuffix(".py")]:
        assert any(name in found for found in names), f"{file} shows no command of {name}"


def test_every_target_link_and_picture_of_the_readme_is_there():
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"@[A-Z0-9]+@", text)  # a figure that is still to be measured
    targets = re.findall(r"(?:^ +|`)make (\w+)", text, flags=re.MULTILINE)
    assert {"demo", "test", "bench"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or link.removeprefix("#") in anchors or (ROOT / link).is_file(), link
