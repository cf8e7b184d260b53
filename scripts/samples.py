#!/usr/bin/env python3
"""Imports images that are kept elsewhere, by the real program, and compares with what is known.

usage: samples.py MOUNT SAMPLES [HOSTILE]
  MOUNT    a folder in a mounted pool
  SAMPLES  a folder with images of real products, unpacked, and MANIFEST.json: per sample its id, main
           file, kind ("positive", or it must be refused), and the SHA-256 and size of its contents
  HOSTILE  a folder with broken images and MANIFEST.json: per case its id, main file and expectation:
           refuse, truth, refuse-or-truth, survive

NODUPE names the program (default: nodupe). Each import may take SECONDS_MAX seconds and MEMORY_MAX
KiB of memory, times and memory of the few large positive samples excepted. Nothing of these images
is part of the project: their licences differ.
Exit codes: 0 all as expected, 1 not, 2 usage.
"""

import hashlib
import json
import os
import subprocess
import sys
import time

NODUPE = os.environ.get("NODUPE", "nodupe")
SECONDS_MAX = 1.0
MEMORY_MAX = 256 << 10
CHUNK = 65536


def digest(path):
    """Size and a digest of the chunks of 64 KiB that are not zero; holes are skipped."""
    size = os.path.getsize(path)
    sha = hashlib.sha256(f"sparse64k-v1:{size}\n".encode())
    with open(path, "rb") as file:
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // CHUNK * CHUNK
            except OSError:
                break
            data = os.pread(file.fileno(), CHUNK, at)
            if data.count(0) != len(data):
                sha.update(at.to_bytes(8, "little") + data)
            at += CHUNK
    return size, sha.hexdigest()


def run(source, target, extra):
    """Exit code, contents or None, seconds, and KiB of memory of one import."""
    begun = time.monotonic()
    process = subprocess.Popen([NODUPE, "import", source, target, *extra],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    told = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    took = time.monotonic() - begun
    code = os.waitstatus_to_exitcode(status)
    found = None
    if os.path.exists(target):
        found = digest(target)
        os.unlink(target)
    return code, found, took, usage.ru_maxrss, told


def judge(expect, code, found, truth):
    wanted = truth and (truth["size"], truth["sparse_sha256"])
    if code not in (0, 1) or (code == 0) != (found is not None):
        return False
    refused, right = code == 1, found is not None and found == wanted
    return {"refuse": refused, "truth": right, "refuse-or-truth": refused or right,
            "survive": True}[expect]


def main():
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    target = os.path.join(sys.argv[1], f"sample-{os.getpid()}.raw")
    good = bad = 0
    cases = []
    with open(os.path.join(sys.argv[2], "MANIFEST.json")) as file:
        for sample in json.load(file)["samples"]:
            main_file = os.path.join(sys.argv[2], sample["id"], sample["main"])
            expect = "truth" if sample["kind"] == "positive" else "refuse"
            cases.append((sample["id"], main_file, expect, sample["truth"], [], 60))
    if len(sys.argv) == 4:
        with open(os.path.join(sys.argv[3], "MANIFEST.json")) as file:
            for case in json.load(file)["cases"]:
                extra = ["--from", "raw"] if case["format"] == "raw" else []
                main_file = os.path.join(sys.argv[3], case["main"])
                cases.append((case["id"], main_file, case["expect"], case["truth"], extra,
                              SECONDS_MAX))
    worst = (0, 0)
    for name, source, expect, truth, extra, seconds in cases:
        code, found, took, memory, told = run(source, target, extra)
        right = judge(expect, code, found, truth)
        if right and took <= seconds and memory <= MEMORY_MAX:
            good += 1
        else:
            bad += 1
            print(f"{name}: expected {expect}, exit code {code}, contents {found}, "
                  f"{took:.2f} s, {memory} KiB: {told.strip()}")
        worst = (max(worst[0], took), max(worst[1], memory))
    print(f"{good} as expected, {bad} not; slowest {worst[0]:.2f} s, most memory {worst[1]} KiB")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
