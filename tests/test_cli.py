from argparse import ArgumentTypeError, Namespace

import numpy as np
import pytest
from conftest import GOLDEN

from pcl import cli
from pcl.checkpoint import CheckpointError


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v1", {"lr": 0.03, "schedule": [120, 160], "epochs": 200, "cos": False}),
        ("v2", {"lr": 0.03, "schedule": [120, 160], "epochs": 200, "cos": True}),
        ("linear", {"lr": 5, "schedule": [60, 80], "epochs": 100}),  # this script has no --cos
    ],
)
def test_learning_rates_are_the_published_ones(name, options):
    with np.load(GOLDEN / "learning_rate.npz") as golden:
        ours = [cli.learning_rate(Namespace(**options), epoch) for epoch in range(options["epochs"])]
        np.testing.assert_allclose(ours, golden[name], rtol=1e-5, atol=1e-12)


def test_numbers_are_read_or_refused():
    assert cli.integers("25000,50000") == [25000, 50000]
    for wrong in ("", "a", "3,,4", "3.5", "0", "-2", "5,5"):
        with pytest.raises(ArgumentTypeError):
            cli.integers(wrong)
    assert (cli.natural("0"), cli.positive("1"), cli.fraction("1"), cli.nonnegative_float("0")) == (0, 1, 1.0, 0.0)
    for kind, wrong in (
        (cli.natural, "-1"), (cli.positive, "0"), (cli.positive_float, "0"), (cli.positive_float, "nan"),
        (cli.positive_float, "inf"), (cli.nonnegative_float, "-1"), (cli.fraction, "1.1"), (cli.fraction, "x"),
    ):  # fmt: skip
        with pytest.raises(ArgumentTypeError, match=wrong):
            kind(wrong)


def test_a_random_backbone_may_have_a_small_stem():
    parser = cli.Parser("text")
    cli.add_backbone_arguments(parser)

    def opened(*options):
        return cli.open_backbone(parser.parse_args(["--small-stem", *options]))[0]

    assert opened("--random-init", "-a", "resnet18").conv1.kernel_size == (3, 3)
    with pytest.raises(CheckpointError, match="a file tells by itself"):
        opened("--pretrained", "c.pth.tar")
    with pytest.raises(CheckpointError, match="shufflenet_v2_x0_5 does not begin with"):
        opened("--random-init", "-a", "shufflenet_v2_x0_5")


def test_an_error_is_one_line_and_exit_code_2(capsys):
    parser = cli.Parser("text")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--unknown"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_batches_are_totals_over_a_node():
    args = Namespace(batch_size=256, nproc=4, gpu=None, world_size=3)
    assert cli.global_batch(args) == 768
