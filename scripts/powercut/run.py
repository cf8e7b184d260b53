#!/usr/bin/env python3
"""Power cuts, flipped bits and errors of the disk under the real daemon.

The pool lies on a file that QEMU's storage daemon exports over FUSE, with a log of every write, flush
and discard (blklogwrites) or with faults (blkdebug) below it. Seeded writers work on the mount; what
they know is compared with what is there afterwards (world.py says what is asked).

cuts    The power fails at flushes and between them: what was not flushed is there in any subset and
        order, torn at 512 bytes. In the middle of the run the daemon is killed with SIGKILL and
        mounts again, so that recovery is cut, too; every eighth cut is followed by another one in
        the recovery from it. Each image is mounted, compared, written to, unmounted and checked.
flips   One bit of a clean pool is flipped, before it is mounted or under the running daemon: each
        read gives the right bytes or an error.
errors  The disk fails a read, write, flush or discard, once or from then on: the error reaches the
        callers, after it nothing is acknowledged, and what was acknowledged is there on a whole disk.
        A write that finds no space once is a full host, no failure: the pool goes on.

Exit codes: 0 nothing wrong, 1 something is, 2 it cannot run here.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time

import world
from host import DISCARD, FLUSH, Disk, Failed, Log, Pool, write_image
from world import Violation, Writer

HERE = os.path.dirname(os.path.abspath(__file__))
POOL_SIZE = 96 << 20
HANG_S = 180  # nothing here takes as long, on a busy machine either
END = 1 << 61  # behind every place of a log


def say(text):
    print(f"powercut: {text}", flush=True)


class Bench:
    """One seed's folder, pool and writers."""

    def __init__(self, options, mode, seed):
        self.options, self.mode, self.seed = options, mode, seed
        self.random = random.Random(f"{mode}/{seed}")
        self.folder = tempfile.mkdtemp(prefix=f"powercut-{mode}-{seed}-", dir=options.folder)
        self.writers = []
        self.pools = []
        self.disks = []

    def pool(self, device, name="mnt"):
        folder = os.path.join(self.folder, name)
        os.makedirs(folder, exist_ok=True)
        pool = Pool(self.options.nodupe, device, folder)
        self.pools.append(pool)
        return pool

    def disk(self, name, **what):
        folder = os.path.join(self.folder, name)
        os.makedirs(folder, exist_ok=True)
        disk = Disk(folder, POOL_SIZE, **what)
        self.disks.append(disk)
        return disk

    def journal(self):
        return self.random.choice(("1M", "2M", "4M", "8M"))

    def add_writer(self, pool, number, position):
        """A writer in a folder that is durable before it begins."""
        folder = os.path.join(pool.mount_point, f"w{number}")
        os.mkdir(folder)
        for path in (folder, pool.mount_point):
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        writer = Writer(number, folder, f"{self.mode}/{self.seed}", position)
        self.writers.append(writer)
        return writer

    def close(self, keep):
        for pool in self.pools:
            pool.kill()
        for disk in self.disks:
            disk.stop()
        if keep:
            say(f"left for study: {self.folder}")
        else:
            shutil.rmtree(self.folder)


def join(writers):
    for writer in writers:
        writer.thread.join(HANG_S)
        if writer.thread.is_alive():
            raise Failed(f"writer {writer.number} hangs in what follows '{writer.history[-1]}'")


def no_errors(writers):
    for writer in writers:
        if writer.error is not None:
            raise Failed(f"writer {writer.number}: {writer.error}")


def folders_of(pool, writers):
    return {writer.number: world.read_folder(os.path.join(pool.mount_point, f"w{writer.number}"))
            for writer in writers}


# Cuts.

def workload(bench, disk):
    """Writes through the daemon with a SIGKILL in the middle. Returns where the writers began."""
    pool = bench.pool(disk.path)
    pool.create(bench.journal())
    pool.mount()
    writers = [bench.add_writer(pool, number, disk.position) for number in range(3)]
    began = disk.position()
    for writer in writers:
        writer.start(bench.options.operations // 2)
    time.sleep(bench.random.uniform(0.2, 1.5))
    if bench.random.random() < 0.5:
        join(writers)
        no_errors(writers)
    pool.kill()
    join(writers)
    for writer in writers:
        if isinstance(writer.error, Violation):
            raise writer.error
    pool.mount()
    folders = folders_of(pool, writers)
    world.verify(writers, END, folders)
    for writer in writers:
        writer.resume(folders[writer.number])
        writer.start(bench.options.operations // 2)
    join(writers)
    no_errors(writers)
    world.verify(writers, END, folders_of(pool, writers))
    if bench.random.random() < 0.5:
        pool.unmount()
    else:
        pool.kill()
    return began


def choose_cuts(entries, began, count, rng):
    """Numbers of requests after which the power fails: half of them at flushes."""
    first = next(index for index, entry in enumerate(entries) if entry.end > began)
    flushes = [index + 1 for index, entry in enumerate(entries) if entry.flags & FLUSH and index >= first]
    between = [index + 1 for index, entry in enumerate(entries) if not entry.flags & FLUSH and index >= first]
    at_flush = min(len(flushes), count // 2)
    # A cut right before a flush is where the most is at stake.
    chosen = set(rng.sample(flushes, at_flush)) | {index - 1 for index in rng.sample(flushes, at_flush // 2)}
    rng.shuffle(between)
    while len(chosen) < count and between:
        chosen.add(between.pop())
    return sorted(index for index in chosen if index > first)


def recover_and_cut(bench, path):
    """Recovers from a cut, fails again in the middle of that, and leaves the second image."""
    disk = bench.disk(f"again-{len(bench.disks)}", log=os.path.join(bench.folder, "again.log"))
    try:
        shutil.copyfile(path, disk.image)
        pool = bench.pool(disk.path, "mnt-again")
        pool.mount()
        pool.kill()
    finally:
        disk.stop()
    if os.path.getsize(disk.log) <= 512:
        return
    log = Log(disk.log, POOL_SIZE)
    with open(path, "rb") as file:
        log.durable = bytearray(file.read())
    image, _ = log.cut(bench.random.randint(0, len(log.entries)), bench.random)
    log.close()
    shutil.rmtree(os.path.dirname(disk.image))
    write_image(path, image)


def after_cut(bench, path, position, pool):
    """Mounts what a cut left and compares."""
    pool.mount()
    folders = folders_of(pool, bench.writers)
    world.verify(bench.writers, position, folders)
    canary = os.path.join(pool.mount_point, "canary")
    with open(canary, "wb") as file:
        file.write(b"written after the cut" * 1000)
        os.fsync(file.fileno())
    pool.unmount()
    pool.check()


def run_cuts(bench):
    log_path = os.path.join(bench.folder, "log")
    disk = bench.disk("disk", log=log_path)
    began = workload(bench, disk)
    disk.stop()
    os.unlink(disk.image)
    log = Log(log_path, POOL_SIZE)
    cuts = choose_cuts(log.entries, began, bench.options.cuts, bench.random)
    flushes = sum(1 for entry in log.entries if entry.flags & FLUSH)
    discards = sum(1 for entry in log.entries if entry.flags & DISCARD)
    path = os.path.join(bench.folder, "cut.nodupe")
    pool = bench.pool(path, "mnt-cut")
    wrong = 0
    for number, count in enumerate(cuts):
        image, style = log.cut(count, bench.random, bench.options.lying)
        write_image(path, image)
        try:
            if number % 8 == 7:
                style += ", cut again in recovery"
                recover_and_cut(bench, path)
            after_cut(bench, path, log.entries[count - 1].end, pool)
        except (Violation, Failed, OSError) as error:
            wrong += 1
            say(f"FAILED: seed {bench.seed}, cut after request {count} of {len(log.entries)} ({style}): {error}")
            pool.kill()
            write_image(os.path.join(bench.folder, f"failed-{count}.nodupe"), image)
    operations = sum(len(writer.history) for writer in bench.writers)
    log.close()
    say(f"cuts, seed {bench.seed}: {operations} operations, {len(log.entries)} requests with {flushes} flushes and "
        f"{discards} discards; {len(cuts)} cuts, {wrong} failed")
    return len(cuts), wrong


# Flips.

def read_or_error(path, expected):
    """'right', 'error' or what is wrong about a file; every block is tried."""
    blocks, size = expected
    result = "right"
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return "is not there"
    except OSError:
        return "error"
    try:
        if os.fstat(file).st_size != size:
            return f"has {os.fstat(file).st_size} bytes instead of {size}"
        for at in range(0, size, world.BLOCK):
            try:
                found = os.pread(file, world.BLOCK, at)
            except OSError:
                result = "error"
                continue
            if found != blocks[at // world.BLOCK][:size - at]:
                return f"block {at // world.BLOCK} is wrong"
    except OSError:
        return "error"
    finally:
        os.close(file)
    return result


def after_flip(bench, pool, expected):
    """'right', 'error', or a `Violation`."""
    outcome = "right"
    for number, state in expected.items():
        folder = os.path.join(pool.mount_point, f"w{number}")
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            raise Violation(f"{folder} is not there") from None
        except OSError:
            names, outcome = list(state), "error"
        if set(names) != set(state):
            raise Violation(f"{folder} has {sorted(names)} instead of {sorted(state)}")
        for name in names:
            result = read_or_error(os.path.join(folder, name), state[name])
            if result == "error":
                outcome = "error"
            elif result != "right":
                raise Violation(f"{folder}/{name} {result}")
    return outcome


def flip(path, image, rng):
    """Flips a bit of a block that is in use, or one of the first blocks; tells where."""
    block = rng.randrange(16) if rng.random() < 0.1 else None
    while block is None or not any(image[block * world.BLOCK:(block + 1) * world.BLOCK]):
        block = rng.randrange(len(image) // world.BLOCK)
    at, bit = block * world.BLOCK + rng.randrange(world.BLOCK), rng.randrange(8)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes([image[at] ^ 1 << bit]))
    return at, bit


def run_flips(bench):
    path = os.path.join(bench.folder, "pool.nodupe")
    pool = bench.pool(path)
    pool.command("create", path, "--size", str(POOL_SIZE), "--journal-size", bench.journal())
    pool.mount()
    writers = [bench.add_writer(pool, number, lambda: 0) for number in range(2)]
    for writer in writers:
        writer.start(bench.options.operations // 2)
    join(writers)
    no_errors(writers)
    pool.unmount()
    expected = {writer.number: writer.state for writer in writers}
    with open(path, "rb") as file:
        image = file.read()
    outcomes = {"right": 0, "error": 0, "refused": 0, "wrong": 0}
    for number in range(bench.options.flips):
        write_image(path, image)
        online = number % 2
        try:
            if online:
                pool.mount()
            at, bit = flip(path, image, bench.random)
            if not online:
                try:
                    pool.mount()
                except Failed:
                    outcomes["refused"] += 1
                    continue
            outcomes[after_flip(bench, pool, expected)] += 1
        except (Violation, Failed) as error:
            outcomes["wrong"] += 1
            say(f"FAILED: seed {bench.seed}, flip of bit {bit} at {at}{' under the daemon' if online else ''}: {error}")
        finally:
            pool.kill()
    say(f"flips, seed {bench.seed}: {bench.options.flips} flips: {outcomes['right']} without effect on what is read, "
        f"{outcomes['error']} read errors, {outcomes['refused']} mounts refused, {outcomes['wrong']} silently wrong")
    return bench.options.flips, outcomes["wrong"]


# Errors.

EVENTS = {"read": "read_aio", "write": "write_aio", "flush": "flush_to_os"}


def fault(rng):
    """A fault for blkdebug: what it is, in words, after how many requests of which kind, and
    whether the pool may go on as if nothing had been."""
    kind = rng.choice(("read", "write", "write", "write", "flush", "flush", "discard"))
    name, number = rng.choice((("EIO", 5), ("EIO", 5), ("ENOSPC", 28)))
    once = rng.random() < 0.5
    error = {"iotype": kind, "errno": number, "once": once, "immediately": False}
    if kind == "discard":
        return {"inject-error": [{"event": "none", **error}]}, f"{name} at discards", kind, 0, True
    count = rng.randint(1, {"read": 12, "write": 120, "flush": 60}[kind])
    rules = {"inject-error": [{"event": EVENTS[kind], "state": count, **error}]}
    if count > 1:  # blkdebug takes no empty list
        rules["set-state"] = [{"event": EVENTS[kind], "state": state, "new_state": state + 1}
                              for state in range(1, count)]
    goes_on = once and kind == "write" and name == "ENOSPC"
    return rules, f"{name} at {kind} {count}{'' if once else ' and all after it'}", kind, count, goes_on


def fault_position(log, kind, count):
    """Where in the log the request that failed is, or None if it was not reached."""
    seen = 0
    for entry in log.entries:
        is_kind = entry.flags & FLUSH if kind == "flush" else not entry.flags & (FLUSH | DISCARD)
        if is_kind:
            seen += 1
            if seen == count:
                return entry.end
    return None


def one_error(bench, number):
    """One run with one fault. Returns its words and how many errors the writers met."""
    rules, words, kind, count, goes_on = fault(bench.random)
    log_path = os.path.join(bench.folder, f"log-{number}")
    folder = os.path.join(bench.folder, f"disk-{number}")
    os.makedirs(folder)
    image = os.path.join(folder, "image")
    direct = bench.pool(image, "mnt-direct")
    direct.command("create", image, "--size", str(POOL_SIZE), "--journal-size", bench.journal())
    disk = bench.disk(f"disk-{number}", log=log_path, faults=rules)
    pool = bench.pool(disk.path, f"mnt-{number}")
    bench.writers = []
    met = 0
    try:
        pool.mount()
        met = write_until_errors(bench, pool, disk)
        try:
            pool.unmount()
        except Failed:
            met += 1
    except Failed as error:
        if "hangs" in str(error):
            raise Failed(f"{words}: {error}") from None
        met += 1
    finally:
        pool.kill()
        disk.stop()
    if kind in ("write", "flush") and not goes_on and os.path.getsize(log_path) > 512:
        log = Log(log_path, POOL_SIZE)
        failed_at = fault_position(log, kind, count)
        log.close()
        if failed_at is not None and not met:
            raise Failed(f"{words}: nobody was told")
        for writer in bench.writers:
            for step in writer.history[1:]:
                if failed_at is not None and step.acknowledged and step.before >= failed_at:
                    raise Failed(f"{words}: '{step}' of writer {writer.number} was acknowledged after it")
    try:
        direct.mount()
        world.verify(bench.writers, END, folders_of(direct, bench.writers))
        direct.unmount()
        direct.check()
    except (Failed, Violation, OSError) as error:
        direct.kill()
        raise Failed(f"{words}: {error}") from None
    shutil.rmtree(folder)
    os.unlink(log_path)
    return words, met


def write_until_errors(bench, pool, disk):
    """Two writers; one that met an error goes on in a new folder, three times at most. Returns how
    many errors there were."""
    met = 0
    numbers = iter(range(100))
    for _ in range(3):
        writers = []
        try:
            for _ in range(2):
                writers.append(bench.add_writer(pool, next(numbers), disk.position))
        except OSError:
            met += 1
        for writer in writers:
            writer.start(bench.options.operations // 6)
        join(writers)
        for writer in writers:
            if isinstance(writer.error, Violation):
                raise Failed(f"writer {writer.number} read wrong bytes: {writer.error}")
            met += writer.error is not None
    return met


def run_errors(bench):
    wrong = unmet = 0
    for number in range(bench.options.errors):
        try:
            _, met = one_error(bench, number)
            unmet += met == 0
        except Failed as error:
            wrong += 1
            say(f"FAILED: seed {bench.seed}, error run {number}: {error}")
    say(f"errors, seed {bench.seed}: {bench.options.errors} runs, {bench.options.errors - unmet - wrong} in which a caller "
        f"met an error, {unmet} in which none did, {wrong} failed")
    return bench.options.errors, wrong


MODES = {"cuts": run_cuts, "flips": run_flips, "errors": run_errors}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"{', '.join(MODES)}; all of them unless told")
    parser.add_argument("--nodupe", default=os.path.join(HERE, "../../target/release/nodupe"), help="the program")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="first seed (default: the time)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--operations", type=int, default=240, help="of each writer")
    parser.add_argument("--cuts", type=int, default=120, help="of each seed")
    parser.add_argument("--flips", type=int, default=100, help="of each seed")
    parser.add_argument("--errors", type=int, default=20, help="runs of each seed")
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None,
                        help="where images are made (default: /dev/shm, in memory)")
    parser.add_argument("--lying", action="store_true", help="the disk ignores its last flush: cuts must fail, or the harness is blind")
    options = parser.parse_args()
    options.nodupe = os.path.realpath(options.nodupe)
    for name in options.modes:
        if name not in MODES:
            parser.error(f"no mode called {name}")
    if os.geteuid() or not os.path.exists("/dev/fuse"):
        sys.exit(cannot("needs root and /dev/fuse"))
    if not os.access(options.nodupe, os.X_OK):
        sys.exit(cannot(f"{options.nodupe} is missing: cargo build --release, or --nodupe"))
    if not shutil.which("qemu-storage-daemon"):
        sys.exit(cannot("qemu-storage-daemon is missing: run scripts/setup"))
    return options


def cannot(why):
    print(f"powercut: {why}", file=sys.stderr)
    return 2


def main():
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    total = failed = 0
    for seed in range(options.seed, options.seed + options.seeds):
        for mode in options.modes or MODES:
            bench = Bench(options, mode, seed)
            wrong = 1
            try:
                count, wrong = MODES[mode](bench)
                total, failed = total + count, failed + wrong
            except (Failed, Violation) as error:
                say(f"FAILED: {mode}, seed {seed}: {error}")
                total, failed = total + 1, failed + 1
            finally:
                bench.close(keep=wrong and not options.lying)
    say(f"{total} in all, {failed} failed" + (", as they must" if options.lying and failed else ""))
    return int((failed > 0) != options.lying)


if __name__ == "__main__":
    sys.exit(main())
