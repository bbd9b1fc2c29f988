#!/usr/bin/env python
"""Write the golden files in tests/golden: for each case an input, the bytes and a JSON that says how they were made.

Bytes are what ranks with different versions of this package exchange. A changed file means a new version of the
codec's format, which is why this is not done by the tests and overwrites nothing without --force.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvd_qsgd import (
    QSGD,
    Cast,
    Codec,
    EliasQSGD,
    GlobalTopK,
    Identity,
    MinMax,
    RandomK,
    Rows,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
)
from hvd_qsgd.codecs.random_words import key_of, stream_of

DIRECTORY = Path(__file__).resolve().parent.parent / "tests" / "golden"
#: Of one case: how it was made, the input, the payload or the words.
SUFFIXES = (".json", ".npy", ".bin")


@dataclass(frozen=True)
class Case:
    """An encoded array, or with ``ranks`` the agreement and the lanes of the allreduce exchange."""

    name: str
    codec: Codec
    x: np.ndarray
    first: int = 0
    ranks: int = 0

    @property
    def key(self) -> int:
        return key_of(stream_of(0, 0, self.name), 1)


def gauss(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32)


def with_values(x: np.ndarray, **values: Any) -> np.ndarray:
    for position, value in values.items():
        x[int(position[1:])] = value
    return x


CASES = [
    Case("qsgd_2bit", QSGD(bits=2, bucket_size=64), gauss(130, 1)),
    Case("qsgd_3bit", QSGD(bits=3, bucket_size=64), gauss(127, 2)),
    Case("qsgd_4bit_second_part", QSGD(bucket_size=64), gauss(128, 3), first=128),
    Case("qsgd_7bit_nearest", QSGD(bits=7, bucket_size=40, rounding="nearest"), gauss(87, 4)),
    Case("qsgd_8bit_l2", QSGD(bits=8, bucket_size=64, norm="l2"), gauss(101, 5)),
    Case("qsgd_l2_nearest", QSGD(bits=5, bucket_size=24, norm="l2", rounding="nearest"), gauss(60, 6)),
    Case("qsgd_not_finite", QSGD(bucket_size=16), with_values(gauss(60, 7), _3=np.nan, _40=-np.inf)),
    Case("qsgd_zeros_and_tail_of_one", QSGD(bucket_size=16), with_values(np.zeros(33, np.float32), _32=-2)),
    Case(
        "qsgd_extreme_magnitudes",
        QSGD(bits=6, bucket_size=8),
        np.ldexp(gauss(40, 8), np.repeat([-140, -101, -99, 0, 124], 8)),
    ),
    Case("topk_plain", TopK(k=1), gauss(256, 9)),
    Case("topk_bitmap", TopK(ratio=0.5), gauss(99, 10)),
    Case("topk_gaps_float16", TopK(ratio=0.05, values="float16"), gauss(300, 11) * np.float32(1e4)),
    Case("topk_ties_and_zeros", TopK(ratio=0.3), np.tile(np.array([0, 1, -1, -0.0, 2], np.float32), 8)),
    Case("topk_not_finite", TopK(), with_values(gauss(20, 12), _5=np.inf)),
    Case("minmax_2bit", MinMax(2), gauss(50, 18)),
    Case("minmax_7bit_after_relu", MinMax(7), np.maximum(gauss(77, 19), 0)),
    Case("minmax_8bit_extreme", MinMax(8), with_values(gauss(30, 20), _3=3.4e38, _4=-3.4e38)),
    Case("minmax_not_finite", MinMax(4), with_values(gauss(9, 21), _8=np.nan)),
    Case("rows_topk", Rows(TopK(0.2), 30), gauss(100, 22)),
    Case("rows_qsgd_second_part", Rows(QSGD(3, 16), 20), gauss(70, 23), first=60),
    Case("cast_float16", Cast(), with_values(gauss(20, 13), _0=np.nan, _1=1e6, _2=1e-7, _3=-0.0)),
    Case("cast_bfloat16", Cast("bfloat16"), with_values(gauss(20, 14), _0=np.nan, _1=3.4e38, _2=1e-45, _3=-0.0)),
    Case("identity", Identity(), with_values(gauss(9, 15), _1=np.inf, _2=-0.0)),
    Case("lanes_4bit_4_ranks", QSGD(bucket_size=64), with_values(gauss(70, 16), _69=0.0), ranks=4),
    Case(
        "lanes_8bit_1000_ranks_not_finite",
        QSGD(bits=8, bucket_size=8),
        with_values(gauss(21, 17), _9=np.nan),
        ranks=1000,
    ),
    Case("elias_4bit", EliasQSGD(bucket_size=64), gauss(150, 18)),
    Case("elias_sparse", EliasQSGD(bits=2, bucket_size=1024), gauss(1100, 19)),
    Case("elias_fixed_width", EliasQSGD(bits=8, bucket_size=64, norm="max"), with_values(gauss(100, 20), _70=np.nan)),
    Case("random_k", RandomK(0.1), gauss(111, 21)),
    Case("random_k_unbiased", RandomK(0.3, unbiased=True), gauss(50, 22)),
    Case("random_k_not_finite", RandomK(0.3), with_values(gauss(20, 23), _7=-np.inf)),
    Case("sign", Sign(24), with_values(gauss(61, 24), _3=0.0, _4=-0.0, _30=np.nan)),
    Case("topk_rows", RowTopK(0.1, 48), with_values(gauss(130, 25), _50=np.inf)),
    Case("topk_rows_ties_and_zeros", RowTopK(0.5, 5), np.tile(np.array([0, 1, -1, -0.0, 1, 2], np.float32), 4)),
    Case("topk_global", GlobalTopK(0.1), gauss(100, 26)),
    Case("topk_threshold", ThresholdTopK(0.1, method="sample"), gauss(400, 27)),
    Case("scaled", Scaled(QSGD(bucket_size=64, norm="l2")), gauss(100, 28)),
]


def make_bytes(kernels: Any, case: Case, wrap: Any) -> np.ndarray:
    """The payload, or the agreement words followed by the lanes words; of any backend's kernels."""
    codec: Any = case.codec
    if not case.ranks:
        payload = np.empty(codec.payload_size(case.x.size), np.uint8)
        return payload[: kernels.encode_into(wrap(case.x.copy()), wrap(payload), case.key, case.first)]
    cut = codec.agreement_length(case.x.size)
    words = np.empty(cut + codec.lanes_length(case.x.size, case.ranks), np.int32)
    kernels.agree_into(wrap(case.x.copy()), wrap(words[:cut]))
    kernels.to_lanes(wrap(case.x.copy()), wrap(words[:cut]), case.ranks, wrap(words[cut:]), case.key, case.first)
    return words.astype("<i4").view(np.uint8)


def read_bytes(kernels: Any, case: Case, data: np.ndarray, wrap: Any) -> np.ndarray:
    """What decoding gives: of lanes, the mean over ranks that all contribute these words."""
    out = np.empty(case.x.size, np.float32)
    if not case.ranks:
        kernels.decode_into(wrap(data), wrap(out))
        return out
    words = data.view("<i4").astype(np.int32)
    cut = kernels.codec.agreement_length(case.x.size)
    kernels.from_lanes(wrap(words[cut:] * np.int32(case.ranks)), wrap(words[:cut]), case.ranks, wrap(out), case.ranks)
    return out


def digest(decoded: np.ndarray) -> str:
    """SHA-256 of the values as little-endian float32; NaN has many bit patterns and is counted as one."""
    canonical = np.where(np.isnan(decoded), np.float32(np.nan), decoded).astype("<f4")
    return hashlib.sha256(canonical.tobytes()).hexdigest()


def files_of(case: Case) -> dict[str, bytes]:
    """The bytes of each file of a case by its suffix, by the NumPy code; the input is written by np.save."""
    data = make_bytes(case.codec, case, lambda array: array)
    decoded = read_bytes(case.codec, case, data, lambda array: array)
    text = json.dumps(description(case, digest(decoded)), indent=2) + "\n"
    return {".json": text.encode(), ".bin": data.tobytes()}


def description(case: Case, decoded: str) -> dict[str, Any]:
    return {
        "config": case.codec.config(),
        "version": case.codec.version,
        "key": f"{case.key:016x}",
        "first": case.first,
        "ranks": case.ranks,
        "decoded_sha256": decoded,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    parser.add_argument("--force", action="store_true", help="overwrite files: raise the version of the codec as well")
    arguments = parser.parse_args()
    present = [
        path for case in CASES for suffix in SUFFIXES if (path := arguments.directory / f"{case.name}{suffix}").exists()
    ]
    if present and not arguments.force:
        print(
            f"{len(present)} of the files exist, {present[0]} among them, and nothing was written. If the bytes are "
            f"meant to change, raise the codec's version and use --force.",
            file=sys.stderr,
        )
        return 1
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        for suffix, content in files_of(case).items():
            (arguments.directory / f"{case.name}{suffix}").write_bytes(content)
        np.save(arguments.directory / f"{case.name}.npy", case.x)
    print(f"{len(CASES)} cases written to {arguments.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
