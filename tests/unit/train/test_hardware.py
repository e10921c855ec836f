"""The peak table: specific names before general ones, whole words only, infinity for the unknown."""

from __future__ import annotations

import math

import pytest
import torch

from llm.train.hardware import PEAK_BF16, cpu_name, device_memory, device_name, peak_flops, peak_memory


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_devices(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "AMD EPYC", "", "Tesla P4", "NVIDIA L400"])
def test_unknown_devices_have_no_guess(name: str) -> None:
    assert math.isinf(peak_flops(name))


def test_no_entry_hides_a_later_one() -> None:
    for index, (key, peak) in enumerate(PEAK_BF16):
        assert peak_flops(key) == peak, f"{key} (entry {index}) is hidden by an earlier one"


def test_this_machine_has_a_name_and_memory() -> None:
    assert device_name("cpu") == cpu_name() != ""
    assert device_memory("cpu") > 2**27
    before = peak_memory("cpu")
    block = torch.ones(2**26)
    assert peak_memory("cpu") >= before
    assert peak_memory("cpu") > block.nbytes
