import re
import shlex

import pytest
from conftest import ROOT

import eval_cls_imagenet
import eval_svm_voc
import main_pcl

SCRIPTS = {"main_pcl.py": main_pcl, "eval_svm_voc.py": eval_svm_voc, "eval_cls_imagenet.py": eval_cls_imagenet}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("file", ["README.md", "script"])
def test_every_command_that_is_shown_parses(name, file):
    text = re.sub(r"\\+\n *", "", (ROOT / (name if file == "script" else file)).read_text())
    commands = re.findall(rf"^ +(?:python|torchrun .*?) {re.escape(name)} (.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command.split("   ")[0])  # what follows is a remark
        if words != ["--help"]:
            SCRIPTS[name].get_parser().parse_args(words)
