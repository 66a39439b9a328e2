"""A slow, lossy link: frames between a port and a bridge pass through this program, since `tc netem` is not in every kernel.

python -m tests.cluster.forwarder PORT BRIDGE DELAY_S LOSS     in the switch's namespace, until it is ended
python -m tests.cluster.forwarder --plain DEVICE               turns off what a device leaves to the hardware
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque

SIOCETHTOOL, TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x8946, 0x400454CA, 0x0002, 0x1000
OFFLOADS = (0x17, 0x1F, 0x24, 0x2C)  # ETHTOOL_STXCSUM, _STSO, _SGSO, _SGRO
OUTGOING = 4  # PACKET_OUTGOING: what we wrote ourselves


def make_plain(device: str) -> None:
    """From now on the device hands out frames as they travel: with checksums, none larger than its MTU."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for offload in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", offload, 0))
            fcntl.ioctl(probe, SIOCETHTOOL, struct.pack("16sP16x", device.encode(), ctypes.addressof(value)))


def forward(port: str, bridge: str, delay_s: float, loss: float) -> None:
    """Takes the port off the bridge and stands between the two. Each frame is kept for `delay_s`, or dropped."""
    tap = os.open("/dev/net/tun", os.O_RDWR)
    name = f"t{port}"[:15]
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    wire.bind((port, 0))
    subprocess.run(["ip", "link", "set", port, "nomaster"], check=True)
    subprocess.run(["ip", "link", "set", port, "promisc", "on"], check=True)
    subprocess.run(["ip", "link", "set", name, "master", bridge, "up"], check=True)
    chance = random.Random(0)
    waiting: deque[tuple[float, bool, bytes]] = deque()  # when it goes on, whether to the bridge, the frame
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([tap, wire], [], [], left)
        for source in ready:
            if source is wire:
                frame, where = wire.recvfrom(65536)
                if where[2] == OUTGOING:
                    continue
            else:
                frame = os.read(tap, 65536)
            if chance.random() >= loss:
                waiting.append((time.monotonic() + delay_s, source is wire, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, to_bridge, frame = waiting.popleft()
            if to_bridge:
                os.write(tap, frame)
            else:
                wire.send(frame)


if __name__ == "__main__":
    if sys.argv[1] == "--plain":
        make_plain(sys.argv[2])
    else:
        forward(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
