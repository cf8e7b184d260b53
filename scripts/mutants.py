#!/usr/bin/env python3
"""Breaks the engine on purpose, one line at a time, and looks whether the tests notice.

usage: mutants.py [--list] [--jobs N] [--all] [--trust] [--tests A,B] [NAME...]
  NAME      only these (default: all of mutants.txt)
  --list    print the names and what each breaks
  --all     run all tests on each, not only up to the first that fails
  --trust   do not first run the tests on the unchanged tree
  --tests A,B  only these tests of the list in this file
  --jobs N  for cargo (default: 2)

Each change of scripts/mutants.txt guards durability: a flush, an order, a checksum, a reference
count, a lock, a promise of space. It is made in a copy of the tree below target/mutants, never
in the tree itself. There the tests run, fast ones first, and at least one must fail, or not come
to its end in time. A change that all tests let pass is printed as SURVIVED, and the exit code is 1; one that is
marked `equivalent` in the list is run too, and must survive.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIST = os.path.join(ROOT, "scripts", "mutants.txt")
WORK = os.path.join(ROOT, "target", "mutants")
# What runs, fast and telling first: name, arguments of cargo, environment, seconds allowed. The
# seeds are fixed, so that a run says the same as the last one.
MODEL = ["--no-default-features", "--features", "shuttle", "--test", "shuttle"]
PLAIN = ["--no-default-features"]
TESTS = [
    ("mutants", PLAIN + ["--test", "mutants"], {}, 240),
    ("readers", MODEL + ["no_reader"], {"SEED": "1"}, 120),
    ("shuttle", MODEL, {"SEED": "1", "SCHEDULES": "60"}, 120),
    ("crash", PLAIN + ["--test", "crash"], {"SEEDS": "20"}, 240),
    ("faults", PLAIN + ["--test", "faults"], {}, 240),
    ("full", PLAIN + ["--test", "full"], {}, 240),
    ("discard", PLAIN + ["--test", "discard"], {}, 240),
    ("regressions", PLAIN + ["--test", "regressions"], {}, 240),
    ("hostile", PLAIN + ["--test", "hostile"], {}, 240),
    ("races", PLAIN + ["--test", "races"], {"SECONDS": "2"}, 240),
    ("journal_loss", PLAIN + ["--test", "journal_loss"], {}, 240),
    ("host_full", PLAIN + ["--test", "host_full"], {}, 240),
    ("threads", PLAIN + ["--test", "threads"], {"SECONDS": "3"}, 240),
    ("model", PLAIN + ["--test", "model"], {}, 240),
    ("lib", PLAIN + ["--lib"], {}, 240),
    ("shuttle-long", MODEL, {"SEED": "2", "SCHEDULES": "1500"}, 300),
]
# Long enough for a build on a busy machine.
BUILD_SECONDS = 900


class Mutant:
    """Changes that belong together, each of a file: there the lines `old` become `new`."""

    def __init__(self, name, why, changes, equivalent):
        self.name, self.why = name, why
        self.changes, self.equivalent = changes, equivalent

    def apply(self, root):
        """Makes the changes below `root`; returns each path with its text before."""
        undo = []
        for file, old, new in self.changes:
            path = os.path.join(root, file)
            with open(path, encoding="ascii") as stream:
                before = stream.read()
            lines = before.split("\n")
            found = [
                at
                for at in range(len(lines) - len(old) + 1)
                if all(lines[at + i].strip() == want for i, want in enumerate(old))
            ]
            if len(found) != 1:
                take_back(undo)
                sys.exit(f"{self.name}: {len(found)} places in {file}; mend mutants.txt")
            lines[found[0] : found[0] + len(old)] = new
            undo.append((path, before))
            with open(path, "w", encoding="ascii") as stream:
                stream.write("\n".join(lines))
        return undo


def take_back(undo):
    """Undoes what `apply` did, the last change first."""
    for path, before in reversed(undo):
        with open(path, "w", encoding="ascii") as stream:
            stream.write(before)


def read_list():
    """The mutants of mutants.txt."""
    mutants = []
    with open(LIST, encoding="ascii") as stream:
        text = stream.read()
    for part in re.split(r"^== ", text, flags=re.M)[1:]:
        lines = part.rstrip("\n").split("\n")
        name, _, why = lines[0].partition(": ")
        equivalent, changes = None, []
        for line in lines[1:]:
            if line.startswith("equivalent: "):
                equivalent = line[len("equivalent: ") :]
            elif line.startswith("src/"):
                changes.append((line.strip(), [], []))
            elif line.startswith("-") and changes:
                changes[-1][1].append(line[1:].strip())
            elif line.startswith("+") and changes:
                changes[-1][2].append(line[1:].strip())
        if not changes or not all(old for _, old, _ in changes):
            sys.exit(f"mutants.txt: {name} changes nothing")
        mutants.append(Mutant(name, why, changes, equivalent))
    return mutants


def copy_tree():
    """Brings the copy up to date; its build folder stays. Returns where it is."""
    tree = os.path.join(WORK, "tree")
    os.makedirs(tree, exist_ok=True)
    for entry in ["src", "tests", "examples", "Cargo.toml", "Cargo.lock", "docs", "fuzz"]:
        source, target = os.path.join(ROOT, entry), os.path.join(tree, entry)
        if not os.path.exists(source):
            continue
        if os.path.isdir(source):
            sync_folder(source, target)
        elif entry == "Cargo.toml":
            # No test here needs the program, and building it takes longer than the library.
            with open(source, encoding="ascii") as stream:
                text = stream.read()
            text = text.replace('default-run = "nodupe"', "autobins = false")
            write_if_new(target, text.encode("ascii"))
        else:
            copy_file(source, target)
    return tree


def copy_file(source, target):
    """Copies what differs, so that cargo builds no more than it must."""
    with open(source, "rb") as stream:
        write_if_new(target, stream.read())


def write_if_new(target, data):
    """Writes a file if it has other contents."""
    if os.path.exists(target):
        with open(target, "rb") as stream:
            if stream.read() == data:
                return
    with open(target, "wb") as stream:
        stream.write(data)


def sync_folder(source, target):
    """Makes `target` like `source`."""
    os.makedirs(target, exist_ok=True)
    wanted = set(os.listdir(source)) - {"target"}
    for gone in set(os.listdir(target)) - wanted:
        path = os.path.join(target, gone)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    for name in wanted:
        path = os.path.join(source, name)
        if os.path.isdir(path):
            sync_folder(path, os.path.join(target, name))
        else:
            copy_file(path, os.path.join(target, name))


def run(tree, args, extra, seconds):
    """Runs cargo test. Returns 'ok', 'failed' or 'late', and the end of what it said."""
    env = dict(os.environ, CARGO_TARGET_DIR=os.path.join(WORK, "build"), RUST_BACKTRACE="0")
    # Line tables cost a third of the build.
    env.update({"CARGO_PROFILE_TEST_DEBUG": "0"}, **extra)
    process = subprocess.Popen(
        ["nice", "-n", "10", "cargo", "test", "--locked", "--quiet"] + args,
        cwd=tree,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        said, _ = process.communicate()
        return "late", said
    return ("ok" if process.returncode == 0 else "failed"), said


def reason(said):
    """The line of a failure that says most."""
    lines = said.split("\n")
    for at, line in enumerate(lines):
        if "panicked at" in line and at + 1 < len(lines):
            return lines[at + 1].strip()[:100]
    errors = [line for line in lines if line.startswith("error") or "DEADLOCK" in line]
    return errors[0][:100] if errors else "it failed"


def try_tests(tree, tests, jobs, everything):
    """The first test that fails, or None; with what it said."""
    caught = []
    for name, args, extra, seconds in TESTS:
        if tests and name not in tests:
            continue
        with_jobs = [f"-j{jobs}"] + args
        built, said = run(tree, with_jobs + ["--no-run"], {}, BUILD_SECONDS)
        if built != "ok":
            # Whatever does not compile proves nothing.
            sys.exit(f"{name} cannot be built:\n{said[-3000:]}")
        outcome, said = run(tree, with_jobs, extra, seconds)
        if outcome == "failed":
            caught.append((name, reason(said)))
        elif outcome == "late":
            caught.append((name, f"not done in {seconds} s"))
        if caught and not everything:
            break
    return caught


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tests", default=[], type=lambda text: text.split(","))
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    mutants = read_list()
    unknown = set(options.names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    if options.names:
        mutants = [mutant for mutant in mutants if mutant.name in options.names]
    if options.list:
        for mutant in mutants:
            files = " ".join(file for file, _, _ in mutant.changes)
            print(f"{mutant.name:32} {files:28} {mutant.why}")
        return 0
    tree = copy_tree()
    # All places are looked up before hours are spent.
    for mutant in mutants:
        take_back(mutant.apply(tree))
    if not options.names and not options.trust:
        caught = try_tests(tree, options.tests, options.jobs, False)
        if caught:
            sys.exit(f"the unchanged tree fails: {caught[0][0]}: {caught[0][1]}")
    counts = {"caught": 0, "survived": 0, "equivalent": 0, "wrong": 0}
    for mutant in mutants:
        begun = time.monotonic()
        undo = mutant.apply(tree)
        try:
            caught = try_tests(tree, options.tests, options.jobs, options.all)
        finally:
            take_back(undo)
        took = f"{time.monotonic() - begun:4.0f} s"
        if mutant.equivalent:
            verdict = "wrong" if caught else "equivalent"
        else:
            verdict = "caught" if caught else "survived"
        counts[verdict] += 1
        word = {"wrong": "NOT EQUIVALENT", "survived": "SURVIVED"}.get(verdict, verdict)
        by = "; ".join(f"{name}: {why}" for name, why in caught) or mutant.why
        print(f"{word:10} {took} {mutant.name:32} {by}", flush=True)
    print(", ".join(f"{number} {word}" for word, number in counts.items()), f"of {len(mutants)}")
    return 1 if counts["survived"] or counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
