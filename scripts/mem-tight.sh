#!/bin/bash
# The daemon in a small memory, together with the programs that dirty its files: nothing may hang, be
# killed, or read back wrong. A daemon that allocates while the kernel waits for it to write dirty
# pages back is how FUSE filesystems deadlock.
#
# usage: mem-tight.sh [--mib N] [--cache SIZE] [--seconds N] [--nodupe BINARY] [FOLDER]
#   --mib N       memory of the control group of writers and daemon (default: 192)
#   --cache SIZE  the daemon's cache (default: 32M)
#   --seconds N   limit of one job (default: 300)
#   --nodupe B    the program (default: target/release/nodupe)
#   FOLDER        where pool and mount point are made, on a disk (default: a new one in target)
#
# Needs root, a memory controller (cgroup 1 or 2) and fio. Exit codes: 0 all passed, 1 not, 2 it
# cannot run here.
set -u
here=$(cd "$(dirname "$0")" && pwd)
stop() { echo "mem-tight: $*" >&2; exit 2; }
mib=192 cache=32M seconds=300 nodupe=$here/../target/release/nodupe folder=''
while [ $# -gt 0 ]; do
    case $1 in
    --mib) mib=${2:?} && shift ;;
    --cache) cache=${2:?} && shift ;;
    --seconds) seconds=${2:?} && shift ;;
    --nodupe) nodupe=$(realpath "${2:?}") && shift ;;
    -*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) folder=$1 ;;
    esac
    shift
done
[ -x "$nodupe" ] || stop "$nodupe is missing: cargo build --release, or name it with --nodupe"
command -v fio >/dev/null || stop "fio is missing: run scripts/setup"
group=''
for root in /sys/fs/cgroup/memory /sys/fs/cgroup /sys/fs/cgroup/unified; do
    try=$root/mem-tight.$$
    mkdir "$try" 2>/dev/null || continue
    if echo $((mib << 20)) 2>/dev/null >"$try/memory.limit_in_bytes" ||
        echo $((mib << 20)) 2>/dev/null >"$try/memory.max"; then
        group=$try
        break
    fi
    rmdir "$try"
done
[ -n "$group" ] || stop "no memory control group can be made here: it needs root and the controller"
folder=${folder:-$here/../target/mem-tight.$$}
mkdir -p "$folder/mnt" && folder=$(cd "$folder" && pwd) || stop "cannot make $folder"
pool=$folder/pool.nodupe mnt=$folder/mnt daemon='' passed=0 failed=0

cleanup() {
    local status=$?
    [ -z "$daemon" ] || kill -9 "$daemon" 2>/dev/null
    ! mountpoint -q "$mnt" || umount -l "$mnt"
    wait 2>/dev/null
    rmdir "$group" 2>/dev/null
    if [ $status = 0 ]; then rm -rf "$folder"; else echo "mem-tight: left for study: $folder"; fi
    exit $status
}
trap cleanup EXIT

"$nodupe" create "$pool" --size 8G --journal-size 256M || exit 1
(echo $BASHPID >"$group/cgroup.procs" && exec "$nodupe" mount --foreground --cache-size "$cache" \
    "$pool" "$mnt") >"$folder/daemon.log" 2>&1 &
daemon=$!
for _ in $(seq 300); do
    mountpoint -q "$mnt" && break
    sleep 0.1
done
mountpoint -q "$mnt" || { cat "$folder/daemon.log"; stop "no mount"; }

job() {                 # job NAME COMMAND...
    local name=$1 status
    shift
    (echo $BASHPID >"$group/cgroup.procs"; cd "$mnt" && exec timeout -k 5 "$seconds" "$@") \
        >"$folder/job.log" 2>&1
    status=$?
    if ! timeout 20 stat -f "$mnt" >/dev/null 2>&1; then
        echo "mem-tight: $name: FAILED: the mount no longer answers"
    elif ! kill -0 "$daemon" 2>/dev/null; then
        echo "mem-tight: $name: FAILED: the daemon is gone"
    elif [ $status = 0 ]; then
        passed=$((passed + 1))
        echo "mem-tight: $name: passed"
        return
    else
        tail -3 "$folder/job.log" | cut -c1-200
        echo "mem-tight: $name: FAILED: exit code $status"
    fi
    failed=$((failed + 1))
}
fio_job="fio --minimal --verify=crc32c --verify_fatal=1 --do_verify=1 --name=x"
job buffered $fio_job --rw=randwrite --bs=64k --size=512M --ioengine=psync --filename=a
job mmap $fio_job --rw=randwrite --bs=4k --size=192M --ioengine=mmap --filename=b
job direct $fio_job --rw=randwrite --bs=256k --size=512M --ioengine=libaio --iodepth=64 --direct=1 \
    --filename=c
job many-files sh -c 'for i in $(seq 3000); do head -c 20000 /dev/zero >f$i || exit 1; done; sync .'
job copies sh -c 'for i in 1 2 3; do cp a d$i && cmp a d$i || exit 1; done'
peak=$(awk '/VmHWM/ {print int($2 / 1024)}' "/proc/$daemon/status")
"$nodupe" umount "$mnt" && wait "$daemon" && daemon='' && "$nodupe" check "$pool" >"$folder/check.log" ||
    failed=$((failed + 1))
echo "mem-tight: $passed passed, $failed failed; $mib MiB for all, cache $cache, the daemon had $peak MiB at most"
[ $failed = 0 ]
