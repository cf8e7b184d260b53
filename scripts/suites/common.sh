# What the drivers in this folder share; sourced, not run.
#
# A driver counts its cases with ok, bad and skip, and ends with summary. A case named in
# SUITE.expected (one name per line, then the reason) may fail without failing the run; one that
# is named there and passes is reported, so that the list stays short.
#   SUITE_CACHE   where test programs are kept (default: ~/.cache/nodupe-suites)
SUITE_CACHE=${SUITE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nodupe-suites}
SUITE_FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
suite=$(basename "$0" .sh)
passed=0 failed=0 skipped=0 expected=0

stop() { echo "$suite: $*" >&2; exit 2; }

suite_program() {       # suite_program CRATE@VERSION: builds it if need be, prints its path
    local program=$SUITE_CACHE/bin/${1%@*}
    if [ ! -x "$program" ]; then
        mkdir -p "$SUITE_CACHE"
        echo "$suite: building $1 (once; log: $SUITE_CACHE/${1%@*}.log)" >&2
        nice cargo install "${1%@*}" --version "${1#*@}" --locked --root "$SUITE_CACHE" \
            >"$SUITE_CACHE/${1%@*}.log" 2>&1 || stop "cannot build $1, see $SUITE_CACHE/${1%@*}.log"
    fi
    echo "$program"
}

need() {                # need PROGRAM...
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || stop "$program is missing: run scripts/setup"
    done
}

work_in() {             # work_in DIR: makes $work, a folder of this run
    [ -d "${1:-}" ] || stop "usage: $(basename "$0") DIR"
    work=$(cd "$1" && pwd)/$suite.$$
    mkdir "$work" || stop "$1 is not writable"
    log=$(mktemp)
    trap 'cd /; rm -rf "$work" "$log"' EXIT
}

listed() { sed 's/#.*//' "$SUITE_FOLDER/$suite.expected" 2>/dev/null | awk '{print $1}' | grep -qxF -- "$1"; }
ok() {
    passed=$((passed + 1))
    if listed "$1"; then echo "$suite: $1 passes: take it off $suite.expected"; fi
}
skip() { skipped=$((skipped + 1)); }
bad() {                 # bad CASE WHY...
    if listed "$1"; then expected=$((expected + 1)); return; fi
    failed=$((failed + 1))
    echo "$suite: FAILED: $*"
}

summary() {             # the last line, and the exit code
    echo "$suite: $passed passed, $failed failed, $expected failed as expected, $skipped skipped"
    [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
    exit
}
