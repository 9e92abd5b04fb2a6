"""Tests on a GPU. In a dry run (``make gpu DRY=1``) those that can run on the CPU do, so that they
are known to work before a GPU is at hand.
"""

import os

import pytest

DRY = os.environ.get("FLOWKERNELS_GPU_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"

needs_cuda = pytest.mark.skipif(DRY, reason="dry run: streams, graphs and CUDA C++ are a GPU's")
