"""The kernels of `norms`: per-example norms of gradients that are sums over positions, of which none is ever written.

An example is a row of a batch, or one of the segments packed into a row. Every program writes numbers of its own and
`finish_kernel` adds them up in one order, so that the same call gives the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_products(total, a, b, UPCAST: tl.constexpr):
    """total + a b, the products of one chunk summed by themselves: float32 outside of them is rounded to nearest.

    Matrix units cut their running sums off instead of rounding them, so a sum over thousands of products in one
    accumulator would have thousands of errors of one sign. Inputs of 32 bits are multiplied in float32, never TF32.
    """
    if UPCAST or a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # Without its last argument, which is for float8 only, Triton would fold the addition into the accumulator.
    return total + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=a.shape[1])


@triton.jit
def example_bounds(example, BOUNDARIES, length, SEGMENTED: tl.constexpr):
    """(first, stop): positions of an example in its row, which is its own unless rows are packed."""
    start = example * 0
    stop = start + length
    if SEGMENTED:
        start = tl.load(BOUNDARIES + example).to(tl.int32)
        stop = tl.load(BOUNDARIES + example + 1).to(tl.int32)
    return start, stop


@triton.jit
def example_of_program(program, ENDS, examples, tiles, SEGMENTED: tl.constexpr, SEARCH: tl.constexpr):
    """(example, number of the program within it); the example is `examples` for programs that have nothing to do.

    In a packed row ENDS [examples] holds the programs of all segments up to each one.
    """
    if SEGMENTED:
        found = program * 0
        before = program * 0
        for begin in range(0, examples, SEARCH):
            i = begin + tl.arange(0, SEARCH)
            ends = tl.load(ENDS + i, mask=i < examples, other=2147483647)
            found += tl.sum((ends <= program).to(tl.int32))
            before = tl.maximum(before, tl.max(tl.where(ends <= program, ends, 0)))
        return found, program - before
    return program // tiles, program % tiles


@triton.jit
def load_rows(X, begin, stride, stop, column, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK, WIDTH] of X from position `begin` and column `column` on, zero beyond `stop` and `columns`."""
    here = tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH)
    # 64 bits to the block, 32 within it.
    corner = X + tl.cast(begin, tl.int64) * stride + column
    inside = (here[:, None] < stop - begin) & (c[None, :] < columns - column)
    return tl.load(corner + (here[:, None] * stride + c[None, :]), mask=inside, other=0.0)


@triton.jit
def load_columns(X, begin, stride, stop, column, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """`load_rows` transposed, [WIDTH, BLOCK]."""
    here = tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH)
    corner = X + tl.cast(begin, tl.int64) * stride + column
    inside = (here[None, :] < stop - begin) & (c[:, None] < columns - column)
    return tl.load(corner + (here[None, :] * stride + c[:, None]), mask=inside, other=0.0)


@triton.jit
def inner_products(
    X,
    Y,
    x_begin,
    y_begin,
    stride_x,
    stride_y,
    x_stop,
    y_stop,
    columns,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BLOCK, BLOCK] of <x_s, y_t> for the positions from `x_begin` and `y_begin` on; zero beyond their ends."""
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for column in range(0, columns, CHUNK):
        x = load_rows(X, x_begin, stride_x, x_stop, column, columns, BLOCK, CHUNK)
        y = load_columns(Y, y_begin, stride_y, y_stop, column, columns, BLOCK, CHUNK)
        total = add_products(total, x, y, UPCAST)
    return total


@triton.jit
def gram_kernel(
    LEFT,
    RIGHT,
    PARTIAL,
    MASS,
    BOUNDARIES,
    ENDS,
    stride_left_b,
    stride_left_t,
    stride_right_b,
    stride_right_t,
    examples,
    length,
    tiles,
    rows,
    columns,
    SEGMENTED: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_LEFT: tl.constexpr,
    CHUNK_RIGHT: tl.constexpr,
    UPCAST_LEFT: tl.constexpr,
    UPCAST_RIGHT: tl.constexpr,
):
    """PARTIAL[program] = sum of <left_s, left_t> <right_s, right_t> over a block of pairs, twice if it is below the
    diagonal; there are none above. Blocks on the diagonal also give MASS[t] = |left_t| |right_t|."""
    program = tl.program_id(0)
    example, tile = example_of_program(program, ENDS, examples, tiles, SEGMENTED, SEARCH)
    if example < examples:
        start, stop = example_bounds(example, BOUNDARIES, length, SEGMENTED)
        offset = 0 if SEGMENTED else example
        LEFT += tl.cast(offset, tl.int64) * stride_left_b
        RIGHT += tl.cast(offset, tl.int64) * stride_right_b
        # The blocks are counted row by row, and row i begins at i (i + 1) / 2; the square root may be off by one.
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
        j = tile - i * (i + 1) // 2
        s = start + i * BLOCK
        t = start + j * BLOCK
        left = inner_products(
            LEFT, LEFT, s, t, stride_left_t, stride_left_t, stop, stop, rows, BLOCK, CHUNK_LEFT, UPCAST_LEFT
        )
        right = inner_products(
            RIGHT, RIGHT, s, t, stride_right_t, stride_right_t, stop, stop, columns, BLOCK, CHUNK_RIGHT, UPCAST_RIGHT
        )
        if i == j:
            here = tl.arange(0, BLOCK)
            own = here[:, None] == here[None, :]
            mass = tl.sqrt(tl.sum(tl.where(own, left, 0.0), 1)) * tl.sqrt(tl.sum(tl.where(own, right, 0.0), 1))
            at = MASS + tl.cast(offset, tl.int64) * length + s + here
            tl.store(at, mass, mask=here < stop - s)
        weight = tl.where(i == j, 1.0, 2.0)
        tl.store(PARTIAL + program, weight * tl.sum(tl.sum(left * right, 1).to(tl.float64)))


@triton.jit
def tile_kernel(
    LEFT,
    RIGHT,
    PARTIAL,
    BOUNDARIES,
    stride_left_b,
    stride_left_t,
    stride_right_b,
    stride_right_t,
    length,
    rows,
    columns,
    SEGMENTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """PARTIAL[program] = the squared norm of a [BLOCK_M, BLOCK_N] tile of sum_t left_t^T right_t."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles = tiles_m * tl.cdiv(columns, BLOCK_N)
    example = program // tiles
    m = program % tiles % tiles_m * BLOCK_M
    n = program % tiles // tiles_m * BLOCK_N
    start, stop = example_bounds(example, BOUNDARIES, length, SEGMENTED)
    if not SEGMENTED:
        LEFT += example.to(tl.int64) * stride_left_b
        RIGHT += example.to(tl.int64) * stride_right_b
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(start, stop, CHUNK):
        left = load_columns(LEFT, begin, stride_left_t, stop, m, rows, CHUNK, BLOCK_M)
        right = load_rows(RIGHT, begin, stride_right_t, stop, n, columns, CHUNK, BLOCK_N)
        total = add_products(total, left, right, UPCAST)
    tl.store(PARTIAL + program, tl.sum(tl.sum(total * total, 1).to(tl.float64)))


@triton.jit
def mass_kernel(
    LEFT,
    RIGHT,
    MASS,
    stride_left_b,
    stride_left_t,
    stride_right_b,
    stride_right_t,
    length,
    rows,
    columns,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """MASS[b, t] = |left_t| |right_t|, or |left_t| alone; a program takes a block of positions of a row."""
    blocks = tl.cdiv(length, BLOCK)
    row = tl.program_id(0) // blocks
    begin = tl.program_id(0) % blocks * BLOCK
    squares = tl.zeros([BLOCK, WIDTH], tl.float32)
    for column in range(0, rows, WIDTH):
        x = load_rows(
            LEFT + row.to(tl.int64) * stride_left_b, begin, stride_left_t, length, column, rows, BLOCK, WIDTH
        ).to(tl.float32)
        squares += x * x
    mass = tl.sqrt(tl.sum(squares, 1))
    if PAIRED:
        squares = tl.zeros([BLOCK, WIDTH], tl.float32)
        for column in range(0, columns, WIDTH):
            x = load_rows(
                RIGHT + row.to(tl.int64) * stride_right_b, begin, stride_right_t, length, column, columns, BLOCK, WIDTH
            ).to(tl.float32)
            squares += x * x
        mass *= tl.sqrt(tl.sum(squares, 1))
    here = tl.arange(0, BLOCK)
    tl.store(MASS + row.to(tl.int64) * length + begin + here, mass, mask=here < length - begin)


@triton.jit
def lookup_kernel(
    KEY,
    ORDER,
    GRAD,
    PARTIAL,
    BOUNDARIES,
    stride_b,
    stride_t,
    length,
    columns,
    SEGMENTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """PARTIAL[program] = sum over keys of |sum of grad_t with that key|^2, for a block of columns of an example.

    KEY holds an example's keys in rising order and ORDER the positions they stood at: equal keys are runs. The sums of
    the runs in a chunk are one product with a matrix of zeros and ones; the last run goes on in the next chunk.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(columns, BLOCK_N)
    example = program // tiles
    n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    here = tl.arange(0, CHUNK)
    start, stop = example_bounds(example, BOUNDARIES, length, SEGMENTED)
    if not SEGMENTED:
        KEY += example.to(tl.int64) * length
        ORDER += example.to(tl.int64) * length
        GRAD += example.to(tl.int64) * stride_b
    carried = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(start, stop, CHUNK):
        inside = here < stop - begin
        follows = inside & (here > start - begin)
        key = tl.load(KEY + begin + here, mask=inside, other=0)
        before = tl.load(KEY + begin + here - 1, mask=follows, other=0)
        opens = (inside & ((follows == 0) | (key != before))).to(tl.int32)
        opening = tl.sum(tl.where(here == 0, opens, 0))
        run = tl.cumsum(opens, 0) - opening
        last = tl.max(run)
        position = tl.load(ORDER + begin + here, mask=inside, other=0)
        grad_at = GRAD + position[:, None] * stride_t + n[None, :]
        grad = tl.load(grad_at, mask=inside[:, None] & (n[None, :] < columns), other=0.0)
        member = tl.where((run[None, :] == here[:, None]) & inside[None, :], 1.0, 0.0)
        if not UPCAST:
            member = member.to(GRAD.dtype.element_ty)
        squares += tl.where(opening != 0, carried * carried, 0.0)
        carried = tl.where(opening != 0, 0.0, carried)
        sums = tl.where(here[:, None] == 0, carried[None, :], 0.0)
        sums = add_products(sums, member, grad, UPCAST)
        squares += tl.sum(tl.where(here[:, None] < last, sums * sums, 0.0), 0)
        carried = tl.sum(tl.where(here[:, None] == last, sums, 0.0), 0)
    tl.store(PARTIAL + program, tl.sum((squares + carried * carried).to(tl.float64)))


@triton.jit
def cross_kernel(
    LEFT,
    RIGHT,
    INDEX,
    GRAD,
    PARTIAL,
    BOUNDARIES,
    ENDS,
    stride_left_b,
    stride_left_t,
    stride_right_b,
    stride_right_t,
    stride_grad_b,
    stride_grad_t,
    examples,
    length,
    length_grad,
    tiles,
    rows,
    columns,
    SEGMENTED: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """PARTIAL[program] = sum of left_s[index_t] <right_s, grad_t> over a block of pairs (s, t) of an example."""
    program = tl.program_id(0)
    example, tile = example_of_program(program, ENDS, examples, tiles, SEGMENTED, SEARCH)
    if example < examples:
        start, stop = example_bounds(example, BOUNDARIES, length, SEGMENTED)
        start_grad, stop_grad = example_bounds(example, BOUNDARIES, length_grad, SEGMENTED)
        if not SEGMENTED:
            LEFT += example.to(tl.int64) * stride_left_b
            RIGHT += example.to(tl.int64) * stride_right_b
            GRAD += example.to(tl.int64) * stride_grad_b
            INDEX += example.to(tl.int64) * length_grad
        across = tl.cdiv(stop_grad - start_grad, BLOCK)
        s = start + tile // across * BLOCK
        t = start_grad + tile % across * BLOCK
        inner = inner_products(
            RIGHT, GRAD, s, t, stride_right_t, stride_grad_t, stop, stop_grad, columns, BLOCK, CHUNK, UPCAST
        )
        here = tl.arange(0, BLOCK)
        index = tl.load(INDEX + t + here, mask=here < stop_grad - t, other=-1)
        inside = (here[:, None] < stop - s) & (index[None, :] >= 0) & (index[None, :] < rows)
        left_at = LEFT + tl.cast(s, tl.int64) * stride_left_t + (here[:, None] * stride_left_t + index[None, :])
        left = tl.load(left_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(PARTIAL + program, tl.sum(tl.sum(left * inner, 1).to(tl.float64)))


@triton.jit
def finish_kernel(
    PARTIAL,
    MASS,
    OUT,
    BOUNDARIES,
    ENDS,
    examples,
    length,
    tiles,
    absolute,
    squared,
    relative,
    SEGMENTED: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT [3, examples] = value (the example's PARTIAL added up), bound of its error, and mass, all in float64; without
    a mass the value alone, which may then be negative."""
    example = tl.program_id(0)
    here = tl.arange(0, BLOCK)
    first = example.to(tl.int64) * tiles
    last = first + tiles
    if RAGGED:
        last = tl.load(ENDS + example).to(tl.int64)
        first = tl.load(ENDS + example - 1, mask=example > 0, other=0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, last, BLOCK):
        sums += tl.load(PARTIAL + begin + here, mask=here < last - begin, other=0.0)
    value = tl.sum(sums)
    if HAS_MASS:
        value = tl.where(value < 0, 0.0, value)
        start, stop = example_bounds(example, BOUNDARIES, length, SEGMENTED)
        if not SEGMENTED:
            MASS += example.to(tl.int64) * length
        sums = tl.zeros([BLOCK], tl.float64)
        for begin in range(start, stop, BLOCK):
            sums += tl.load(MASS + begin + here, mask=here < stop - begin, other=0.0).to(tl.float64)
        mass = tl.sum(sums)
        distance = absolute * mass
        error = relative * value + distance * (2 * tl.sqrt(value) + distance) + squared * mass * mass
        tl.store(OUT + examples + example, error)
        tl.store(OUT + 2 * examples + example, mass)
    tl.store(OUT + example, value)


@triton.jit
def moments_kernel(
    X,
    MOMENTS,
    stride_b,
    stride_t,
    positions,
    length,
    columns,
    eps,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """MOMENTS [2, B, T] = a position's mean (0 unless CENTERED) and 1 / sqrt(mean square of the difference + eps)."""
    blocks = tl.cdiv(length, BLOCK)
    row = tl.program_id(0) // blocks
    begin = tl.program_id(0) % blocks * BLOCK
    X += row.to(tl.int64) * stride_b
    mean = tl.zeros([BLOCK], tl.float32)
    if CENTERED:
        sums = tl.zeros([BLOCK, WIDTH], tl.float32)
        for column in range(0, columns, WIDTH):
            sums += load_rows(X, begin, stride_t, length, column, columns, BLOCK, WIDTH).to(tl.float32)
        mean = tl.sum(sums, 1) / columns
    squares = tl.zeros([BLOCK, WIDTH], tl.float32)
    for column in range(0, columns, WIDTH):
        x = load_rows(X, begin, stride_t, length, column, columns, BLOCK, WIDTH).to(tl.float32) - mean[:, None]
        x = tl.where(tl.arange(0, WIDTH)[None, :] < columns - column, x, 0.0)
        squares += x * x
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / columns + eps)
    here = tl.arange(0, BLOCK)
    at = MOMENTS + row.to(tl.int64) * length + begin + here
    tl.store(at, mean, mask=here < length - begin)
    tl.store(at + positions, scale, mask=here < length - begin)


@triton.jit
def position_sums_kernel(
    GRAD,
    X,
    MOMENTS,
    BOUNDARIES,
    WEIGHT,
    BIAS,
    stride_grad_b,
    stride_grad_t,
    stride_x_b,
    stride_x_t,
    positions,
    length,
    columns,
    NORMALISED: tl.constexpr,
    SEGMENTED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """BIAS[b] = sum of grad_t, and WEIGHT[b] = sum of grad_t times the normalised x_t, for a block of columns."""
    tiles = tl.cdiv(columns, WIDTH)
    example = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * WIDTH
    start, stop = example_bounds(example, BOUNDARIES, length, SEGMENTED)
    if not SEGMENTED:
        GRAD += example.to(tl.int64) * stride_grad_b
    if NORMALISED and not SEGMENTED:
        X += example.to(tl.int64) * stride_x_b
        MOMENTS += example.to(tl.int64) * length
    here = tl.arange(0, BLOCK)
    bias = tl.zeros([WIDTH], tl.float64)
    weight = tl.zeros([WIDTH], tl.float64)
    for begin in range(start, stop, BLOCK):
        grad = load_rows(GRAD, begin, stride_grad_t, stop, column, columns, BLOCK, WIDTH).to(tl.float32)
        bias += tl.sum(grad.to(tl.float64), 0)
        if NORMALISED:
            x = load_rows(X, begin, stride_x_t, stop, column, columns, BLOCK, WIDTH).to(tl.float32)
            mean = tl.load(MOMENTS + begin + here, mask=here < stop - begin, other=0.0)
            scale = tl.load(MOMENTS + positions + begin + here, mask=here < stop - begin, other=0.0)
            normalised = (x - mean[:, None]) * scale[:, None]
            weight += tl.sum((normalised * grad).to(tl.float64), 0)
    n = column + tl.arange(0, WIDTH)
    tl.store(BIAS + example.to(tl.int64) * columns + n, bias, mask=n < columns)
    if NORMALISED:
        tl.store(WEIGHT + example.to(tl.int64) * columns + n, weight, mask=n < columns)
