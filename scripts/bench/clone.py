#!/usr/bin/env python3
"""What clones cost, and what they do not cost, measured on a mounted pool. Beside other stores:
compare.py.

usage: clone.py --nodupe BINARY [--folder DIR] [--extents N] [--gib N] [--depth N] [--skip NAME,...]

Each section prints its figures and the target that they are held against:
  fragmented  a sparse file of --gib GiB with --extents extents: `nodupe clone` (the time that the
              program reports for the request) and `cp` (the whole command), median of 20
  depth       clones of clones of that file, --depth of them: the first 20 against the last 20
  fleet       1000 clones of a golden image in one call: time, and growth of the pool
  reading     random and sequential reads of the deepest clone against the original, of the
              fragmented file and of a golden image, with cold caches (a new mount) and warm ones
Exit code 0 if every target is met.
"""
import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time

from stores import BLOCK, Failed, fragment, sh, timed

ROUNDS = 20
missed = []


def report(what, value, unit, target=None, at_least=False):
    verdict = ""
    if target is not None:
        met = value >= target if at_least else value <= target
        verdict = f"  (target: {'at least' if at_least else 'at most'} {target:g} {unit})" + ("" if met else "  MISSED")
        if not met:
            missed.append(what)
    print(f"{what:58} {value:10.2f} {unit}{verdict}", flush=True)


class Bench:
    def __init__(self, options):
        self.options = options
        self.nodupe = os.path.abspath(options.nodupe)
        self.root = tempfile.mkdtemp(prefix="clone.", dir=options.folder)
        self.pool, self.dir = f"{self.root}/pool.nodupe", f"{self.root}/mnt"
        sh(self.nodupe, "create", self.pool, "--size", "256G")
        self.mounted = False
        self.mount()

    def mount(self):
        sh(self.nodupe, "mount", *self.options.mount_options.split(), self.pool, self.dir, "--create")
        self.mounted = True

    def umount(self):
        self.mounted = False
        sh(self.nodupe, "umount", self.dir)

    def cold(self):
        """A new daemon and an empty page cache."""
        self.umount()
        with contextlib.suppress(OSError), open("/proc/sys/vm/drop_caches", "w") as caches:
            caches.write("3")
        self.mount()

    def close(self):
        if self.mounted:
            self.umount()
        sh("rm", "-rf", self.root)

    def path(self, name):
        return f"{self.dir}/{name}"

    def clone(self, source, target, *more):
        """Seconds that the program reports for the request."""
        return json.loads(sh(self.nodupe, "clone", "--json", self.path(source), self.path(target), *more))["seconds"]

    def used_mib(self):
        sh("sync", self.dir)
        seen = os.statvfs(self.dir)
        return (seen.f_blocks - seen.f_bfree) * seen.f_frsize / 2**20

    # ---- what is cloned ---------------------------------------------------------------------

    def make_fragmented(self):
        started = time.monotonic()
        fragment(self.path("fragmented"), self.options.gib << 30, self.options.extents)
        # What the map looks like is known after a new mount, with nothing staged.
        self.cold()
        print(f"fragmented: {self.options.gib} GiB, {self.options.extents} extents, made in {time.monotonic() - started:.0f} s")

    def make_gold(self):
        sh("fio", "--name=gold", f"--filename={self.path('gold')}", "--rw=write", "--bs=1M", "--size=2G", "--direct=1",
           "--ioengine=io_uring", "--iodepth=4", "--refill_buffers=1", "--end_fsync=1", "--fallocate=none")
        self.cold()

    # ---- sections ---------------------------------------------------------------------------

    def fragmented(self):
        calls, commands = [], []
        for number in range(ROUNDS):
            calls.append(self.clone("fragmented", f"call{number}"))
        for number in range(ROUNDS):
            commands.append(timed("cp", self.path("fragmented"), self.path(f"cp{number}")))
        report("nodupe clone, fragmented file, median of 20", statistics.median(calls) * 1000, "ms", 10)
        report("nodupe clone, fragmented file, slowest of 20", max(calls) * 1000, "ms")
        report("cp, fragmented file, median of 20", statistics.median(commands) * 1000, "ms", 100)
        report("cp, fragmented file, slowest of 20", max(commands) * 1000, "ms")
        for number in range(ROUNDS):
            os.unlink(self.path(f"call{number}"))
            os.unlink(self.path(f"cp{number}"))

    def chain(self, source, name):
        """Clones of clones; returns the time of each."""
        took, last = [], source
        for depth in range(1, self.options.depth + 1):
            took.append(self.clone(last, f"{name}{depth}"))
            last = f"{name}{depth}"
        return took

    def depth(self):
        took = self.chain("fragmented", "deep")
        first, last = statistics.median(took[:ROUNDS]) * 1000, statistics.median(took[-ROUNDS:]) * 1000
        report("clone of a clone, depth 1 to 20, median", first, "ms")
        report(f"clone of a clone, depth {self.options.depth - ROUNDS + 1} to {self.options.depth}, median", last, "ms")
        # Half as much again is the noise of single milliseconds, not growth.
        report("growth with depth", last / first, "times", 1.5)

    def fleet(self):
        before = self.used_mib()
        whole = timed(self.nodupe, "clone", self.path("gold"), self.path("fleet{}"), "--count", 1000)
        report("1000 clones of a golden image, one call, whole command", whole, "s", 2)
        report("growth of the pool", self.used_mib() - before, "MiB", 20)

    def read(self, name, **options):
        words = [f"--{key}={value}" for key, value in options.items()]
        text = sh("fio", "--name=read", f"--filename={self.path(name)}", "--direct=1", "--ioengine=io_uring", "--randrepeat=1",
                  "--output-format=json", "--eta=never", *words)
        return json.loads(text[text.index("{"):])["jobs"][0]["read"]["bw_bytes"] / 1e6

    def compare(self, what, original, clone, **options):
        """Speeds of both, in turns, each first cold and then warm."""
        speeds = {"cold": {original: [], clone: []}, "warm": {original: [], clone: []}}
        for turn in range(6):
            for name in (original, clone) if turn % 2 == 0 else (clone, original):
                self.cold()
                speeds["cold"][name].append(self.read(name, **options))
                speeds["warm"][name].append(self.read(name, **options))
        for caches, seen in speeds.items():
            medians = {name: statistics.median(runs) for name, runs in seen.items()}
            ratio = medians[clone] / medians[original]
            report(f"{what}, {caches}: {medians[clone]:.0f} MB/s against {medians[original]:.0f}", ratio, "ratio", 0.95, at_least=True)

    def reading(self):
        if not os.path.exists(self.path(f"deep{self.options.depth}")):
            self.chain("fragmented", "deep")
        self.chain("gold", "golden")
        deepest = self.options.depth
        self.compare("golden image, 4 KiB random", "gold", f"golden{deepest}", rw="randread", bs="4k", iodepth=16, io_size="256M")
        self.compare("golden image, 1 MiB sequential", "gold", f"golden{deepest}", rw="read", bs="1M", iodepth=4)
        # Each read is one extent; between two of them lies a hole that is not read.
        skip = (self.options.gib << 30) // self.options.extents // BLOCK * 4 - 4
        self.compare("fragmented file, extent by extent", "fragmented", f"deep{deepest}",
                     rw=f"read:{skip}k", bs="4k", iodepth=16, io_size=f"{min(self.options.extents * 4, 400000)}k")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodupe", required=True)
    parser.add_argument("--folder", default="/var/tmp/nodupe-clone")
    parser.add_argument("--mount-options", default="", help="options for nodupe mount")
    parser.add_argument("--gib", type=int, default=64)
    parser.add_argument("--extents", type=int, default=1_000_000)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--skip", default="", help="names of sections, with commas")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    print(f"command: {' '.join(sys.argv)}")
    print(f"machine: {os.cpu_count()} processors, kernel {platform.release()}, "
          f"{sh('cp', '--version').splitlines()[0]}, {sh(options.nodupe, '--version').strip()}")
    skipped = options.skip.split(",")
    bench = None
    try:
        bench = Bench(options)
        if not {"fragmented", "depth", "reading"} <= set(skipped):
            bench.make_fragmented()
        bench.make_gold()
        for name in ("fragmented", "depth", "fleet", "reading"):
            if name not in skipped:
                getattr(bench, name)()
    except Failed as error:
        sys.exit(f"clone: {error}")
    finally:
        if bench:
            bench.close()
    print("missed: " + "; ".join(missed) if missed else "every target met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
