"""One gate solves the 2x2 checkerboard (DeepShare, section 5, eq. 4): python examples/xor.py

    f(x1, x2) = x2 * (-2 DReLU(x1) + 1) = -sign(x1) x2, positive where the signs differ

The replicate x2 takes the gate of the prototype x1. `deepshare xor` trains such networks beside ones that cannot.
"""

import torch

from deepshare import SharedReLU2d

act = SharedReLU2d(channels=2, prototypes=1)
with torch.no_grad():
    act.alpha[1], act.beta[1] = -2.0, 1.0
    line = torch.arange(-0.95, 1, 0.1)
    points = torch.cartesian_prod(line, line)  # [400, 2]
    f = act(points.reshape(-1, 2, 1, 1))[:, 1, 0, 0]

right = (f > 0) == (points[:, 0].sign() != points[:, 1].sign())
for row in (f > 0).reshape(20, 20)[::2, ::2]:
    print(" ".join("#" if label else "." for label in row))
print(f"{int(right.sum())} of {len(points)} points are right, with one gate")
