"""Fake quantization: a tensor rounded to a grid of 2^bits values, with a straight-through gradient.

Asymmetric, with one range for a whole activation and one for each output channel of a weight. With
low <= 0 <= high (a range that lacks 0 is widened to it) and n = 2^bits - 1:

    scale = (high - low) / n,    zero = round(-low / scale)
    q     = clamp(round(x / scale) + zero, 0, n),    the integer that is stored
    y     = scale (q - zero)
    dx    = dy where low <= x <= high, else 0,    dlow = dhigh = 0

round goes to the even neighbour. 0 is on the grid, so zero padding stays exact in integers. A range
of zero width (a dead channel) gives y = 0. `fake_quantize_channels` takes low and high from the
values of each channel. All of them lie inside, so that dx = dy.

Sources: Jacob et al. 2018, "Quantization and training of neural networks for efficient
integer-arithmetic-only inference" (arXiv:1712.05877), eq. 1 and section 3; the straight-through
gradient is that of Bengio et al. 2013 (arXiv:1308.3432). PyTorch's fake_quantize_per_tensor_affine
and fake_quantize_per_channel_affine have the same values. They take scale and zero instead of a
range, keep a mask for the backward pass, and let it pass up to half a step beyond the range.

Traffic in passes over x (4 bytes an element in fp32):
    eager  fake_quantize: forward 20 (divide, round, add, two clamps, subtract, multiply at 2 each;
           two sums at 3 for the slope), backward 5.5 (two comparisons, an and, a choice; masks have
           a byte); fake_quantize_channels: forward 22, as the range reads x twice more
    fused  forward 2 (read x, write y); backward 3 (read x and dy, write dx), of channels 0
    best possible ratio, forward and backward: 25.5 / 5 = 5; of channels 27.5 / 2 = 14
"""

import torch

from kernels import _channels, _common
from kernels._channels import compute_row_offsets
from kernels._common import tl, triton

LEAST_SCALE = 1e-30  # of a range of zero width


def quantization_grid(low, high, bits):
    """scale and zero of the grid over [low, high]: see fake_quantize. Tensors of low's shape."""
    low = low.clamp_max(0)
    high = high.clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(LEAST_SCALE)
    return scale, (-low / scale).round()


def fake_quantize_ref(x, low, high, bits):
    """The definition in plain PyTorch: see fake_quantize.

    float64 stays float64; half precision is computed in fp32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    low = low.detach().to(dtype)
    high = high.detach().to(dtype)
    scale, zero = quantization_grid(low, high, bits)

    x32 = x.to(dtype)
    q = ((x32.detach() / scale).round() + zero).clamp(0, 2**bits - 1)
    inside = x32.clamp(low.clamp_max(0), high.clamp_min(0))  # its gradient is 1 inside, 0 outside
    return (scale * (q - zero) + (inside - inside.detach())).to(x.dtype)


def fake_quantize_channels_ref(x, bits):
    """The definition in plain PyTorch: see fake_quantize_channels."""
    rows = x.detach().flatten(1)
    shape = (-1, *[1] * (x.ndim - 1))
    return fake_quantize_ref(x, rows.amin(1).view(shape), rows.amax(1).view(shape), bits)


@triton.jit
def _make_grid(low, high, n_steps):
    """scale and zero of the grid over [low, high], fp32, with low <= 0 <= high."""
    scale = tl.maximum(tl.div_rn(high - low, n_steps), 1e-30)
    return scale, _round(tl.div_rn(-low, scale))


@triton.jit
def _round(x):
    """x to the nearest integer, halves to the even one.

    From 2^23 on fp32 holds integers alone, so the sum with 1.5 * 2^23 is rounded to one. Right for
    |x| < 2^22. Beyond, x comes back changed by little, and is clamped to the grid's end.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quantize(x, scale, zero, n_steps):
    """y of fp32 values; a NaN stays one."""
    q = _round(tl.div_rn(x, scale)) + zero
    q = tl.minimum(tl.maximum(q, 0.0), n_steps)
    return tl.where(x == x, scale * (q - zero), x)


@triton.jit
def _load_range(low_ptr, high_ptr):
    """low and high, fp32; a range that lacks 0 is widened to it."""
    low = tl.minimum(tl.load(low_ptr).to(tl.float32), 0.0)
    high = tl.maximum(tl.load(high_ptr).to(tl.float32), 0.0)
    return low, high


@triton.jit
def _locate_positions(
    positions,  # flat indices over up to four dimensions
    sizes,  # three: those of the dimensions but the outermost
    strides,  # four
):
    """Offsets in memory of flat indices."""
    return compute_row_offsets(
        positions, sizes[0], sizes[1], sizes[2], strides[0], strides[1], strides[2], strides[3]
    )


@triton.jit
def _load_tile(
    x_ptr,
    rows,  # (BLOCK_ROW,) flat indices over the row dimensions
    offs_col,  # (BLOCK_COL,)
    mask,  # (BLOCK_ROW, BLOCK_COL)
    sizes,  # see _locate_positions
    strides,  # along the row dimensions
    stride_col,
):
    """Values of a tile, (BLOCK_ROW, BLOCK_COL) fp32; 0 outside the mask."""
    offs = _locate_positions(rows, sizes, strides)[:, None] + offs_col[None, :] * stride_col
    return tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(
    y_ptr,
    y,  # (BLOCK_ROW, BLOCK_COL) fp32
    rows,  # the others as of _load_tile
    offs_col,
    mask,
    sizes,
    strides,
    stride_col,
):
    """Store a tile in the dtype of its tensor."""
    offs = _locate_positions(rows, sizes, strides)[:, None] + offs_col[None, :] * stride_col
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_values(
    x_ptr,  # at a channel
    values,  # (BLOCK,) flat indices over the channel's dimensions
    n_values,  # of the channel
    sizes,  # see _locate_positions
    strides,
):
    """Values of a channel, (BLOCK,) fp32; 0, which belongs to every range, beyond the last one."""
    offs = _locate_positions(values, sizes, strides)
    return tl.load(x_ptr + offs, mask=values < n_values, other=0.0).to(tl.float32)


@triton.jit
def _store_values(
    y_ptr,  # at a channel
    y,  # (BLOCK,) fp32
    values,  # the others as of _load_values
    n_values,
    sizes,
    strides,
):
    """Store values of a channel in the dtype of their tensor."""
    offs = _locate_positions(values, sizes, strides)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=values < n_values)


@triton.jit
def _fake_quantize_fwd_kernel(
    y_ptr,  # out, shape and dtype of x
    x_ptr,  # values, in up to five dimensions
    low_ptr,  # () least value of the range
    high_ptr,  # () greatest value
    n_rows,  # positions along the rows
    n_columns,  # positions along the columns
    rows_per_program,  # a multiple of BLOCK_ROW
    size_1,  # sizes of the row dimensions but the outermost
    size_2,
    size_3,
    stride_y0,  # strides of y along the row dimensions
    stride_y1,
    stride_y2,
    stride_y3,
    stride_ycol,  # along the columns
    stride_x0,  # the same five of x
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,
    n_steps,  # 2^bits - 1, fp32
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    offs_col = tl.program_id(0).to(tl.int64) * BLOCK_COL + tl.arange(0, BLOCK_COL)
    mask_col = offs_col < n_columns
    first_row = tl.program_id(1).to(tl.int64) * rows_per_program
    low, high = _load_range(low_ptr, high_ptr)
    scale, zero = _make_grid(low, high, n_steps)
    sizes = (size_1, size_2, size_3)
    strides_x = (stride_x0, stride_x1, stride_x2, stride_x3)
    strides_y = (stride_y0, stride_y1, stride_y2, stride_y3)

    for start in range(0, rows_per_program, BLOCK_ROW):
        rows = first_row + start + tl.arange(0, BLOCK_ROW)
        mask = (rows < n_rows)[:, None] & mask_col[None, :]
        x = _load_tile(x_ptr, rows, offs_col, mask, sizes, strides_x, stride_xcol)
        y = _quantize(x, scale, zero, n_steps)
        _store_tile(y_ptr, y, rows, offs_col, mask, sizes, strides_y, stride_ycol)


@triton.jit
def _fake_quantize_bwd_dx_kernel(
    dx_ptr,  # out, shape and dtype of x
    x_ptr,  # values, in up to five dimensions
    dy_ptr,  # gradient of y
    low_ptr,  # () least value of the range
    high_ptr,  # () greatest value
    n_rows,  # positions along the rows
    n_columns,  # positions along the columns
    rows_per_program,  # a multiple of BLOCK_ROW
    size_1,  # sizes of the row dimensions but the outermost
    size_2,
    size_3,
    stride_dx0,  # strides of dx along the row dimensions
    stride_dx1,
    stride_dx2,
    stride_dx3,
    stride_dxcol,  # along the columns
    stride_x0,  # the same five of x
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,
    stride_dy0,  # the same five of dy
    stride_dy1,
    stride_dy2,
    stride_dy3,
    stride_dycol,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    offs_col = tl.program_id(0).to(tl.int64) * BLOCK_COL + tl.arange(0, BLOCK_COL)
    mask_col = offs_col < n_columns
    first_row = tl.program_id(1).to(tl.int64) * rows_per_program
    low, high = _load_range(low_ptr, high_ptr)
    sizes = (size_1, size_2, size_3)
    strides_x = (stride_x0, stride_x1, stride_x2, stride_x3)
    strides_dy = (stride_dy0, stride_dy1, stride_dy2, stride_dy3)
    strides_dx = (stride_dx0, stride_dx1, stride_dx2, stride_dx3)

    for start in range(0, rows_per_program, BLOCK_ROW):
        rows = first_row + start + tl.arange(0, BLOCK_ROW)
        mask = (rows < n_rows)[:, None] & mask_col[None, :]
        x = _load_tile(x_ptr, rows, offs_col, mask, sizes, strides_x, stride_xcol)
        dy = _load_tile(dy_ptr, rows, offs_col, mask, sizes, strides_dy, stride_dycol)
        dx = tl.where((x >= low) & (x <= high), dy, 0.0)
        _store_tile(dx_ptr, dx, rows, offs_col, mask, sizes, strides_dx, stride_dxcol)


@triton.jit
def _fake_quantize_channels_fwd_kernel(
    y_ptr,  # out, shape and dtype of x
    x_ptr,  # (C, *rest) weights, in up to five dimensions
    n_values,  # of a channel
    size_1,  # sizes of a channel's dimensions but the outermost
    size_2,
    size_3,
    stride_y0,  # strides of y along a channel's dimensions
    stride_y1,
    stride_y2,
    stride_y3,
    stride_yc,  # from channel to channel
    stride_x0,  # the same five of x
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xc,
    n_steps,  # 2^bits - 1, fp32
    BLOCK: tl.constexpr,  # values of a channel that are held; those beyond are read twice
):
    channel = tl.program_id(0).to(tl.int64)
    x_ptr += channel * stride_xc
    y_ptr += channel * stride_yc
    sizes = (size_1, size_2, size_3)
    strides_x = (stride_x0, stride_x1, stride_x2, stride_x3)
    strides_y = (stride_y0, stride_y1, stride_y2, stride_y3)

    held = tl.arange(0, BLOCK)
    x = _load_values(x_ptr, held, n_values, sizes, strides_x)
    lows = tl.minimum(x, 0.0)  # 0 belongs to every range
    highs = tl.maximum(x, 0.0)
    for start in range(BLOCK, n_values, BLOCK):
        values = start + tl.arange(0, BLOCK)
        more = _load_values(x_ptr, values, n_values, sizes, strides_x)
        lows = tl.minimum(lows, more)
        highs = tl.maximum(highs, more)
    scale, zero = _make_grid(tl.min(lows, 0), tl.max(highs, 0), n_steps)

    y = _quantize(x, scale, zero, n_steps)
    _store_values(y_ptr, y, held, n_values, sizes, strides_y)
    for start in range(BLOCK, n_values, BLOCK):
        values = start + tl.arange(0, BLOCK)
        more = _load_values(x_ptr, values, n_values, sizes, strides_x)
        y = _quantize(more, scale, zero, n_steps)
        _store_values(y_ptr, y, values, n_values, sizes, strides_y)


# The most values of a channel that are held at once: 16 a thread. A channel of ResNet-50 has up to
# 4,608, which are read twice, the second time from the cache. Not yet measured on a GPU.
_BLOCK = 4096
_WARPS = (  # (most values of a block, warps): 8 values a lane, 16 for 4096
    (256, 1),
    (1024, 4),
    (4096, 8),
)


def _plan(*tensors):
    """Grid, sizes, strides and blocks of a launch over all values of tensors of one shape."""
    flat = [x.unsqueeze(1) for x in tensors]  # as if of one channel
    strides = [x.stride() for x in flat]
    launch = _channels.plan(_channels.BACKWARD_PROGRAMS, flat[0].shape, *strides)
    n_rows, n_columns, _, rows_per_program, *inner_sizes = launch.sizes
    sizes = (n_rows, n_columns, rows_per_program, *inner_sizes)
    blocks = {name: launch.blocks[name] for name in ("BLOCK_ROW", "BLOCK_COL", "num_warps")}
    own_strides = [stride for of_tensor in launch.strides for stride in of_tensor[:5]]
    return launch.grid, sizes, own_strides, blocks


def _quantize_on_gpu(x, low, high, bits):
    y = torch.empty_like(x)
    grid, sizes, strides, blocks = _plan(y, x)
    with _common.on_device_of(x):
        _fake_quantize_fwd_kernel[grid](
            y, x, low, high, *sizes, *strides, float(2**bits - 1), **blocks
        )
    return y


def _compute_dx_on_gpu(x, dy, low, high):
    dx = torch.empty_like(x)
    grid, sizes, strides, blocks = _plan(dx, x, dy)
    with _common.on_device_of(x):
        _fake_quantize_bwd_dx_kernel[grid](dx, x, dy, low, high, *sizes, *strides, **blocks)
    return dx


def _quantize_channels_on_gpu(x, bits):
    y = torch.empty_like(x)
    n_values = x[0].numel()
    absent = (1, [0, 0])
    # a channel's dimensions, those that lie at one step merged
    dims = _channels.merge_dimensions(
        x.transpose(0, 1).shape, [y.transpose(0, 1).stride(), x.transpose(0, 1).stride()]
    )
    dims += [absent] * (4 - len(dims))
    strides = []
    for i, tensor in enumerate((y, x)):
        strides += [stride[i] for _, stride in dims]
        strides.append(tensor.stride(0))

    block = min(triton.next_power_of_2(n_values), _BLOCK)
    num_warps = next(warps for most, warps in _WARPS if block <= most)
    with _common.on_device_of(x):
        _fake_quantize_channels_fwd_kernel[(len(x),)](
            y,
            x,
            n_values,
            *[size for size, _ in dims[1:]],
            *strides,
            float(2**bits - 1),
            BLOCK=block,
            num_warps=num_warps,
        )
    return y


# The CPU path: one new tensor, all steps in place. PyTorch's own op takes ten times as long.


def _quantize_on_cpu(x, low, high, bits):
    scale, zero = quantization_grid(low.float(), high.float(), bits)
    y = x.float() / scale
    y.round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale)
    return y.to(x.dtype)


def _compute_dx_on_cpu(x, dy, low, high):
    x32 = x.float()
    dx = x32.clamp_min(low.float().clamp_max(0))
    dx.clamp_max_(high.float().clamp_min(0))
    return dx.eq_(x32).mul_(dy).to(x.dtype)  # 1 where nothing was clipped


def _quantize_channels_on_cpu(x, bits):
    low, high = x.flatten(1).aminmax(dim=1)
    shape = (-1, *[1] * (x.ndim - 1))
    return _quantize_on_cpu(x, low.view(shape), high.view(shape), bits)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high, bits):
        ctx.save_for_backward(x, low, high)
        if _common.runs_triton(x):
            return _quantize_on_gpu(x, low, high, bits)
        return _quantize_on_cpu(x, low, high, bits)

    @staticmethod
    def backward(ctx, dy):
        _common.refuse_double_backward("fake_quantize")
        x, low, high = ctx.saved_tensors
        if _common.runs_triton(x):
            return _compute_dx_on_gpu(x, dy, low, high), None, None, None
        return _compute_dx_on_cpu(x, dy, low, high), None, None, None


class _FakeQuantizeChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits):
        if _common.runs_triton(x):
            return _quantize_channels_on_gpu(x, bits)
        return _quantize_channels_on_cpu(x, bits)

    @staticmethod
    def backward(ctx, dy):
        _common.refuse_double_backward("fake_quantize_channels")
        return dy, None


def _check_bits(op, bits):
    if isinstance(bits, bool) or not isinstance(bits, int):
        kind = type(bits).__name__
        raise TypeError(f"{op}: expected bits to be a python integer, got {kind}; pass an int")
    if not 1 <= bits <= 16:
        raise ValueError(f"{op}: expected bits from 1 to 16, got {bits}; 8 is usual")


def fake_quantize(x, low, high, bits):
    """Round a tensor to the 2^bits values of a grid over one range, with a straight-through slope.

    y = scale (q - zero) with q = clamp(round(x / scale) + zero, 0, 2^bits - 1),
    scale = (high - low) / (2^bits - 1), zero = round(-low / scale).

    Args:
        x: values such as an activation, 1-D to 5-D; float32, float16 or bfloat16, any strides.
        low: () least value of the range, in units of x. A constant. Above 0 it counts as 0.
        high: () greatest value, likewise. Below 0 it counts as 0.
        bits: of the integers q, from 1 to 16.

    Returns:
        y of the shape and dtype of x, on the grid but for the rounding of half precision.

    Raises:
        TypeError: a tensor is none or of another dtype; bits is no python integer.
        ValueError: x is empty or of more than 5 dimensions; low or high has more than one value or
            needs a gradient; tensors lie on several devices; bits is out of range.

    Note:
        Differentiable once, in x: the gradient passes where low <= x <= high and is 0 elsewhere. It
        has the memory layout of x. low and high stay on their device, so the host does not wait. A
        NaN stays NaN. Infinity becomes the range's end. x is kept for the backward pass.

    Example:
        >>> x = torch.tensor([-1.0, 0.2, 0.4, 1.0, 9.0], requires_grad=True)
        >>> y = fake_quantize(x, torch.tensor(0.0), torch.tensor(1.5), bits=2)  # 0, 0.5, 1, 1.5
        >>> y.tolist()
        [0.0, 0.0, 0.5, 1.0, 1.5]
        >>> y.sum().backward()
        >>> x.grad.tolist()
        [0.0, 1.0, 1.0, 1.0, 0.0]
    """
    _common.check_float("fake_quantize", x=x, low=low, high=high)
    _check_bits("fake_quantize", bits)
    if not 1 <= x.ndim <= 5:
        got = tuple(x.shape)
        raise ValueError(f"fake_quantize: expected x of 1 to 5 dimensions, got {got}; reshape it")
    for name, end in (("low", low), ("high", high)):
        if end.ndim != 0:
            got = tuple(end.shape)
            raise ValueError(f"fake_quantize: expected {name} of shape (), got {got}; pass one")
        if end.requires_grad:
            raise ValueError(f"fake_quantize: expected a constant {name}; detach it")
    return _FakeQuantize.apply(x, low, high, bits)


def fake_quantize_channels(x, bits):
    """Round each output channel of a weight to 2^bits values between its minimum and maximum.

    For every i, fake_quantize(x[i], x[i].min(), x[i].max(), bits).

    Args:
        x: (C, *rest) a weight with its output channels first, 2-D to 5-D; float32, float16 or
            bfloat16, any strides.
        bits: of the integers, from 1 to 16.

    Returns:
        y of the shape and dtype of x.

    Raises:
        TypeError: x is no tensor or of another dtype; bits is no python integer.
        ValueError: x is empty or not 2-D to 5-D; bits is out of range.

    Note:
        Differentiable once: the gradient of x is that of y, as no value lies outside its range, and
        the range counts as a constant. It has the strides of the gradient of y. Nothing is kept
        for the backward pass. Values must be finite.

    Example:
        >>> x = torch.tensor([[-1.0, 0.4, 2.0], [0.0, 0.0, 0.0]])
        >>> fake_quantize_channels(x, bits=2).tolist()  # -1, 0, 1, 2; a dead channel
        [[-1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    """
    _common.check_float("fake_quantize_channels", x=x)
    _check_bits("fake_quantize_channels", bits)
    if not 2 <= x.ndim <= 5:
        problem = f"expected x of shape (C, *rest), 2-D to 5-D, got {tuple(x.shape)}"
        raise ValueError(f"fake_quantize_channels: {problem}; reshape it")
    return _FakeQuantizeChannels.apply(x, bits)
