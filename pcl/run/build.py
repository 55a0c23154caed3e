"""The models and views that the options of pre-training describe."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from pcl import checkpoint, networks
from pcl.augment import Augmentation
from pcl.builder import MoCo, split_batch_norm
from pcl.run.logs import log
from pcl.run.preflight import Plan


def make_model(args: argparse.Namespace) -> MoCo:
    """The model that the options describe, with random weights."""
    encoder = partial(networks.new_network, args.arch, args.small_stem)
    model = MoCo(encoder, args.low_dim, args.pcl_r, args.moco_m, args.mlp)
    if args.bn_splits > 1:
        split_batch_norm(model, args.bn_splits)
    return model


def start_model(args: argparse.Namespace, plan: Plan) -> MoCo:
    """`make_model`, for a new run with the weights of --init; its encoders are compiled if --compile asks for it."""
    model = make_model(args)
    if args.init and not plan.resume and not checkpoint.load_init(args.init, model, args.arch):
        log(f"note: --init {args.init}: its head does not fit --low-dim and --mlp; the head begins with random weights")
    for encoder in (model.encoder_q, model.encoder_k) if args.compile else ():
        # In place: no name changes. Not dynamic: the E-step's batch would make sizes symbolic, and training's kernels slow.
        encoder.compile(fullgraph=True, dynamic=False)
    return model


def augmentation_of(args: argparse.Namespace) -> Augmentation:
    """The views that the options describe."""
    return Augmentation(args.image_size, args.aug_plus, on_device=args.augment_on == "device")


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Inside, the encoders give features in bfloat16 if --amp asks for it; weights and all that follows stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")
