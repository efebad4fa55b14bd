"""A party of SPU's private ReLU, protocol SEMI2K or CHEETAH, 64-bit ring, 16 fractional bits. Its numpy is 1.26."""

import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import relu_party
import spu
import spu.utils.frontend as frontend
from spu import libspu


def compiled(x: np.ndarray) -> Any:
    """The executable of max(x, 0), and the shape of its result."""
    return frontend.compile(
        frontend.Kind.JAX,
        lambda x: jnp.maximum(x, 0.0),
        (x,),
        {},
        ["x"],
        [libspu.Visibility.VIS_SECRET],
        lambda outputs: ["y"] if not isinstance(outputs, list) else [f"y{i}" for i in range(len(outputs))],
    )


def connected(options: Any) -> Any:
    description = libspu.link.Desc()
    description.recv_timeout_ms = 600_000
    for rank in range(2):
        description.add_party(f"party{rank}", f"127.0.0.1:{options.port + rank}")
    return libspu.link.create_brpc(description, options.rank)


def own_share(options: Any, link: Any, io: Any, x: np.ndarray) -> Any:
    """Party 0 shares the inputs and sends party 1 its share."""
    if options.rank == 0:
        shares = io.make_shares(x, libspu.Visibility.VIS_SECRET, 0)
        link.send(1, pickle.dumps(shares[1]).hex())
        return shares[0]
    return unpacked(link.recv(0))


def unpacked(message: bytes | str) -> Any:
    """What the other party of this run sent: `recv` returns bytes, `all_gather` text."""
    return pickle.loads(bytes.fromhex(message if isinstance(message, str) else message.decode()))


def main() -> None:
    options = relu_party.arguments()
    x = relu_party.inputs(options.elements).astype(np.float32)
    config = libspu.RuntimeConfig(
        protocol=getattr(libspu.ProtocolKind, options.setting), field=libspu.FieldType.FM64, fxp_fraction_bits=16
    )
    link = connected(options)
    io, runtime = spu.Io(2, config), spu.Runtime(link, config)
    executable, _ = compiled(x)
    runtime.set_var(executable.input_names[0], own_share(options, link, io, x))
    measured = relu_party.timed(options, lambda: runtime.run(executable), link.barrier)
    share = runtime.get_var(executable.output_names[0])
    shares = [unpacked(part) for part in link.all_gather(pickle.dumps(share).hex())]
    relu_party.finish(options, measured, io.reconstruct(shares), ("spu", "numpy"))
    link.stop_link()


if __name__ == "__main__":
    main()
