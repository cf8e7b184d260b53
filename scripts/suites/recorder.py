#!/usr/bin/env python3
"""Writes files until the file system dies, remembers what was synced, and checks it afterwards.

usage: recorder.py write DIR RECORD [--writers N] [--seed N]
       recorder.py check DIR RECORD

Each writer has a file of numbered 4 KiB blocks, written in an order that its seed fixes, and
syncs at random. From time to time it makes a new file by write, fsync, rename and fsync of the
folder, and a copy of its own file by cp. When writing fails, because the daemon was killed, all
writers put down in RECORD what had been acknowledged; SIGTERM ends them as well.

check: no synced write is missing; a file written with O_DIRECT is a prefix of what was written,
in order; no block is torn; every renamed file and every synced copy is there, whole. Files that
an earlier check has passed must not have changed since.
"""
import argparse
import contextlib
import hashlib
import json
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import sys

BLOCK = 4096
BLOCKS = 2048


def places(seed):
    """Blocks in the order in which they are written, without end."""
    order = random.Random(seed)
    while True:
        yield order.randrange(BLOCKS)


def state(seed, count):
    """Number in each block after the first `count` writes."""
    blocks, order = [0] * BLOCKS, places(seed)
    for number in range(1, count + 1):
        blocks[next(order)] = number
    return blocks


def sync_folder(path):
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class Writer:
    def __init__(self, folder, seed, direct):
        self.folder, self.name = folder, f"{seed}"
        self.path = f"{folder}/{self.name}"
        self.known = {"name": self.name, "seed": seed, "direct": direct, "made": False, "synced": 0, "sent": 0,
                      "renamed": [], "copies": {}}
        self.stopped = False

    def run(self):
        known, chance = self.known, random.Random(-self.known["seed"])
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if known["direct"] else 0)
        target = os.open(self.path, flags, 0o644)
        os.fsync(target)
        sync_folder(self.folder)
        known["made"] = True
        memory = mmap.mmap(-1, BLOCK)
        for place in places(known["seed"]):
            if self.stopped:
                return
            known["sent"] += 1
            memory[:] = known["sent"].to_bytes(8, "little") * (BLOCK // 8)
            if os.pwrite(target, memory, place * BLOCK) != BLOCK:
                raise OSError("short write")
            what = chance.random()
            if what < 0.3:
                os.fdatasync(target)
                known["synced"] = known["sent"]
            elif what < 0.31:
                self.rename()
            elif what < 0.315:
                self.copy()

    def rename(self):
        name = f"{self.name}.renamed.{len(self.known['renamed'])}"
        with open(f"{self.path}.new", "wb") as file:
            file.write(name.encode() * 100)
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{self.path}.new", f"{self.folder}/{name}")
        sync_folder(self.folder)
        self.known["renamed"].append(name)

    def copy(self):
        name = f"{self.name}.copy.{len(self.known['copies'])}"
        done = subprocess.run(["cp", self.path, f"{self.folder}/{name}"], stderr=subprocess.DEVNULL)
        if done.returncode:
            raise OSError("cp failed")
        with open(f"{self.folder}/{name}", "rb") as file:
            os.fsync(file.fileno())
        sync_folder(self.folder)
        self.known["copies"][name] = self.known["sent"]


def write_one(folder, seed, direct, record):
    writer = Writer(folder, seed, direct)

    def stop(*_):
        writer.stopped = True
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    with contextlib.suppress(OSError):
        writer.run()
    with open(record, "w") as file:
        json.dump(writer.known, file)


def write(options):
    writers, records = [], []
    # Whoever is told to end before it listens puts its record down all the same.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    for i in range(options.writers):
        # Through the cache and past it by turns.
        records.append(f"{options.record}.{i}")
        arguments = (options.dir, options.seed * 100 + i, i % 2 == 0, records[-1])
        writers.append(multiprocessing.Process(target=write_one, args=arguments))
        writers[-1].start()
    signal.signal(signal.SIGTERM, lambda *_: [writer.terminate() for writer in writers])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    for writer in writers:
        writer.join()
    known = []
    for path in records:
        with open(path) as file:
            known.append(json.load(file))
        os.unlink(path)
    with open(options.record, "w") as record:
        json.dump({"writers": known, "passed": {}}, record)


def numbers(path):
    """Number in each block of a file, or ValueError if it holds anything else."""
    with open(path, "rb") as file:
        data = file.read()
    if len(data) % BLOCK:
        raise ValueError(f"size {len(data)}")
    found = []
    for at in range(0, len(data), BLOCK):
        word = data[at:at + 8]
        if data[at:at + BLOCK] != word * (BLOCK // 8):
            raise ValueError(f"block {at // BLOCK} is torn")
        found.append(int.from_bytes(word, "little"))
    return found + [0] * (BLOCKS - len(found))


def check_file(folder, known):
    """Raises ValueError if the file is not what a crash may leave, FileNotFoundError if it is gone."""
    found, synced = numbers(f"{folder}/{known['name']}"), state(known["seed"], known["synced"])
    newest = max(found)
    if not known["synced"] <= newest <= known["sent"]:
        # A sync with nothing written since is the one case with an equal number.
        raise ValueError(f"newest write is {newest}; synced {known['synced']}, sent {known['sent']}")
    for place in range(BLOCKS):
        if found[place] < synced[place]:
            raise ValueError(f"block {place} lost write {synced[place]}, which was synced: {found[place]}")
    if known["direct"] and found != state(known["seed"], newest):
        raise ValueError(f"not the first {newest} writes, in order")


def check_extras(folder, known):
    for name in known["renamed"]:
        with open(f"{folder}/{name}", "rb") as file:
            if file.read() != name.encode() * 100:
                raise ValueError(f"{name} is not what was written")
    for name, sent in known["copies"].items():
        # Through the cache or not, cp sees what its writer had written.
        if numbers(f"{folder}/{name}") != state(known["seed"], sent):
            raise ValueError(f"{name} is not the file as of write {sent}")


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def check(options):
    with open(options.record) as record:
        kept = json.load(record)
    failed = 0
    for known in kept["writers"]:
        if not known["made"] and not os.path.exists(f"{options.dir}/{known['name']}"):
            continue  # the daemon was killed before its first sync was acknowledged
        try:
            check_file(options.dir, known)
            check_extras(options.dir, known)
            names = [known["name"], *known["renamed"], *known["copies"]]
            digests = {name: digest(f"{options.dir}/{name}") for name in names}
            if kept["passed"].get(known["name"], digests) != digests:
                raise ValueError("changed since it was checked last")
            kept["passed"][known["name"]] = digests
        except (OSError, ValueError) as error:
            failed += 1
            print(f"recorder: {options.dir}/{known['name']}: {error}")
    with open(options.record, "w") as record:
        json.dump(kept, record)
    print("recorder: %d writers, %d writes, %d synced, %d renamed, %d copies: %s" % (
        len(kept["writers"]), sum(w["sent"] for w in kept["writers"]),
        sum(w["synced"] for w in kept["writers"]), sum(len(w["renamed"]) for w in kept["writers"]),
        sum(len(w["copies"]) for w in kept["writers"]), f"{failed} FAILED" if failed else "nothing lost"))
    sys.exit(failed > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["write", "check"])
    parser.add_argument("dir")
    parser.add_argument("record")
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    {"write": write, "check": check}[options.verb](options)


if __name__ == "__main__":
    main()
