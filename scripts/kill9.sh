#!/bin/bash
# Kills the daemon with SIGKILL under load, again and again: nothing that was synced is lost.
#
# usage: kill9.sh [--rounds N] [--nodupe BINARY] [--seed N] [FOLDER]
#   --rounds N    kills (default: 20)
#   --nodupe B    the program (default: target/release/nodupe)
#   --seed N      of the writers and of the moments of the kills (default: the time)
#   FOLDER        where pool and mount point are made, on a disk (default: a new one in target)
#
# In each round 1, 2, 4 or 8 writers (suites/recorder.py: syncs, renames, copies) and two fio
# jobs (O_DIRECT and O_DSYNC, a checksum in every block) write while the daemon is killed. fio
# saves what it knows to be written at the moment of the kill. After a new mount both check; every
# file of earlier rounds is checked again, too. Every fifth round, and at the end, the pool is
# unmounted and must have no findings. Exit codes: 0 nothing lost, 1 something lost, 2 usage.
set -u
here=$(cd "$(dirname "$0")" && pwd)
stop() { echo "kill9: $*" >&2; exit 2; }
rounds=20 nodupe=$here/../target/release/nodupe seed=$(date +%s) folder=''
while [ $# -gt 0 ]; do
    case $1 in
    --rounds) rounds=${2:?} && shift ;;
    --nodupe) nodupe=$(realpath "${2:?}") && shift ;;
    --seed) seed=${2:?} && shift ;;
    -*) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) folder=$1 ;;
    esac
    shift
done
[ -x "$nodupe" ] || stop "$nodupe is missing: cargo build --release, or name it with --nodupe"
command -v fio >/dev/null || stop "fio is missing: run scripts/setup"
folder=${folder:-$here/../target/kill9.$$}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || stop "cannot make $folder"
pool=$folder/pool.nodupe mnt=$folder/mnt daemon='' recorder=''
mkdir -p "$mnt"

cleanup() {
    local status=$?
    [ -z "$recorder" ] || kill "$recorder" 2>/dev/null
    [ -z "$daemon" ] || kill -9 "$daemon" 2>/dev/null
    if mountpoint -q "$mnt" || ! stat "$mnt" >/dev/null 2>&1; then umount -l "$mnt"; fi
    if [ $status = 0 ]; then rm -rf "$folder"; else echo "kill9: left for study: $folder"; fi
    exit $status
}
trap cleanup EXIT

mount_pool() {
    "$nodupe" mount --foreground --cache-size 256M "$pool" "$mnt" >>"$folder/daemon.log" 2>&1 &
    daemon=$!
    for _ in $(seq 600); do
        if mountpoint -q "$mnt"; then return; fi
        kill -0 $daemon 2>/dev/null || break
        sleep 0.1
    done
    tail -5 "$folder/daemon.log"
    daemon=''
    echo "kill9: FAILED: no mount after a kill"
    exit 1
}

unmount_and_check() {
    "$nodupe" umount "$mnt" || exit 1
    wait "$daemon"
    daemon=''
    "$nodupe" check "$pool" >"$folder/check.log" 2>&1 || {
        cat "$folder/check.log"
        echo "kill9: FAILED: check"
        exit 1
    }
}

fio_job() {             # fio_job ROUND OPTION...
    local round=$1
    shift
    fio --name=job --directory="$mnt/fio$round" --aux-path="$folder/fio$round" --rw=randwrite --bs=4k --size=256M \
        --numjobs=2 --ioengine=psync --direct=1 --sync=dsync --fallocate=none --randseed="$((seed + round))" \
        --verify=crc32c --verify_fatal=1 --verify_dump=0 --minimal "$@" >"$folder/fio.log" 2>&1
}

echo "kill9: seed $seed, $rounds rounds, $("$nodupe" --version 2>/dev/null), pool $pool"
RANDOM=$((seed % 32768))
"$nodupe" create "$pool" --size 8G --journal-size 256M || exit 1
lost=0
mount_pool
for round in $(seq "$rounds"); do
    writers=$((1 << (round % 4)))
    mkdir -p "$mnt/recorder$round" "$mnt/fio$round" "$folder/fio$round"
    # Of full size from the start: the one write that fio does not know the end of may be behind it.
    truncate -s 256M "$mnt/fio$round/job.0.0" "$mnt/fio$round/job.1.0"
    sync "$mnt/fio$round/job.0.0" "$mnt/fio$round/job.1.0" "$mnt/fio$round" "$mnt"
    python3 "$here/suites/recorder.py" write "$mnt/recorder$round" "$folder/record.$round" \
        --writers $writers --seed $((seed + round)) &
    recorder=$!
    # On a busy machine the moment of the kill could come before the first write.
    for _ in $(seq 600); do
        [ "$(ls "$mnt/recorder$round" | wc -l)" -lt $writers ] || break
        sleep 0.1
    done
    rm -f "$folder/trigger"
    pause=$((500 + RANDOM % 2500))
    (sleep "$((pause / 1000)).$(printf %03d $((pause % 1000)))"; touch "$folder/trigger") &
    fio_job "$round" --do_verify=0 --runtime=60 --trigger-file="$folder/trigger" --trigger="kill -9 $daemon"
    wait "$daemon" 2>/dev/null
    # The writers end by an error of their files; one that has nothing to do with the dead daemon
    # at that moment is told.
    kill $recorder 2>/dev/null
    wait $recorder
    daemon='' recorder=''
    umount -l "$mnt" || exit 1
    mount_pool
    printf 'kill9: round %2d, killed after %4d ms: ' "$round" "$pause"
    python3 "$here/suites/recorder.py" check "$mnt/recorder$round" "$folder/record.$round" || lost=$((lost + 1))
    fio_job "$round" --verify_only --verify_state_load=1 || {
        lost=$((lost + 1))
        echo "kill9: FAILED: fio finds a write of round $round lost or damaged:"
        grep -a 'verify:\|err=' "$folder/fio.log" | cut -c1-200 | head -5
    }
    if [ $((round % 5)) = 0 ]; then
        unmount_and_check
        mount_pool
    fi
done
for round in $(seq "$rounds"); do
    python3 "$here/suites/recorder.py" check "$mnt/recorder$round" "$folder/record.$round" >"$folder/again.log" || {
        lost=$((lost + 1))
        sed "s/^/kill9: in the end, round $round: /" "$folder/again.log"
    }
done
unmount_and_check
[ $lost = 0 ] && echo "kill9: $rounds kills, nothing synced was lost" || echo "kill9: $lost FAILED"
[ $lost = 0 ]
