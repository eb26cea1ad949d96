"""The ChaCha20 keystream (RFC 8439) on the CPU, and which of its words serve which element of the noise.

Noise is made in tiles of 1024 elements from 128 blocks of the cipher. A block is sixteen 32-bit words and serves eight
elements of its tile: with pair p in 0 to 3, words 2 p and 2 p + 1 are the low and the high half of a 64-bit radius,
word 8 + p is an angle, and word 12 + p refines that angle in the hardened mode alone. Element 128 j + b of a tile is
made from its block b: from the cosine of pair j where j < 4, from the sine of pair j - 4 above. So elements that lie
side by side are made from the same words of neighbouring blocks, which neither a vector unit nor a GPU has to
rearrange. The Triton kernel `dpfa_hf._kernel.add_gaussian_noise` follows the same plan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from dpfa_hf._kernel.chacha import NORMALS_PER_BLOCK
from dpfa_hf._kernel.noise import BLOCKS_PER_TILE, NORMALS_PER_TILE

BLOCK_BYTES = 64
MAX_LENGTH = 2**20  # bytes of keystream at a time
_ZEROS = memoryview(bytes(MAX_LENGTH))


class TileWords(NamedTuple):
    """Views of a keystream's words by their use; the last two dimensions are pair and block.

    Attributes:
        radius: int64 [tiles, 4, 128], the bits of the 64-bit radii.
        angle: int32 [tiles, 4, 128].
        refinement: int32 [tiles, 4, 128], more bits of the angles.
    """

    radius: torch.Tensor
    angle: torch.Tensor
    refinement: torch.Tensor


def chacha20_keystream(key: bytes, nonce: int, counter: int, length: int) -> bytearray:
    """Returns `length` <= 1 MiB of the ChaCha20 keystream, beginning at 64-byte block `counter`.

    Args:
        key: 32 bytes.
        nonce: 0 <= nonce < 2**64.
        counter: 0 <= counter < 2**64; the original layout of the cipher (64-bit counter, 64-bit nonce), which agrees
            with RFC 8439 (32-bit counter, 96-bit nonce) wherever the same sixteen bytes are meant. The blocks asked for
            must not cross a multiple of 2**32, which OpenSSL refuses.
        length: bytes.
    """
    state = counter.to_bytes(8, "little") + nonce.to_bytes(8, "little")
    stream = bytearray(length)  # writable, as torch wants it
    Cipher(ChaCha20(key, state), mode=None).encryptor().update_into(_ZEROS[:length], stream)
    return stream


def tile_words(key: bytes, nonce: int, first_tile: int, tiles: int) -> TileWords:
    """The words of `tiles` <= 128 tiles from `first_tile` on; those from a multiple of 128 cross no 2**32 blocks."""
    blocks = tiles * BLOCKS_PER_TILE
    stream = chacha20_keystream(key, nonce, first_tile * BLOCKS_PER_TILE, BLOCK_BYTES * blocks)
    words = torch.frombuffer(stream, dtype=torch.int32).view(tiles, BLOCKS_PER_TILE, 16)
    by_word = words.transpose(1, 2)
    return TileWords(words.view(torch.int64).transpose(1, 2)[:, :4], by_word[:, 8:12], by_word[:, 12:16])


def block_and_pair(element: int) -> tuple[int, int]:
    """The counter of the block, and the pair in it, from which an element of a tensor is made."""
    tile, place = divmod(element, NORMALS_PER_TILE)
    half_pair, block = divmod(place, BLOCKS_PER_TILE)
    return tile * BLOCKS_PER_TILE + block, half_pair % (NORMALS_PER_BLOCK // 2)


def is_cosine(element: int) -> bool:
    """Whether an element of a tensor is made from the cosine of its pair, not from the sine."""
    return element % NORMALS_PER_TILE < NORMALS_PER_TILE // 2
