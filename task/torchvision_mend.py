"""Let torchvision import beside a CPU build of torch whose binary operators it lacks."""

import importlib
import sys

import torch

_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def mend_torchvision() -> bool:
    """Declare the operators whose absence keeps torchvision from importing.

    A torchvision wheel built for CUDA finds no ``torchvision::nms`` beside a CPU build of torch and
    fails on import, and timm with it. Declaring the operators' signatures is enough for models,
    transforms and data sets; calling ``nms`` itself still raises. An install that imports is left
    as it is. Must run before timm is imported, in every process.

    Returns
    -------
    bool
        True if the mend was needed, False if torchvision imports as it is.

    Raises
    ------
    RuntimeError
        If torchvision fails for any other reason.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return False
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    for name, signature in _OPERATORS.items():
        torch.library.define(f"torchvision::{name}", signature)
    importlib.import_module("torchvision")
    return True
