"""The dropout mask is a pure function of seed and place, with the statistics of a fair coin."""

from __future__ import annotations

import pytest
import torch

from adasplash_core import dropout


def philox7(key: int, counter: tuple[int, int, int, int]) -> int:
    """Philox-4x32-7 in plain Python integers, from the definition in Salmon et al. 2011."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def test_known_answer_of_random123() -> None:
    zero = torch.zeros((), dtype=torch.int64)
    assert int(dropout.philox_word(zero, zero, zero, 0)) == 0x5F6FB709


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_words_equal_the_definition(seed: int) -> None:
    columns, rows = torch.arange(0, 100_000, 9_973)[None], torch.tensor([0, 3, 2**31])[:, None]
    words = dropout.philox_word(torch.tensor(seed), columns, rows, 77)
    expected = [[philox7(seed & (2**64 - 1), (int(j), int(i), 77, 0)) for j in columns[0]] for i in rows[:, 0]]
    assert words.tolist() == expected


def test_any_tile_gives_the_same_entries() -> None:
    seed, rows, columns = torch.tensor(5), torch.arange(40)[:, None], torch.arange(50)
    whole = dropout.keep(seed, 3, rows, columns, 0.3)
    assert torch.equal(dropout.keep(seed, 3, rows[7:20], columns[11:], 0.3), whole[7:20, 11:])


def test_the_share_kept_and_independence_of_heads_and_seeds() -> None:
    rows, columns = torch.arange(300)[:, None], torch.arange(400)
    masks = [dropout.keep(torch.tensor(seed), head, rows, columns, 0.25).double() for seed, head in ((1, 0), (1, 1), (2, 0))]
    for mask in masks:
        assert abs(mask.mean() - 0.75) < 5 * (0.25 * 0.75 / mask.numel()) ** 0.5
    for other in masks[1:]:
        agreement = (masks[0] == other).double().mean()
        assert abs(agreement - (0.75**2 + 0.25**2)) < 0.01


def test_manual_seed_repeats_the_seed() -> None:
    torch.manual_seed(3)
    first, second = dropout.draw_seed(torch.device("cpu")), dropout.draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert first == dropout.draw_seed(torch.device("cpu")) != second
