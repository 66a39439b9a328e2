"""Table of GPUs and of the nodes that hold them, and the names by which `--hardware` asks for them.

All numbers are the makers': no sparsity, links in one direction, decimal units. Of a node with fewer GPUs than the table's, host
memory, CPUs and network count in proportion, as clouds rent them out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from apprentice.errors import ResourcesError, did_you_mean
from apprentice.train.metrics.mfu import PEAKS

GB, TERA = 1e9, 1e12
PCIE_4, PCIE_5 = 32 * GB, 64 * GB  # bytes/s of 16 lanes in one direction
_NAME = re.compile(r"(?:(?P<nodes>\d+)x)?(?:(?P<gpus>\d+)x)?(?P<device>[A-Za-z].*)")


@dataclass(frozen=True)
class Device:
    """A GPU, and a full node of them as its maker or a cloud sells it. Bytes, bytes/s and FLOP/s."""

    memory: float
    bandwidth: float
    bfloat16_peak: float  # dense, sums in float32
    float32_peak: float  # without tensor cores
    link: float  # from a GPU to the others of its node: NVLink, else PCIe
    host_link: float  # from a GPU to its host
    node_gpus: int
    node_network: float
    node_memory: float
    node_cpus: int  # cores
    source: str
    products_share: float = 0.5  # of `bfloat16_peak` that products of large matrices reach in training; docs/decisions/training.md


# NVLink and network are what the data sheet gives for both directions or in bits, divided.
DEVICES: dict[str, Device] = {
    "A100-40GB": Device(
        *(40 * GB, 1555 * GB, PEAKS["A100"], 19.5 * TERA, 300 * GB, PCIE_4),
        *(8, 200 * GB, 1000 * GB, 128),
        "NVIDIA A100 data sheet; DGX A100 (320 GB) user guide",
        products_share=0.65,
    ),
    "A100-80GB": Device(
        *(80 * GB, 2039 * GB, PEAKS["A100"], 19.5 * TERA, 300 * GB, PCIE_4),
        *(8, 200 * GB, 2000 * GB, 128),
        "NVIDIA A100 data sheet (SXM); DGX A100 (640 GB) user guide",
        products_share=0.65,
    ),
    "H100-80GB": Device(
        *(80 * GB, 3350 * GB, PEAKS["H100"], 67 * TERA, 450 * GB, PCIE_5),
        *(8, 400 * GB, 2000 * GB, 112),
        "NVIDIA H100 data sheet (SXM); DGX H100 user guide",
    ),
    "H200-141GB": Device(
        *(141 * GB, 4800 * GB, PEAKS["H200"], 67 * TERA, 450 * GB, PCIE_5),
        *(8, 400 * GB, 2000 * GB, 112),
        "NVIDIA H200 data sheet (SXM); DGX H200 user guide",
    ),
    "B200-180GB": Device(
        *(180 * GB, 8000 * GB, PEAKS["B200"], 75 * TERA, 900 * GB, PCIE_5),
        *(8, 400 * GB, 2000 * GB, 112),
        "NVIDIA HGX B200 specifications; DGX B200 user guide",
    ),
    "L40S-48GB": Device(
        *(48 * GB, 864 * GB, PEAKS["L40S"], 91.6 * TERA, PCIE_4, PCIE_4),
        *(8, 50 * GB, 1536 * GB, 96),
        "NVIDIA L40S data sheet; Amazon EC2 g6e.48xlarge",
    ),
    "L4-24GB": Device(
        *(24 * GB, 300 * GB, PEAKS["L4"], 30.3 * TERA, PCIE_4, PCIE_4),
        *(8, 12.5 * GB, 768 * GB, 96),
        "NVIDIA L4 data sheet; Amazon EC2 g6.48xlarge",
    ),
    "RTX4090-24GB": Device(
        *(24 * GB, 1008 * GB, PEAKS["RTX 4090"], 82.6 * TERA, PCIE_4, PCIE_4),
        *(8, 1.25 * GB, 512 * GB, 64),
        "NVIDIA Ada GPU architecture white paper; the node is an assumption: 64 cores, 512 GB, 10 Gbit/s Ethernet",
    ),
}


@dataclass(frozen=True)
class Hardware:
    """Nodes with the same number of the same GPUs."""

    name: str
    device: Device
    nodes: int
    gpus: int  # of one node

    def __str__(self) -> str:
        return (f"{self.nodes}x" if self.nodes > 1 else "") + f"{self.gpus}x{self.name}"

    @property
    def total_gpus(self) -> int:
        """Number of GPUs of all nodes."""
        return self.nodes * self.gpus

    @property
    def host_memory(self) -> float:
        """Bytes of host memory of one node."""
        return self.device.node_memory * self._part

    @property
    def network(self) -> float:
        """Bytes/s of one node's network in one direction."""
        return self.device.node_network * self._part

    @property
    def cpus(self) -> float:
        """CPU cores of one node."""
        return self.device.node_cpus * self._part

    @property
    def _part(self) -> float:
        return self.gpus / self.device.node_gpus


def parse_hardware(text: str) -> Hardware:
    """The hardware that `text` names: `8xH100-80GB`, or nodes × GPUs of each as `4x8xH100-80GB`; no number is one.

    Raises `ResourcesError`, with the known names, for anything else.
    """
    known = ", ".join(DEVICES)
    match = _NAME.fullmatch(text.strip())
    names = {name.lower(): name for name in DEVICES}
    device_name = match["device"] if match else text.strip()
    if match is None or device_name.lower() not in names:
        near = did_you_mean(device_name.upper(), DEVICES)
        raise ResourcesError(
            f"hardware {text!r} is not known; give GPUs as 8xH100-80GB, or nodes too as 4x8xH100-80GB, of {known}.{near}"
        )
    first, second = match["nodes"], match["gpus"]
    nodes, gpus = (int(first), int(second)) if first and second else (1, int(first or second or 1))
    name = names[device_name.lower()]
    device = DEVICES[name]
    if not nodes or not 1 <= gpus <= device.node_gpus:
        raise ResourcesError(
            f"hardware {text!r}: a node has 1 to {device.node_gpus} GPUs; name several nodes as 2x{device.node_gpus}x{name}."
        )
    return Hardware(name, device, nodes, gpus)
