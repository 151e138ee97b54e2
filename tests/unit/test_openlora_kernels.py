"""Every implementation of the LoRA kernels computes what the reference does.

Triton's run in its interpreter and through its compiler in processes of their own: which of the two
a kernel gets is decided by the environment when it is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ledger.errors import ConfigError
from tests.unit.openlora_kernel_cases import CASES, Case, deltas, difference
from workers.openlora.kernels import TOLERANCE, Reference, Torch, for_device, self_test

torch.set_num_threads(1)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is published for x86_64 Linux only"
)


def test_the_reference_is_the_sum_of_outer_products() -> None:
    """Row by row with numbers that can be followed by hand."""
    x = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]], [[1.0, 2.0]]])
    a = torch.tensor([[[[3.0, 4.0], [5.0, 6.0]]]])  # one member, one slot, rank 2 of 2
    b = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]]])
    index = torch.tensor([0, -1, 0])
    for rank, added in ((2, [11.0, 17.0, 73.0]), (1, [11.0, 0.0, 22.0]), (0, [0.0, 0.0, 0.0])):
        ranks = torch.tensor([[rank]], dtype=torch.int32)
        h = Reference().shrink(x, a, index, ranks)
        y = Reference().expand(torch.ones(3, 1, 3), h[:, 0], b, index, ranks[0])
        assert y[0, 0].tolist() == y[2, 0].tolist() == [1 + v for v in added]
        assert y[1, 0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_torch_s_kernels_are_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert difference(Torch(), case, dtype) < 1


def test_a_row_without_an_adapter_keeps_its_bits() -> None:
    """Also where the slot it does not have holds NaN."""
    for case in CASES.values():
        with_none = Case(**{**case.__dict__, "index": (-1,) * case.rows})
        for y, same in zip(
            deltas(Torch(), with_none, torch.bfloat16),
            deltas(Reference(), with_none, torch.bfloat16),
            strict=True,
        ):
            assert torch.equal(y, same)


def test_a_cpu_gets_torch_s_and_the_self_test_can_fail() -> None:
    assert for_device(torch.device("cpu"), torch.float32).name == "torch"
    assert for_device(torch.device("cuda"), torch.float32, "torch").name == "torch"
    with pytest.raises(ConfigError, match="lora_kernels"):
        for_device(torch.device("cpu"), torch.float32, "cutlass")
    self_test(Torch(), torch.device("cpu"), torch.float32)

    class Wrong(Torch):
        name = "wrong"

        def expand(self, y, h, b, index, ranks):  # type: ignore[no-untyped-def]
            return super().expand(y, h * 1.01, b, index, ranks)

    with pytest.raises(ArithmeticError, match="wrong kernels are off"):
        self_test(Wrong(), torch.device("cpu"), torch.float32)


def _run(*arguments: str, cache: Path, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.openlora_kernel_cases", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)} | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@needs_triton
def test_triton_s_kernels_are_the_reference_in_its_interpreter(tmp_path: Path) -> None:
    """All cases in float32 and float16, decode in bfloat16 as well; then a whole engine on them,
    whose tokens are those of plain torch with merged weights."""
    assert _run(cache=tmp_path, TRITON_INTERPRET="1") == len(CASES) * 2 + 5


@needs_triton
def test_triton_s_kernels_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    """To machine code, with tensor cores where tokens come in tiles; no GPU is needed for that."""
    assert _run("compile", cache=tmp_path, TRITON_INTERPRET="0") == 4
