"""Runs the CUDA and Triton kernels on random cases, without checking values: what compute-sanitizer watches.

Inputs are made on the CPU and copied: uninitialised reads can only come from the kernels. The tests check values.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from operator_cases import inputs, random_case, run  # noqa: E402

CASES = 60


def main() -> None:
    from deepshare.raw_ops import backends

    for backend in ("cuda", "triton"):
        reason = backends()[backend]
        if reason is not None:
            print(f"{backend}: not run: {reason}")
            continue
        for number in range(CASES):
            case = random_case(number)
            run(case, inputs(case, "cuda"), backend)
        torch.cuda.synchronize()
        print(f"{backend}: {CASES} cases run")


if __name__ == "__main__":
    main()
