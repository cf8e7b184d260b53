#!/usr/bin/env python3
"""nodupe beside what one would use instead, in one run on one machine, held against its targets.

usage: compare.py --nodupe BINARY [--quick] [--rows 1,2,...] [--runs N] [--folder DIR] [--out DIR]

The stores, all on the file system of --folder:
  ext4-copy      a full copy of the golden image for each clone: the folder's own file system
  xfs-reflink    XFS on a loop device (direct I/O), cp --reflink
  btrfs-reflink  btrfs on a loop device (direct I/O), cp --reflink
  qcow2-chain    a qcow2 overlay for each clone, reached through qemu-storage-daemon's FUSE export
  empty-fuse     the ceiling: a FUSE daemon that does nothing (examples/empty_fuse.rs)
  nodupe         a pool in the folder, mounted

The rows (all data with O_DIRECT, as QEMU's cache=none):
   1  clone of an image with very many extents        7  sequential write and read
   2  4 KiB random write + fdatasync, 1, 8, 32 files  8  write amplification
   3  4 KiB random write, depth 16; also for minutes  9  processor time per operation, locks
   4  sequential read of an aged clone               10  memory with 10,000 clones
   5  boot storm: 32 clones of one image, cold       11  mount and unmount of a large pool
   6  4 KiB random read, cold and cached             12  growth with extents and with clones

Stores take turns in every run. A ratio is taken within each run, and the median of the runs is held
against the target. --quick makes everything small: it shows that all works, and roughly how fast.
With --out (docs/benchmarks for a whole run) it writes results.json, results.md and a chart of
each figure. Needs root, for loop devices and cold caches; `scripts/setup` installs the tools, and
`cargo build --release --examples` builds the two helpers. Cleans up behind itself, on ^C too.
"""
import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys

import charts
from rows import FIGURES, SECTIONS, Bench
from stores import Failed, fio, median, sh

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(os.path.dirname(HERE))
# Settings for a whole run, and for a quick one.
SIZES = {
    "runs": (5, 1, "runs of each row that is not measured once"),
    "mib": (1024, 128, "MiB of the golden image"),
    "seconds": (10, 2, "of each timed measurement"),
    "long": (300, 10, "seconds of the rows that last minutes (3, 8)"),
    "age": (600, 10, "seconds of random writes before row 4"),
    "set_mib": (4096, 256, "MiB of the working set of row 8"),
    "extents": (1_000_000, 20_000, "extents of the image of row 1"),
    "pool_extents": (100_000_000, 500_000, "extents of the pool of rows 10 to 12"),
}
TOOLS = ("fio", "mkfs.xfs", "mkfs.btrfs", "losetup", "qemu-img", "qemu-storage-daemon", "findmnt")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodupe", required=True, help="the program, of a release build")
    parser.add_argument("--quick", action="store_true", help="everything small")
    parser.add_argument("--rows", default="1,2,3,4,5,6,7,8,9,10,11,12")
    parser.add_argument("--only", default="", help="names of stores for rows where all take turns")
    parser.add_argument("--mount-options", default="", help="options for nodupe mount")
    parser.add_argument("--folder", default="/var/tmp/nodupe-compare")
    parser.add_argument("--out", help="folder for results and charts")
    for name, (whole, quick, what) in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{what}: {whole:,}, or {quick:,}")
    options = parser.parse_args()
    for name, (whole, quick, _) in SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else whole)
    whole_run = not options.quick and options.rows == parser.get_default("rows")
    if options.out is None and whole_run:
        options.out = f"{PROJECT}/docs/benchmarks"
    options.rows = {int(row) for row in options.rows.split(",")}
    options.only = set(filter(None, options.only.split(",")))
    options.nodupe = os.path.abspath(options.nodupe)
    options.empty, options.furnish = (f"{os.path.dirname(options.nodupe)}/examples/{name}" for name in ("empty_fuse", "furnish"))
    options.gold = f"{options.folder}/gold.source"
    return options


def complain(options):
    """What is missing, all at once."""
    missing = [f"{tool}: run scripts/setup" for tool in TOOLS if not shutil.which(tool)]
    missing += [f"{path}: cargo build --release --examples" for path in (options.nodupe, options.empty, options.furnish)
                if not os.access(path, os.X_OK)]
    if os.geteuid():
        missing.append("root, for loop devices and cold caches")
    if not os.path.exists("/dev/fuse"):
        missing.append("/dev/fuse: load the kernel module fuse")
    # The full copies of row 2, with the image itself and the pools.
    need = 40 * options.mib + 2 * options.set_mib if options.rows & {2, 3, 5, 6, 7} else 2 * options.set_mib
    free = shutil.disk_usage(options.folder).free >> 20
    if free < need:
        missing.append(f"space in {options.folder}: {need} MiB are needed, {free} are free; choose another --folder or a smaller --mib")
    if missing:
        raise Failed("missing:\n  " + "\n  ".join(missing))


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
    tools = [version(options.nodupe, "--version"), version("fio", "--version"), version("qemu-img", "--version").split(" (")[0],
             version("mkfs.xfs", "-V"), version("mkfs.btrfs", "-V"), version("cp", "--version")]
    return {
        "date": datetime.date.today().isoformat(),
        "command": "scripts/bench/compare.py " + " ".join(
            os.path.relpath(word, PROJECT) if os.path.exists(word) and word.startswith(PROJECT) else word for word in sys.argv[1:]),
        "machine": f"{os.cpu_count()} x {cpu}, {memory} GiB, kernel {platform.release()}, "
                   f"{sh('findmnt', '-no', 'FSTYPE', '-T', options.folder).strip()} below",
        "versions": "; ".join(tools),
        "settings": {name: getattr(options, name) for name in SIZES},
    }


def table(goals):
    head = ("row", "what", "value", "target", "")
    rows = [(str(row), what, charts.number(value), f"{how} {charts.number(target)}", "met" if met else "MISSED")
            for row, what, value, how, target, met in goals]
    widths = [max(len(line[at]) for line in (head, *rows)) for at in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (head, *rows))


def markdown(about, bench, goals):
    lines = ["# Side by side", "", f"{about['date']}, `{about['command']}`", "", about["machine"], "", about["versions"], "",
             "Settings: " + ", ".join(f"{name} {value:,}" for name, value in about["settings"].items()) + ".", "",
             "| row | what | value | target | |", "|---|---|---|---|---|"]
    lines += [f"| {row} | {what} | {charts.number(value)} | {how} {charts.number(target)} | {'met' if met else '**missed**'} |"
              for row, what, value, how, target, met in goals]
    for key, (row, title, unit, less) in FIGURES.items():
        if key in bench.figures:
            lines += ["", f"## {title}", "", f"Row {row}, {unit}; {'less' if less else 'more'} is better.", "",
                      f"![{title}]({key}.svg)", "", "| store | median | all |", "|---|---|---|"]
            lines += [f"| {store} | {charts.number(median(values))} | {' '.join(map(charts.number, values))} |"
                      for store, values in bench.figures[key].items()]
    return "\n".join(lines) + "\n"


def write(out, about, bench, goals):
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/results.json", "w") as file:
        json.dump({**about, "figures": bench.figures,
                   "goals": [dict(zip(("row", "what", "value", "how", "target", "met"), goal)) for goal in goals]}, file, indent=1)
        file.write("\n")
    with open(f"{out}/results.md", "w") as file:
        file.write(markdown(about, bench, goals))
    notes = [f"{about['date']}  {about['machine']}", about["versions"], about["command"]]
    for key, (row, title, unit, less) in FIGURES.items():
        values = {store: median(found) for store, found in bench.figures.get(key, {}).items()}
        if values:
            with open(f"{out}/{key}.svg", "w") as file:
                file.write(charts.bars(f"Row {row}: {title}", unit, less, values, notes))


def stop(*_):
    raise KeyboardInterrupt


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    os.makedirs(options.folder, exist_ok=True)
    bench, failed = Bench(options), []
    try:
        complain(options)
        about = describe(options)
        print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
        fio([options.gold], rw="write", bs="1M", iodepth=4, size=f"{options.mib}M", refill_buffers=1, end_fsync=1)
        for section, rows in SECTIONS:
            if not options.rows & rows:
                continue
            print(f"rows {', '.join(map(str, sorted(options.rows & rows)))}: {section.__name__}", flush=True)
            try:
                section(bench)
            except Failed as error:
                # The other rows are worth having all the same.
                failed.append(f"{section.__name__}: {error}")
                print(f"  FAILED: {error}", flush=True)
        goals = list(bench.goals())
        print("\n" + table(goals))
        if options.out:
            write(options.out, about, bench, goals)
    except Failed as error:
        sys.exit(f"compare: {error}")
    except KeyboardInterrupt:
        sys.exit("compare: interrupted")
    finally:
        bench.close()
        with contextlib.suppress(OSError):
            os.unlink(options.gold)
            os.rmdir(options.folder)
    missed = sum(not goal[-1] for goal in goals)
    print(f"\n{len(goals) - missed} targets met, {missed} missed" + "".join(f"\nfailed: {line}" for line in failed))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
