"""What the benchmark of a decode step says of launches: their kinds by kernels' names, and a layer's, explained."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
import torch

from auxstream.bench.budget import limit
from auxstream.bench.decode import remaining
from auxstream.bench.launches import by_kind, kind_of
from auxstream.capture.huggingface import DecodeStep, build, gemma4_config
from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.trace import trace
from auxstream.kernels import fuse_elementwise

NAMES = {
    "fused_softmax_mul": "pointwise",
    "triton_per_fused__to_copy_mean_mul_topk_3": "pointwise",
    "triton_tem_fused_mm_7": "product",
    "nvjet_tst_64x8_64x16_2x1_v_bz_splitK_TNT": "product",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "product",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...> >": "product",
    "void pytorch_flash::flash_fwd_splitkv_kernel<...>": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "sort, top-k, scan",
    "void at::native::tensor_kernel_scan_innermost_dim<int, std::plus<int> >": "sort, top-k, scan",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >": "pointwise",
    "void at::native::index_elementwise_kernel<128, 4>": "pointwise",
    "void at::native::reduce_kernel<512, 1>": "pointwise",
    "Memcpy DtoD (Device -> Device)": "copy",
    "product_one": "product",
    "product_sum": "product",
    "router_product_few": "product",
    "experts_up_one": "product",
    "experts_down_many": "product",
    "experts_group": "sort, top-k, scan",
    "experts_sum": "pointwise",
    "router_select": "sort, top-k, scan",
    "attention_part": "attention",
    "something_new": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_kind_of_a_kernel(name: str) -> None:
    assert kind_of(name) == NAMES[name]


def test_every_kernel_of_ours_has_a_kind() -> None:
    """A launched one is named after what it belongs to; what others call within it is not."""
    files = (Path(__file__).parents[2] / "kernels").glob("*_kernels.py")
    functions = [f for file in files for f in ast.parse(file.read_text()).body if isinstance(f, ast.FunctionDef)]
    owners = ("attention_", "experts_", "product_", "router_")
    names = [f.name for f in functions if f.name.startswith(owners) and f.decorator_list]
    assert len(names) > 12
    assert [name for name in names if kind_of(name) == "other"] == []


def test_kinds_are_counted() -> None:
    counted = by_kind(dict.fromkeys(NAMES, (2, 1.0)))
    assert sum(counted.values()) == 2 * len(NAMES)
    assert counted["pointwise"] == 2 * sum(kind == "pointwise" for kind in NAMES.values())


def test_every_launch_of_a_layer_is_listed() -> None:
    step = DecodeStep(build(gemma4_config(2, "tiny"), torch.device("cpu")), 1, 32)
    gm = trace(step, (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))).graph_module
    mark_multi_stream_moe_shared_experts(gm)
    report = fuse_elementwise(gm, safe=(("*", "1"),))
    lines = remaining(gm, report, 0)
    assert sum(line.startswith("eager's linear:") for line in lines) == 8  # q, k, v, o, gate, up, down, router
    assert sum(line.startswith("eager's scaled_dot_product_attention: from fused_") for line in lines) == 1
    assert sum("gelu, mul): from linear; for linear" in line for line in lines) == 1
    fused = [line for line in lines if line.startswith("fused_")]
    assert 5 < len(fused) < len(report.fusions)
    assert remaining(gm, report, 7) == []


def test_what_takes_too_long_is_stopped() -> None:
    with pytest.raises(TimeoutError, match="more than 0 s"), limit(0.05):
        time.sleep(30)
    with limit(0.05):
        pass
    time.sleep(0.1)
