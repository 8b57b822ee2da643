"""Every Triton kernel, compiled without a GPU for the cards that users own, as it is launched for the released sizes.

No feature that a card lacks, no more shared memory than a program of a GeForce card may have, and few spilled
registers. What each kernel needs is printed.
"""

import ast
import importlib.util
import pkgutil
import re
import subprocess
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed; CPU-only installs do not need it")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import alpacache  # noqa: E402
from alpacache.gpu import checksum, squares  # noqa: E402
from alpacache.prefix import attention_kernels, encode_kernels, layered, transform_kernels  # noqa: E402
from alpacache.prefix.calibration import KVSample, calibrate  # noqa: E402
from alpacache.prefix.codecs import tensor_codec  # noqa: E402
from alpacache.prefix.layout import PrefixLayout  # noqa: E402
from alpacache.prefix.packed import PackedPrefixes  # noqa: E402
from alpacache.training import adamw8_update  # noqa: E402
from cache_store import CODECS  # noqa: E402

CARDS = {80: 108, 86: 82, 89: 128, 120: 170}
"""Capability -> multiprocessors of an A100, an RTX 3090, a 4090 and a 5090."""
SHARED_LIMIT = 99 * 1024
SPILLED = {"prefix_backward": 96, "merge_forward": 96, "merge_backward": 96, "finish_layers": 32, "group_vectors": 40}
"""Most bytes of local memory a thread, of kernels that take all 255 registers, and of cosines; others take none."""
REGISTERS = {"fold": 96, "compare": 96, "group_extremes": 128, "group_energy": 128, "fit": 128, "pack_plane": 128}
TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.float16: "fp16", torch.uint8: "u8", torch.uint16: "u16",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
SETTINGS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
ALIGNED = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """What Triton compiles for a launch."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, object], ...]
    aligned: tuple[int, ...]
    settings: tuple[tuple[str, object], ...]


def kernels():
    """All functions of the package that Triton compiles: (module, name) -> function."""
    found = {}
    for info in pkgutil.walk_packages(alpacache.__path__, "alpacache."):
        file = Path(importlib.util.find_spec(info.name).origin)
        if "@triton.jit" in file.read_text():
            module = importlib.import_module(info.name)
            found |= {(module, name): value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return found


def as_launched(kernel, arguments, options):
    """Specialised on the arguments as Triton does: 1 and None are constants, multiples of 16 are known to be."""
    options, signature, constants, aligned = dict(options), {}, {}, []
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        special = not parameter.do_not_specialize
        if value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[place] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], number = f"*{TYPES[value.dtype]}", value.data_ptr()
        elif isinstance(value, float):
            signature[parameter.name], number = "fp32", 1
        else:
            signature[parameter.name], number = "i32" if -(2**31) <= value < 2**31 else "i64", value
        if special and not parameter.do_not_specialize_on_alignment and number % 16 == 0:
            aligned.append(place)
    signature |= dict.fromkeys(options, "constexpr")
    constants |= {kernel.arg_names.index(name): value for name, value in options.items()}
    ordered = tuple((name, signature[name]) for name in kernel.arg_names)
    constants = tuple(sorted(constants.items()))
    return Launch(kernel, ordered, constants, tuple(aligned), tuple(settings.items()))


class Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(as_launched(self.kernel, arguments, options))


def attend(codec, samples, layers, *, causal):
    """Forward and backward of layers of four cameras: encoded ones are decoded first."""
    layout = PrefixLayout(layers=36, kv_heads=8, head_dim=128, codec=CODECS.get(codec))
    packed = PackedPrefixes(
        layout=layout,
        data=torch.empty(samples, 256, dtype=torch.uint8),
        rows=torch.zeros(samples, dtype=torch.int64),
        lengths=torch.full((samples,), 3000),
        starts=torch.zeros(samples, dtype=torch.int64),
        longest=3050,
        dtype=torch.bfloat16,
    )
    query, key = (torch.empty(samples, 64, heads, 128, dtype=torch.bfloat16).transpose(1, 2) for heads in (16, 8))
    for layer in layers:
        output, lse = attention_kernels.forward(query, key, key, packed, layer, 0.1, causal=causal)
        attention_kernels.backward(query, query, key, key, output, lse, packed, layer, 0.1, causal=causal)


def transform():
    """Encoding and decoding of one layer with a basis that is learnt from noise."""
    tokens, layout = 100, PrefixLayout(layers=1, kv_heads=8, head_dim=128, codec=None)
    positions = torch.arange(tokens).expand(3, -1)
    generator = torch.Generator().manual_seed(0)
    kv = [torch.randn(layout.shape(tokens), generator=generator).bfloat16() for _ in range(2)]
    samples = [KVSample(kv=one, positions=positions) for one in kv]
    half = {"angles": torch.ones(64), "axes": torch.arange(64) % 3, "device": torch.device("cpu")}
    codec = calibrate(samples, rate=2.2, **half)
    transform_kernels.encode(codec, kv[0], positions)
    packed = PackedPrefixes(
        layout=layout,
        data=torch.empty(2, 256, dtype=torch.uint8),
        rows=torch.zeros(2, dtype=torch.int64),
        lengths=torch.full((2,), tokens),
        starts=torch.zeros(2, dtype=torch.int64),
        longest=tokens,
        dtype=torch.bfloat16,
    )
    scratch = torch.empty(2, 2 * layout.size_bytes(tokens), dtype=torch.uint8)
    transform_kernels.decode(codec, packed, 0, [scratch])


def update(dtype, count, first=0):
    """The update of a parameter, or of a shard of one."""
    weight = torch.zeros(count, dtype=dtype)
    state = adamw8_update.Moments.empty("w", weight)
    scalars = adamw8_update.Scalars(
        lr=torch.tensor(0.1),
        scale=torch.tensor(1.0),
        skip=torch.tensor(False),
        step=torch.tensor(1),
        bias=torch.zeros(2, dtype=torch.float64),
    )
    hyper = adamw8_update.Hyperparameters(betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
    part = slice(first, count)
    shard = state.shard(part) if first else state
    one = adamw8_update.Part(weight=weight[part], grad=weight[part], state=shard)
    adamw8_update.TritonUpdates(weight.device, one_by_one=False)({"w": one}, scalars, hyper, lambda name: None)


def launches(monkeypatch, multiprocessors):
    """What training and extraction launch on a card, each once."""
    found = []
    with monkeypatch.context() as patch:
        for (module, name), kernel in kernels().items():
            patch.setattr(module, name, Recorder(kernel, found))
        patch.setattr(attention_kernels, "_multiprocessors", lambda device: multiprocessors)
        patch.setattr(layered, "passes_on", lambda device: encode_kernels)
        attend("bf16", 1, [3], causal=False)  # a prefix is split over most programs
        attend("bf16", 16, [3], causal=True)  # over one
        for codec in CODECS:
            attend(codec, 2, range(36), causal=False)
            tensor_codec(CODECS[codec]).encode(torch.zeros(2, 2, 8, 100, 128, dtype=torch.bfloat16))
        transform()
        chunks, cpu = [(0, 5, 1000, 0), (1, 7, 1000, 0)], torch.device("cpu")
        table = checksum.ChunkTable.build(chunks, device=cpu, programs=3)
        checksum.check_rows(torch.zeros(2, 1024, dtype=torch.uint8), table, torch.zeros(2, dtype=torch.int32))
        for dtype in (torch.bfloat16, torch.float32):
            for whole in (True, False):
                squares.SquareSum(cpu).partial_sums((dtype, whole), [torch.empty(8192, dtype=dtype)])
            update(dtype, 2048 * 4096)
            update(dtype, 2049)
            update(dtype, 2048 * 4, first=4096)
    return list(dict.fromkeys(found))


def compiled(launch, capability):
    source = triton.compiler.ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(place,): value for place, value in launch.constants},
        attrs={(place,): ALIGNED for place in launch.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.settings))


def resources(binary, folder):
    """Registers and bytes of local memory of a thread, from the machine code."""
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name: int(count) for name, count in re.findall(r"([A-Z]+):(\d+)", usage)}
    return counts["REG"], max(counts["STACK"], counts["LOCAL"])


@pytest.mark.ci
@pytest.mark.parametrize("capability", CARDS)
def test_kernels_compile_for_users_cards(capability, monkeypatch, tmp_path, capsys):
    most = {}
    for launch in launches(monkeypatch, CARDS[capability]):
        result, name = compiled(launch, capability), launch.kernel.__name__
        needed = (result.metadata.shared, *resources(result.asm["cubin"], tmp_path))
        most[name] = tuple(map(max, most.get(name, (0, 0, 0)), needed))
        if name in ("fit", "group_energy"):  # no sum fused with a product that is rounded twice elsewhere
            assert "div.rn.f32" in result.asm["ptx"]
            assert not re.search(r"div\.(full|approx)|fma\.|\.ftz", result.asm["ptx"])
    with capsys.disabled():
        print(f"\ncompute capability {capability / 10}: shared bytes a program, registers and local bytes a thread")
        for name, (shared, registers, local) in sorted(most.items()):
            print(f"  {name:20} {shared:6} {registers:4} {local:4}")
    for name, (shared, registers, local) in most.items():
        assert shared <= SHARED_LIMIT, name
        assert registers <= REGISTERS.get(name, 255), name
        assert local <= SPILLED.get(name, 0), name


def called(kernel):
    """Functions of Triton that a kernel calls, by the names in its source."""
    names = {node.id for node in ast.walk(ast.parse(textwrap.dedent(kernel.src))) if isinstance(node, ast.Name)}
    return [value for name in names if isinstance(value := kernel.fn.__globals__.get(name), JITFunction)]


@pytest.mark.system
def test_every_kernel_is_compiled(monkeypatch):
    """A new kernel is launched by `launches`, or called by one that is."""
    reached = set()
    open_ = [launch.kernel for launch in launches(monkeypatch, 82)]
    while open_:
        kernel = open_.pop()
        if kernel not in reached:
            reached.add(kernel)
            open_ += called(kernel)
    assert [f"{module.__name__}.{name}" for (module, name), kernel in kernels().items() if kernel not in reached] == []
