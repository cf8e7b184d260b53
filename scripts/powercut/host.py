"""The disk under a pool, for the power-cut tests: QEMU's storage daemon as a file that logs.

Owns the processes (storage daemon, nodupe) and what they leave: the log of every write, flush and
discard that reached the disk, and images of what a disk may hold after a cut at any place of it.

1. A flush makes durable what the log holds before it. QEMU logs a request when it is done, so a
   request that was under way during a flush is logged behind it and may be lost.
2. What is not durable at a cut is there wholly, in part or not at all, write by write, in any order.
   Parts are whole sectors of 512 bytes.
"""
import json
import mmap
import os
import signal
import struct
import subprocess
import time

SECTOR = 512
FLUSH, FUA, DISCARD = 1, 2, 4  # flags of a log entry
LOG_MAGIC = 0x6A736677736872
START_S = 120  # a program that has not started by then, on a busy machine, never will
PIECE = 1 << 20  # images are written in pieces; those of zeros stay holes


class Failed(Exception):
    """Something that the tests hold against nodupe."""


def wait_for(what, condition, process=None, seconds=START_S):
    end = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise Failed(f"{what}: ended with {process.returncode}")
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.005)


class Disk:
    """A file that QEMU's storage daemon serves over FUSE, with a log or with faults below it."""

    def __init__(self, folder, size, log=None, faults=None):
        self.path = os.path.join(folder, "export")
        self.image = os.path.join(folder, "image")
        self.log = log
        if not os.path.exists(self.image):
            with open(self.image, "wb") as file:
                file.truncate(size)
        open(self.path, "wb").close()
        node = {"driver": "file", "filename": self.image, "node-name": "disk", "discard": "unmap"}
        nodes, top = [node], "disk"
        if faults:
            nodes.append({"driver": "blkdebug", "node-name": "faults", "image": "disk", "discard": "unmap", **faults})
            # The format driver 'raw' tells blkdebug of each request: that is what counts them.
            nodes.append({"driver": "raw", "node-name": "counted", "file": "faults", "discard": "unmap"})
            top = "counted"
        if log:
            open(log, "wb").close()
            nodes.append({"driver": "file", "filename": log, "node-name": "log"})
            nodes.append({"driver": "blklogwrites", "node-name": "logged", "file": top, "log": "log",
                          "log-sector-size": SECTOR, "discard": "unmap"})
            top = "logged"
        command = ["qemu-storage-daemon"]
        for node in nodes:
            command += ["--blockdev", json.dumps(node)]
        command += ["--export", f"type=fuse,id=export,node-name={top},mountpoint={self.path},writable=on"]
        self.output = open(os.path.join(folder, "disk.log"), "ab")
        self.process = subprocess.Popen(command, stdout=self.output, stderr=self.output)
        wait_for("qemu-storage-daemon", lambda: mounted(self.path), self.process)

    def position(self):
        """Bytes of the log: what was done before now is below."""
        return os.stat(self.log).st_size

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(START_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        detach(self.path)
        self.output.close()


def mounted(path):
    path = os.path.realpath(path)
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return any(line.split()[1] == path for line in mounts)


def detach(path):
    if mounted(path):
        subprocess.run(["umount", "-l", path], check=False)


class Pool:
    """A pool on a file, served by the real daemon."""

    def __init__(self, nodupe, device, folder, log=None):
        self.nodupe, self.device = nodupe, device
        self.mount_point = os.path.join(folder, "mnt")
        self.log = log or os.path.join(folder, "daemon.log")
        self.daemon = None
        os.makedirs(self.mount_point, exist_ok=True)

    def create(self, journal):
        self.command("create", self.device, "--journal-size", journal)

    def command(self, *words):
        done = subprocess.run([self.nodupe, *words], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise Failed(f"nodupe {words[0]}: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-800:]}")
        return done.stdout

    def mount(self, cache="16M"):
        """Mounts; `Failed` with the daemon's words if it refuses."""
        with open(self.log, "wb") as log:
            self.daemon = subprocess.Popen(
                [self.nodupe, "mount", "--foreground", "--cache-size", cache, self.device, self.mount_point],
                stdout=log, stderr=log)
        try:
            wait_for("nodupe mount", lambda: mounted(self.mount_point), self.daemon)
        except Failed as error:
            self.kill()
            raise Failed(f"{error}: {self.words()}") from None

    def words(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()[-800:].strip()

    def kill(self):
        """SIGKILL, and the dead mount taken away."""
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
            self.daemon = None
        detach(self.mount_point)

    def unmount(self):
        end = time.monotonic() + START_S
        while True:
            try:
                self.command("umount", self.mount_point)
                break
            except Failed as error:
                # A passing statfs of another program (df, a monitor) is enough for that.
                if "busy" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.05)
        status = self.daemon.wait(START_S)
        self.daemon = None
        if status:
            raise Failed(f"the daemon ended with {status}: {self.words()}")

    def check(self):
        self.command("check", "--quiet", self.device)


class Entry:
    """One request of the log."""

    __slots__ = ("sector", "sectors", "flags", "data_at", "end")

    def __init__(self, sector, sectors, flags, data_at, end):
        self.sector, self.sectors, self.flags = sector, sectors, flags
        self.data_at, self.end = data_at, end  # in the log, bytes


class Log:
    """The log of a disk, and what the disk holds after a cut at a place of it."""

    def __init__(self, path, size):
        self.file = open(path, "rb")
        self.bytes = mmap.mmap(self.file.fileno(), 0, prot=mmap.PROT_READ)
        magic, version, _, sector = struct.unpack_from("<QQQI", self.bytes, 0)
        if magic != LOG_MAGIC or version != 1 or sector != SECTOR:
            raise SystemExit(f"{path}: not a log of blklogwrites")
        self.entries = list(self.parse())
        self.durable = bytearray(size)
        self.flushed = 0  # entries in `durable`

    def close(self):
        self.bytes.close()
        self.file.close()

    def parse(self):
        at = SECTOR
        while at + SECTOR <= len(self.bytes):
            sector, sectors, flags, _ = struct.unpack_from("<QQQQ", self.bytes, at)
            if not flags & FLUSH and not sectors:
                return
            data = at + SECTOR
            end = data if flags & (DISCARD | FLUSH) else data + sectors * SECTOR
            if end > len(self.bytes):
                return
            yield Entry(sector, sectors, flags, data, end)
            at = end

    def apply(self, image, entry, keep=None):
        """Does one request again; `keep` tells which of its sectors, else all."""
        if entry.flags & FLUSH:
            return
        start, length = entry.sector * SECTOR, entry.sectors * SECTOR
        if entry.flags & DISCARD:
            image[start:start + length] = bytes(length)
        elif keep is None:
            image[start:start + length] = self.bytes[entry.data_at:entry.data_at + length]
        else:
            for index in keep:
                at = entry.data_at + index * SECTOR
                image[start + index * SECTOR:start + (index + 1) * SECTOR] = self.bytes[at:at + SECTOR]

    def cut(self, count, random, lying=False):
        """What the disk may hold if the power fails after `count` requests. The cuts of one log must
        be asked for in order. A lying disk did nothing at its last flush: the harness must notice."""
        last = self.flush_before(count)
        if lying:
            last = self.flush_before(last - 1)
        for entry in self.entries[self.flushed:last]:
            self.apply(self.durable, entry)
        self.flushed = max(self.flushed, last)
        image = bytearray(self.durable)
        pending = self.entries[self.flushed:count]
        style = random.choice(("none", "all", "any", "any", "torn", "torn", "shuffled"))
        if style == "none":
            return image, style
        if style == "shuffled":
            random.shuffle(pending)
        for entry in pending:
            if style == "all" or random.random() < 0.5:
                torn = style in ("torn", "shuffled") and not entry.flags & (FLUSH | DISCARD) and random.random() < 0.7
                self.apply(image, entry, self.tear(entry, random) if torn else None)
        return image, style

    def flush_before(self, count):
        """How many of the first `count` requests the last flush among them covers."""
        while count > self.flushed and not self.entries[count - 1].flags & FLUSH:
            count -= 1
        return max(count, self.flushed)

    @staticmethod
    def tear(entry, random):
        """Which sectors of a write are there: a beginning, an end, or any."""
        middle = random.randrange(entry.sectors + 1)
        return random.choice((
            range(middle), range(middle, entry.sectors),
            [index for index in range(entry.sectors) if random.random() < 0.5]))


def write_image(path, image):
    """A file with these bytes; long runs of zeros are holes."""
    zeros = bytes(PIECE)
    with open(path, "wb") as file:
        file.truncate(len(image))
        for at in range(0, len(image), PIECE):
            piece = image[at:at + PIECE]
            if piece != zeros[:len(piece)]:
                file.seek(at)
                file.write(piece)
