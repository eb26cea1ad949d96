from __future__ import annotations

import os
import struct

import pytest
import torch

from dpfa_hf import keystream
from dpfa_hf.keystream import chacha20_keystream, tile_words

BLOCK_FUNCTION_2_3_2 = (
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
)
VECTOR_A_1_1 = (
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)
VECTOR_A_1_2 = (
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)


def python_chacha20_block(key: bytes, counter: int, nonce: int) -> bytes:
    state = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *struct.unpack("<8I", key)]
    state += [counter & 0xFFFFFFFF, counter >> 32, nonce & 0xFFFFFFFF, nonce >> 32]
    x = list(state)

    def half_quarter(a: int, b: int, d: int, r: int, s: int, c: int) -> None:
        x[a] = (x[a] + x[b]) & 0xFFFFFFFF
        x[d] = ((x[d] ^ x[a]) << r | (x[d] ^ x[a]) >> (32 - r)) & 0xFFFFFFFF
        x[c] = (x[c] + x[d]) & 0xFFFFFFFF
        x[b] = ((x[b] ^ x[c]) << s | (x[b] ^ x[c]) >> (32 - s)) & 0xFFFFFFFF

    columns = [(i, 4 + i, 8 + i, 12 + i) for i in range(4)]
    diagonals = [(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4) for i in range(4)]
    for _ in range(10):
        for a, b, c, d in columns + diagonals:
            half_quarter(a, b, d, 16, 12, c)
            half_quarter(a, b, d, 8, 7, c)
    return struct.pack("<16I", *((u + v) & 0xFFFFFFFF for u, v in zip(x, state, strict=True)))


def test_keystream_equals_the_vectors_of_rfc_8439() -> None:
    rfc_counter_and_nonce = bytes.fromhex("01000000" + "000000090000004a00000000")
    counter, nonce = struct.unpack("<QQ", rfc_counter_and_nonce)
    assert chacha20_keystream(bytes(range(32)), nonce, counter, 64).hex() == BLOCK_FUNCTION_2_3_2
    assert chacha20_keystream(bytes(32), 0, 0, 64).hex() == VECTOR_A_1_1
    assert chacha20_keystream(bytes(32), 0, 1, 64).hex() == VECTOR_A_1_2
    assert chacha20_keystream(bytes(32), 0, 0, 128).hex() == VECTOR_A_1_1 + VECTOR_A_1_2


@pytest.mark.parametrize("counter", [0, 7, 2**32 - 2, 2**32, 2**40 + 3])
@pytest.mark.parametrize("nonce", [0, 1, 2**63 + 5])
def test_keystream_equals_an_independent_chacha20_also_past_32_bits(counter: int, nonce: int) -> None:
    key = os.urandom(32)
    blocks = 2
    expected = b"".join(python_chacha20_block(key, counter + i, nonce) for i in range(blocks))
    assert chacha20_keystream(key, nonce, counter, 64 * blocks) == expected


def words_of(key: bytes, nonce: int, element: int) -> tuple[int, int, int]:
    """Radius, angle and refinement of an element, written out from the module's first paragraph."""
    tile, place = divmod(element, 1024)
    j, b = divmod(place, 128)
    words = struct.unpack("<16I", python_chacha20_block(key, 128 * tile + b, nonce))
    pair = j % 4
    return words[2 * pair] | words[2 * pair + 1] << 32, words[8 + pair], words[12 + pair]


def test_tile_words_are_where_the_plan_says() -> None:
    key = os.urandom(32)
    found = tile_words(key, 5, 7, 3)
    for element in (7 * 1024, 7 * 1024 + 127, 7 * 1024 + 640, 8 * 1024 - 1, 9 * 1024 + 300, 10 * 1024 - 1):
        tile, place = divmod(element - 7 * 1024, 1024)
        j, b = divmod(place, 128)
        at = [int(view[tile, j % 4, b]) % modulus for view, modulus in zip(found, (2**64, 2**32, 2**32), strict=True)]
        assert tuple(at) == words_of(key, 5, element)
        counter, pair = keystream.block_and_pair(element)
        assert (counter, pair) == (128 * (element // 1024) + b, j % 4)


def test_every_word_serves_two_elements_of_a_tile_and_no_other_tile_any() -> None:
    key = bytes(range(32))
    tiles = [tile_words(key, 0, tile, 1) for tile in (0, 1, 2**25 - 1, 2**25)]  # the last beyond 2**32 blocks
    radii = torch.cat([words.radius.flatten() for words in tiles])
    assert radii.unique().numel() == radii.numel() == 4 * 512
    assert torch.equal(tile_words(key, 0, 0, 2).radius, torch.cat([words.radius for words in tiles[:2]]))
