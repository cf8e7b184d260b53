"""The twelve rows of compare.py: what is done to the stores, and what is held against what.

Every function measures a row, or some that need the same preparations, and adds to the figures.
The stores take turns within each run, in another order each time.
"""
import contextlib
import os
import subprocess
import tempfile
import time

from stores import (Btrfs, Copy, Empty, Failed, Nodupe, Qcow2, Watch, Xfs, drop_caches, fio, fragment,
                    median, peak_rss, rates, sh, timed)

# key: row, what it is, unit, whether less is better
FIGURES = {
    "clone": (1, "Clone of an image with very many extents, cp", "ms", True),
    "clone-call": (1, "The same, nodupe clone, the call", "ms", True),
    "sync1": (2, "4 KiB random writes with fdatasync, 1 writer", "IOPS", False),
    "sync8": (2, "4 KiB random writes with fdatasync, 8 writers", "IOPS", False),
    "sync32": (2, "4 KiB random writes with fdatasync, 32 writers", "IOPS", False),
    "deep": (3, "4 KiB random writes, depth 16, 8 clones", "IOPS", False),
    "deep-p99": (3, "4 KiB random writes, depth 16, 8 clones: 99th percentile", "ms", True),
    "absorb": (3, "The same, as many as the stage absorbs", "IOPS", False),
    "long-p99": (3, "The same for minutes: 99th percentile", "ms", True),
    "long-rate": (3, "The same for minutes: rate of the last ten seconds", "of the first ten", False),
    "aged": (4, "Sequential read after minutes of random writes", "MB/s", False),
    "storm": (5, "Boot storm: 32 clones read one golden image, cold", "MB/s", False),
    "storm-read": (5, "Boot storm: bytes read from the device", "of the image", True),
    "random": (6, "4 KiB random read, depth 32, cold", "IOPS", False),
    "cached": (6, "4 KiB random read, depth 32, cached", "IOPS", False),
    "seq-write": (7, "Sequential write of 1 MiB blocks, with fsync at the end", "MB/s", False),
    "seq-read": (7, "Sequential read of 1 MiB blocks, cold", "MB/s", False),
    "amplify": (8, "4 KiB random overwrites: bytes written to the device", "per byte", True),
    "amplify-hot": (8, "The same, zipf 1.1", "per byte", True),
    "cpu-write": (9, "Processor time of the daemon, 4 KiB random write", "us", True),
    "cpu-read": (9, "Processor time of the daemon, 4 KiB random read, cached", "us", True),
    "locks": (9, "Locks in a profile of 8 writers with fdatasync", "%", True),
    "memory": (10, "Memory of the daemon beyond its cache, 10,000 clones", "MiB", True),
    "mount": (11, "Mount of a sparse pool of 10 TiB", "s", True),
    "umount": (11, "Unmount of it", "s", True),
    "grow-clone": (12, "Clone call, by size of the pool", "ms", True),
    "grow-write": (12, "4 KiB random write with fdatasync in 80 MiB, by size of the pool", "us", True),
    "grow-lookup": (12, "4 KiB random lookup in 80 MiB, by size of the pool", "us", True),
    "grow-lookup-all": (12, "4 KiB random lookup in the whole file, by size of the pool", "us", True),
}

# row, what, figure, store, against (figure, store; None: the figure itself), at least, target
GOALS = [
    (1, "cp against XFS, times faster", "clone", "nodupe", "xfs-reflink", "faster", 1000),
    (1, "cp against btrfs, times faster", "clone", "nodupe", "btrfs-reflink", "faster", 1000),
    (1, "nodupe clone, ms", "clone-call", "nodupe", None, "most", 5),
    (1, "cp, ms", "clone", "nodupe", None, "most", 50),
    (2, "8 writers against XFS", "sync8", "nodupe", "xfs-reflink", "least", 4),
    (2, "8 writers against qcow2", "sync8", "nodupe", "qcow2-chain", "least", 4),
    (2, "8 writers against btrfs", "sync8", "nodupe", "btrfs-reflink", "least", 20),
    (2, "8 writers against ext4", "sync8", "nodupe", "ext4-copy", "least", 1),
    (2, "1 writer against ext4", "sync1", "nodupe", "ext4-copy", "least", 0.8),
    (2, "32 writers against ext4", "sync32", "nodupe", "ext4-copy", "least", 1.5),
    (3, "depth 16 against ext4", "deep", "nodupe", "ext4-copy", "least", 1.5),
    (3, "depth 16 against XFS", "deep", "nodupe", "xfs-reflink", "least", 10),
    (3, "depth 16 against btrfs", "deep", "nodupe", "btrfs-reflink", "least", 3),
    (3, "absorbed, against the empty FUSE", "absorb", "nodupe", "empty-fuse", "least", 0.7),
    (3, "minutes: p99, ms", "long-p99", "nodupe", None, "most", 20),
    (3, "minutes: last ten seconds against the first", "long-rate", "nodupe", None, "least", 0.5),
    (4, "aged clone against a file written in order", "aged", "nodupe", "nodupe in order", "least", 0.85),
    (5, "device reads, times the image", "storm-read", "nodupe", None, "most", 1.05),
    (5, "boot storm against XFS", "storm", "nodupe", "xfs-reflink", "least", 5),
    (6, "cold against the host's file", "random", "nodupe", "ext4-copy", "least", 0.85),
    (6, "cached against the empty FUSE", "cached", "nodupe", "empty-fuse", "least", 0.8),
    (7, "sequential write against the host", "seq-write", "nodupe", "ext4-copy", "least", 0.9),
    (7, "sequential read against the host", "seq-read", "nodupe", "ext4-copy", "least", 0.9),
    (8, "write amplification, uniform", "amplify", "nodupe", None, "most", 2.3),
    (8, "write amplification, zipf 1.1", "amplify-hot", "nodupe", None, "most", 1.5),
    (9, "processor per write against the empty FUSE", "cpu-write", "nodupe", "empty-fuse", "most", 1.5),
    (9, "processor per read against the empty FUSE", "cpu-read", "nodupe", "empty-fuse", "most", 1.5),
    (9, "largest lock in a profile, %", "locks", "nodupe", None, "most", 5),
    (10, "memory beyond the cache, MiB", "memory", "nodupe", None, "most", 64),
    (11, "mount, s", "mount", "nodupe", None, "most", 2),
    (11, "unmount, s", "umount", "nodupe", None, "most", 3),
    (12, "clone, many extents against few", "grow-clone", "nodupe many extents", "nodupe few", "most", 2),
    (12, "write, many extents against few", "grow-write", "nodupe many extents", "nodupe few", "most", 2),
    (12, "lookup, many extents against few", "grow-lookup", "nodupe many extents", "nodupe few", "most", 2),
    (12, "clone, many clones against few", "grow-clone", "nodupe many clones", "nodupe few", "most", 2),
    (12, "write, many clones against few", "grow-write", "nodupe many clones", "nodupe few", "most", 2),
    (12, "lookup, many clones against few", "grow-lookup", "nodupe many clones", "nodupe few", "most", 2),
]


class Bench:
    """Runs rows and gathers what they find."""

    def __init__(self, options):
        self.options = options
        self.figures = {}  # key -> store -> values, one for each run
        self.open = contextlib.ExitStack()

    def add(self, key, store, value):
        self.figures.setdefault(key, {}).setdefault(store, []).append(value)
        print(f"    {store:20} {FIGURES[key][1]}: {value:.4g} {FIGURES[key][2]}", flush=True)

    @contextlib.contextmanager
    def store(self, kind):
        store = kind(self.options)
        self.open.callback(store.close)
        try:
            yield store
        finally:
            store.close()

    def wants(self, *rows):
        return bool(self.options.rows & set(rows))

    def turns(self, *kinds):
        """Each kind of store once for each run, with the number of the run."""
        kinds = [kind for kind in kinds if not self.options.only or kind.name in self.options.only]
        for run in range(self.options.runs if kinds else 0):
            shift = run % len(kinds)
            for kind in kinds[shift:] + kinds[:shift]:
                print(f"  run {run + 1} of {self.options.runs}: {kind.name}", flush=True)
                yield kind

    def goals(self):
        """Each goal that was measured: row, what, value, how, target, whether it is met."""
        for row, what, key, store, against, how, target in GOALS:
            mine = self.figures.get(key, {}).get(store, [])
            if against:
                # In one run each, so that a machine that is slow for a while is slow for both.
                pairs = zip(mine, self.figures.get(key, {}).get(against, []))
                mine = [b / a if how == "faster" else a / b for a, b in pairs if a and b]
            if mine:
                value = median(mine)
                met = value <= target if how == "most" else value >= target
                yield row, what, value, "at most" if how == "most" else "at least", target, met

    def close(self):
        self.open.close()


def fragmented(bench):
    """Row 1: one image for each store, then clones of it."""
    options = bench.options
    size = options.extents * 64 * 1024
    with contextlib.ExitStack() as stack:
        stores = []
        for kind in (Nodupe, Xfs, Btrfs):
            store = stack.enter_context(bench.store(kind))
            store.open()
            print(f"  {kind.name}: making {options.extents:,} extents", flush=True)
            fragment(store.path("fragmented"), size, options.extents)
            store.cold()
            stores.append(store)
        for run in range(options.runs):
            for store in stores:
                if isinstance(store, Nodupe):
                    calls = []
                    for number in range(4):
                        calls.append(store.call_ms("fragmented", "call"))
                        os.unlink(store.path("call"))
                    bench.add("clone-call", store.name, median(calls))
                bench.add("clone", store.name, 1000 * timed("cp", *store.cp_options, store.path("fragmented"), store.path("copy")))
                os.unlink(store.path("copy"))


def clones(bench):
    """Rows 2, 3, 5, 6 and 7: the golden image and its clones, on all stores in turns."""
    options = bench.options
    size = f"{options.mib}M"
    for kind in bench.turns(Copy, Xfs, Btrfs, Qcow2, Empty, Nodupe):
        empty = kind is Empty
        with bench.store(kind) as store:
            store.open()
            store.put_gold(options.gold)
            if bench.wants(5) and not empty:
                storm(bench, store)
            if bench.wants(2):
                for writers in (1, 8, 32):
                    found = fio(store.disks(writers), options.seconds, rw="randwrite", bs="4k", iodepth=1, fdatasync=1, size=size)
                    bench.add(f"sync{writers}", store.name, found["iops"])
            if bench.wants(3):
                found = fio(store.disks(8), options.seconds, rw="randwrite", bs="4k", iodepth=16, size=size)
                bench.add("deep", store.name, found["iops"])
                bench.add("deep-p99", store.name, found["p99_ms"])
            if bench.wants(6) and kind in (Copy, Xfs, Btrfs, Nodupe):
                disks = store.disks(1)
                store.cold()
                bench.add("random", store.name, fio(disks, options.seconds, rw="randread", bs="4k", iodepth=32, size=size)["iops"])
            if bench.wants(6) and kind in (Empty, Nodupe):
                disks = store.disks(1)
                small = f"{min(options.mib, 256)}M"
                fio(disks, rw="read", bs="64k", iodepth=4, size=small)
                bench.add("cached", store.name, fio(disks, options.seconds, rw="randread", bs="4k", iodepth=32, size=small)["iops"])
            if bench.wants(7) and kind in (Copy, Xfs, Btrfs, Nodupe):
                store.drop()
                store.settle()
                new = [store.path("new")]
                found = fio(new, rw="write", bs="1M", iodepth=4, size=size, end_fsync=1, refill_buffers=1)
                bench.add("seq-write", store.name, found["MBps"])
                store.cold()
                bench.add("seq-read", store.name, fio(new, rw="read", bs="1M", iodepth=4, size=size)["MBps"])


def storm(bench, store):
    size = bench.options.mib << 20
    disks = store.disks(32)
    if isinstance(store, Nodupe):
        store.cold()
    drop_caches()
    before = store.device_read()
    found = fio(disks, rw="read", bs="64k", iodepth=4, size=size)
    bench.add("storm", store.name, found["MBps"])
    bench.add("storm-read", store.name, (store.device_read() - before) / size)


def absorbed(bench):
    """Row 3: so few writes that the stage takes them all, against the empty FUSE."""

    class Large(Nodupe):
        cache = "4G"  # half of its stage, where destage begins, is 256 MiB

    for kind in bench.turns(Empty, Large):
        with bench.store(kind) as store:
            store.open()
            store.put_gold(bench.options.gold)
            found = fio(store.disks(8), rw="randwrite", bs="4k", iodepth=16, size=f"{bench.options.mib}M", io_size="24M")
            bench.add("absorb", store.name, found["iops"])


def minutes(bench):
    """Row 3: deep writes for minutes, with destage all the time. Once: it is long."""
    options = bench.options
    with bench.store(Nodupe) as store, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store.open()
        store.put_gold(options.gold)
        found = fio(store.disks(8), options.long, rw="randwrite", bs="4k", iodepth=16, size=f"{options.mib}M",
                    write_iops_log=f"{folder}/log", log_avg_msec=1000)
        each = rates(f"{folder}/log")
        ten = min(10, max(1, len(each) // 2))
        bench.add("long-p99", store.name, found["p99_ms"])
        bench.add("long-rate", store.name, sum(each[-ten:]) / sum(each[:ten]))
        bench.seconds = each
        print(f"    slowest second {min(each)}, median {median(each):.0f}, fastest {max(each)} IOPS")


def aged(bench):
    """Row 4: a clone that was written at random, against a file written in order. Once: it is long."""
    options = bench.options
    size = f"{options.mib}M"
    with bench.store(Nodupe) as store:
        store.open()
        store.put_gold(options.gold)
        disks = store.disks(1)
        fio(disks, options.age, rw="randwrite", bs="4k", iodepth=16, size=size)
        for _ in range(options.runs):
            for name, file in (("nodupe", disks[0]), ("nodupe in order", store.path("gold.raw"))):
                store.cold()
                bench.add("aged", name, fio([file], rw="read", bs="1M", iodepth=4, size=size)["MBps"])


def amplification(bench):
    """Row 8: bytes to the device for each byte of the guest. Once: it is long."""
    options = bench.options
    for key, more in (("amplify", {}), ("amplify-hot", {"random_distribution": "zipf:1.1"})):
        with bench.store(Nodupe) as store:
            store.open()
            disk = [store.path("disk")]
            fio(disk, rw="write", bs="1M", iodepth=4, size=f"{options.set_mib}M", refill_buffers=1)
            store.settle()
            watch = Watch(store.pid)
            found = fio(disk, options.long, rw="randwrite", bs="4k", iodepth=16, size=f"{options.set_mib}M", **more)
            store.settle()  # what is still staged counts as well
            bench.add(key, store.name, watch.used()["written"] / found["bytes"])


def processor(bench):
    """Row 9: processor time of the daemon for each operation, and what locks cost."""
    options = bench.options
    for kind in bench.turns(Empty, Nodupe):
        with bench.store(kind) as store:
            store.open()
            store.put_gold(options.gold)
            disks, small = store.disks(8), f"{min(options.mib, 32)}M"
            fio(disks, rw="read", bs="64k", iodepth=4, size=small)
            for key, rw in (("cpu-read", "randread"), ("cpu-write", "randwrite")):
                watch = Watch(store.pid)
                found = fio(disks, options.seconds, rw=rw, bs="4k", iodepth=16, size=small)
                store.settle()
                bench.add(key, store.name, watch.used()["cpu"] / found["ops"] * 1e6)
    with bench.store(Nodupe) as store:
        store.open()
        store.put_gold(options.gold)
        try:
            bench.add("locks", store.name, lock_share(store, store.disks(8), options))
        except Failed as error:
            print(f"    locks are not measured, that needs perf (linux-perf): {error}", flush=True)


def lock_share(store, disks, options):
    """Percent of the samples of a profile in the worst function that locks or waits for a lock."""
    data = f"{store.root}/perf.data"
    sh("perf", "--version")
    with subprocess.Popen(["perf", "record", "-q", "-F", "499", "-o", data, "-p", str(store.pid)], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, start_new_session=True) as perf:
        try:
            fio(disks, options.seconds, rw="randwrite", bs="4k", iodepth=1, fdatasync=1, size=f"{options.mib}M")
        finally:
            perf.send_signal(2)
            perf.wait()
    worst = 0
    for line in sh("perf", "report", "-i", data, "--stdio", "--no-children", "-F", "overhead,symbol").splitlines():
        if any(word in line for word in ("lock_slow", "RawMutex", "RawRwLock", "futex_wait", "futex_wake", "spin_lock_slowpath")):
            worst = max(worst, float(line.split("%")[0]))
    return worst


def hole_fio(files, seconds, size, **more):
    """Random accesses to the blocks between the extents of a furnished file."""
    return fio(files, seconds, bs="4k", blockalign="8k", offset="4k", size=size - 8192, **more)


def large(bench):
    """Rows 10, 11 and 12: a pool with few extents, one with many, one with many clones."""
    options = bench.options
    with contextlib.ExitStack() as stack:
        pools = {}
        for name, extents in (("few", 10_000), ("many clones", 10_000), ("many extents", options.pool_extents)):
            pools[name] = store = stack.enter_context(bench.store(Nodupe))
            store.cache, store.extents = "256M", extents
            print(f"  making a pool with {extents:,} extents", flush=True)
            store.furnished(extents)
        many = pools["many extents"]
        if bench.wants(11):
            for _ in range(options.runs):
                drop_caches()
                bench.add("mount", "nodupe", clock(many.mount))
                hole_fio([many.path("fragmented")], 2, many.extents * 8192, rw="randwrite", iodepth=16)
                bench.add("umount", "nodupe", clock(many.umount))
        for store in pools.values():
            store.mount()
        if bench.wants(12):
            growth(bench, pools)
        if bench.wants(10):
            many_clones(many, 10_000)
            disks = [many.path(f"many{number}") for number in range(1, 640, 10)]
            for rw in ("randread", "randwrite", "randread"):
                hole_fio(disks, options.seconds, many.extents * 8192, rw=rw, iodepth=4)
            many.settle()
            bench.add("memory", "nodupe", peak_rss(many.pid) / 2**20 - 256)


def growth(bench, pools):
    many_clones(pools["few"], 10)
    many_clones(pools["many clones"], 10_000)
    for store in pools.values():
        store.cold()
    seconds = max(1, bench.options.seconds // 2)
    for _ in range(bench.options.runs):
        for name, store in pools.items():
            label, size, calls = f"nodupe {name}", store.extents * 8192, []
            for _ in range(10):
                calls.append(store.call_ms("fragmented", "call"))
                os.unlink(store.path("call"))
            bench.add("grow-clone", label, median(calls))
            # A part as large as the smallest file: the same work for all, but for the depth of the
            # trees. Of the whole file also what must be fetched from the device is seen.
            part = min(size, 10_000 * 8192)
            for key, rw, area in (("grow-write", "randwrite", part), ("grow-lookup", "randread", part), ("grow-lookup-all", "randread", size)):
                more = {"fdatasync": 1} if rw == "randwrite" else {}
                found = hole_fio([store.path("fragmented")], seconds, area, rw=rw, iodepth=1, **more)
                bench.add(key, label, 1e6 / found["iops"])


def many_clones(store, count):
    if not os.path.exists(store.path("many1")):
        sh(store.options.nodupe, "clone", store.path("fragmented"), store.path("many{}"), "--count", count)


def clock(call):
    started = time.monotonic()
    call()
    return time.monotonic() - started


# What measures which rows.
SECTIONS = [(fragmented, {1}), (clones, {2, 3, 5, 6, 7}), (absorbed, {3}), (minutes, {3}), (aged, {4}),
            (amplification, {8}), (processor, {9}), (large, {10, 11, 12})]
