#!/usr/bin/env python3
"""Boots a disk in every format under QEMU: converted inside a pool, and exported out of it.

usage: boot.py POOL
  POOL  a folder in a mounted pool

The disk has a boot sector that has the BIOS read a sector from its end half and prints that to the
serial port. So firmware, emulated disk and QEMU's driver of the format agree on where bytes are.
No KVM is needed. NODUPE names the program (default: nodupe). BOOT_QUICK=1 boots each format once.
Exit codes: 0 all boot, 1 not, 2 usage, or something is missing.
"""

import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

NODUPE = os.environ.get("NODUPE", "nodupe")
QEMU = "qemu-system-x86_64"
SIZE = 24 << 20
TEXT_AT = (20 << 20) + 8192
# A boot takes half a second; a machine that emulates and has much else to do may need far more.
SECONDS_MAX = 120

CONVERTS = [
    ("fixed.vhd", []),
    ("dynamic.vhd", ["--subformat", "dynamic"]),
    ("dynamic.vhdx", []),
    ("fixed.vhdx", ["--subformat", "fixed"]),
    ("flat.vmdk", []),
    ("sparse.vmdk", ["--subformat", "monolithicSparse"]),
    ("dynamic.vdi", []),
    ("fixed.vdi", ["--subformat", "fixed"]),
    ("plain.qcow2", []),
    ("copy.raw", []),
]
EXPORTS = [
    ("fixed.vhd", []),
    ("dynamic.vhd", ["--subformat", "dynamic"]),
    ("dynamic.vhdx", []),
    ("fixed.vhdx", ["--subformat", "fixed"]),
    ("sparse.vmdk", []),
    ("flat.vmdk", ["--subformat", "monolithicFlat"]),
    ("stream.vmdk", ["--subformat", "streamOptimized"]),
    ("dynamic.vdi", []),
    ("fixed.vdi", ["--subformat", "fixed"]),
    ("plain.qcow2", []),
    ("compressed.qcow2", ["--compress"]),
    ("copy.raw", []),
]
# What is left of each list for a quick run.
QUICK = {"dynamic.vhd", "dynamic.vhdx", "flat.vmdk", "dynamic.vdi"}, \
    {"fixed.vhd", "sparse.vmdk", "stream.vmdk", "plain.qcow2", "compressed.qcow2"}
# Those of which QEMU reads differences.
CHILDREN = [("child.qcow2", "plain.qcow2"), ("child.vmdk", "sparse.vmdk")]


def boot_sector():
    """Machine code of 16 bits; the BIOS leaves the number of the disk in DL."""
    code = bytes.fromhex(
        "fc fa 31c0 8ed8 8ec0 8ed0 bc007c fb"   # segments 0, stack below the code
        "be407c b442 cd13 7211"                 # read as the packet at 0x7c40 says, or fail
        "be007e"                                # text: each byte up to a zero
        "ac 84c0 7406 baf803 ee ebf5"           # to the serial port
        "b000 e6f4"                             # the debug exit: QEMU ends with 1
        "b001 e6f4 f4 ebfd"                     # failed: QEMU ends with 3
    )
    packet = struct.pack("<BBHHHQ", 16, 0, 1, 0x7e00, 0, TEXT_AT // 512)
    return (code.ljust(0x40, b"\0") + packet).ljust(510, b"\0") + b"\x55\xaa"


def make_disk(path, text):
    rng = random.Random(9)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), boot_sector(), 0)
        os.pwrite(file.fileno(), rng.randbytes(3 << 20), 5 << 20)
        os.pwrite(file.fileno(), text.encode().ljust(512, b"\0"), TEXT_AT)


def boots(path, text):
    """None, or what went wrong."""
    kind = "vpc" if path.endswith(".vhd") else path.rsplit(".", 1)[1]
    drive = f"file={path},format={kind},if=virtio,readonly=on"
    command = [QEMU, "-machine", "pc,accel=tcg", "-m", "32", "-nodefaults", "-display", "none",
               "-serial", "stdio", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
               "-drive", drive]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL,
                              timeout=SECONDS_MAX)
    except subprocess.TimeoutExpired as error:
        return f"nothing after {SECONDS_MAX} s: {error.stdout} {error.stderr}"
    if done.returncode == 1 and text.encode() in done.stdout:
        return None
    return f"exit code {done.returncode}: {done.stdout[-200:]} {done.stderr[-300:]}"


def main():
    if len(sys.argv) != 2 or not os.path.isdir(sys.argv[1]):
        print(__doc__, file=sys.stderr)
        return 2
    if not shutil.which(QEMU):
        print(f"boot: {QEMU} is missing: run scripts/setup", file=sys.stderr)
        return 2
    bad = good = 0
    converts, exports = (
        [one for one in all_of if one[0] in quick or not os.environ.get("BOOT_QUICK")]
        for all_of, quick in zip((CONVERTS, EXPORTS), QUICK))

    def judge(what, path, text):
        nonlocal bad, good
        why = boots(path, text)
        good, bad = (good + 1, bad) if why is None else (good, bad + 1)
        if why is not None:
            print(f"{what} {os.path.basename(path)} does not boot: {why}")

    def nodupe(*args):
        subprocess.run([NODUPE, "-q", *args], check=True)

    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as pool, \
            tempfile.TemporaryDirectory() as out:
        gold, clone = os.path.join(pool, "gold.raw"), os.path.join(pool, "vm.raw")
        make_disk(gold, "gold is here")
        for name, options in converts:
            path = os.path.join(pool, name)
            nodupe("convert", gold, path, *options)
            judge("converted", path, "gold is here")
        nodupe("clone", gold, clone)
        with open(clone, "r+b") as file:
            os.pwrite(file.fileno(), b"clone is here\0", TEXT_AT)
        for name, options in exports:
            path = os.path.join(out, name)
            nodupe("export", gold, path, *options)
            judge("exported", path, "gold is here")
        for name, parent in CHILDREN:
            path = os.path.join(out, name)
            nodupe("export", clone, path, "--backing", gold, "--parent", os.path.join(out, parent))
            judge("exported", path, "clone is here")
    print(f"boot: {good} images boot, {bad} do not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
