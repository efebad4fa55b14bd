"""A party of CrypTen's private ReLU. Provider TFP: party 0 makes every triple, within the time measured."""

import os
from typing import Any

import relu_party
import torch

from deepshare.secure.baseline.crypten_import import load_crypten


def main() -> None:
    options = relu_party.arguments()
    os.environ |= {"RANK": str(options.rank), "WORLD_SIZE": "2", "DISTRIBUTED_BACKEND": "gloo"}
    os.environ |= {"RENDEZVOUS": f"file://{options.folder}/rendezvous", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    crypten = load_crypten()
    crypten.init()
    communicator = crypten.communicator.get()
    shared = crypten.cryptensor(torch.from_numpy(relu_party.inputs(options.elements)), src=0)
    results: list[Any] = []

    def operation() -> None:
        results[:] = [shared.relu()]

    measured = relu_party.timed(options, operation, communicator.barrier)
    before = communicator.get_communication_stats()
    operation()
    after = communicator.get_communication_stats()
    measured["rounds"] = after["rounds"] - before["rounds"]
    measured["counted_bytes"] = after["bytes"] - before["bytes"]  # sent and received: both ways
    opened = results[0]._tensor.reveal().double() / 2**16  # not get_plain_text: its decoder is off for some values
    relu_party.finish(options, measured, opened.numpy(), ("crypten", "torch"))
    crypten.uninit()


if __name__ == "__main__":
    main()
