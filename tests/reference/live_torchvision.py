"""torchvision's `transforms`, also beside a PyTorch that torchvision was not built for."""

import sys

import torch

try:
    from torchvision import models, transforms
except RuntimeError:
    # While it is imported torchvision describes two operators of its compiled part, which does not
    # load beside another build of PyTorch (a CPU build, and the registry's torchvision). The
    # transforms use neither operator, so it is enough that their names are known.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    NAMES = torch.library.Library("torchvision", "DEF")  # lives as long as this module
    for name in ("nms", "qnms"):
        NAMES.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        from torchvision import models, transforms
    except RuntimeError as error:
        raise ImportError(f"torchvision does not work with this PyTorch: {error}") from error

functional = transforms.functional

__all__ = ["functional", "models", "torch", "transforms"]
