#!/usr/bin/env python3
"""A clone of a file that is being written is the file at one instant.

usage: live-clone.py DIR [--copies N] [--mib N] [--command 'cp {src} {dst}']

A writer numbers the blocks of a file, round after round, in an order that jumps about, each write
complete before the next (O_DIRECT). Meanwhile the file is copied again and again. In a copy that
is one instant the newest number tells what every other block must hold; anything else is a
mixture of two instants. A copy that reads and writes the bytes, as on a file system that does
not clone, fails this test.
"""
import argparse
import mmap
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

BLOCK = 4096
STRIDE = 7919  # a prime: every block has its turn once in each round


def write_forever(path, blocks):
    """Numbers the blocks round and round until killed."""
    memory = mmap.mmap(-1, BLOCK)  # page-aligned, as O_DIRECT wants it
    target = os.open(path, os.O_WRONLY | os.O_DIRECT)
    number = blocks
    while True:
        memory[:] = number.to_bytes(8, "little") * (BLOCK // 8)
        os.pwrite(target, memory, number * STRIDE % blocks * BLOCK)
        number += 1


def verdict(path, blocks):
    """None if the copy is one instant, else what is wrong with it."""
    with open(path, "rb") as copy:
        data = copy.read()
    if len(data) != blocks * BLOCK:
        return f"size {len(data)}"
    numbers = []
    for at in range(0, len(data), BLOCK):
        word = data[at:at + 8]
        if data[at:at + BLOCK] != word * (BLOCK // 8):
            return f"block {at // BLOCK} is torn"
        numbers.append(int.from_bytes(word, "little"))
    newest, turn_of = max(numbers), pow(STRIDE, -1, blocks)
    for place, number in enumerate(numbers):
        expected = newest - (newest - place * turn_of) % blocks
        if number != expected:
            return f"block {place} holds write {number}, but write {newest} is there, so it must be {expected}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir")
    parser.add_argument("--copies", type=int, default=50)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--command", default="cp {src} {dst}")
    options = parser.parse_args()
    blocks = options.mib * 256
    work = tempfile.mkdtemp(prefix="live-clone.", dir=options.dir)
    source, copy = f"{work}/source", f"{work}/copy"
    with open(source, "wb") as file:
        for place in range(blocks):
            number = place * pow(STRIDE, -1, blocks) % blocks
            file.write(number.to_bytes(8, "little") * (BLOCK // 8))
        os.fsync(file.fileno())
    writer = os.fork()
    if writer == 0:
        write_forever(source, blocks)
    failed, seconds = 0, []
    try:
        time.sleep(0.2)
        for i in range(options.copies):
            started = time.monotonic()
            subprocess.run([word.format(src=source, dst=copy) for word in shlex.split(options.command)], check=True)
            seconds.append(time.monotonic() - started)
            wrong = verdict(copy, blocks)
            if wrong:
                failed += 1
                print(f"live-clone: copy {i}: {wrong}")
            os.unlink(copy)
            time.sleep(0.01)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        shutil.rmtree(work)
    seconds.sort()
    print(f"live-clone: {len(seconds) - failed} passed, {failed} failed; median copy {seconds[len(seconds) // 2] * 1000:.1f} ms")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
