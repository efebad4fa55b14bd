"""Which prototype channel gives each channel its gate."""

import torch
from torch import Tensor, nn


class ChannelMap(nn.Module):
    """The mapping pi of DeepShare eq. 3: channel c takes the gate of prototype channel pi[c].

    Prototypes are the first P channels (DeepShare 3.2). A module without parameters, so that the map follows
    `.to(device)` and stands in checkpoints.

    Attributes:
        pi: int32 [C], 0 <= pi[c] < P.
        members: int32 [C], the channels sorted by prototype (stable).
        offsets: int32 [P+1], where each prototype's channels begin in members.
        channels, prototypes: C and P.

    Raises:
        TypeError: pi is not a one-dimensional integer tensor.
        ValueError: P is not in 1..C, or a value of pi is not in 0..P-1 (not checked on the meta device); when loading,
            pi maps to another number of prototypes than P.
    """

    pi: Tensor
    members: Tensor
    offsets: Tensor

    def __init__(self, pi: Tensor, prototypes: int) -> None:
        super().__init__()
        _validate(pi, prototypes)
        self.channels = pi.numel()
        self.prototypes = prototypes
        self.register_buffer("pi", pi.detach().to(torch.int32).clone())
        members, offsets = _inverse(self.pi, prototypes)
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)

    @classmethod
    def balanced(cls, channels: int, prototypes: int) -> "ChannelMap":
        """pi[c] = c mod P: "a naive balanced way" (DeepShare 3.2); a prototype maps to itself."""
        _check_prototypes(channels, prototypes)
        return cls(torch.arange(channels, dtype=torch.int32) % prototypes, prototypes)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, prototypes={self.prototypes}"

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:  # type: ignore[no-untyped-def]
        incoming = state_dict.get(prefix + "pi")
        if incoming is not None:
            if incoming.shape != self.pi.shape:
                raise ValueError(
                    f"ChannelMap: pi must have {self.channels} channels (got {list(incoming.shape)} for {prefix}pi)"
                )
            _validate(incoming, self.prototypes)
            self._check_prototypes_of(incoming)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if incoming is not None:
            self.pi = self.pi.to(torch.int32)  # assign=True takes the incoming tensor, whatever integers it has
            members, offsets = _inverse(self.pi, self.prototypes)
            if self.members.device == members.device:
                self.members.copy_(members)
                self.offsets.copy_(offsets)
            else:  # assign=True has filled a module that was on the meta device
                self.members, self.offsets = members, offsets

    def _check_prototypes_of(self, pi: Tensor) -> None:
        """A map of another P fits in shape, and would be paid and counted as this one: refuse it.

        A map that never uses its last prototypes loads into one like it.
        """
        if pi.is_meta:
            return
        found = int(pi.max()) + 1
        own = self.prototypes if self.pi.is_meta else int(self.pi.max()) + 1
        if found not in (self.prototypes, own):
            raise ValueError(f"ChannelMap: pi must be a map to {self.prototypes} prototypes (got one to {found})")


def _check_prototypes(channels: int, prototypes: int) -> None:
    if isinstance(prototypes, bool) or not isinstance(prototypes, int) or not 1 <= prototypes <= channels:
        raise ValueError(f"ChannelMap: prototypes must be an int in 1..{channels} (got {prototypes!r})")


def _validate(pi: Tensor, prototypes: int) -> None:
    integers = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
    if not isinstance(pi, Tensor) or pi.dim() != 1 or pi.dtype not in integers:
        got = f"{pi.dtype} {list(pi.shape)}" if isinstance(pi, Tensor) else type(pi).__name__
        raise TypeError(f"ChannelMap: pi must be an integer tensor [C] (got {got})")
    _check_prototypes(pi.numel(), prototypes)
    if pi.is_meta:
        return
    low, high = int(pi.min()), int(pi.max())
    if low < 0 or high >= prototypes:
        raise ValueError(f"ChannelMap: pi must have values in 0..{prototypes - 1} (got {low}..{high})")


def _inverse(pi: Tensor, prototypes: int) -> tuple[Tensor, Tensor]:
    """(members, offsets) of pi, on pi's device."""
    if pi.is_meta:  # bincount does not run there
        return pi.new_empty(pi.shape, dtype=torch.int32), pi.new_empty(prototypes + 1, dtype=torch.int32)
    members = torch.argsort(pi, stable=True).to(torch.int32)
    counts = torch.bincount(pi.long(), minlength=prototypes)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return members, offsets
