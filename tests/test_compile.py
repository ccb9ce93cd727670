"""Every Triton kernel ahead of time for GPUs that need not be there: compiles, does not spill, loads 16 bytes.

The ops run on CPU tensors with recorders in place of their kernels, in a process without the interpreter; each
distinct launch is then specialised as Triton's own launcher would and compiled. By hand, as a table of registers:

    python tests/test_compile.py cuda:90
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
WIDE_LOADS = re.compile(r"ld\.global\S*\.(v4\.[a-z]32|v2\.[a-z]64|v8\.[a-z]16|b128)")  # 16 bytes a lane, in PTX


class Recorder:
    """Stands where a kernel stood: keeps what it would have been launched with and launches nothing."""

    def __init__(self, name, kernel):
        self.name, self.kernel, self.launches = name, kernel, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def record_kernels():
    """Replace every `_*_kernel` of every module of the package, so that kernels added later are found as well."""
    import kernels

    recorders = []
    for found in pkgutil.iter_modules(kernels.__path__, "kernels."):
        module = importlib.import_module(found.name)
        for name, kernel in list(vars(module).items()):
            if name.startswith("_") and name.endswith("_kernel") and kernel.__module__ == found.name:
                recorders.append(Recorder(name, kernel))
                setattr(module, name, recorders[-1])
    return recorders


def run_ops():
    """Forward and backward of every op on inputs as the scripts have them; the numbers mean nothing."""
    import kernels

    def images(shape, dtype, memory_format):
        return torch.ones(shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()

    nchw, nhwc = torch.contiguous_format, torch.channels_last
    kernels.bn_moments(images((256, 64, 32, 32), torch.bfloat16, nhwc))[1].sum().backward()
    for shape, dtype, memory_format in (
        ((256, 64, 32, 32), torch.bfloat16, nhwc),
        ((256, 16, 32, 32), torch.float32, nchw),
        ((64, 2048, 7, 7), torch.float16, nhwc),
    ):
        moments = torch.ones(shape[1]), torch.ones(shape[1])
        kernels.bn_moment_loss(images(shape, dtype, memory_format), *moments).backward()
    for shape, dtype, memory_format, add in (
        ((256, 64, 32, 32), torch.bfloat16, nhwc, False),
        ((64, 256, 56, 56), torch.bfloat16, nhwc, True),
        ((256, 16, 32, 32), torch.float32, nchw, True),
        ((64, 2048, 7, 7), torch.float16, nhwc, False),
    ):
        x, vectors = images(shape, dtype, memory_format), [torch.ones(shape[1])] * 4
        y, moments = kernels.bn_act_moments(x, *vectors, residual=x.detach().requires_grad_() if add else None)
        (y.sum() + kernels.moment_distance(moments, torch.ones(shape[1]), (shape[1],))).backward()
    for shape, dtype, memory_format in (
        ((16, 16, 32, 32), torch.bfloat16, nhwc),
        ((16, 3, 224, 224), torch.float32, nchw),
        ((256, 3, 32, 32), torch.float16, nhwc),
    ):
        sum(kernels.total_variation(images(shape, dtype, memory_format))).backward()
        view, *priors = kernels.jittered_view(images(shape, dtype, memory_format), torch.tensor([1, 2, 0]))
        (view.sum() + sum(priors)).backward()
    wide = images((64, 3, 224, 224), torch.float32, nhwc)
    kernels.jittered_view(wide, torch.tensor([1, 2, 0]), torch.bfloat16)[0].sum().backward()
    for K, dtype, needs_q in ((10, torch.float32, True), (1000, torch.bfloat16, False), (21841, torch.float32, True)):
        p_logits, q_logits = (torch.ones(256, K, dtype=dtype, requires_grad=needs) for needs in (True, needs_q))
        kernels.js_divergence(p_logits, q_logits, 3.0).backward()
        kernels.kl_divergence(p_logits, q_logits).backward()
    kernels.kl_divergence(torch.ones(128, 10), torch.ones(128, 10, requires_grad=True)).backward()  # constant teacher
    for shape, dtype, memory_format in (
        ((128, 16, 32, 32), torch.bfloat16, nhwc),
        ((128, 64, 8, 8), torch.bfloat16, nhwc),
        ((128, 24, 8, 8), torch.bfloat16, nhwc),  # strides that 8 divides and 16 does not
        ((128, 6, 28, 28), torch.float32, nhwc),
        ((8, 16, 96, 96), torch.float32, nchw),
    ):
        target = torch.ones(shape[0], shape[2] * shape[3])
        kernels.attention_transfer(images(shape, dtype, memory_format), target).backward()
    kernels.attention_map(images((128, 16, 32, 32), torch.bfloat16, nhwc)).sum().backward()
    kernels.attention_map(images((4, 8, 10, 12), torch.float32, nchw)[:, :, ::2, 1:]).sum().backward()


def is_wide(args):
    """Whether a launch reads bf16 images whose channels lie side by side in multiples of 16 bytes."""
    images = [x for x in args if isinstance(x, torch.Tensor) and x.ndim == 4 and x.dtype == torch.bfloat16]
    return any(x.stride(1) == 1 and x.shape[1] % 8 == 0 for x in images)


def nvidia_usage(compiled):
    """(registers, bytes spilled) of a cubin, as Triton's own copy of cuobjdump reads them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def amd_usage(compiled):
    """(vector registers, registers spilled plus bytes of scratch) from the metadata of the assembly."""
    keys = "vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"
    usage = [int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"]).group(1)) for key in keys]
    return usage[0], sum(usage[1:])


def compile_all(target):
    """Compile each distinct launch for `target`, "cuda:90" or "hip:gfx942"; one row per compilation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from kernels import _common

    recorders = record_kernels()
    _common.runs_triton = lambda x: True
    run_ops()

    kind, arch = target.split(":")
    gpu = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
    backend = make_backend(gpu)
    rows = {}
    for recorder in recorders:
        kernel = recorder.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        for args, kwargs in recorder.launches:
            # The launcher's own steps: divisibility by 16 and the integer 1 become part of the specialisation.
            bound, specialization, _ = bind(*args, **kwargs)
            options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, None)
            key = str((recorder.name, specialization, options))
            if key in rows:
                rows[key]["must_be_wide"] |= is_wide(args)
                continue
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, attributes), target=gpu, options=options.__dict__
            )
            registers, spilled = nvidia_usage(compiled) if kind == "cuda" else amd_usage(compiled)
            largest = max((x for x in args if isinstance(x, torch.Tensor)), key=torch.Tensor.numel)
            rows[key] = {
                "kernel": recorder.name,
                "largest_input": f"{tuple(largest.shape)} {largest.dtype}".replace("torch.", ""),
                "num_warps": options.num_warps,
                "registers": registers,
                "spilled": spilled,
                "wide_loads": len(WIDE_LOADS.findall(compiled.asm["ptx"])) if kind == "cuda" else None,
                "must_be_wide": is_wide(args),
            }
    return {"kernels": sorted(r.name for r in recorders), "rows": list(rows.values())}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One process per target, side by side, all without the interpreter and without sight of a GPU."""
    started = {}
    for target in TARGETS:
        folder = tmp_path_factory.mktemp("triton")
        env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
        env |= {
            "TRITON_CACHE_DIR": str(folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with open(folder / "report.json", "w") as report, open(folder / "errors", "w") as errors:
            command = [sys.executable, __file__, target, "--json"]
            started[target] = subprocess.Popen(command, env=env, stdout=report, stderr=errors), folder
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target, reports):
    process, folder = reports[target]
    assert process.wait(timeout=600) == 0, (folder / "errors").read_text()[-3000:]
    report = json.loads((folder / "report.json").read_text())
    assert report["kernels"], "no kernel found: the rule by which they are named has changed"
    unused = set(report["kernels"]) - {row["kernel"] for row in report["rows"]}
    assert not unused, f"never launched by run_ops, so never compiled: {unused}"
    assert not [row for row in report["rows"] if row["spilled"]]
    if target.startswith("cuda"):
        must_be_wide = [row for row in report["rows"] if row["must_be_wide"]]
        assert must_be_wide, "run_ops has no bf16 channels_last images left"
        assert not [row for row in must_be_wide if not row["wide_loads"]]


def main():
    sys.path.insert(0, str(ROOT))
    report = compile_all(sys.argv[1])
    if "--json" in sys.argv:
        print(json.dumps(report))
        return
    for row in report["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
