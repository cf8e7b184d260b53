#!/bin/bash
# stress-ng's stressors of files, with --verify, one at a time.
#
# usage: stress-ng.sh [--ext4 | DIR]
#   STRESS_SECONDS   for each stressor (default: 4)
#   STRESS_WORKERS   processes of each (default: 2)
#   STRESS_LIST      stressors (default: the list below)
# Skipped is what says that the filesystem or the kernel lacks the operation. Failed is what does
# not verify, does not end 60 s after its time, or leaves a filesystem that does not answer.
set -u
. "$(dirname "$0")/common.sh"
need stress-ng
work_in "${1:-}"
list=${STRESS_LIST:-access aio aiol chdir chmod chown copy-file dentry dir dirdeep dirmany dup
    fallocate fault fcntl fiemap file-ioctl filename flock fpunch fstat getdent handle hdd
    inode-flags io-uring iomix lease link locka lockf lockofd metamix mknod mmap mmapaddr mmapfork
    msync open rename readahead revio seek sendfile splice symlink sync-file touch truncate unlink
    utime vm-splice xattr}
known=" $(stress-ng --stressors 2>&1 | tail -1) "
seconds=${STRESS_SECONDS:-4}
echo "$suite: $(stress-ng --version | cut -d' ' -f1-3)"
for stressor in $list; do
    case $known in *" $stressor "*) ;; *) skip; continue ;; esac
    sizes=()
    case $stressor in
    hdd | iomix | readahead | fallocate | sync-file) sizes=("--$stressor-bytes" 16M) ;;
    copy-file) sizes=(--copy-file-bytes 128M) ;;
    seek) sizes=(--seek-size 16M --seek-punch) ;;
    mmap) sizes=(--mmap-file --mmap-bytes 16M) ;;
    esac
    (cd "$work" && timeout -k 5 $((seconds + 60)) stress-ng --temp-path "$work" --verify --timeout "${seconds}s" \
        "--$stressor" "${STRESS_WORKERS:-2}" ${sizes[@]+"${sizes[@]}"} --log-brief --no-rand-seed) >"$log" 2>&1
    status=$?
    if ! timeout 20 stat -f "$work" >/dev/null 2>&1; then
        tail -5 "$log"
        bad "$stressor" "the filesystem does not answer any more"
        break
    fi
    case $status in
    0) if grep -qiE 'skipp(ed|ing)|not supported|not implemented' "$log"; then skip; else ok "$stressor"; fi ;;
    3 | 4) skip ;;
    *)
        grep -iE 'fail|error|mismatch|unexpected' "$log" | head -5
        bad "$stressor" "exit $status"
        ;;
    esac
    rm -rf "${work:?}"/*
done
summary
