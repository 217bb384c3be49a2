"""Set before jax is imported: four devices on the CPU for SPMD, and a folder of this run for compiled programs."""

from __future__ import annotations

import os
import tempfile

os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="hal-jax-"))
