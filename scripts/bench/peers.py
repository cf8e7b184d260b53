#!/usr/bin/env python3
"""nodupe beside the other ways to keep clones of disk images, on one machine, in one run.

usage: peers.py [--nodupe BINARY | --mount DIR] [--only NAME,...] [--runs N] [--folder DIR] ...

The stores, all on the file system of --folder:
  ext4-copy      a full copy of the golden image for each clone (the folder's own file system)
  xfs-reflink    XFS on a loop device, cp --reflink
  btrfs-reflink  btrfs on a loop device, cp --reflink
  qcow2-chain    a qcow2 overlay for each clone, reached through qemu-storage-daemon's FUSE export
  nodupe         a pool in the folder, mounted; cp

The rows, all with O_DIRECT as QEMU's cache=none uses:
  clone ms          one clone of the golden image, median
  sync write IOPS   4 KiB random writes, each followed by fdatasync, one writer for each clone
  deep write IOPS   4 KiB random writes, 16 deep, one writer for each clone
  write p99 us      latency of the row above, 99th percentile
  rand read IOPS    4 KiB random reads, 4 deep, one reader for each clone, after the writes
  aged read MB/s    1 MiB sequential read of one clone, after the writes
  storm MB/s        every clone reads the same quarter of the golden image at once, caches cold
  seq write MB/s    1 MiB sequential write of a new file
  seq read MB/s     1 MiB sequential read of it
  space MiB         what the store grew by for all clones and their writes
Stores take turns in every run; the table shows medians over the runs, and nodupe's ratio to each.
Needs root for the loop devices.
"""
import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

LESS_IS_BETTER = {"clone ms", "write p99 us", "space MiB"}


def sh(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"peers: {' '.join(map(str, words))}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def fio(files, seconds, **options):
    """Runs one job per file, all at once; returns fio's numbers for the group."""
    words = ["fio", "--output-format=json", "--eta=never", "--group_reporting", "--direct=1",
             "--ioengine=io_uring", "--randrepeat=0", "--norandommap", "--fallocate=none"]
    words += [f"--{key}={value}" for key, value in options.items()]
    if seconds:
        words += ["--time_based", f"--runtime={seconds}"]
    for number, file in enumerate(files):
        words += [f"--name=job{number}", f"--filename={file}"]
    text = sh(*words)
    job = json.loads(text[text.index("{"):])["jobs"][0]
    side = job["write"] if job["write"]["io_bytes"] else job["read"]
    return {"iops": side["iops"], "MBps": side["bw_bytes"] / 1e6,
            "p99_us": side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000}


def drop_caches():
    sh("sync")
    with contextlib.suppress(OSError), open("/proc/sys/vm/drop_caches", "w") as caches:
        caches.write("3")


class Store:
    """A folder with a golden image in it, from which clones are made."""

    cp_options = ()

    def __init__(self, options):
        self.options = options
        self.root = tempfile.mkdtemp(prefix=f"{self.name}.", dir=options.folder)
        self.dir = self.root

    def open(self):
        """Makes the store ready for files in `self.dir`."""

    def clone(self, number):
        path = f"{self.dir}/clone{number}.raw"
        sh("cp", *self.cp_options, f"{self.dir}/gold.raw", path)
        return path

    def attach(self, clones):
        """Paths by which the clones are read and written."""
        return clones

    def used(self):
        """Bytes of the host that the store takes."""
        sh("sync")
        return int(sh("du", "-s", "-B1", self.root).split()[0])

    def close(self):
        shutil.rmtree(self.root)


class Copy(Store):
    name = "ext4-copy"


class Loop(Store):
    """Another file system on a loop device over a sparse file."""

    cp_options = ("--reflink=always",)

    def open(self):
        self.dir = f"{self.root}/mnt"
        os.mkdir(self.dir)
        sh("truncate", "-s", "64G", f"{self.root}/image")
        sh(*self.mkfs, f"{self.root}/image")
        self.device = sh("losetup", "--direct-io=on", "--show", "-f", f"{self.root}/image").strip()
        sh("mount", self.device, self.dir)

    def used(self):
        sh("sync")
        return os.stat(f"{self.root}/image").st_blocks * 512

    def close(self):
        sh("umount", self.dir)
        sh("losetup", "-d", self.device)
        super().close()


class Xfs(Loop):
    name, mkfs = "xfs-reflink", ("mkfs.xfs", "-q", "-m", "reflink=1")


class Btrfs(Loop):
    name, mkfs = "btrfs-reflink", ("mkfs.btrfs", "-q", "-f")


class Qcow2(Store):
    """An overlay for each clone, each served by a daemon of its own."""

    name = "qcow2-chain"

    def open(self):
        self.daemons = []

    def clone(self, number):
        path = f"{self.dir}/clone{number}.qcow2"
        sh("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"{self.dir}/gold.raw", path)
        return path

    def attach(self, clones):
        def file(name, **more):
            return {"driver": "file", "filename": name, "cache": {"direct": True}, "aio": "io_uring", **more}
        exported, size = [], os.stat(f"{self.dir}/gold.raw").st_size
        for path in clones:
            raw = f"{path}.raw"
            open(raw, "w").close()
            disk = {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": file(path),
                    "backing": {"driver": "raw", "file": file(f"{self.dir}/gold.raw", **{"read-only": True})}}
            self.daemons.append(subprocess.Popen([
                "qemu-storage-daemon", "--blockdev", json.dumps(disk), "--export",
                f"type=fuse,id=export,node-name=disk,mountpoint={raw},writable=on,growable=off"]))
            exported.append(raw)
        for raw in exported:
            for _ in range(200):
                if os.stat(raw).st_size == size:
                    break
                time.sleep(0.05)
            else:
                raise SystemExit(f"peers: qemu-storage-daemon does not export {raw}")
        return exported

    def close(self):
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait()
        super().close()


class Nodupe(Store):
    name = "nodupe"

    def open(self):
        if self.options.mount:
            self.dir = tempfile.mkdtemp(prefix="peers.", dir=self.options.mount)
            return
        self.dir = f"{self.root}/mnt"
        sh(self.options.nodupe, "create", f"{self.root}/pool", "--size", "64G")
        sh(self.options.nodupe, "mount", *self.options.mount_options.split(), f"{self.root}/pool", self.dir, "--create")

    def used(self):
        sh("sync", self.dir)
        seen = os.statvfs(self.dir)
        return (seen.f_blocks - seen.f_bfree) * seen.f_frsize

    def close(self):
        if self.options.mount:
            shutil.rmtree(self.dir)
        else:
            sh(self.options.nodupe, "umount", self.dir)
        super().close()


def measure(store, options):
    """All rows for one store."""
    rows, size, seconds = {}, options.gib << 30, options.seconds
    sh("cp", "--sparse=never", f"{options.folder}/gold.source", f"{store.dir}/gold.raw")
    before = store.used()
    clones, took = [], []
    for number in range(options.clones):
        started = time.monotonic()
        clones.append(store.clone(number))
        took.append(time.monotonic() - started)
    rows["clone ms"] = statistics.median(took) * 1000
    disks = store.attach(clones)
    drop_caches()
    rows["storm MB/s"] = fio(disks, 0, rw="read", bs="64k", iodepth=4, size=size // 4)["MBps"]
    rows["sync write IOPS"] = fio(disks, seconds, rw="randwrite", bs="4k", iodepth=1, fdatasync=1, size=size)["iops"]
    deep = fio(disks, seconds, rw="randwrite", bs="4k", iodepth=16, size=size)
    rows["deep write IOPS"], rows["write p99 us"] = deep["iops"], deep["p99_us"]
    drop_caches()
    rows["aged read MB/s"] = fio(disks[:1], 0, rw="read", bs="1M", iodepth=4, size=size)["MBps"]
    rows["rand read IOPS"] = fio(disks, seconds, rw="randread", bs="4k", iodepth=4, size=size)["iops"]
    rows["space MiB"] = (store.used() - before) / 2**20
    if not isinstance(store, Qcow2):
        new = [f"{store.dir}/new"]
        rows["seq write MB/s"] = fio(new, 0, rw="write", bs="1M", iodepth=4, size=size, end_fsync=1, refill_buffers=1)["MBps"]
        drop_caches()
        rows["seq read MB/s"] = fio(new, 0, rw="read", bs="1M", iodepth=4, size=size)["MBps"]
    return rows


def version(*words):
    with contextlib.suppress(OSError, IndexError):
        done = subprocess.run(words, capture_output=True, text=True)
        return (done.stdout + done.stderr).splitlines()[0].strip()
    return f"{words[0]} is missing"


def describe(options):
    """What somebody needs to repeat the run."""
    with open("/proc/cpuinfo") as info:
        cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    print(f"command: {' '.join(sys.argv)}")
    print(f"machine: {os.cpu_count()} x {cpu}, {memory} GiB, kernel {platform.release()}, "
          f"{sh('findmnt', '-no', 'FSTYPE', '-T', options.folder).strip()} below")
    tools = [version("fio", "--version"), version("qemu-img", "--version"), version("mkfs.xfs", "-V"),
             version("mkfs.btrfs", "-V"), version("cp", "--version")]
    if options.nodupe:
        tools.append(version(options.nodupe, "--version"))
    print(f"versions: {'; '.join(tools)}")


def number(value):
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def table(results):
    """Medians, and ratios of nodupe where above 1 is better for nodupe."""
    names = list(results)
    medians = {name: {row: statistics.median(run[row] for run in runs) for row in runs[0]}
               for name, runs in results.items()}
    rows = list(max(medians.values(), key=len))
    print(f"\n{'medians':16}" + "".join(f"{name:>15}" for name in names))
    for row in rows:
        print(f"{row:16}" + "".join(f"{number(medians[name].get(row)):>15}" for name in names))
    mine = medians.get("nodupe")
    if not mine or len(medians) == 1:
        return
    print("\nnodupe against (above 1 is better for nodupe)")
    for row in rows:
        cells = []
        for name in names:
            pair = (mine.get(row), medians[name].get(row))
            if row in LESS_IS_BETTER:
                pair = pair[::-1]
            unknown = None in pair or name == "nodupe" or pair[1] <= 0
            cells.append("-" if unknown else f"{pair[0] / pair[1]:.2f}")
        print(f"{row:16}" + "".join(f"{cell:>15}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodupe", help="the program: makes and mounts a pool in --folder")
    parser.add_argument("--mount", help="a mounted datastore, instead of --nodupe")
    parser.add_argument("--mount-options", default="", help="options for nodupe mount")
    parser.add_argument("--only", default="", help="names of stores, with commas")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--gib", type=int, default=2, help="size of the golden image")
    parser.add_argument("--clones", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=6, help="of each timed row")
    parser.add_argument("--folder", default="/var/tmp/nodupe-peers")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    kinds = [Copy, Xfs, Btrfs, Qcow2] + ([Nodupe] if options.nodupe or options.mount else [])
    if options.only:
        kinds = [kind for kind in kinds if kind.name in options.only.split(",")]
    if options.nodupe:
        options.nodupe = os.path.abspath(options.nodupe)
    describe(options)
    source, size = f"{options.folder}/gold.source", options.gib << 30
    if not (os.path.exists(source) and os.stat(source).st_size == size):
        fio([source], 0, rw="write", bs="1M", iodepth=4, size=size, refill_buffers=1)
    results = {kind.name: [] for kind in kinds}
    for run in range(options.runs):
        turn = run % len(kinds)
        for kind in kinds[turn:] + kinds[:turn]:
            store = kind(options)
            store.open()
            try:
                rows = measure(store, options)
            finally:
                store.close()
            results[kind.name].append(rows)
            print(f"run {run + 1}: {kind.name}: {json.dumps({row: round(value, 1) for row, value in rows.items()})}", flush=True)
    table(results)


if __name__ == "__main__":
    main()
