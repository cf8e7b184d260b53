#!/bin/sh
# Fuzzes TARGET (or all of them, one after the other) for MINUTES each, from the kept corpus and
# what earlier runs found, and logs executions, seconds of processor time, coverage and findings.
#
#     scripts/fuzz.sh TARGET|all MINUTES
#
# Needs a nightly toolchain and cargo-fuzz (`cargo install cargo-fuzz`). Everything new goes to
# fuzz/work (FUZZ_WORK); a finding is an input in fuzz/work/TARGET.found. `fuzz/README.md` tells
# what to do with it.
set -eu
cd "$(dirname "$0")/.."
target=${1:?which target? one of fuzz/targets, or all}
minutes=${2:?how many minutes for each target?}
work=${FUZZ_WORK:-fuzz/work}

case $target in
all) targets=$(cd fuzz/targets && ls | sed 's/\.rs$//') ;;
*) targets=$target ;;
esac

if [ -z "${FUZZ_BIN:-}" ]; then
    # The engine has no unsafe code, so the address sanitizer would only slow it down.
    nice -n 19 cargo +nightly fuzz build -s none >&2
    FUZZ_BIN=fuzz/target/$(rustc -vV | sed -n 's/^host: //p')/release
fi

# Sets cpu to the seconds of processor time that ended children took. A substitution would ask
# another shell, which has no children.
count_cpu() {
    times >"$work/times"
    cpu=$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); sum += t[1] * 60 + t[2] } }
        END { printf "%d", sum }' "$work/times")
}

failed=0
mkdir -p "$work"
for name in $targets; do
    mkdir -p "$work/$name" "$work/$name.found"
    case $name in
    node) len=4100 ;;
    journal) len=16384 ;;
    control) len=8192 ;;
    superblock | record) len=1024 ;;
    *) len=512 ;;
    esac
    dict=fuzz/dictionaries/$name.txt
    log=$work/$name.log
    status=0
    count_cpu
    before=$cpu
    nice -n 19 "$FUZZ_BIN/$name" "$work/$name" "fuzz/corpus/$name" \
        $([ -f "$dict" ] && echo "-dict=$dict") \
        -max_total_time=$((minutes * 60)) -max_len=$len -timeout=60 -rss_limit_mb=1500 \
        -artifact_prefix="$work/$name.found/" -print_final_stats=1 -len_control=20 \
        >"$log" 2>&1 || status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    cov=$(grep -o 'cov: [0-9]* ft: [0-9]* corp: [^ ]*' "$log" | tail -1)
    count_cpu
    echo "$(date -u +%FT%TZ) $name: minutes=$minutes cpu=$((cpu - before)) runs=${runs:-?} $cov status=$status" |
        tee -a "$work/runs.txt"
    [ "$status" = 0 ] || { failed=1; tail -20 "$log" >&2; }
done
exit $failed
