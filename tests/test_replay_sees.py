"""What holds the engine to the replay sees mistakes in a party; what both share, the emulation sees.

The replay has no line of inference.py, gated.py, comparison.py, carry.py, dcf.py or share.py: it computes gates from
the values, and the server's share of a product as what the client's leaves. It shares the program, the schedule, the
material and the local arithmetic of ring.py; a mistake there looks right to it.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from exact_cases import assert_is_the_replay, values_of
from transcripts import CLIENT, SERVER, Recorded, record

from deepshare.channel_map import ChannelMap
from deepshare.secure import replay as replay_module
from deepshare.secure.engine import carry, comparison, gated, inference, party, ring
from deepshare.secure.engine.inference import Inference
from deepshare.secure.engine.party import Party
from deepshare.secure.engine.protocol import Settings
from deepshare.secure.exactness import check_locally
from deepshare.secure.fixed_point import encode
from deepshare.secure.replay import replay

SECRET, TREE, PUBLIC = Settings(), Settings(gate="tree"), Settings("public")
Plant = Callable[[], AbstractContextManager[object]]


def assert_recorded_is_the_replay(recorded: Recorded) -> None:
    parties, images = recorded.parties, encode(recorded.images)
    for ran, tickets in zip(recorded.rans, recorded.tickets, strict=True):
        reference = replay(parties.protocol, parties.tensors, parties.deal.server_key, tickets, images)
        assert_is_the_replay(ran, reference)


def instead(owner: object, name: str, new: Callable[..., object]) -> Plant:
    """`new` is called with the original first."""
    original = getattr(owner, name)

    def planted(*arguments, **named):
        return new(original, *arguments, **named)

    return lambda: patch.object(owner, name, planted)


def _no_msb() -> AbstractContextManager[object]:
    bare = SimpleNamespace(pack=lambda bits: carry.pack(torch.zeros_like(bits)), unpack=carry.unpack)
    return patch.object(inference, "carry", bare)


def _public_without_two(original, alpha, beta, mask, flip, product, rank):
    found = original(alpha, beta, mask, flip, product, rank)
    return replace(found, toggle=alpha * mask - alpha * product)


def _secret_without_offset(original, own, masked, mask, flip, products):
    return original(own, masked, mask, flip, [*products[:2], torch.zeros_like(products[2]), products[3]])


def _other_map(original, self, step):
    found = original(self, step)
    return ChannelMap(found.pi.roll(1), found.prototypes)


def _linear_on_its_share(original, self, action):
    operand = action.source.operand
    with patch.dict(self._masks, {operand: self._operand(operand)}):
        return original(self, action)


def _no_noise_at_the_client(original, self, action):
    if action.noise is not None and self.rank == CLIENT:
        self.material.kept[action.noise.number].zero_()
    return original(self, action)


def _weights_plus_masks(original, protocol, tensors, key):
    return {name: 2 * tensors[name] - masked for name, masked in original(protocol, tensors, key).items()}


def _one_more(original, *arguments):
    factor, bits = original(*arguments)
    return factor + 1, bits


IN_A_PARTY: dict[str, tuple[Plant, Settings]] = {
    "the client truncates as the server does": (
        instead(inference, "truncate", lambda original, share, bits, rank: original(share, bits, SERVER)),
        SECRET,
    ),
    "a layer is truncated by a bit less": (
        instead(inference, "truncate", lambda original, share, bits, rank: original(share, bits - 1, rank)),
        PUBLIC,
    ),
    "no bias": (instead(Inference, "_with_bias", lambda original, self, step, share: share), SECRET),
    "the client adds the bias too": (
        instead(
            Inference,
            "_with_bias",
            lambda original, self, step, share: share + self.party.param(step, ring.bias_role(step)),
        ),
        PUBLIC,
    ),
    "the server leaves out the top bit of e": (_no_msb, SECRET),
    "both parties leave it to the carry of e, not ~e": (
        instead(inference, "dcf_carry", lambda original, opened, *rest, **named: original(~opened, *rest, **named)),
        SECRET,
    ),
    "both parties add the product of the opened bits": (
        instead(comparison, "_ands", lambda original, opened, masks, dealt, rank: original(opened, masks, dealt, 0)),
        TREE,
    ),
    "neither party adds it": (
        instead(comparison, "_ands", lambda original, opened, masks, dealt, rank: original(opened, masks, dealt, 1)),
        TREE,
    ),
    "toggle lacks its 2": (instead(inference, "with_public", _public_without_two), PUBLIC),
    "alpha and beta swapped": (
        instead(inference, "with_secret", lambda original, own, masked, *rest: original(own, masked[::-1], *rest)),
        SECRET,
    ),
    "a dealt product left out": (instead(inference, "with_secret", _secret_without_offset), SECRET),
    "both parties hold a ReLU's alpha": (
        instead(inference, "with_unit", lambda original, mask, flip, product, rank: original(mask, flip, product, 0)),
        SECRET,
    ),
    "a product's share has the other party's rounding": (
        instead(
            gated.GatedConstants,
            "product",
            lambda original, self, opened, gates, channels, rank: original(self, opened, gates, channels, 1 - rank),
        ),
        SECRET,
    ),
    "another channel map": (instead(Party, "channel_map", _other_map), SECRET),
    "a linear layer on the server's share": (instead(Inference, "_linear", _linear_on_its_share), SECRET),
    "the mask's other elements are 0": (
        instead(Inference, "_passed", lambda original, self, index: original(self, index).zero_()),
        SECRET,
    ),
    "a mean's divisor": (instead(inference, "division", _one_more), PUBLIC),
    "no noise at the client": (instead(Inference, "_reveal", _no_noise_at_the_client), SECRET),
    "F = W + B": (instead(party, "mask_weights", _weights_plus_masks), SECRET),
}


@pytest.mark.parametrize("name", IN_A_PARTY)
def test_a_mistake_in_a_party_is_no_replay(name):
    plant, settings = IN_A_PARTY[name]
    assert_recorded_is_the_replay(record(settings, inferences=1))
    with plant():
        recorded = record(settings, inferences=1)
    with pytest.raises(AssertionError):
        assert_recorded_is_the_replay(recorded)


@contextmanager
def in_both(name: str, new: Callable[..., object]) -> Iterator[None]:
    """A function of ring.py, changed wherever it is used."""
    with ExitStack() as stack:
        for module in (inference, replay_module):
            stack.enter_context(instead(module, name, new)())
        yield


SHARED: dict[str, tuple[str, Callable[..., object]]] = {
    "a mean's divisor": ("division", _one_more),
    "a window's sum": ("sum_windows", lambda original, step, x: 2 * original(step, x)),
    "a linear layer": ("apply_linear", lambda original, step, x, weight: 2 * original(step, x, weight)),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_mistake_that_the_replay_shares_is_seen_by_the_emulation(name):
    function, new = SHARED[name]
    with in_both(function, new):
        recorded = record(PUBLIC, inferences=1)
        assert_recorded_is_the_replay(recorded)
        program, tensors = recorded.protocol.program, recorded.parties.tensors
        assert check_locally(program, tensors, values_of(recorded.rans[0])) != ()


def test_the_replay_uses_nothing_else_of_the_engine():
    tree = ast.parse(Path(replay_module.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {node.module.rpartition(".")[2] for node in imports if (node.module or "").startswith("deepshare")}
    assert modules == {"material", "party", "protocol", "ring", "ticket", "fixed_point", "program"}
    (of_party,) = (node for node in imports if node.module == "deepshare.secure.engine.party")
    assert [alias.name for alias in of_party.names] == ["mask_weights"]
