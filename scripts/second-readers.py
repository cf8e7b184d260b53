#!/usr/bin/python3
"""Exports a disk in every format and reads each whole with readers that share no code with nodupe.

usage: second-readers.py [DIR]
  DIR   a folder in a mounted pool. Without it a pool is made and mounted in a temporary folder,
        which needs root and /dev/fuse.

Readers: qemu-img; libvhdi, libvmdk, libqcow (Debian: python3-libvhdi, python3-libvmdk,
python3-libqcow); dissect.hypervisor (PyPI). `scripts/setup --readers` installs them, the last into
~/.cache/nodupe-readers, or READERS_CACHE. A reader that is not there is told and left out; one that does not read a kind of image is not asked for it.
NODUPE names the program (default: nodupe).
Exit codes: 0 each image was read by two readers at least, and all contents are equal; 1 not; 2 usage.
"""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile

NODUPE = os.environ.get("NODUPE", "nodupe")
SITE = os.environ.get("READERS_CACHE") or os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nodupe-readers")
sys.path.append(SITE)
SIZE = 40 << 20
STEP = 1 << 20

# Name, options of the export.
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
]
# The same as differences from the first disk, which was exported under the second name.
CHILDREN = [
    ("child.vhd", "dynamic.vhd"),
    ("child.vhdx", "dynamic.vhdx"),
    ("child.vmdk", "sparse.vmdk"),
    ("child.vdi", "dynamic.vdi"),
    ("child.qcow2", "plain.qcow2"),
]


def digest(read):
    """SHA-256 of what read(offset, length) gives."""
    sha = hashlib.sha256()
    for at in range(0, SIZE, STEP):
        data = read(at, STEP)
        if len(data) != STEP:
            raise ValueError(f"{len(data)} bytes at {at}")
        sha.update(data)
    return sha.hexdigest()


def seeking(stream):
    def read(at, length):
        stream.seek(at)
        return stream.read(length)
    return digest(read)


def by_qemu(path, _parent):
    kind = "vpc" if path.endswith(".vhd") else path.rsplit(".", 1)[1]
    raw = path + ".raw"
    subprocess.run(["qemu-img", "convert", "-f", kind, "-O", "raw", path, raw], check=True,
                   capture_output=True)
    with open(raw, "rb") as file:
        return seeking(file)


def by_libyal(library, path, parent):
    files = [library.file()]
    files[0].open(path)
    if parent:
        files.append(library.file())
        files[1].open(parent)
        files[0].set_parent(files[1])
    return digest(lambda at, length: files[0].read_buffer_at_offset(length, at))


def by_vhdi(path, parent):
    import pyvhdi
    return by_libyal(pyvhdi, path, parent)


def by_vmdk(path, parent):
    import pyvmdk
    handles = []
    for name in [path, parent]:
        if name:
            handle = pyvmdk.handle()
            handle.open(name)
            handle.open_extent_data_files()
            handles.append(handle)
    if parent:
        handles[0].set_parent(handles[1])
    return digest(lambda at, length: handles[0].read_buffer_at_offset(length, at))


def by_qcow(path, parent):
    import pyqcow
    return by_libyal(pyqcow, path, parent)


def by_dissect(path, parent):
    from pathlib import Path
    from dissect.hypervisor.disk import qcow2, vdi, vhd, vhdx, vmdk
    kind = path.rsplit(".", 1)[1]
    if kind == "vhd":
        stream = vhd.VHD(open(path, "rb"))
    elif kind == "vhdx":
        stream = vhdx.VHDX(Path(path))
    elif kind == "vmdk":
        stream = vmdk.VMDK(Path(path))
    elif kind == "vdi":
        below = vdi.VDI(open(parent, "rb")).open() if parent else None
        stream = vdi.VDI(open(path, "rb"), below)
    else:
        stream = qcow2.QCow2(Path(path))
    return seeking(stream.open() if hasattr(stream, "open") else stream)


# Name, module or program that must be there, formats, those of children, how.
READERS = [
    ("qemu-img", None, {"vhd", "vhdx", "vmdk", "vdi", "qcow2"}, {"vmdk", "qcow2"}, by_qemu),
    ("libvhdi", "pyvhdi", {"vhd", "vhdx"}, {"vhd", "vhdx"}, by_vhdi),
    ("libvmdk", "pyvmdk", {"vmdk"}, {"vmdk"}, by_vmdk),
    ("libqcow", "pyqcow", {"qcow2"}, {"qcow2"}, by_qcow),
    ("dissect.hypervisor", "dissect.hypervisor", {"vhd", "vhdx", "vmdk", "vdi", "qcow2"},
     {"vhdx", "vmdk", "vdi", "qcow2"}, by_dissect),
]


def present(name, module):
    if module is None:
        return shutil.which(name) is not None
    try:
        __import__(module)
        return True
    except ImportError:
        return False


def nodupe(*args):
    subprocess.run([NODUPE, "-q", *args], check=True)


def make(pool, out):
    """Makes the disks and all exports; returns pairs of an image and its parent, and the digests."""
    rng = random.Random(5)
    gold, clone = (os.path.join(pool, f"second-readers-{os.getpid()}-{name}.raw")
                   for name in ("gold", "vm"))
    images = []
    try:
        with open(gold, "wb") as file:
            file.truncate(SIZE)
            for at, length in ((0, 4096), (1 << 20, 300 << 10), (7 << 20, 5 << 20),
                               (SIZE - 4096, 4096)):
                os.pwrite(file.fileno(), rng.randbytes(length), at)
        nodupe("clone", gold, clone)
        with open(clone, "r+b") as file:
            for at, data in ((8192, rng.randbytes(4096)), (8 << 20, bytes(8192)),
                             (30 << 20, rng.randbytes(12288))):
                os.pwrite(file.fileno(), data, at)
        truth = []
        for disk in (gold, clone):
            with open(disk, "rb") as file:
                truth.append(seeking(file))
        for name, options in EXPORTS:
            path = os.path.join(out, name)
            nodupe("export", gold, path, *options)
            images.append((path, None, truth[0]))
        for name, parent in CHILDREN:
            path, parent = os.path.join(out, name), os.path.join(out, parent)
            nodupe("export", clone, path, "--backing", gold, "--parent", parent)
            images.append((path, parent, truth[1]))
    finally:
        for disk in (gold, clone):
            if os.path.exists(disk):
                os.unlink(disk)
    return images


def compare(images):
    there = [reader for reader in READERS if present(*reader[:2])]
    for name, *_ in READERS:
        if name not in [reader[0] for reader in there]:
            print(f"{name}: not installed, left out (scripts/setup --readers)")
    bad = 0
    for path, parent, truth in images:
        image, kind, words, good = os.path.basename(path), path.rsplit(".", 1)[1], [], 0
        for name, _, whole, differencing, read in there:
            if kind not in (differencing if parent else whole):
                continue
            try:
                equal = read(path, parent) == truth
                words.append(f"{name} {'equal' if equal else 'DIFFERENT'}")
            except Exception as error:  # whatever a reader throws is its verdict
                equal = False
                words.append(f"{name} FAILED ({error})")
            good += equal
            bad += not equal
        if good < (1 if parent else 2):
            words.append("TOO FEW READERS")
            bad += 1
        print(f"{image}: {', '.join(words)}")
    print(f"{len(images)} images, {bad} troubles")
    return 1 if bad else 0


def main():
    if sys.argv[1:] == ["--has-dissect"]:
        return 0 if present("", "dissect.hypervisor") else 1
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work:
        pool, mounted = (sys.argv[1:] or [None])[0], None
        if pool is None:
            mounted = pool = os.path.join(work, "mnt")
            os.mkdir(pool)
            nodupe("mount", "--create", "--size", "4G", os.path.join(work, "pool"), pool)
        try:
            out = os.path.join(work, "out")
            os.mkdir(out)
            return compare(make(pool, out))
        finally:
            if mounted:
                nodupe("umount", mounted)


if __name__ == "__main__":
    sys.exit(main())
