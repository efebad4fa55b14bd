"""Runs of the engine held against its two references: the replay bit for bit, the emulation up to truncation."""

from dataclasses import dataclass, field

import torch
from engine_cases import Ran, Setup, infer
from torch import Tensor

from deepshare.secure.emulate import compared, emulate, gate_makers
from deepshare.secure.engine.protocol import Compare
from deepshare.secure.exactness import check_locally, flips, run_gates
from deepshare.secure.fixed_point import encode
from deepshare.secure.replay import Replayed, replay

# What truncations, each off by less than one LSB, may add up to where the gates are the same: 2^-9. Worst-case bounds
# grow to 2^37 LSB within the demo's network; the largest seen is in docs/exactness.md, 101 (all-ReLU ResNet18).
CLOSE = 128


@dataclass
class Tally:
    """What was compared, over all inferences; gates that differ from the emulation's by |x| in LSB."""

    inferences: int = 0
    gates: int = 0
    flips: list[int] = field(default_factory=list)
    flips_alone: list[int] = field(default_factory=list)  # with the run's gates followed: what truncation itself flips
    largest: int = 0  # difference of any step to the emulation that follows the run's gates, LSB
    argmax_equal: int = 0

    def __str__(self) -> str:
        alone = f"{len(self.flips_alone)} alone, at {max(self.flips_alone, default=0)} LSB at most"
        return (
            f"{self.inferences} inferences: {len(self.flips)} of {self.gates} gates flipped ({alone}), gates followed "
            f"{self.largest} LSB off at most, argmax equal {self.argmax_equal}"
        )


def opened_gates(ran: Ran) -> dict[int, Tensor]:
    """The gates as the parties have them, z xor r, bool, by the step that compares."""
    found = {}
    protocol = ran.client.protocol
    for action in protocol.actions:
        if isinstance(action, Compare):
            z = ran.client._gates[action.flip.number].unpack().to(torch.int64)
            r = ran.server._flips[action.flip.number] + ran.client._flips[action.flip.number]
            assert bool(((r == 0) | (r == 1)).all())
            kept = protocol.program.steps[action.step].op == "mask"
            found[action.step] = ((z ^ r).squeeze(1) if kept else z ^ r).to(torch.bool)
    return found


def values_of(ran: Ran) -> list[Tensor]:
    """Every step's value; the last one's as the client learns it."""
    steps = len(ran.client.protocol.program.steps)
    return [*(ran.server.values[index] + ran.client.values[index] for index in range(steps - 1)), ran.logits]


def assert_is_the_replay(ran: Ran, reference: Replayed) -> None:
    """Both parties' shares of every step, and the logits, bit for bit."""
    assert torch.equal(ran.logits, reference.logits)
    for index, shares in enumerate(reference.shares):
        for inference, share in zip((ran.server, ran.client), shares, strict=True):
            step = ran.client.protocol.program.steps[index]
            assert torch.equal(inference.values[index], share), f"party {inference.rank}, step {step.name}"


def assert_is_the_emulation(parties: Setup, ran: Ran, images: Tensor, tally: Tally) -> None:
    """Every step within its truncation of what its inputs give, gates exactly; end to end within CLOSE.

    A gate that differs from the emulation's is explained if x is that close to 0 there, or if an earlier gate of the
    same image differed.
    """
    program, bits = parties.protocol.program, parties.protocol.settings.gate_bits
    values, gates = values_of(ran), opened_gates(ran)
    assert set(gates) == set(gate_makers(program))
    assert check_locally(program, parties.tensors, values, gates=gates, gate_bits=bits) == ()
    implied = run_gates(program, values)
    assert all(torch.equal(gates[index], implied[index]) for index in gates)
    followed = emulate(program, parties.tensors, images, keep=True, gates=gates).values
    plain = emulate(program, parties.tensors, images, keep=True).values
    assert followed is not None
    assert plain is not None
    for value, wanted in zip(values, followed, strict=True):
        tally.largest = max(tally.largest, int((value - wanted).abs().max()))
    assert tally.largest <= CLOSE
    tally.flips_alone += [int(x) for flip in flips(program, followed, values) for x in flip.magnitudes]
    flipped = torch.zeros(len(images), dtype=torch.bool)
    for flip in flips(program, plain, values):
        tally.gates += flip.gates
        tally.flips += flip.magnitudes.tolist()
        differ = gates[flip.index] != run_gates(program, plain)[flip.index]
        x = compared(program, program.steps[flip.index], dict(enumerate(plain)))
        assert x is not None
        far = (differ & (x.abs() > CLOSE)).flatten(1).any(1)
        assert not bool(far[~flipped].any()), f"a gate of {flip.name} flipped far from 0"
        flipped |= differ.flatten(1).any(1)
    tally.inferences += len(images)
    tally.argmax_equal += int((ran.logits.flatten(1).argmax(1) == plain[-1].flatten(1).argmax(1)).sum())


def run_against_both(parties: Setup, images: Tensor, inferences: int) -> Tally:
    """So many inferences, taking the images in turns, a protocol's batch at a time."""
    tally, batch = Tally(), parties.protocol.settings.batch
    for number in range(inferences):
        some = images[[(number * batch + i) % len(images) for i in range(batch)]]
        tickets = parties.deal.tickets(number)
        ran = infer(parties, tickets, some)
        reference = replay(parties.protocol, parties.tensors, parties.deal.server_key, tickets, encode(some))
        assert_is_the_replay(ran, reference)
        assert_is_the_emulation(parties, ran, encode(some), tally)
    return tally
