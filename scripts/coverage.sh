#!/bin/bash
# Line and branch coverage of the engine, the formats and the devices by the tests.
#
# usage: coverage.sh [--missing] [--html FOLDER] [TEST...]
#   TEST       names of tests as for `cargo test --test` (default: all that need no mount, and lib)
#   --missing  also prints the lines that nothing runs, by file
#   --html     writes annotated sources
#
# With a nightly toolchain branches are counted too, else lines only. The tools of the compiler are
# needed: `rustup component add llvm-tools` (with `--toolchain nightly` for branches). Builds in
# target/coverage; SECONDS, SEEDS and so on are handed on to the tests. Tests inside the sources
# do not count as lines.
set -euo pipefail
cd "$(dirname "$0")/.."
stop() { echo "coverage: $*" >&2; exit 2; }

missing=false html='' tests=()
while [ $# -gt 0 ]; do
    case $1 in
        --missing) missing=true ;;
        --html) html=${2:?--html needs a folder}; shift ;;
        -*) sed -n '4,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
        *) tests+=("$1") ;;
    esac
    shift
done
if [ ${#tests[@]} = 0 ]; then
    for file in tests/*.rs tests/*/main.rs; do
        name=${file#tests/}
        name=${name%.rs}
        name=${name%/main}
        # These look at sources, need a mount, or another build.
        case $name in tidy | kill9 | powercut | qemu | fuse | cli | full_real | import | memory | shuttle) ;; *) tests+=("$name") ;; esac
    done
fi

toolchain=stable flags='-C instrument-coverage'
tools() { echo "$(rustc "+$1" --print sysroot)/lib/rustlib/$(rustc "+$1" -vV | sed -n 's/^host: //p')/bin"; }
if rustc +nightly --version >/dev/null 2>&1 && [ -x "$(tools nightly)/llvm-cov" ]; then
    toolchain=nightly flags="$flags -Z coverage-options=branch"
else
    echo 'coverage: no nightly toolchain with llvm-tools: lines only' >&2
fi
bin=$(tools $toolchain)
[ -x "$bin/llvm-cov" ] || stop 'no llvm-cov; run: rustup component add llvm-tools'

folder=$PWD/target/coverage
rm -rf "$folder/raw"
mkdir -p "$folder/raw"
export RUSTFLAGS=$flags CARGO_TARGET_DIR=$folder LLVM_PROFILE_FILE=$folder/raw/%p-%m.profraw
arguments=(--no-default-features --lib)
for name in "${tests[@]}"; do arguments+=(--test "$name"); done
cargo "+$toolchain" test --locked --no-run "${arguments[@]}"
objects=$(cargo "+$toolchain" test --locked --no-run --message-format=json "${arguments[@]}" 2>/dev/null |
    python3 -c '
import json, sys
for line in sys.stdin:
    if line.startswith("{"):
        message = json.loads(line)
        if message.get("profile", {}).get("test") and message.get("executable"):
            print("-object", message["executable"])
')
# A test that fails still says what it ran.
cargo "+$toolchain" test --locked --no-fail-fast "${arguments[@]}" ||
    echo 'coverage: some tests failed' >&2
"$bin/llvm-profdata" merge -sparse "$folder"/raw/*.profraw -o "$folder/all.profdata"

# shellcheck disable=SC2086 # the words of $objects are arguments
"$bin/llvm-cov" export -format=lcov -instr-profile="$folder/all.profdata" $objects \
    -sources src/engine src/ondisk src/device >"$folder/lcov.info"
MISSING=$missing python3 - "$folder/lcov.info" <<'PYTHON'
import os
import sys

files, name = {}, None
for line in open(sys.argv[1], encoding="utf-8"):
    key, _, value = line.strip().partition(":")
    if key == "SF":
        name = os.path.relpath(value)
        files[name] = ({}, {})
    elif key == "DA":
        at, count = value.split(",")[:2]
        lines = files[name][0]
        lines[int(at)] = max(lines.get(int(at), 0), int(count))
    elif key == "BRDA":
        at, block, branch, count = value.split(",")
        branches = files[name][1]
        taken = 0 if count == "-" else int(count)
        branches[at, block, branch] = max(branches.get((at, block, branch), 0), taken)


def tests_begin(path):
    """The line where the tests of a file begin: they are not what is measured."""
    for number, line in enumerate(open(path, encoding="ascii"), 1):
        if line.startswith("#[cfg(test)]"):
            return number
    return 0 if path.endswith("/tests.rs") else 1 << 30


def percent(done, of):
    return f"{100 * done / of:6.1f}" if of else "     -"


def row(name, counts):
    lines, run, branches, taken = counts
    print(f"{name:32} {lines:6} {percent(run, lines)} {branches:9} {percent(taken, branches)}")


print(f"{'file':32} {'lines':>6} {'% run':>6} {'branches':>9} {'% run':>6}")
sums, gaps = {}, []
for name in sorted(files):
    end = tests_begin(name)
    lines = {at: count for at, count in files[name][0].items() if at < end}
    branches = [count for (at, *_), count in files[name][1].items() if int(at) < end]
    counts = [len(lines), sum(map(bool, lines.values())), len(branches), sum(map(bool, branches))]
    row(name, counts)
    folder = "/".join(name.split("/")[:2])
    sums[folder] = [a + b for a, b in zip(sums.get(folder, [0] * 4), counts)]
    gaps += [(name, at) for at in sorted(lines) if not lines[at]]
print()
for folder, counts in sums.items():
    row(folder, counts)
if os.environ["MISSING"] == "true":
    print()
    for name, at in gaps:
        text = open(name, encoding="ascii").readlines()[at - 1].strip()
        print(f"{name}:{at}: {text}")
PYTHON
if [ -n "$html" ]; then
    # shellcheck disable=SC2086
    "$bin/llvm-cov" show -format=html -output-dir="$html" -instr-profile="$folder/all.profdata" \
        $objects -sources src/engine src/ondisk src/device
fi
