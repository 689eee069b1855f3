"""Shared by the two residual formats: tiles of a matrix, numbers of known widths packed into bits.

    part     index int32 [tiles + 1] | tiles | 3 zero words
             index: first word of each tile; last, the words of all. Little-endian u32 words.
    tile     32 rows x 64 columns, tiles and the weights in them row-major.

R = rows of one part of a matrix, K = its columns, t = tiles of a chunk, m = numbers of a chunk.
Integers are int64 tensors unless said otherwise.
"""

import torch
from torch import Tensor

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.model import GROUP_SIZE

TILE_ROWS = 32
TILE_COLUMNS = GROUP_SIZE  # a row of a tile is one group: one scale, one zero_point
TILE_WEIGHTS = TILE_ROWS * TILE_COLUMNS
GUARD_WORDS = 3  # a decoder may always read three words
CHUNK_TILES = 512  # decoded at once: bounds the temporaries, does not affect the stream


def index_and_payload(stored: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """stored uint8 [bytes], at an address that 4 divides -> views of it: the index int32 [tiles +
    1], and the payload int32 [words + GUARD_WORDS].

    Raises SubspecError(CORRUPT) unless the index begins at 0, never falls, and ends with the number
    of words in the payload.
    """
    assert num_rows % TILE_ROWS == 0 and num_columns % TILE_COLUMNS == 0 and stored.dim() == 1
    assert stored.dtype == torch.uint8 and stored.data_ptr() % 4 == 0
    num_index = num_rows * num_columns // TILE_WEIGHTS + 1
    num_words, rest = divmod(stored.numel() - 4 * num_index, 4)
    if num_words < GUARD_WORDS or rest:
        raise corrupt(f"it is {stored.numel()} bytes for {num_rows} x {num_columns} weights")
    words = stored.view(torch.int32)
    index, payload = words[:num_index], words[num_index:]
    if int(index[0]) != 0 or bool((index[1:] < index[:-1]).any()):
        raise corrupt("its index does not count up from 0")
    if int(index[-1]) != num_words - GUARD_WORDS:
        raise corrupt(f"its index ends at {int(index[-1])} of {num_words - GUARD_WORDS} words")
    return index, payload


def corrupt(what: str) -> SubspecError:
    return SubspecError(
        Exit.CORRUPT, f"a residual is damaged: {what}", "copy or build the artifact again"
    )


def check_part(weight: Tensor, codes: Tensor, qparams: Tensor) -> None:
    """Assert what compiled code relies on: the shapes of a part [R, K], its codes [R, K / 2] or as
    many bytes in another layout, and qparams bf16 [G, R, 2]; contiguous CPU memory."""
    num_rows, num_columns = weight.shape
    assert all(tensor.device.type == "cpu" for tensor in (weight, codes, qparams))
    assert num_rows % TILE_ROWS == 0 and num_columns % TILE_COLUMNS == 0
    assert weight.is_contiguous() and codes.is_contiguous()
    assert codes.dtype == torch.uint8 and codes.numel() * 2 == weight.numel()
    assert qparams.dtype == torch.bfloat16
    assert qparams.shape == (num_columns // TILE_COLUMNS, num_rows, 2)
    assert qparams.stride()[1:] == (2, 1)


def room_for_words(num_weights: int, most_words: int) -> tuple[Tensor, Tensor]:
    """Allocate an encoder's output: index int32 [tiles + 1], and a payload int32 for tiles of at
    most `most_words` words."""
    num_tiles = num_weights // TILE_WEIGHTS
    assert num_tiles * most_words < 1 << 31, "the index is int32"
    index = torch.empty(num_tiles + 1, dtype=torch.int32)
    return index, torch.empty(num_tiles * most_words, dtype=torch.int32)


def tiled(matrix: Tensor) -> Tensor:
    """[R, K] -> view [R / 32, G, 32, 64]: the first two dimensions are the tile."""
    num_rows, num_columns = matrix.shape
    shape = (num_rows // TILE_ROWS, TILE_ROWS, num_columns // TILE_COLUMNS, TILE_COLUMNS)
    return matrix.view(shape).transpose(1, 2)


def join(entries: Tensor, sizes: Tensor) -> Tensor:
    """entries, sizes [m, radix] -> [m]: e0 + n0 * (e1 + n1 * (e2 + ...)), below 2^43."""
    value = torch.zeros_like(entries[:, 0])
    for column in reversed(range(entries.shape[1])):
        value = value * sizes[:, column] + entries[:, column]
    return value


def split(value: Tensor, sizes: Tensor) -> Tensor:
    """Inverse of join; in a damaged stream the last entry may be too large."""
    entries = torch.empty_like(sizes)
    last = sizes.shape[1] - 1
    for column in range(last):
        entries[:, column], value = value % sizes[:, column], value // sizes[:, column]
    entries[:, last] = value
    return entries


def bit_length(value: Tensor) -> Tensor:
    """Bit length of integers 0 <= value < 2^53."""
    return torch.frexp(value.double())[1].long()


def put_bits(words: Tensor, position: Tensor, value: Tensor) -> None:
    """Add values below 2^53 to words (u32 in int64) at bit positions; the bit ranges are disjoint,
    so addition is bitwise or."""
    word, shift = position >> 5, position & 31
    words.scatter_add_(0, word, (value << shift) & 0xFFFF_FFFF)
    words.scatter_add_(0, word + 1, (value >> (32 - shift)) & 0xFFFF_FFFF)
    words.scatter_add_(0, word + 2, torch.where(shift > 0, value >> (64 - shift).clamp(max=63), 0))


def get_bits(words: Tensor, position: Tensor, width: Tensor) -> Tensor:
    """Read `width` (below 53) bits at each bit position of words (u32 in int64)."""
    word, shift = position >> 5, position & 31
    value = (words[word] >> shift) | (words[word + 1] << (32 - shift))
    value |= torch.where(shift > 0, words[word + 2] << (64 - shift).clamp(max=63), 0)
    return value & ((torch.ones_like(width) << width) - 1)
