"""Writers of the power-cut tests, what they know, and what must be there afterwards.

Each writer works in a folder of its own with seeded operations, and keeps its history: the state of
its folder after every operation, when the operation began and ended, and whether it was a sync that
was acknowledged. States are compared byte for byte. What is asked of a folder after a crash:

1. (P1) It is at least as new as the last acknowledged sync.
2. (P3) It is the state after one of the operations, in the order they were made; only of the one
   operation after it some blocks may be there, too.
3. (P2) Each block of such an operation is the old or the new one.
4. (P3, all writers together) If an operation is there, all that ended before it began is there.
"""
import mmap
import os
import random
import subprocess
import threading
import time

BLOCK = 4096
ZERO = bytes(BLOCK)
FILE_BLOCKS_MAX = 192  # so that a file grows over several leaves, and a run stays short
FILES_MAX = 6
EMPTY = ((), 0)


class Violation(Exception):
    """A promise that was not kept."""


class Step:
    """One operation of a writer and the state it left."""

    __slots__ = ("what", "state", "before", "after", "began", "ended", "acknowledged")

    def __init__(self, what, state, before, after, began, ended, acknowledged):
        self.what, self.state = what, state
        self.before, self.after = before, after  # position of the disk's log
        self.began, self.ended = began, ended  # seconds
        self.acknowledged = acknowledged

    def __repr__(self):
        return self.what


def pattern(writer, file, block, sequence):
    """A block's content: the same record over and over, so that a mix of two is seen."""
    record = f"w{writer} f{file} b{block} s{sequence} ".encode().ljust(64, b".")
    return record * (BLOCK // len(record))


class Writer:
    """Seeded operations on one folder."""

    def __init__(self, number, folder, seed, position):
        self.number, self.folder = number, folder
        self.random = random.Random(f"{seed}/{number}")
        self.position = position  # where the disk's log is now
        self.state = {}  # name to (blocks, size)
        self.sequence = 0
        self.files = 0
        self.history = [Step("start", {}, 0, 0, 0.0, 0.0, True)]
        self.error = None
        self.stopping = threading.Event()
        self.buffer = mmap.mmap(-1, 1 << 20)  # aligned, for O_DIRECT
        self.thread = None

    def start(self, operations):
        self.stopping.clear()
        self.thread = threading.Thread(target=self.run, args=(operations,), daemon=True)
        self.thread.start()

    def run(self, operations):
        try:
            for _ in range(operations):
                if self.stopping.is_set():
                    return
                self.step()
        except (OSError, subprocess.CalledProcessError, Violation) as error:
            self.error = error

    def path(self, name):
        return os.path.join(self.folder, name)

    def step(self):
        """One operation. It is in the history even if it fails: then nobody knows what it did."""
        kinds = [self.write] * 10 + [self.write_large] * 3 + [self.write_odd] * 3 + [self.sync] * 6 + \
            [self.clone] * 3 + [self.resize] * 2 + [self.punch] * 2 + [self.rename, self.remove, self.read, self.read]
        if len(self.state) < 2:
            kinds = [self.create]
        elif len(self.state) < FILES_MAX:
            kinds += [self.create]
        self.random.choice(kinds)()

    def do(self, what, name, new, action, acknowledged=False):
        """Runs `action`, after which file `name` is `new` (None: gone), and notes it."""
        state = dict(self.state)
        for file, content in ({name: new} if not isinstance(name, dict) else name).items():
            if content is None:
                state.pop(file, None)
            else:
                state[file] = content
        before, began = self.position(), time.monotonic()
        try:
            action()
        except BaseException as error:
            self.history.append(Step(f"{what}: {error}", state, before, 1 << 62, began, float("inf"), False))
            raise
        ended = time.monotonic()
        self.state = state
        self.history.append(Step(what, state, before, self.position(), began, ended, acknowledged))

    def pick(self):
        return self.random.choice(sorted(self.state))

    def fresh(self):
        self.files += 1
        return f"f{self.files}"

    def create(self):
        name = self.fresh()
        self.do(f"create {name}", name, EMPTY,
                lambda: os.close(os.open(self.path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)))

    def write(self):
        self.write_blocks(self.random.randint(1, 4))

    def write_large(self):
        self.write_blocks(self.random.randint(16, 64))

    def write_blocks(self, count):
        name = self.pick()
        blocks, size = self.state[name]
        at = self.random.randrange(0, min(len(blocks) + 16, FILE_BLOCKS_MAX - count))
        self.sequence += 1
        new = [ZERO if self.random.random() < 0.04 else pattern(self.number, name, at + i, self.sequence)
               for i in range(count)]
        content = (splice(blocks, at, new), max(size, (at + count) * BLOCK))
        flags = self.random.choice((0, 0, os.O_DIRECT, os.O_DIRECT, os.O_DSYNC, os.O_DIRECT | os.O_DSYNC))
        self.do(f"write {name} blocks {at}+{count} flags {flags:o}", name, content,
                lambda: self.put(name, at * BLOCK, b"".join(new), flags), bool(flags & os.O_DSYNC))

    def write_odd(self):
        name = self.pick()
        blocks, size = self.state[name]
        offset = self.random.randrange(0, max(size, BLOCK))
        length = self.random.randint(1, 3 * BLOCK)
        self.sequence += 1
        data = (f"w{self.number} {name} s{self.sequence} ".encode() * 3000)[:length]
        old = b"".join(blocks[offset // BLOCK:(offset + length) // BLOCK + 1])
        start = offset % BLOCK
        span = (start + length + BLOCK - 1) // BLOCK * BLOCK
        merged = bytearray(old.ljust(span, b"\0")[:span])
        merged[start:start + length] = data
        new = [bytes(merged[i:i + BLOCK]) for i in range(0, span, BLOCK)]
        content = (splice(blocks, offset // BLOCK, new), max(size, offset + length))
        self.do(f"write {name} bytes {offset}+{length}", name, content, lambda: self.put(name, offset, data, 0))

    def put(self, name, offset, data, flags):
        if flags & os.O_DIRECT:
            self.buffer[:len(data)] = data
            data = memoryview(self.buffer)[:len(data)]
        file = os.open(self.path(name), os.O_WRONLY | flags)
        try:
            written = os.pwrite(file, data, offset)
            if written != len(data):
                raise OSError(5, f"short write: {written} of {len(data)}")
        finally:
            os.close(file)

    def sync(self):
        name = self.pick()
        how = self.random.choice((os.fsync, os.fdatasync))
        target = self.folder if self.random.random() < 0.2 else self.path(name)

        def action():
            file = os.open(target, os.O_RDONLY)
            try:
                how(file)
            finally:
                os.close(file)
        self.do(f"{how.__name__} {os.path.basename(target)}", {}, None, action, True)

    def clone(self):
        source, name = self.pick(), self.fresh()
        if len(self.state) >= FILES_MAX:
            self.remove()
            if source not in self.state:
                return
        # As cp(1) does it: the new file is there, empty, before it is a clone.
        self.do(f"create {name}", name, EMPTY,
                lambda: os.close(os.open(self.path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)))
        if self.random.random() < 0.3:
            self.do(f"cp {source} {name}", name, self.state[source], lambda: subprocess.run(
                ["cp", self.path(source), self.path(name)], check=True, capture_output=True))
        else:
            self.do(f"clone {source} {name}", name, self.state[source], lambda: self.copy(source, name))

    def copy(self, source, name):
        left = self.state[source][1]
        read = os.open(self.path(source), os.O_RDONLY)
        write = os.open(self.path(name), os.O_WRONLY)
        try:
            while left:
                copied = os.copy_file_range(read, write, left)
                if not copied:
                    raise Violation(f"copy_file_range ended {left} bytes early")
                left -= copied
        finally:
            os.close(read)
            os.close(write)

    def resize(self):
        name = self.pick()
        blocks, size = self.state[name]
        new = self.random.randrange(0, FILE_BLOCKS_MAX * BLOCK)
        if self.random.random() < 0.5:
            new = new // BLOCK * BLOCK
        self.do(f"truncate {name} from {size} to {new}", name, resized(blocks, new),
                lambda: os.truncate(self.path(name), new))

    def punch(self):
        name = self.pick()
        blocks, size = self.state[name]
        if size < 2 * BLOCK:
            return
        at = self.random.randrange(0, size // BLOCK)
        count = self.random.randint(1, 32)
        new = [ZERO] * min(count, len(blocks) - at)
        self.do(f"punch {name} blocks {at}+{count}", name, (splice(blocks, at, new), size), lambda: subprocess.run(
            ["fallocate", "--punch-hole", "--offset", str(at * BLOCK), "--length", str(count * BLOCK), self.path(name)],
            check=True, capture_output=True))

    def rename(self):
        source = self.pick()
        name = self.pick() if self.random.random() < 0.6 else self.fresh()
        if name != source:
            self.do(f"rename {source} {name}", {source: None, name: self.state[source]}, None,
                    lambda: os.rename(self.path(source), self.path(name)))

    def remove(self):
        name = self.pick()
        self.do(f"unlink {name}", name, None, lambda: os.unlink(self.path(name)))

    def read(self):
        name = self.pick()
        found = read_file(self.path(name), self.random.random() < 0.5)
        if found != self.state[name]:
            raise Violation(f"{name} reads wrong: {difference(self.state[name], found)}")

    def resume(self, state):
        """Goes on after a crash of the daemon, with what was there after it."""
        at = None
        for index, step in enumerate(self.history):
            if step.state == state:
                at = index
        if at is None:
            # Part of the operation that was under way.
            last = self.history[-1]
            self.history.append(Step(f"part of {last.what}", state, last.before, last.after, last.began, last.ended, False))
        else:
            del self.history[at + 1:]
        self.state, self.error = state, None


def splice(blocks, at, new):
    blocks = blocks + (ZERO,) * (at - len(blocks))
    return blocks[:at] + tuple(new) + blocks[at + len(new):]


def resized(blocks, size):
    count = (size + BLOCK - 1) // BLOCK
    blocks = (blocks + (ZERO,) * (count - len(blocks)))[:count]
    if size % BLOCK:
        blocks = blocks[:-1] + (blocks[-1][:size % BLOCK].ljust(BLOCK, b"\0"),)
    return blocks, size


def read_file(path, direct=False):
    """Content of a file as (blocks, size)."""
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        size = os.fstat(file).st_size
        buffer = mmap.mmap(-1, max(BLOCK, (size + BLOCK - 1) // BLOCK * BLOCK))
        done = 0
        while done < size:
            read = os.preadv(file, [memoryview(buffer)[done:]], done)
            if read == 0:
                raise Violation(f"{path}: ends at {done} of {size}")
            done += read
        blocks = []
        for at in range(0, size, BLOCK):
            block = buffer[at:at + BLOCK]
            if size - at < BLOCK:
                block = block[:size - at].ljust(BLOCK, b"\0")
            blocks.append(ZERO if block == ZERO else block)
        return tuple(blocks), size
    finally:
        os.close(file)


def read_folder(folder):
    return {name: read_file(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}


def difference(old, new):
    """One sentence about two contents."""
    if old[1] != new[1]:
        return f"size {new[1]} instead of {old[1]}"
    for at, (left, right) in enumerate(zip(old[0], new[0])):
        if left != right:
            kinds = sorted({right[i:i + 64] for i in range(0, BLOCK, 64)})
            mixed = " (mixed)" if len(kinds) > 1 else ""
            return f"block {at} is {kinds[0].rstrip(b'.')!r}{mixed} instead of {left[:32].rstrip(b'.')!r}"
    return "equal"


def is_between(before, after, found):
    """True if each block of `found` is the one of `before` or of `after`: part of one operation."""
    if set(found) - set(before) - set(after) or (set(before) & set(after)) - set(found):
        return False
    for name, (blocks, size) in found.items():
        old, new = before.get(name, EMPTY), after.get(name, EMPTY)
        if not min(old[1], new[1]) <= size <= max(old[1], new[1]):
            return False
        for at, block in enumerate(blocks):
            if block not in [side[0][at] if at < len(side[0]) else ZERO for side in (old, new)]:
                return False
    return True


def explain(history, found):
    """Why a folder is in no allowed state, from the newest state of each of its files."""
    lines = []
    last = history[-1].state
    for name in sorted(set(found) | set(last)):
        if name not in found:
            lines.append(f"{name} is not there")
        elif name not in last:
            lines.append(f"{name} is there")
        elif found[name] != last[name]:
            lines.append(f"{name}: {difference(last[name], found[name])}")
    return "; ".join(lines) or "equal to the newest state"


def matches(history, found, floor, ceiling):
    """The steps whose state is `found`, as (oldest, newest) index; the oldest is `floor` or later."""
    full = [index for index in range(floor, ceiling + 1) if history[index].state == found]
    if full:
        return full[0], full[-1]
    partial = [index for index in range(floor, ceiling)
               if is_between(history[index].state, history[index + 1].state, found)]
    if partial:
        return partial[0], partial[-1]
    return None


def verify(writers, position, folders):
    """Compares folders (by writer) with what their writers know, after a cut at `position` of the
    log. Raises `Violation`."""
    there = []
    for writer in writers:
        history, found = writer.history, folders[writer.number]
        floor = max(index for index, step in enumerate(history) if step.acknowledged and step.after <= position)
        ceiling = max(index for index, step in enumerate(history) if step.before <= position)
        span = matches(history, found, floor, ceiling)
        if span is None:
            older = matches(history, found, 0, floor)
            if older:
                raise Violation(f"P1: writer {writer.number} is back at '{history[older[1]]}' ({older[1]}), but "
                                f"'{history[floor]}' ({floor}) was acknowledged")
            raise Violation(f"P3: writer {writer.number} is in no state between '{history[floor]}' ({floor}) and "
                            f"'{history[ceiling]}' ({ceiling}); against the newest: {explain(history[:ceiling + 1], found)}")
        there.append((writer, span, ceiling))
    newest = max((writer.history[span[0]].began for writer, span, _ in there), default=0.0)
    for writer, span, ceiling in there:
        for index in range(span[1] + 1, ceiling + 1):
            step = writer.history[index]
            if step.ended < newest and step.state != writer.history[span[1]].state:
                raise Violation(f"P3: '{step}' ({index}) of writer {writer.number} is not there, but an operation "
                                "that began after its end is")
