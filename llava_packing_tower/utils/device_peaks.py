"""Peak rates of GPUs from their makers' datasheets: dense bfloat16 with float32 sums, without sparsity."""

from __future__ import annotations

# The first entry whose words are all in the device's name counts. In TFLOP/s.
PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 311.9),
    ("A800", 311.9),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),  # of one of its two dies, which are devices of their own
)


def datasheet_peak(device_name: str) -> float | None:
    """Operations per second of a device by its name (``torch.cuda.get_device_name``); None for one that is unknown."""
    words = set(device_name.replace("-", " ").replace("/", " ").split())
    for name, teraflops in PEAKS:
        if set(name.split()) <= words:
            return teraflops * 1e12
    return None
