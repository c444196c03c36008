"""A branch that may read a block after it was reused. Nothing raises, and some replays are right:

    python examples/verify_me.py               how many of 100 replays were right, this time
    auxstream verify examples/verify_me.py     what is wrong, where, and which edge is missing

The mistake: `fork` is not told that the branch reads `h`, so the block is free while the branch may still read it.
Write `fork("aux", h)`, leave `verify="off"` out, and it is proved. `off` spares a production start the proof; the
command finds the race all the same.
"""

import torch

import auxstream

device = "cuda" if torch.cuda.is_available() else "cpu"


def step(x: torch.Tensor) -> torch.Tensor:
    h = x * 2
    region = auxstream.fork("aux")
    with region:  # an auxiliary stream
        s = region.returns(h * 3)
    del h  # its block is free again
    z = x + 5  # and this takes it
    region.join()
    return z + s


x = torch.zeros(1 << 16, device=device)
step(x)  # on a GPU it loads what a capture may not
with auxstream.graph("step", verify="off") as g:
    out = step(x)
right = 0
for k in range(100):
    x.fill_(k)
    g.replay()
    right += torch.equal(out, x + 5 + x * 2 * 3)
print(f"{right} of 100 replays were right")
