"""A party of MPyC's private ReLU: Shamir shares, fixed point of 32 bits, 16 of them fractional.

MPyC needs an honest majority: two parties have threshold 0, which hides nothing. The smallest private setting is three.
"""

import sys
from typing import Any

import relu_party

OPTIONS = relu_party.arguments()
HOSTS = [f"-P127.0.0.1:{OPTIONS.port + rank}" for rank in range(OPTIONS.parties)]
sys.argv = [sys.argv[0], *HOSTS, f"-I{OPTIONS.rank}", "--no-log"]  # MPyC reads its settings from here when imported

from mpyc.runtime import mpc  # noqa: E402


async def prepared() -> Any:
    fixed = mpc.SecFxp(32, 16)
    x = relu_party.inputs(OPTIONS.elements)
    return mpc.input(fixed.array(x), senders=0)


def main() -> None:
    mpc.run(mpc.start())
    shared = mpc.run(prepared())
    results: list[Any] = []

    async def relu() -> None:
        results[:] = [mpc.np_maximum(shared, 0)]
        await mpc.gather(results[0])

    def barrier() -> None:
        mpc.run(mpc.barrier())

    measured = relu_party.timed(OPTIONS, lambda: mpc.run(relu()), barrier)
    opened = mpc.run(mpc.output(results[0]))
    measured["threshold"] = mpc.threshold
    relu_party.finish(OPTIONS, measured, opened, ("mpyc", "numpy", "gmpy2"))
    mpc.run(mpc.shutdown())


if __name__ == "__main__":
    main()
