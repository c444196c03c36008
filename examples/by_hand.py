"""Two branches side by side, by hand. Without a GPU, a simulated machine replays the graph. Change a line, run again:

A  delete the line         a warning that nobody waited for 'shared_expert', then the capture refuses the sum
B  delete `, h`            a warning names the undeclared read; the read is made safe, and the numbers stay equal
"""

import torch
from torch import nn

import auxstream

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
experts, mlp = (nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)).to(device) for _ in range(2))


def block(x: torch.Tensor, overlap: bool) -> torch.Tensor:
    h = nn.functional.layer_norm(x, x.shape[-1:])
    if not overlap:
        return x + (experts(h) + mlp(h))
    region = auxstream.fork("shared_expert", h)  # B: the branch may start here, and reads h
    routed = experts(h)  # the caller's stream
    with region:  # an auxiliary stream
        shared = region.returns(mlp(h))
    region.join()  # A: the caller's stream waits; the host does not
    return x + (routed + shared)


with torch.no_grad():
    x = torch.randn(4, 256, device=device)
    block(x, overlap=True)  # eager; on a GPU it also loads what a capture may not
    with auxstream.graph("by_hand") as g:
        out = block(x, overlap=True)
    equal = 0
    for _ in range(100):
        x.normal_()
        g.replay()
        equal += torch.equal(out, block(x, overlap=False))
print(f"regions {list(g.regions)} on {device}: {equal} of 100 replays equal serial, bit for bit\n{g.report}")
raise SystemExit(equal != 100)
