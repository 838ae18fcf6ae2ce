"""Nothing here loads from a hub: what tries fails at once instead of waiting for a network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))  # test modules share tests/tiny.py and tests/helpers.py

import pytest
import torch

if torch.cuda.is_available():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else its products are refused where outputs are poisoned
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which other libraries may do


@pytest.fixture(autouse=True)
def _few_threads():
    """Tiny tensors gain nothing from threads, and lose much when several test processes share the cores."""
    torch.set_num_threads(1)
