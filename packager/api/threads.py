"""How threads that score wait for each other."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Have threads of OpenMP, which PyTorch computes with, sleep when they wait instead of spinning.

    Spinning wins a little on an idle machine and loses most of it beside a busy neighbour, who then runs in place of
    the thread that all others spin for. OpenMP reads the variable when it is loaded: call this before torch is
    imported. What the user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
