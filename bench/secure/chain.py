"""How many bytes stand one after another on the wire between the client's image and its logits."""

from deepshare.secure.engine import costs
from deepshare.secure.engine.protocol import Protocol


def path_bytes(protocol: Protocol) -> int:
    """Bytes of the longest chain of messages, a direction of the link carrying one message at a time.

    More than the busier party sends where messages go one way in turns, as with secret weights: the client's to a
    linear layer, then the server's half of an opening. What both send at once counts once. `costs.flights` in bytes.
    """
    server = client = 0.0  # when each has what it needs to go on
    to_server = to_client = 0.0  # when each direction is free
    for cost in costs.predict(protocol):
        for _ in range(cost.rounds):
            from_server, from_client = cost.server_sends / cost.rounds, cost.client_sends / cost.rounds
            if from_server:
                to_client = max(to_client, server) + from_server
            if from_client:
                to_server = max(to_server, client) + from_client
            server, client = max(server, to_server), max(client, to_client)
    return round(client)
