"""Device functions of generated kernels (written `dm` there), for the GPU or for Triton's interpreter.

Which of the two this module holds is decided when triton is imported (TRITON_INTERPRET), as Triton decides it.
"""

# pyright: basic
from __future__ import annotations

from triton import knobs

if knobs.runtime.interpret:
    from .interpreter_math import *  # noqa: F403
else:
    from .gpu_math import *  # noqa: F403
