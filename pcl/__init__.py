"""Prototypical Contrastive Learning (Li, Zhou, Xiong, Hoi; ICLR 2021): the parts that the scripts use.

`pcl.clustering` (k-means, concentration) and `pcl.losses` (InfoNCE, ProtoNCE) work on plain tensors of any origin.
"""

import os as _os

if _os.name != "posix":
    raise SystemExit("pcl needs Linux, macOS or, on Windows, WSL (https://learn.microsoft.com/windows/wsl)")

__version__ = "0.1.0"
