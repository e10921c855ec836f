"""DeepSpeed picks its device from the environment when it is first imported."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
