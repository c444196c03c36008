"""A mixture of experts, compiled: its shared experts are found, run on a lane, captured for up to two and up to eight
rows, and proved. Without a GPU a simulated machine replays the graphs. Change the options, run again:

A  overlap="*=off,layers.1.shared=on"    only the second layer overlaps; "*=off" is one stream
B  overlap=""                            on a GPU: what is measured to pay
C  fusion_safe="layers.*.shared=auto"    branches on lanes get fused kernels too, if the proof holds: one more kernel
"""

import torch
from moe import HIDDEN, Model

import auxstream

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model, example = Model().to(device).eval(), torch.randn(8, HIDDEN, device=device)
options = auxstream.Options(buckets=(2, 8), overlap="*=off,layers.*.shared=on")
fast = auxstream.compile(model, example, options, name="moe")

print(fast, *fast.regions, fast.fusion, *fast.padding, fast.memory, fast.report, sep="\n")
near = 0
for rows in range(1, 9):  # each runs the smallest bucket that holds it: 1 is padded to 2, 3 to 8
    x = torch.randn(rows, HIDDEN, device=device)
    with torch.no_grad():
        near += torch.allclose(fast(x), model(x), atol=1e-4)
print(f"{near} of 8 outputs near eager's")
raise SystemExit(near != 8)
