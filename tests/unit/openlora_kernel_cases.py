"""Small worlds for the LoRA kernels; run as a program it holds Triton's against the reference.

`TRITON_INTERPRET=1 python -m tests.unit.openlora_kernel_cases` needs no GPU: Triton's interpreter
runs the kernels on CPU tensors. `... compile` builds them for a Hopper GPU instead, with Triton's
own assembler, and runs nothing. Neither is imported by anything but the tests.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from workers.openlora.kernels import TOLERANCE, Kernels, Reference


@dataclass(frozen=True, kw_only=True)
class Case:
    """`ranks` by member and slot; what lies beyond a slot's rank is NaN, as unwritten memory may
    be."""

    rows: int
    tokens: int
    width: int
    outs: tuple[int, ...]
    max_rank: int
    ranks: tuple[tuple[int, ...], ...]
    index: tuple[int, ...]


CASES = {
    "decode": Case(
        rows=5,
        tokens=1,
        width=70,
        outs=(33,),
        max_rank=8,
        ranks=((3, 8, 1),),
        index=(2, -1, 0, 1, 0),
    ),
    "decode, three share an input": Case(
        rows=3,
        tokens=1,
        width=64,
        outs=(48, 16, 17),
        max_rank=16,
        ranks=((16, 5), (0, 5), (16, 0)),
        index=(1, 0, -1),
    ),
    "decode, long input in parts": Case(
        rows=2, tokens=1, width=2100, outs=(40,), max_rank=4, ranks=((4, 3),), index=(0, 1)
    ),
    "decode, rank of no power of two": Case(
        rows=2, tokens=1, width=31, outs=(7,), max_rank=24, ranks=((24, 11),), index=(1, 0)
    ),
    "nobody has an adapter": Case(
        rows=2, tokens=1, width=16, outs=(16,), max_rank=4, ranks=((4,),), index=(-1, -1)
    ),
    "prompt": Case(
        rows=3, tokens=19, width=80, outs=(72,), max_rank=8, ranks=((8, 2),), index=(1, -1, 0)
    ),
    "prompt, two share an input": Case(
        rows=2,
        tokens=70,
        width=33,
        outs=(20, 90),
        max_rank=32,
        ranks=((32, 7), (0, 7)),
        index=(0, 1),
    ),
}


def deltas(kernels: Kernels, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """`y` of each member after its adapter was added, for seeded numbers."""
    make = torch.Generator().manual_seed(len(case.outs) + case.width)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    slots = len(case.ranks[0])
    ranks = torch.tensor(case.ranks, dtype=torch.int32)
    beyond = torch.arange(case.max_rank) >= ranks[..., None]  # (members, slots, max_rank)
    a = randn(len(case.outs), slots, case.max_rank, case.width)
    a[beyond] = torch.nan
    index = torch.tensor(case.index)
    x = randn(case.rows, case.tokens, case.width)
    h = kernels.shrink(x, a, index, ranks)
    out: list[Tensor] = []
    for m, width in enumerate(case.outs):
        b = randn(slots, case.max_rank, width)
        b[beyond[m]] = torch.nan
        y = randn(case.rows, case.tokens, width)
        out.append(kernels.expand(y, h[:, m], b, index, ranks[m]))
    return out


def difference(kernels: Kernels, case: Case, dtype: torch.dtype) -> float:
    """Largest difference to the reference in units of what `dtype` allows: below 1 is equal."""
    worst = 0.0
    for want, got in zip(
        deltas(Reference(), case, dtype), deltas(kernels, case, dtype), strict=True
    ):
        assert not want.isnan().any()
        allowed = TOLERANCE[dtype] * float(want.float().abs().max())
        error = float((want.float() - got.float()).abs().nan_to_num(torch.inf).max())
        worst = max(worst, error / allowed)
    return worst


def interpret() -> int:
    from workers.openlora.kernels_triton import Triton

    count = 0
    for name, case in CASES.items():
        for dtype in TOLERANCE:
            if dtype == torch.bfloat16 and case.tokens > 1:
                continue  # the interpreter keeps bfloat16 as uint16, and its dot multiplies those
            worst = difference(Triton(), case, dtype)
            assert worst < 1, (name, dtype, worst)
            count += 1
    assert whole_engine() == (10, 10, 10)
    return count


def whole_engine() -> tuple[int, int, int]:
    """The GPU bench's own check with Triton's kernels in the engine: answers that are plain
    torch's, answers, distinct ones."""
    from workers.openlora import bench, kernels
    from workers.openlora.kernels_triton import Triton

    options = bench.parse(["--device=cpu"])
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(kernels, "for_device", return_value=Triton()),
    ):
        here = bench.Bench(
            options=options,
            folder=Path(folder),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        return bench.greedy(here, torch.float32)


def compile_for_hopper() -> int:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from workers.openlora import kernels_triton

    floats = dict.fromkeys("xaby", "*bf16") | {"h": "*fp32"}
    kinds = floats | {"index": "*i64", "ranks": "*i32", "a_slot": "i64", "a_member": "i64"}
    constants = {"STEP": 1024, "R": 16, "K": 64, "N": 64, "M": 64, "PARTS": 4}
    names = ["_shrink_row", "_expand_row", "_shrink_tile", "_expand_tile"]
    for name in names:
        fn = getattr(kernels_triton, name)
        const = {n: constants[n] for n in fn.arg_names if n.isupper()}
        signature = {n: kinds.get(n, "i32") for n in fn.arg_names if n not in const}
        source = ASTSource(
            fn=fn, signature=signature | dict.fromkeys(const, "constexpr"), constexprs=const
        )
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert len(built.asm["cubin"]) > 1000, name
        tensor_cores = "mma" in built.asm["ptx"]
        assert tensor_cores == name.endswith("_tile"), name
    return len(names)


if __name__ == "__main__":
    print(compile_for_hopper() if sys.argv[1:] == ["compile"] else interpret())
