"""Lets torchvision, built for CUDA, load beside a torch for CPUs.

Its library of operators cannot load there, and its Python code asks for two of them while it is imported. Here they are
declared, without being implemented; what image processors use of torchvision needs neither. Every process of the
environment finds this through the `.pth` file beside it.
"""

import importlib.abc
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing itself; it acts right before torchvision is found."""

    library = None

    def find_spec(self, name, path=None, target=None):
        """Called for every module that is imported."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and torch.version.hip is None:
                DeclareOperators.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators())
