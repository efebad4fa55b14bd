"""Runs of the engine held against its two references: the replay bit for bit, the emulation up to truncation."""

from dataclasses import dataclass, field

import torch
from engine_cases import Ran, Setup, infer
from error_bounds import error_bounds
from torch import Tensor

from deepshare.secure.emulate import emulate, gate_makers
from deepshare.secure.engine.protocol import Compare
from deepshare.secure.exactness import check_locally, flips, run_gates
from deepshare.secure.fixed_point import encode
from deepshare.secure.replay import Replayed, replay


@dataclass
class Tally:
    """What was compared, over all inferences; gates that differ from the emulation's by |x| in LSB."""

    inferences: int = 0
    gates: int = 0
    flips: list[int] = field(default_factory=list)
    flips_alone: list[int] = field(default_factory=list)  # with the run's gates followed: what truncation itself flips
    largest: int = 0  # difference of any step to the emulation that follows the run's gates, LSB
    bound: int = 0
    argmax_equal: int = 0

    def __str__(self) -> str:
        alone = f"{len(self.flips_alone)} alone, at {max(self.flips_alone, default=0)} LSB at most"
        return (
            f"{self.inferences} inferences: {len(self.flips)} of {self.gates} gates flipped ({alone}), gates followed "
            f"{self.largest} LSB off at most (bound {self.bound}), argmax equal {self.argmax_equal}"
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
    """Every step within its truncation of what its inputs give, gates exactly; end to end within the error bounds.

    A gate that differs from the emulation's is explained if x is within the bound of 0 there, or if an earlier gate of
    the same image differed.
    """
    program, bits = parties.protocol.program, parties.protocol.settings.gate_bits
    values, gates = values_of(ran), opened_gates(ran)
    assert set(gates) == set(gate_makers(program))
    assert check_locally(program, parties.tensors, values, gates=gates, gate_bits=bits) == ()
    implied = run_gates(program, values)
    assert all(torch.equal(gates[index], implied[index]) for index in gates)
    followed = emulate(program, parties.tensors, images, keep=True, gates=gates).values
    bounds = error_bounds(program, parties.tensors, gates, len(images))
    plain = emulate(program, parties.tensors, images, keep=True).values
    assert followed is not None
    assert plain is not None
    for value, wanted, bound in zip(values, followed, bounds, strict=True):
        assert bool(((value - wanted).abs() <= bound).all())
        tally.largest = max(tally.largest, int((value - wanted).abs().max()))
        tally.bound = max(tally.bound, int(bound.max()))
    tally.flips_alone += [int(x) for flip in flips(program, followed, values) for x in flip.magnitudes]
    for flip in flips(program, plain, values):
        tally.gates += flip.gates
        tally.flips += flip.magnitudes.tolist()
    _assert_explained(gates, run_gates(program, plain), plain, bounds, program)
    tally.inferences += len(images)
    tally.argmax_equal += int((ran.logits.flatten(1).argmax(1) == plain[-1].flatten(1).argmax(1)).sum())


def _assert_explained(gates, of_emulation, plain, bounds, program) -> None:  # type: ignore[no-untyped-def]
    """The first comparison of an image that differs does so within the bound of 0; what follows follows from it."""
    flipped = torch.zeros(len(plain[0]), dtype=torch.bool)
    for index in sorted(gates):
        step = program.steps[index]
        source = step.inputs[0] if step.gates is None else step.gates[0]
        x, bound = plain[source], bounds[source]
        if step.op == "mask":
            kept = program.public[step.public["index"]]
            x, bound = x.flatten(1)[:, kept], bound.flatten(1)[:, kept]
        else:
            x, bound = (each[:, : gates[index].shape[1]] for each in (x, bound))
        differ = gates[index] != of_emulation[index]
        unexplained = differ & (x.abs() > bound)
        assert not bool(unexplained.flatten(1).any(1)[~flipped].any()), f"a gate of {step.name} flipped far from 0"
        flipped |= differ.flatten(1).any(1)


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
