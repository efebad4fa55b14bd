"""The third process of provider TTP: CrypTen's trusted third party, which makes the triples and sees no opening.

It shares a seed with each party, so that all of a triple but party 0's share of the product comes from seeds. CrypTen's
own loop (`TTPServer.__init__`) takes a broken connection for the end of work; here it is an error.
"""

from collections.abc import Callable
from types import ModuleType


def serve(crypten: ModuleType, on_request: Callable[[], None]) -> int:
    """Answers party 0's requests until it says that it is done; returns their number.

    Each request names an operation and two shapes; the answer is party 0's correction, 8 bytes an element.
    """
    crypten.init()
    communicator = crypten.communicator.get()
    server_class = crypten.mpc.provider.ttp_provider.TTPServer
    server = object.__new__(server_class)  # its __init__ is the loop
    server.ttp_group, server.comm_group, server.device = communicator.ttp_group, communicator.ttp_comm_group, "cpu"
    server._setup_generators()
    served = 0
    while (request := communicator.recv_obj(0, server.ttp_group)) != "terminate":
        server.device = request["device"]
        made = getattr(server, request["function"])(*request["args"], **request["kwargs"])
        communicator.send_obj(made.size(), 0, server.ttp_group)
        communicator.broadcast(made, communicator.get_ttp_rank(), server.comm_group)
        served += 1
        on_request()
    return served
