"""The machine that plays compiled kernels finds what a GPU would do wrongly, or not always in the same way."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import ptx_machine
import pytest
import torch

from hvd_qsgd import QSGD
from hvd_qsgd.kernels.triton.qsgd import QSGDKernels

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	mov.u32 %r1, %tid.x;
	ld.param.b64 %rd1, [kernel_param_0];
	ld.param.b32 %r2, [kernel_param_1];
	mad.wide.u32 %rd2, %r1, 4, %rd1;
	shl.b32 %r8, %r1, 2;
"""


def play(body: str, number: int = 0, grid: int = 1) -> np.ndarray:
    """What a kernel of 64 threads leaves in 64 words, of which word i is first i."""
    words = torch.arange(64, dtype=torch.int32)
    lines = "".join(f"\t{line.strip()}\n" for line in body.splitlines())
    ptx_machine.run(f"{HEAD}{lines}\tret;\n}}", (grid,), [words, number], 256)
    return words.numpy()


def test_threads_meet_in_shuffles_votes_and_shared_memory() -> None:
    lanes = np.arange(64)
    assert (play("shfl.sync.bfly.b32 %r3, %r1, 3, 31, -1;\nst.global.b32 [%rd2], %r3;") == lanes ^ 3).all()
    up = play("shfl.sync.up.b32 %r3, %r1, 4, 0, -1;\nst.global.b32 [%rd2], %r3;")
    assert (up == np.where(lanes % 32 < 4, lanes, lanes - 4)).all()
    odd = play(
        "and.b32 %r3, %r1, 1;\nsetp.eq.b32 %p1, %r3, 1;\nvote.sync.ballot.b32 %r4, %p1, -1;\nst.global.b32 [%rd2], %r4;"
    )
    assert (odd.view(np.uint32) == 0xAAAAAAAA).all()
    highest = play("redux.sync.max.s32 %r3, %r1, -1;\nst.global.b32 [%rd2], %r3;")
    assert (highest == np.where(lanes < 32, 31, 63)).all()
    turned = play(
        """st.shared.b32 [%r8], %r1;
        bar.sync 0;
        xor.b32 %r3, %r8, 252;
        ld.shared.b32 %r4, [%r3];
        st.global.b32 [%rd2], %r4;"""
    )
    assert (turned == 63 - lanes).all()


def test_atomic_operations_come_one_after_the_other() -> None:
    counted = play("atom.global.gpu.relaxed.add.u32 %r3, [%rd1], %r1;", grid=3)
    assert counted[0] == 3 * sum(range(64))
    before = play(
        """mov.b32 %r3, 1;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 st.shared.b32 [0], 0;
        bar.sync 0;
        atom.shared.add.u32 %r4, [0], %r3;
        st.global.b32 [%rd2], %r4;"""
    )
    assert sorted(before) == list(range(64))


def test_threads_that_part_at_a_branch_go_on() -> None:
    # Twice as long a way for each thread: adds up its number.
    sums = play(
        """mov.b32 %r3, 0;
        mov.b32 %r4, %r1;
        $L__loop:
        add.s32 %r3, %r3, %r4;
        sub.s32 %r4, %r4, 1;
        setp.gt.s32 %p1, %r4, 0;
        @%p1 bra $L__loop;
        st.global.b32 [%rd2], %r3;"""
    )
    assert (sums[1:] == [n * (n + 1) // 2 for n in range(1, 64)]).all()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("st.global.b32 [%rd2+4], %r1;", "outside of what the kernel was given"),
        ("ld.global.b32 %r3, [%rd1+-4];", "outside of what the kernel was given"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd2];", "not at a multiple of 8 bytes"),
        ("st.shared.b32 [%r8+4], %r1;", "outside of shared memory"),
        ("st.global.b32 [%rd1], %r1;", "race of several writes"),
        ("st.global.b32 [%rd2], %r1;\nld.global.b32 %r3, [%rd1];", "race with a write"),
        ("ld.global.b32 %r3, [%rd1];\nadd.s32 %r3, %r3, 1;\nst.global.b32 [%rd1], %r3;", "race with a read"),
        ("st.shared.b32 [%r8], %r1;\nxor.b32 %r3, %r8, 4;\nld.shared.b32 %r4, [%r3];", "race with a write"),
        ("atom.shared.add.u32 %r3, [0], %r1;\nld.shared.b32 %r4, [0];", "race with a write"),
        ("setp.lt.u32 %p1, %r1, 7;\n@%p1 vote.sync.ballot.b32 %r3, %p1, -1;", "do not take part"),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;", "have ended before"),
        ("fma.rn.f32 %r3, %r1, %r1, %r1;", "not known here"),
        ("mul.f32 %r3, %r1, %r1;", "may round otherwise"),
        ("add.rn.ftz.f32 %r3, %r1, %r1;", "may round otherwise"),
        ("cvt.f32.s32 %r3, %r1;", "may round otherwise"),
        ("ld.global.v8.b32 {%r3}, [%rd1];", "not known here"),
    ],
)
def test_what_a_gpu_would_not_do_is_a_fault(body: str, fault: str) -> None:
    with pytest.raises(ptx_machine.FaultError, match=fault):
        play(body)


def test_other_programs_are_not_ordered_by_anything() -> None:
    with pytest.raises(ptx_machine.FaultError, match="race"):
        play("mov.u32 %r3, %ctaid.x;\nst.global.b32 [%rd2], %r3;", grid=2)


@pytest.mark.parametrize(
    ("pattern", "other", "fault"),
    [
        (r"bar\.sync \t?0;", "", "race"),
        (r"mul\.rn\.f32", "mul.f32", "may round otherwise"),
        (r"(st\.global\.b32 \[ %rd\d+) \+ 0", r"\1 + 2", "not at a multiple"),
    ],
)
def test_a_compiled_kernel_that_is_spoiled_is_found(
    pattern: str, other: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ptx_machine.run

    def spoiled(text: str, *arguments: Any) -> Any:
        changed = re.sub(pattern, other, text)
        assert changed != text
        return original(changed, *arguments)

    monkeypatch.setattr(ptx_machine, "run", spoiled)
    codec = QSGD()
    with pytest.raises(ptx_machine.FaultError, match=fault):
        QSGDKernels(codec).encode_into(torch.ones(4096), torch.zeros(codec.payload_size(4096), dtype=torch.uint8))


def test_fused_multiply_adds_are_found_where_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx_machine, "EXACT", {"enable_fp_fusion": True})
    payload, out = torch.zeros(QSGD().payload_size(4096), dtype=torch.uint8), torch.ones(4096)
    with pytest.raises(ptx_machine.FaultError, match=r"may round otherwise: (add|mul)\.f32"):
        QSGDKernels(QSGD()).decode_into(payload, out, "add")
