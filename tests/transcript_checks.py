"""T1, T2, T4 to T7: what must hold for everything a party of the engine sees. Each raises AssertionError.

Every statistic raises a false alarm once in 10^9 (`ALARM`), as far as chi-square's approximation goes; the
default tests compute some 10,000, so that one run in 100,000 fails without a cause.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor
from transcripts import CLIENT, SERVER, Message, Recorded, roles

from deepshare.secure.engine import carry
from deepshare.secure.engine.protocol import Compare, Protocol
from deepshare.secure.engine.streams import Stream

ALARM = 1e-9
CLOSE = 2**21  # 32.0 in units of 2^-16: secrets are as close as that, uniform words are not


# statistics


def chance_of_bytes(sample: Tensor) -> float:
    """Probability that uniform bytes are as uneven as these or more so: chi-square over 256 values, or both nibbles."""
    flat = sample.reshape(-1).to(torch.int64)
    if flat.numel() >= 2560:  # ten expected of each value
        return _chance(torch.bincount(flat, minlength=256))
    return _chance(torch.bincount(torch.cat([flat & 15, flat >> 4]), minlength=16))


def _chance(counts: Tensor) -> float:
    expected = counts.sum().double() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64), statistic / 2))


def chance_of_bits(ones: int, bits: int) -> float:
    """Probability that fair bits are so many or so few ones, or more extreme: normal approximation."""
    return math.erfc(abs(ones - bits / 2) / math.sqrt(bits / 2)) if bits else 1.0


def assert_uniform_words(name: str, words: Tensor) -> None:
    """Each of the eight byte positions apart: a short mask shows in the high ones alone."""
    for position, column in enumerate(words.contiguous().view(torch.uint8).reshape(-1, 8).unbind(1)):
        chance = chance_of_bytes(column)
        assert chance > ALARM, f"{name}: byte {position} of {words.numel()} words is uneven (chance {chance:.1e})"


def assert_uniform(name: str, sample: Tensor) -> None:
    """Words or bytes."""
    if sample.dtype == torch.int64:
        assert_uniform_words(name, sample)
    else:
        chance = chance_of_bytes(sample)
        assert chance > ALARM, f"{name}: {sample.numel()} bytes are uneven (chance {chance:.1e})"


def assert_unrelated(name: str, first: Tensor, second: Tensor) -> None:
    """Bits (uint8, 0 or 1) that agree as often as not."""
    chance = chance_of_bits(int((first == second).sum()), first.numel())
    assert chance > ALARM, f"{name}: {int((first == second).sum())} of {first.numel()} bits agree"


def close_neighbours(words: Tensor, apart: int = CLOSE) -> int:
    """Sorted words closer than `apart` to the next. Of n uniform ones n^2 apart / 2^64 are expected."""
    ordered = words.reshape(-1).sort().values
    gaps = ordered[1:] - ordered[:-1]  # mod 2^64: a gap above 2^63 comes out negative
    return int(((gaps >= 0) & (gaps < apart)).sum())


def assert_far_apart(name: str, words: Tensor) -> None:
    """No word near another, or near the negative of another (one mask added here and subtracted there).

    Less than 0.02 close pairs are expected: four or more come once in 10^8 runs.
    """
    flat = words.reshape(-1)
    for what, sample in (("", flat), (" or of a negative", torch.cat([flat, -flat]))):
        expected = sample.numel() ** 2 * CLOSE / 2**64
        assert expected < 0.02
        count = close_neighbours(sample)
        assert count < 4, f"{name}: {count} of {sample.numel()} words within 2^21 of the next{what}"


# T1 to T7


def openings_are_uniform(recorded: Recorded) -> None:
    """T1: each party's messages of each kind, as they are and less what their receiver knows."""
    samples: dict[str, list[Tensor]] = defaultdict(list)
    for message in _all(recorded):
        samples[message.label].append(message.data.reshape(-1))
        if message.kind != "logits":
            samples[message.label + ", less the receiver's part"].append(message.known.reshape(-1))
        elif recorded.protocol.actions[-1].noise is not None:  # type: ignore[union-attr]
            noise = message.known.reshape(-1, 1)
            assert bool(((noise >= 0) & (noise < 2**16)).all()), "the logits' noise leaves [0, 2^16)"
            samples["the logits' noise"].append(noise.view(torch.uint8)[:, :2].reshape(-1))
    for name, sample in samples.items():
        assert_uniform(name, torch.cat(sample))


def no_mask_serves_twice(recorded: Recorded) -> None:
    """T2: opened words of all inferences, sorted; halves as sent, less the receiver's part, and corrections."""
    families: dict[str, list[Tensor]] = defaultdict(list)
    for message in _all(recorded):
        if message.data.dtype == torch.int64:
            families[f"halves of party {message.sender}"].append(message.data.reshape(-1))
            if message.kind != "logits":  # what is left of those is below 2^16
                families[f"halves of party {message.sender}, less the other's"].append(message.known.reshape(-1))
    for index in range(len(recorded.rans)):
        for wire in recorded.protocol.wires:
            if wire.kind == "product":
                families["corrections"].append(recorded.dealt(index, SERVER, wire).reshape(-1))
    for name, words in families.items():
        assert_far_apart(name, torch.cat(words))


def gates_are_hidden(recorded: Recorded) -> None:
    """T4: z of two runs of one input agree at chance, as opened and less what a party knows; nor do they tell gates."""
    of_action: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for index, messages in enumerate(recorded.messages):
        for action, z, known in _opened_gates(recorded, messages):
            top = recorded.top_bits(index, action)
            truth = (recorded.compared(index, action) >= 0).to(torch.uint8)
            seen = {
                "z": z,
                "z less msb(e)": z ^ top,
                "z to the server": known[SERVER],
                "z to the client": known[CLIENT],
            }
            for name, packed in seen.items():
                bits = carry.unpack(packed, action.gates)
                of_action[name, action.flip.number].append(bits)
                assert_unrelated(f"{name} and the gates", bits, truth)
                of_action[name + ", less the gates", index].append(bits ^ truth)
    for (name, _), runs in of_action.items():
        for first, second in combinations(runs, 2):
            common = min(first.numel(), second.numel())
            assert_unrelated(f"two runs' {name}", first[:common], second[:common])


def ands_are_apart(recorded: Recorded) -> None:
    """T5: the xor of any two rows of the carry tree's openings is fair, and of a row and itself some gates on."""
    for sender in (SERVER, CLIENT):
        rows: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for messages in recorded.messages:
            for action, row, packed in _and_rows(recorded.protocol, messages, sender):
                rows[action, row].append(packed)
        actions = {action for action, _ in rows}
        for action in actions:
            lines = [torch.cat(parts) for (of, _), parts in rows.items() if of == action]
            for (i, first), (j, second) in combinations(enumerate(lines), 2):
                _assert_fair(f"openings of rows {i} and {j}", first ^ second)
            for i, line in enumerate(lines):
                for step in (1, 2, 8):
                    _assert_fair(f"openings of row {i} and {8 * step} gates on", line[step:] ^ line[:-step])
            for i, parts in enumerate(parts for (of, _), parts in rows.items() if of == action):
                for first, second in combinations(parts, 2):
                    _assert_fair(f"openings of row {i} of two runs", first ^ second)


def dealer_messages_are_uniform(recorded: Recorded) -> None:
    """T6: every kind of correction, the client's part of it, and comparison keys by level, no two equal."""
    samples: dict[str, list[Tensor]] = defaultdict(list)
    names = roles(recorded.protocol)
    for index in range(len(recorded.rans)):
        for wire in recorded.protocol.wires:
            name = names[wire.number]
            if wire.kind == "keys":
                samples[name].append(recorded.dealt(index, CLIENT, wire))
                assert torch.equal(samples[name][-1], recorded.dealt(index, SERVER, wire))
            elif wire.dealt_to(SERVER):
                samples[f"correction of {name}"].append(recorded.dealt(index, SERVER, wire).reshape(-1))
                samples[f"client's share of {name}"].append(recorded.drawn(index, CLIENT, wire).reshape(-1))
    keys = samples.pop("keys", None)
    for name, sample in samples.items():
        assert_uniform(name, torch.cat(sample))
    if keys is not None:
        _keys_are_uniform(torch.cat(keys))


def _keys_are_uniform(keys: Tensor) -> None:  # [gates, 16 * levels]
    blocks = keys.reshape(len(keys), -1, 16)
    for level in range(blocks.shape[1]):
        assert_uniform(f"correction words of level {level}", blocks[:, level])
        assert_uniform(f"first bytes of correction words of level {level}", blocks[:, level, 0])
    halves = blocks.contiguous().view(torch.int64)[..., 1]
    equal = close_neighbours(halves, apart=1)
    assert equal == 0, f"{equal} correction words are equal"


def versions_share_no_mask(recorded: Recorded, other: Recorded) -> None:
    """T7: masked weights of two model versions, and of each other within one, uniform and far apart."""
    first, second = _masked(recorded), _masked(other)
    assert first.keys() == second.keys()
    assert first
    words = torch.cat([value.reshape(-1) for masked in (first, second) for value in masked.values()])
    assert_uniform_words("masked weights", words)
    assert_far_apart("masked weights of two versions", words)


def _masked(recorded: Recorded) -> dict[str, Tensor]:
    """F of the secret weights, as the client has them."""
    given = recorded.parties.server.masked_weights()
    return {key: given[key] for key in recorded.protocol.masked_params()}


def weights_are_the_servers_masks(recorded: Recorded) -> None:
    """F = W - B with B of the server's stream, for exactly the secret weights; the client has nothing else of them."""
    given, protocol = recorded.parties.server.masked_weights(), recorded.protocol
    assert set(given) == set(protocol.known_params()) | set(protocol.masked_params())
    stream = Stream(recorded.parties.deal.server_key)
    for key, number in protocol.masked_params().items():
        weight = recorded.parties.tensors[key]
        assert torch.equal(weight - given[key], stream.words(number, tuple(weight.shape)))
        assert not bool((weight == given[key]).any()), f"{key} is not masked"


# the messages, regrouped


def _all(recorded: Recorded) -> Iterator[Message]:
    for messages in recorded.messages:
        yield from messages


def _opened_gates(recorded: Recorded, messages: list[Message]) -> Iterator[tuple[Compare, Tensor, dict[int, Tensor]]]:
    """(comparison, z, and by receiver z less what that party knows), packed."""
    of_action: dict[int, dict[int, Message]] = defaultdict(dict)
    for message in messages:
        if message.kind == "z":
            of_action[message.action][message.sender] = message
    for number, halves in of_action.items():
        action, z = recorded.protocol.actions[number], halves[SERVER].data ^ halves[CLIENT].data
        assert isinstance(action, Compare)
        yield action, z, {1 - sender: half.known for sender, half in halves.items()}


def _and_rows(protocol: Protocol, messages: list[Message], sender: int) -> Iterator[tuple[int, int, Tensor]]:
    """(action, row over all levels, bytes) less the receiver's part; the last byte may have spare bits, left out."""
    row: dict[int, int] = defaultdict(int)
    for message in messages:
        if message.kind == "and" and message.sender == sender:
            for line in message.known:
                yield message.action, row[message.action], line[:-1]
                row[message.action] += 1


def _assert_fair(name: str, packed: Tensor) -> None:
    bits = carry.unpack(packed, 8 * packed.numel())
    chance = chance_of_bits(int(bits.sum()), bits.numel())
    assert chance > ALARM, f"{name}: {int(bits.sum())} of {bits.numel()} bits differ"
