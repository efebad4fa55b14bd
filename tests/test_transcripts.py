"""Everything the engine's parties say and are dealt gives nothing away; and each planted mistake, which does, is seen.

T1 to T7 and key replacement, the checks being in transcript_checks.py and key_checks.py, the mistakes in planted.py.
Under every mistake the inferences stay right in every step: only tests like these see it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import planted
import pytest
import torch
from engine_cases import EVERY_SETTING
from key_checks import keys_are_replaced, no_label_is_drawn_twice
from planted import Plant
from transcript_checks import (
    ands_are_apart,
    dealer_messages_are_uniform,
    gates_are_hidden,
    no_mask_serves_twice,
    openings_are_uniform,
    versions_share_no_mask,
    weights_are_the_servers_masks,
)
from transcripts import CLIENT, SERVER, EveryMessage, Recorded, record

from deepshare.secure.engine.protocol import Settings
from deepshare.secure.exactness import check_locally
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.replay import replay

Check = Callable[[Recorded], None]
DCF, TREE = Settings(), Settings(gate="tree")


def next_version(recorded: Recorded) -> Recorded:
    """The same network after some more training, under a deal of its own."""
    model = EveryMessage()
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    return record(recorded.protocol.settings, inferences=1, model=model)


def versions_are_apart(recorded: Recorded) -> None:
    """T7 with the version that follows."""
    other = next_version(recorded)
    assert_functions_correctly(other)
    versions_share_no_mask(recorded, other)


CHECKS: tuple[Check, ...] = (
    openings_are_uniform,
    no_mask_serves_twice,
    no_label_is_drawn_twice,
    gates_are_hidden,
    ands_are_apart,
    dealer_messages_are_uniform,
    versions_are_apart,
    keys_are_replaced,
    weights_are_the_servers_masks,
)


def assert_functions_correctly(recorded: Recorded) -> None:
    """What functional tests see: logits bit for bit the replay's and near the network's, every step and gate right."""
    parties, images = recorded.parties, encode(recorded.images)
    with torch.no_grad():
        wanted = recorded.model(recorded.images).double()
    for index, (ran, tickets) in enumerate(zip(recorded.rans, recorded.tickets, strict=True)):
        reference = replay(parties.protocol, parties.tensors, parties.deal.server_key, tickets, images)
        assert torch.equal(ran.logits, reference.logits)
        bits = parties.protocol.settings.gate_bits
        wrong = check_locally(parties.protocol.program, parties.tensors, recorded.values(index), gate_bits=bits)
        assert wrong == ()
        assert (decode(ran.logits) - wanted).abs().max() < 2**-11


@cache
def sound(settings: Settings) -> Recorded:
    """Inferences of the engine as it is."""
    return record(settings)


def _name(value: object) -> str:
    if isinstance(value, Settings):
        return f"{value.weights}-{value.affine}-{value.gate}{value.gate_bits}"
    return getattr(value, "__name__", "") or str(value)


QUICK = (DCF, TREE, Settings("public", gate="tree", gate_bits=32))
BOTH_SPEEDS = [pytest.param(each, marks=[] if each in QUICK else [pytest.mark.slow]) for each in EVERY_SETTING]


@pytest.mark.parametrize("settings", BOTH_SPEEDS, ids=_name)
@pytest.mark.parametrize("check", CHECKS, ids=_name)
def test_the_engine_gives_nothing_away(check, settings):
    if check in (versions_are_apart, weights_are_the_servers_masks) and not settings.secret_weights:
        pytest.skip("no weight is secret")
    check(sound(settings))


@pytest.mark.parametrize("gate", ["dcf", "tree"])
def test_a_label_gives_nothing_away(gate):
    """The tournament of label.py: what it opens, and that the client learns the index and no logit."""
    recorded = record(Settings(gate=gate), label=True)
    for check in CHECKS:
        if check is not versions_are_apart:
            check(recorded)
    with torch.no_grad():
        wanted = recorded.model(recorded.images).argmax(1)
    for ran, messages in zip(recorded.rans, recorded.messages, strict=True):
        assert torch.equal(ran.logits.flatten(), wanted)
        assert messages[-1].label == "server's logits"
        assert messages[-1].data.shape == (len(recorded.images), 1)


def test_every_kind_of_message_is_said():
    """Else a check of it would be of nothing."""
    labels = {message.label for settings in (DCF, TREE) for message in sound(settings).messages[0]}
    assert labels == {
        "client's one-way half",
        "client's early one-way half",
        "client's half",
        "client's early half",
        "server's half",
        "client's and",
        "server's and",
        "client's z",
        "server's z",
        "server's logits",
    }


@dataclass(frozen=True)
class Mistake:
    """What is planted, under which settings, which check must see it and what it must say."""

    name: str
    plant: Plant
    seen_by: Check
    says: str
    settings: Settings = DCF
    slow: bool = False


def mistakes() -> Iterator[Mistake]:
    bare, old = planted.nothing_drawn, planted.old_wire

    def opening(name: str, plant: Plant, says: str, settings: Settings = DCF) -> Mistake:
        return Mistake(name, plant, openings_are_uniform, says, settings, slow=True)

    yield opening("masks of 48 bits", planted.short_masks, "byte 6 of .* uneven")
    yield opening("the server does not mask", bare("a", SERVER), "server's half: byte 6")
    yield opening("the client does not mask", bare("a", CLIENT), "client's early half: byte 6")
    yield replace(
        opening("the client does not mask one-way", bare("a_1 alone", CLIENT), "one-way half: byte"), slow=False
    )
    yield opening(
        "the client's ANDs are bare", bare("AND masks", CLIENT), "client's and, less the receiver's part", TREE
    )
    yield opening(
        "the server's ANDs are bare", bare("AND masks", SERVER), "server's and, less the receiver's part", TREE
    )
    yield opening("no noise on the logits", partial(planted.logits_noise, 0), "noise: 1152 bytes are uneven")
    yield opening("constant noise on the logits", partial(planted.logits_noise, 12345), "noise: 1152 bytes are uneven")

    def twice(name: str, plant: Plant, says: str = "halves of .* within 2.21") -> Mistake:
        return Mistake(name, plant, no_mask_serves_twice, says, slow=True)

    yield replace(twice("openings share a mask", old("a")), slow=False)
    yield twice("one-way halves share a mask", old("a_1 alone"))
    yield twice("images of a batch share a mask", planted.one_mask_a_batch)
    yield twice("a ticket is used again", planted.tickets_again)
    yield twice("counters overlap", planted.overlapping_counters)
    yield twice("corrections of r share a stream", old("[r]"), "corrections: .* within 2.21")

    def label(name: str, plant: Plant, says: str = "label is drawn twice") -> Mistake:
        return Mistake(name, plant, no_label_is_drawn_twice, says, slow=True)

    yield replace(label("an old wire is drawn under a new name", old("c")), slow=False)
    yield label("a ticket's labels are drawn again", planted.tickets_again, "the parties: a label is drawn twice")
    yield label("labels overlap", planted.overlapping_counters)
    yield label("both parties draw the same labels", planted.shared_seed)
    yield label("one AES key for all inferences", planted.one_public_key, "public AES keys are equal")

    def gate(name: str, plant: Plant, says: str, settings: Settings = DCF) -> Mistake:
        return Mistake(name, plant, gates_are_hidden, says, settings, slow=True)

    yield replace(gate("the gate itself is opened", planted.gates_in_the_clear, "z and the gates"), slow=False)
    yield gate("the client's z is bare", bare("random bits", CLIENT), "z to the server and the gates")
    yield gate("the server's z is bare", bare("random bits", SERVER), "z to the client and the gates")
    yield gate("r is used again", planted.tickets_again, "two runs' z", TREE)
    yield gate("two comparisons share random bits", old("random bits"), "two runs' z .*less the gates")

    def ands(name: str, plant: Plant) -> Mistake:
        return Mistake(name, plant, ands_are_apart, "openings of row.* bits differ", TREE, slow=True)

    yield replace(ands("levels share AND masks", old("AND masks")), slow=False)
    yield ands("gates share AND masks", planted.one_mask_for_gates)
    yield ands("nodes share AND masks", planted.one_mask_for_nodes)

    def correction(role: str, says: str = "correction of", settings: Settings = DCF, slow: bool = True) -> Mistake:
        """The dealer does not subtract the client's stream, and the client takes zero."""
        name, seen_by = f"the correction of {role} is the value", dealer_messages_are_uniform
        return Mistake(name, bare(role, CLIENT), seen_by, re.escape(f"{says} {role}: "), settings, slow)

    yield correction("c", "client's share of")
    yield from (correction(role, slow=role != "[ar]") for role in ("[r]", "[ar]", "[Ar]", "[aB + aAr]", "[aA - 2aAr]"))
    yield from (correction("rho"), correction("thermometer", settings=TREE), correction("AND products", settings=TREE))
    for name, plant in (("both parties' root", planted.equal_roots), ("all gates' root", planted.same_root_for_gates)):
        says = "correction words of level 0"
        yield Mistake(f"{name} is one", plant, dealer_messages_are_uniform, says, slow=name[0] == "a")

    yield Mistake("two versions share weight masks", planted.one_server_key, versions_are_apart, "masked weights")
    one_mask, none = partial(planted.weights_masked_by, lambda own, first: first), lambda own, first: own * 0
    yield Mistake("weights share a mask", one_mask, versions_are_apart, "masked weights", slow=True)
    bare_weights = partial(planted.weights_masked_by, none)
    yield Mistake("the client is given the weights", bare_weights, weights_are_the_servers_masks, "is not masked")
    yield Mistake("the parties share a seed", planted.shared_seed, keys_are_replaced, "before the input changed")
    yield Mistake(
        "a mask is the client's", bare("a", SERVER), keys_are_replaced, "server's half: [0-9]+% changed", slow=True
    )
    yield Mistake("a mask is the server's", bare("a", CLIENT), keys_are_replaced, "is one party's share", slow=True)


MISTAKES = list(mistakes())


def marked(mistake: Mistake) -> object:
    return pytest.param(mistake, id=mistake.name, marks=[pytest.mark.slow] if mistake.slow else [])


@pytest.mark.parametrize("mistake", [marked(mistake) for mistake in MISTAKES])
def test_a_planted_mistake_is_seen_here_alone(mistake):
    """It functions correctly, and the check that is for it fails."""
    with mistake.plant():
        recorded = record(mistake.settings)
        assert_functions_correctly(recorded)
        with pytest.raises(AssertionError, match=mistake.says):
            mistake.seen_by(recorded)


def test_every_check_has_a_mistake_to_catch():
    caught = {mistake.seen_by for mistake in MISTAKES}
    assert caught == set(CHECKS)
    assert {mistake.seen_by for mistake in MISTAKES if not mistake.slow} == caught
