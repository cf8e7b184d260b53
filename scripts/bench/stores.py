"""The stores that compare.py measures side by side, and how one drives and watches them.

A store owns a folder, and what it mounts and starts there: `close` undoes all of it, in whatever
state it is, and never raises.
"""
import contextlib
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time

BLOCK = 4096


class Failed(Exception):
    """Something that is not the benchmark's to judge went wrong; says what."""


def sh(*words):
    words = [str(word) for word in words]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Failed(f"{words[0]} is missing: run scripts/setup") from error
    if done.returncode:
        raise Failed(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr.strip()}")
    return done.stdout


def quietly(*words):
    with contextlib.suppress(Failed):
        sh(*words)


def timed(*words):
    started = time.monotonic()
    sh(*words)
    return time.monotonic() - started


def drop_caches():
    sh("sync")
    with open("/proc/sys/vm/drop_caches", "w") as caches:
        caches.write("3")


def fio(files, seconds=0, **options):
    """Runs one job per file, all at once; returns the numbers of the whole group."""
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
    return {"iops": side["iops"], "MBps": side["bw_bytes"] / 1e6, "bytes": side["io_bytes"],
            "ops": side["total_ios"],
            "p99_ms": side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1e6}


def rates(prefix):
    """Operations in each second of a fio run with `write_iops_log=prefix`, all jobs together."""
    seconds = {}
    folder, name = os.path.split(prefix)
    for file in os.listdir(folder):
        if file.startswith(f"{name}_iops"):
            with open(f"{folder}/{file}") as lines:
                for line in lines:
                    at, value = line.split(",")[:2]
                    seconds[int(at) // 1000] = seconds.get(int(at) // 1000, 0) + int(value)
            os.unlink(f"{folder}/{file}")
    # The first and the last entry are of parts of a second.
    return [seconds[at] for at in sorted(seconds)][1:-1]


def fragment(path, size, count):
    """Makes a sparse file of `size` bytes with `count` single blocks at equal distances, written
    in an order that jumps about."""
    spacing = size // count // BLOCK
    if spacing < 2:
        raise Failed("so many extents need a larger file")
    with open(path, "wb") as file:
        file.truncate(size)
    stride, writers = 1_000_003, []  # a prime: no place is written twice
    assert count % stride
    for part in range(4):
        child = os.fork()
        if child == 0:
            # Whatever happens, the child must not run the clean-up of its parent.
            with contextlib.suppress(BaseException):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                memory, target = mmap.mmap(-1, BLOCK), os.open(path, os.O_WRONLY | os.O_DIRECT)
                for number in range(part, count, 4):
                    memory[:] = (number + 1).to_bytes(8, "little") * (BLOCK // 8)
                    os.pwrite(target, memory, number * stride % count * spacing * BLOCK)
                os.fsync(target)
                os._exit(0)
            os._exit(1)
        writers.append(child)
    failed = [child for child in writers if os.waitpid(child, 0)[1]]
    if failed:
        raise Failed(f"cannot write {path}")


class Watch:
    """What a process used since the watch began."""

    def __init__(self, pid):
        self.pid = pid
        self.before = self.now()

    def now(self):
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        with open(f"/proc/{self.pid}/io") as lines:
            io = dict(line.split(": ") for line in lines.read().splitlines())
        ticks = os.sysconf("SC_CLK_TCK")
        return {"cpu": (int(fields[11]) + int(fields[12])) / ticks,
                "read": int(io["read_bytes"]), "written": int(io["write_bytes"])}

    def used(self):
        return {key: value - self.before[key] for key, value in self.now().items()}


def peak_rss(pid):
    """Most memory that a process ever had, in bytes."""
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class Store:
    """A folder with a golden image in it, from which clones are made."""

    cp_options = ()

    def __init__(self, options):
        self.options = options
        self.root = tempfile.mkdtemp(prefix=f"{self.name}.", dir=options.folder)
        self.dir = self.root
        self.made = 0

    def open(self):
        """Makes the store ready for files in `self.dir`."""

    def put_gold(self, source):
        sh("cp", "--sparse=never", source, self.path("gold.raw"))

    def path(self, name):
        return f"{self.dir}/{name}"

    def clone(self, source, target):
        sh("cp", *self.cp_options, self.path(source), self.path(target))
        return self.path(target)

    def disks(self, count):
        """Paths of `count` fresh clones of the golden image; the last ones are gone."""
        self.drop()
        self.clones = [self.clone("gold.raw", f"clone{number}.raw") for number in range(count)]
        self.settle()
        return self.clones

    clones = ()

    def drop(self):
        for clone in self.clones:
            os.unlink(clone)
        self.clones = ()

    def settle(self):
        """Everything is at its place, nothing goes on in the background."""
        sh("sync", "-f", self.dir)

    def cold(self):
        self.settle()
        drop_caches()

    def device_read(self):
        """Bytes read so far from the device below."""
        device = os.stat(self.options.folder).st_dev
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat") as stat:
            return int(stat.read().split()[2]) * 512

    def close(self):
        shutil.rmtree(self.root, ignore_errors=True)


class Copy(Store):
    """Full copies, made once: there is nothing about a copy that is fresh or not."""

    name = "ext4-copy"

    def disks(self, count):
        for number in range(len(self.clones), count):
            self.clones = (*self.clones, self.clone("gold.raw", f"clone{number}.raw"))
        self.settle()
        return self.clones[:count]


class Loop(Store):
    """Another file system on a loop device over a sparse file."""

    cp_options = ("--reflink=always",)
    device = None

    def open(self):
        self.dir = f"{self.root}/mnt"
        os.mkdir(self.dir)
        sh("truncate", "-s", "128G", f"{self.root}/image")
        sh(*self.mkfs, f"{self.root}/image")
        self.device = sh("losetup", "--direct-io=on", "--show", "-f", f"{self.root}/image").strip()
        sh("mount", self.device, self.dir)

    def device_read(self):
        with open(f"/sys/block/{os.path.basename(self.device)}/stat") as stat:
            return int(stat.read().split()[2]) * 512

    def close(self):
        if self.device:
            quietly("umount", self.dir)
            quietly("losetup", "-d", self.device)
        super().close()


class Xfs(Loop):
    name, mkfs = "xfs-reflink", ("mkfs.xfs", "-q", "-m", "reflink=1")


class Btrfs(Loop):
    name, mkfs = "btrfs-reflink", ("mkfs.btrfs", "-q", "-f")


class Qcow2(Store):
    """An overlay for each clone, each served by a daemon of its own."""

    name = "qcow2-chain"
    daemons = ()

    def clone(self, source, target):
        sh("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.path(source), self.path(target))
        return self.path(target)

    def disks(self, count):
        def file(name, **more):
            return {"driver": "file", "filename": name, "cache": {"direct": True}, "aio": "io_uring", **more}
        overlays, size = super().disks(count), os.stat(self.path("gold.raw")).st_size
        for overlay in overlays:
            open(f"{overlay}.export", "w").close()
            disk = {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": file(overlay),
                    "backing": {"driver": "raw", "file": file(self.path("gold.raw"), **{"read-only": True})}}
            self.daemons = (*self.daemons, subprocess.Popen([
                "qemu-storage-daemon", "--blockdev", json.dumps(disk), "--export",
                f"type=fuse,id=export,node-name=disk,mountpoint={overlay}.export,writable=on,growable=off"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True))
        exports = [f"{overlay}.export" for overlay in overlays]
        for export in exports:
            for _ in range(400):
                if os.stat(export).st_size == size:
                    break
                time.sleep(0.05)
            else:
                raise Failed(f"qemu-storage-daemon does not export {export}")
        return exports

    def drop(self):
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait()
        self.daemons = ()
        super().drop()

    def close(self):
        with contextlib.suppress(OSError):
            self.drop()
        super().close()


class Mounted(Store):
    """Something that a daemon in the foreground serves."""

    daemon = None

    def start(self, *words):
        self.dir = f"{self.root}/mnt"
        os.makedirs(self.dir, exist_ok=True)
        before = os.stat(self.dir).st_dev
        self.log = open(f"{self.root}/log", "a")
        self.daemon = subprocess.Popen([str(word) for word in words], stdout=self.log, stderr=self.log,
                                       start_new_session=True)
        while os.stat(self.dir).st_dev == before:
            if self.daemon.poll() is not None:
                with open(f"{self.root}/log") as log:
                    raise Failed(f"{words[0]} does not mount {self.dir}: {log.read()[-500:]}")
            time.sleep(0.002)
        self.pid = self.daemon.pid

    def stop(self, *words):
        sh(*words, self.dir)
        self.daemon.wait()
        self.daemon = None
        self.log.close()

    def close(self):
        if self.daemon:
            quietly("umount", "-l", self.dir)
            try:
                self.daemon.wait(60)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.wait()
        super().close()


class Empty(Mounted):
    """The ceiling: a daemon that answers and does nothing."""

    name = "empty-fuse"

    def open(self):
        self.start(self.options.empty, f"{self.root}/mnt", self.options.mib)

    def put_gold(self, _):
        pass

    def disks(self, count):
        return [f"{self.dir}/disk{number}" for number in range(count)]

    def settle(self):
        pass


class Nodupe(Mounted):
    name = "nodupe"
    cache = "1G"

    def open(self):
        self.pool = f"{self.root}/pool"
        sh(self.options.nodupe, "create", self.pool, "--size", "128G")
        self.mount()

    def furnished(self, extents):
        """A sparse pool of 10 TiB whose only file has that many extents."""
        self.pool = f"{self.root}/pool"
        sh(self.options.furnish, self.pool, extents)

    def mount(self, *more):
        self.start(self.options.nodupe, "mount", "--foreground", "--cache-size", self.cache,
                   *self.options.mount_options.split(), *more, self.pool, f"{self.root}/mnt")

    def umount(self):
        self.stop(self.options.nodupe, "umount")

    def settle(self):
        sh("sync", self.dir)  # of the root directory: a checkpoint

    def cold(self):
        self.umount()
        drop_caches()
        self.mount()

    def call_ms(self, source, target, *more):
        """Milliseconds that `nodupe clone` reports for its request."""
        text = sh(self.options.nodupe, "clone", "--json", self.path(source), self.path(target), *more)
        return json.loads(text)["seconds"] * 1000

    def device_read(self):
        with open(f"/proc/{self.pid}/io") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def median(values):
    return statistics.median(values) if values else None
