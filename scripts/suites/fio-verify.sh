#!/bin/bash
# fio with a checksum in every block that it writes: what is read must be what was written, at
# once, without the page cache, by another path, and after a remount.
#
# usage: fio-verify.sh [--ext4 | DIR [REMOUNT_COMMAND]]
#   FIO_SIZE   size of each file (default: 96M)
# REMOUNT_COMMAND unmounts DIR and mounts it again. Crashes are the business of kill9.sh.
set -u
. "$(dirname "$0")/common.sh"
need fio
work_in "${1:-}"
size=${FIO_SIZE:-96M}

job() {                 # job CASE OPTION...
    local case=$1
    shift
    if (cd "$work" && timeout 600 fio --name="$case" --size="$size" --minimal --group_reporting \
        --verify=crc32c --verify_fatal=1 --verify_dump=0 --randrepeat=1 --fallocate=none "$@") >"$log" 2>&1
    then ok "$case"; else tail -4 "$log" | cut -c1-300; bad "$case"; fi
}
uncached() { sync; echo 3 2>/dev/null >/proc/sys/vm/drop_caches; }

buffered=(--rw=randwrite --bs=4k --ioengine=psync --filename=buffered)
direct=(--rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=32 --filename=direct)
uring=(--rw=randwrite --bs=16k --direct=1 --ioengine=io_uring --iodepth=32 --filename=uring)
mapped=(--rw=randwrite --bs=4k --ioengine=mmap --filename=mapped)
job buffered "${buffered[@]}" --end_fsync=1
job direct "${direct[@]}"
job io_uring "${uring[@]}"
job mapped "${mapped[@]}"
job odd-records --rw=write --bs=3k --ioengine=psync --filename=odd
job every-size --rw=randwrite --bsrange=512-256k --bs_unaligned=1 --ioengine=psync --filename=sizes --serialize_overlap=1
job direct-every-size --rw=randrw --rwmixwrite=70 --bsrange=4k-1M --direct=1 --ioengine=libaio --iodepth=16 --filename=direct-sizes --serialize_overlap=1
job synced-each --rw=randwrite --bs=4k --ioengine=psync --fdatasync=1 --filename=synced --io_size=8M
job dsync --rw=randwrite --bs=4k --ioengine=psync --direct=1 --sync=dsync --filename=dsync --io_size=8M
job writers-of-four-files --rw=randwrite --bs=8k --direct=1 --ioengine=libaio --iodepth=8 --numjobs=4 --size=24M
job writers-of-one-file --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=8 --numjobs=4 --size=24M --offset_increment=24M --filename=shared
uncached
job buffered-uncached "${buffered[@]}" --verify_only
job mapped-uncached "${mapped[@]}" --verify_only
job direct-by-cache "${direct[@]}" --verify_only --direct=0 --ioengine=psync
job buffered-by-direct "${buffered[@]}" --verify_only --direct=1

# A discard by a guest: every block of a file punched in random order reads as zeros, keeps the
# size and gives the space back.
head -c 16M /dev/urandom >"$work/punched"
sync "$work/punched"
before=$(stat -c %b "$work/punched")
if (cd "$work" && fio --name=punch --filename=punched --size=16M --rw=randtrim --bs=64k --ioengine=falloc --minimal) >"$log" 2>&1 &&
    sync "$work/punched" && cmp -s -n $((16 << 20)) "$work/punched" /dev/zero && [ "$(stat -c %s "$work/punched")" = $((16 << 20)) ]
then ok punched; else tail -2 "$log" | cut -c1-300; bad punched; fi

remount=${2:-$remount}
if [ -n "$remount" ]; then
    cd / || exit
    if bash -c "$remount" >"$log" 2>&1; then
        job buffered-remounted "${buffered[@]}" --verify_only
        job direct-remounted "${direct[@]}" --verify_only
        job io_uring-remounted "${uring[@]}" --verify_only
        job mapped-remounted "${mapped[@]}" --verify_only
    else tail -5 "$log"; bad remount "$remount"; fi
else
    skip
fi
echo "$suite: space of a punched file: $before sectors before, $(stat -c %b "$work/punched") after"
summary
