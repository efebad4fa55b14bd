"""The two parties of the engine: what each knows (docs/engine.md). What they do with it stands in inference.py."""

import torch
from torch import Tensor

from deepshare.channel_map import ChannelMap
from deepshare.ring import PackedWeight
from deepshare.secure.engine.inference import Inference
from deepshare.secure.engine.link import Link
from deepshare.secure.engine.material import Material
from deepshare.secure.engine.protocol import CLIENT, SERVER, Protocol
from deepshare.secure.engine.ring import packed, weight_role
from deepshare.secure.engine.streams import Stream
from deepshare.secure.engine.ticket import Ticket
from deepshare.secure.errors import SecureError
from deepshare.secure.program import Step


class Party:
    """One party with what it knows of the weights; serves any number of inferences, one ticket each.

    Attributes:
        rank: 0, the server, or 1, the client.
        protocol: the other party's, and the dealer's, must be equal to it.
    """

    rank: int

    def __init__(self, protocol: Protocol, known: dict[str, Tensor], masked: dict[str, Tensor], device: str) -> None:
        self.protocol = protocol
        self.device = torch.device(device)
        self._known = _on(self.device, _named("public weights", known, protocol.known_params()))
        self._masked = _on(self.device, _named("masked weights", masked, list(protocol.masked_params())))
        self._operators: dict[str, PackedWeight | Tensor] = {}
        self._maps = {
            index: _channel_map(protocol, step).to(self.device)
            for index, step in enumerate(protocol.program.steps)
            if step.op in ("relu", "shared", "mask", "select")
        }

    def prepare(self, ticket: Ticket, link: Link) -> "Inference":
        """Does everything that does not depend on the input; the ticket is used up.

        Raises:
            SecureError: the ticket was made for another protocol or party, or its body has another length.
        """
        return Inference(self, Material(ticket, self.protocol, self.rank), link)

    def param(self, step: Step, role: str) -> Tensor:
        """A weight this party knows in the clear."""
        return self._known[step.params[role]]

    def operator(self, step: Step) -> PackedWeight | Tensor:
        """A linear step's weight as this party uses it: W where it knows it, else F; packed at the first use."""
        key = step.params[weight_role(step)]
        if key not in self._operators:
            known = self.rank == SERVER or key in self._known
            weight = self.param(step, weight_role(step)) if known else self.masked(step, weight_role(step))
            self._operators[key] = packed(step, weight)
        return self._operators[key]

    def masked(self, step: Step, role: str) -> Tensor:
        """F = W - B of a weight that is the server's secret."""
        return self._masked[step.params[role]]

    def channel_map(self, step: int) -> ChannelMap:
        """pi of a gated step."""
        return self._maps[step]

    def own_affine(self, step: Step, role: str) -> Tensor:
        """This party's share of alpha or beta, [C]: the server's is the whole, the client's 0."""
        raise NotImplementedError


class Server(Party):
    """Party 0: has the model.

    Args:
        tensors: every weight of the program, integers.
        mask_key: of the stream of the weight masks, from the dealer, one a model version; None: no weight is secret.
    """

    rank = SERVER

    def __init__(
        self, protocol: Protocol, tensors: dict[str, Tensor], mask_key: bytes | None, *, device: str = "cpu"
    ) -> None:
        masked = mask_weights(protocol, tensors, mask_key)
        super().__init__(protocol, {key: tensors[key] for key in protocol.known_params()}, masked, device)
        self._tensors = _on(self.device, tensors)

    def masked_weights(self) -> dict[str, Tensor]:
        """What the client is given, once a model version: secret weights under their masks, public ones as they are."""
        return {key: value.cpu() for key, value in (self._known | self._masked).items()}

    def param(self, step: Step, role: str) -> Tensor:
        return self._tensors[step.params[role]]

    def own_affine(self, step: Step, role: str) -> Tensor:
        return self.param(step, role).reshape(-1)


class Client(Party):
    """Party 1: has the images, learns the logits. `given` is what `Server.masked_weights` returned."""

    rank = CLIENT

    def __init__(self, protocol: Protocol, given: dict[str, Tensor], *, device: str = "cpu") -> None:
        known, masked = protocol.known_params(), protocol.masked_params()
        public = {key: given[key] for key in known if key in given}
        super().__init__(protocol, public, {key: given[key] for key in masked if key in given}, device)

    def own_affine(self, step: Step, role: str) -> Tensor:
        channels = self.protocol.program.params[step.params[role]].shape[0]
        return torch.zeros(channels, dtype=torch.int64, device=self.device)


def mask_weights(protocol: Protocol, tensors: dict[str, Tensor], mask_key: bytes | None) -> dict[str, Tensor]:
    """F = W - B of every weight that stays the server's, B from the stream of `mask_key`.

    Raises:
        SecureError: there are secret weights and no key.
    """
    secret = protocol.masked_params()
    if secret and mask_key is None:
        raise SecureError("secure: secret weights need the dealer's key of their masks (got None)")
    if not secret:
        return {}
    stream = Stream(mask_key or b"")
    return {key: tensors[key] - stream.words(number, tuple(tensors[key].shape)) for key, number in secret.items()}


def _named(what: str, tensors: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise SecureError(f"secure: {what} must hold {', '.join(missing)} (got {len(tensors)} tensors without them)")
    return tensors


def _on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in tensors.items()}


def _channel_map(protocol: Protocol, step: Step) -> ChannelMap:
    """pi of a shared or select step; of a ReLU the identity, of a mask's kept elements one channel."""
    if step.gates is not None:
        return ChannelMap(protocol.program.public[step.public["pi"]], step.gates[1])
    channels = step.shape[0] if step.op == "relu" else 1
    return ChannelMap.balanced(channels, channels)
