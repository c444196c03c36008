"""The same model through torch.compile: an installed auxstream is found by name. `options` are those of
`auxstream.Options`, or a file and what comes on top of it: {"config": "examples/gemma4_moe.yaml", "verify": "warn"}.
"""

import logging

import torch
from moe import HIDDEN, Model

logging.basicConfig()
logging.getLogger("auxstream").setLevel("INFO")  # a line for each graph that is compiled

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = Model().to(device).eval()
fast = torch.compile(model, backend="auxstream", dynamic=False, options={"overlap": "*=off,layers.*.shared=on"})
near = 0
with torch.inference_mode():
    for _ in range(5):
        x = torch.randn(4, HIDDEN, device=device)
        near += torch.allclose(fast(x), model(x), atol=1e-4)
print(f"{near} of 5 outputs near eager's")
raise SystemExit(near != 5)
