"""Every Triton kernel compiles for GPUs that need not be there, spills nothing, loads 16 bytes.

The ops run on CPU tensors with recorders in place of their kernels, in a process without the
interpreter. Each distinct launch is then specialised as Triton's own launcher would do it, and
compiled ahead of time: all of them for sm_90, the first of each kernel for the other targets, all
for these too with `pytest -m slow`. By hand, as a table of registers:

    python tests/test_compile.py cuda:90
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["cuda:80", "cuda:100", "hip:gfx942"]  # besides cuda:90
WIDE_LOADS = re.compile(  # PTX instructions that load 16 bytes a lane
    r"ld\.global\S*\.(v4\.[a-z]32|v2\.[a-z]64|v8\.[a-z]16|b128)|cp\.async\.cg\.shared\.global"
)

BFLOAT = torch.bfloat16
NCHW = torch.contiguous_format
NHWC = torch.channels_last


def images(shape, dtype, memory_format):
    x = torch.ones(shape, dtype=dtype).contiguous(memory_format=memory_format)
    return x.requires_grad_()


def run_with_two_readers(x, residual):
    """A layer whose output two others read, as where a residual branches off."""
    layer = importlib.import_module("kernels.bn_act_moments")
    affine = torch.ones(3, x.shape[1])
    y, _, again = layer.bn_act_moments_folded(x, affine, residual, "relu", n_uses=2)
    (y.sum() + again.sum()).backward()


def run_batchnorm_ops():
    import kernels

    kernels.bn_moments(images((256, 64, 32, 32), BFLOAT, NHWC))[1].sum().backward()

    for shape, dtype, memory_format in (
        ((256, 64, 32, 32), BFLOAT, NHWC),
        ((256, 16, 32, 32), torch.float32, NCHW),
        ((64, 2048, 7, 7), torch.float16, NHWC),
    ):
        x = images(shape, dtype, memory_format)
        C = shape[1]
        kernels.bn_moment_loss(x, torch.ones(C), torch.ones(C)).backward()

    for shape, dtype, memory_format, has_residual in (
        ((256, 64, 32, 32), BFLOAT, NHWC, False),
        ((64, 256, 56, 56), BFLOAT, NHWC, True),
        ((256, 16, 32, 32), torch.float32, NCHW, True),
        ((64, 2048, 7, 7), torch.float16, NHWC, False),
    ):
        x = images(shape, dtype, memory_format)
        residual = images(shape, dtype, memory_format) if has_residual else None
        C = shape[1]
        vectors = [torch.ones(C)] * 4
        y, moments = kernels.bn_act_moments(x, *vectors, residual=residual)
        distance = sum(
            kernels.moment_distance(moments, torch.ones(C), (C,), form=form)
            for form in ("l2", "relative", "kl")
        )
        (y.sum() + distance).backward()

        run_with_two_readers(x, residual)

    x = images((64, 96, 56, 56), BFLOAT, NHWC)
    residual = images((64, 96, 56, 56), BFLOAT, NHWC)
    vectors = [torch.ones(96)] * 4
    for activation, added in (
        ("none", None),
        ("none", residual),
        ("relu6", None),
        ("silu", None),
        ("silu", residual),
        ("hardswish", residual),
    ):
        options = {"residual": added, "activation": activation}
        kernels.bn_act_moments(x, *vectors, **options)[0].sum().backward()


def run_pointwise_ops():
    import kernels

    for shape, n_inputs, dtype, memory_format, has_residual, activation in (
        ((64, 256, 56, 56), 64, BFLOAT, NHWC, True, "relu"),
        ((64, 64, 56, 56), 256, BFLOAT, NHWC, False, "relu"),
        ((64, 2048, 7, 7), 512, torch.float16, NHWC, True, "relu"),
        ((64, 96, 112, 112), 16, BFLOAT, NHWC, False, "relu6"),
        ((64, 24, 56, 56), 96, BFLOAT, NHWC, True, "none"),
        ((64, 240, 28, 28), 40, BFLOAT, NHWC, False, "silu"),
        ((16, 64, 32, 32), 64, torch.float32, NCHW, False, "hardswish"),
    ):
        x = images((shape[0], n_inputs, *shape[2:]), dtype, memory_format)
        conv_weight = torch.ones(shape[1], n_inputs, 1, 1, dtype=dtype)
        residual = images(shape, dtype, memory_format) if has_residual else None
        vectors = [torch.ones(shape[1])] * 4
        options = {"residual": residual, "activation": activation}
        y, moments = kernels.pointwise_bn_act_moments(x, conv_weight, *vectors, **options)
        torch.autograd.backward((y, moments), (torch.ones_like(y), torch.ones_like(moments)))

    # two readers; fp32 with a residual, exactly, as the check of fuse_batchnorm runs it
    op = importlib.import_module("kernels.pointwise_bn_act_moments")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    for dtype in (BFLOAT, torch.float32):
        x = images((64, 64, 56, 56), dtype, NHWC)
        residual = images((64, 256, 56, 56), dtype, NHWC)
        conv_weight = torch.ones(256, 64, 1, 1, dtype=dtype)
        affine = torch.ones(3, 256)
        y, _, again = op.pointwise_bn_act_moments_folded(x, conv_weight, affine, residual, n_uses=2)
        torch.autograd.backward((y, again), (torch.ones_like(y), torch.ones_like(y)))


def run_image_ops():
    import kernels

    draw = torch.tensor([1, 2, 0])
    for shape, dtype, memory_format in (
        ((16, 16, 32, 32), BFLOAT, NHWC),
        ((16, 3, 224, 224), torch.float32, NCHW),
        ((256, 3, 32, 32), torch.float16, NHWC),
    ):
        sum(kernels.total_variation(images(shape, dtype, memory_format))).backward()
        view, *priors = kernels.jittered_view(images(shape, dtype, memory_format), draw)
        (view.sum() + sum(priors)).backward()

    x = images((64, 3, 224, 224), torch.float32, NHWC)
    kernels.jittered_view(x, draw, BFLOAT)[0].sum().backward()


def run_divergences():
    import kernels

    for K, dtype, needs_q in (
        (10, torch.float32, True),
        (1000, BFLOAT, False),
        (21841, torch.float32, True),
    ):
        p_logits = torch.ones(256, K, dtype=dtype, requires_grad=True)
        q_logits = torch.ones(256, K, dtype=dtype, requires_grad=needs_q)
        kernels.js_divergence(p_logits, q_logits, 3.0).backward()
        kernels.kl_divergence(p_logits, q_logits).backward()

    for p_dtype, q_dtype in ((BFLOAT, torch.float32), (torch.float16, BFLOAT)):
        for K in (1000, 21841):
            p_logits = torch.ones(256, K, dtype=p_dtype, requires_grad=True)
            q_logits = torch.ones(256, K, dtype=q_dtype, requires_grad=True)
            kernels.js_divergence(p_logits, q_logits).backward()
            kernels.kl_divergence(p_logits, q_logits).backward()

    teacher_logits = torch.ones(128, 10)
    student_logits = torch.ones(128, 10, requires_grad=True)
    kernels.kl_divergence(teacher_logits, student_logits).backward()


def run_attention_ops():
    import kernels

    for shape, dtype, memory_format in (
        ((128, 16, 32, 32), BFLOAT, NHWC),
        ((128, 64, 8, 8), BFLOAT, NHWC),
        ((128, 24, 8, 8), BFLOAT, NHWC),  # strides that 8 divides and 16 does not
        ((128, 6, 28, 28), torch.float32, NHWC),
        ((8, 16, 96, 96), torch.float32, NCHW),
    ):
        target = torch.ones(shape[0], shape[2] * shape[3])
        kernels.attention_transfer(images(shape, dtype, memory_format), target).backward()

    kernels.attention_map(images((128, 16, 32, 32), BFLOAT, NHWC)).sum().backward()
    sliced = images((4, 8, 10, 12), torch.float32, NCHW)[:, :, ::2, 1:]
    kernels.attention_map(sliced).sum().backward()


def run_quantizers():
    import kernels

    ends = torch.zeros(()), torch.ones(())
    for shape, dtype, memory_format in (
        ((256, 64, 32, 32), BFLOAT, NHWC),
        ((256, 16, 32, 32), torch.float32, NCHW),
        ((64, 2048, 7, 7), torch.float16, NHWC),
    ):
        kernels.fake_quantize(images(shape, dtype, memory_format), *ends, 4).sum().backward()
    sliced = images((4, 8, 10, 12), torch.float32, NCHW)[:, :, ::2, 1:]
    kernels.fake_quantize(sliced, *ends, 8).sum().backward()

    for shape, memory_format in (
        ((64, 16, 3, 3), NHWC),
        ((16, 3, 3, 3), NCHW),
        ((512, 512, 3, 3), NHWC),
        ((2048, 1024, 1, 1), NCHW),
    ):
        kernels.fake_quantize_channels(images(shape, torch.float32, memory_format), 4)
    kernels.fake_quantize_channels(torch.ones(1000, 2048, dtype=BFLOAT), 8)


def run_ops():
    """Forward and backward of every op on inputs as the scripts have them.

    The numbers mean nothing, as no kernel runs.
    """
    run_batchnorm_ops()
    run_pointwise_ops()
    run_image_ops()
    run_divergences()
    run_attention_ops()
    run_quantizers()


def is_wide(args):
    """Whether a launch reads bf16 images whose channels lie side by side, in groups of 16 bytes."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    images = [x for x in tensors if x.ndim in (2, 4) and x.dtype == BFLOAT]
    images = [x for x in images if x.ndim == 4 or len(x) > 1000]  # no logits and no weights
    return any(x.stride(1) == 1 and x.shape[1] % 8 == 0 for x in images)


def nvidia_usage(compiled):
    """(registers, bytes spilled) of a cubin, as Triton's own copy of cuobjdump reads them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def amd_usage(compiled):
    """(vector registers, registers spilled plus bytes of scratch), from the assembly's metadata."""

    def read(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))

    spilled = read("vgpr_spill_count") + read("sgpr_spill_count")
    return read("vgpr_count"), spilled + read("private_segment_fixed_size")


def compile_all(target, first_only):
    """Compile each distinct launch, or the first of each kernel; a row for each.

    Args:
        target: "cuda:90" or "hip:gfx942".
        first_only: whether to compile the first launch of each kernel alone.
    """
    import triton
    from helpers import record_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from kernels import _common

    recorders = record_kernels(pytest.MonkeyPatch())
    _common.runs_triton = lambda x: True
    run_ops()

    kind, arch = target.split(":")
    gpu = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
    backend = make_backend(gpu)

    rows = {}
    for recorder in recorders:
        kernel = recorder.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        launches = recorder.launches
        if first_only:
            launches = launches[:1]
        for _, args, kwargs in launches:
            # As the launcher does: divisibility by 16 and the integer 1 become part of the key.
            bound, specialization, _ = bind(*args, **kwargs)
            options, signature, constants, attributes = kernel._pack_args(
                backend, kwargs, bound, specialization, None
            )
            key = str((recorder.name, specialization, options))
            if key in rows:
                rows[key]["must_be_wide"] |= is_wide(args)
                continue

            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=gpu, options=options.__dict__)
            if kind == "cuda":
                registers, spilled = nvidia_usage(compiled)
                wide_loads = len(WIDE_LOADS.findall(compiled.asm["ptx"]))
            else:
                registers, spilled = amd_usage(compiled)
                wide_loads = None
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            largest = max(tensors, key=torch.Tensor.numel)
            rows[key] = {
                "kernel": recorder.name,
                "largest_input": f"{tuple(largest.shape)} {largest.dtype}".replace("torch.", ""),
                "num_warps": options.num_warps,
                "registers": registers,
                "spilled": spilled,
                "wide_loads": wide_loads,
                "must_be_wide": is_wide(args),
            }
    return {"kernels": sorted(r.name for r in recorders), "rows": list(rows.values())}


def report_launches(target, folder, *options):
    """What a process without the interpreter and without a GPU says of a target, as a dict."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    env["TRITON_CACHE_DIR"] = str(folder / "cache")
    env["CUDA_VISIBLE_DEVICES"] = ""
    env["PYTHONPATH"] = str(ROOT)
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, __file__, target, "--json", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check_launches(report, target):
    """All kernels were compiled; none spills; bf16 images in channels_last are read in 16 bytes."""
    assert report["kernels"], "no kernel found: their names do not end in _kernel any more"
    unused = set(report["kernels"]) - {row["kernel"] for row in report["rows"]}
    assert not unused, f"never launched by run_ops, so never compiled: {unused}"

    assert not [row for row in report["rows"] if row["spilled"]]
    if target.startswith("cuda"):
        must_be_wide = [row for row in report["rows"] if row["must_be_wide"]]
        assert must_be_wide, "run_ops has no bf16 channels_last images left"
        assert not [row for row in must_be_wide if not row["wide_loads"]]


def test_every_launch_compiles(tmp_path):
    check_launches(report_launches("cuda:90", tmp_path), "cuda:90")


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target, tmp_path):
    check_launches(report_launches(target, tmp_path, "--first"), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles_for_other_targets(target, tmp_path):
    check_launches(report_launches(target, tmp_path), target)


def main():
    sys.path.insert(0, str(ROOT))
    os.environ["TRITON_INTERPRET"] = "0"  # kernels need Triton here, and not its interpreter
    report = compile_all(sys.argv[1], first_only="--first" in sys.argv)
    if "--json" in sys.argv:
        print(json.dumps(report))
        return
    for row in report["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
