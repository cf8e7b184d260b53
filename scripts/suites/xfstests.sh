#!/bin/bash
# The generic group of xfstests, as far as a FUSE filesystem can run it.
#
# usage: XFSTESTS=DIR xfstests.sh [--ext4 | TEST...]      as root; --ext4 TEST... for some there
#   XFSTESTS         folder of an xfstests that was built, with its script 'check'; Debian has no
#                    package of it
#   XFSTESTS_GROUP   what runs (default: generic/quick)
# Two pools are mounted by a helper for mount(8), with blocks=allocated: tests about space need
# st_blocks to tell what is mapped. xfstests itself skips what the filesystem does not offer; its
# reasons are counted at the end. Tests of xfstests.exclude do not run, for the reason given there.
set -u
. "$(dirname "$0")/common.sh"
[ -x "${XFSTESTS:-}/check" ] || stop "XFSTESTS is not the folder of an xfstests that was built"
need xfs_io setfacl getfattr bc
kind=nodupe
[ "${1:-}" != --ext4 ] || { kind=ext4 && shift; }
fresh_home
log=$home/log
helper=/sbin/mount.fuse.nodupe
[ ! -e $helper ] || stop "$helper exists: it is made here, for the time of the run"
mkdir "$home/test" "$home/scratch" "$home/bin" "$home/results"
for user in fsgqa fsgqa2 123456-fsgqa; do
    id $user >/dev/null 2>&1 || useradd --badname --create-home $user || stop "cannot add user $user"
done

finish() {
    local status=$?
    trap - EXIT
    cd / || exit
    for dir in "$home/test" "$home/scratch"; do
        while mountpoint -q "$dir"; do umount "$dir" || umount -l "$dir"; done
    done
    for device in "${loops[@]}"; do losetup -d "$device"; done
    rm -f $helper
    rm -rf "$home"
    exit $status
}
loops=()
trap finish EXIT

if [ $kind = nodupe ]; then
    [ -x "$NODUPE" ] || stop "$NODUPE is missing: cargo build --release, or NODUPE=PATH"
    for name in test scratch; do "$NODUPE" create --quiet "$home/$name.pool" --size 10G || exit 2; done
    cat >$helper <<HELPER
#!/bin/bash
# Made by xfstests.sh of nodupe, for the time of its run: mount.fuse.nodupe POOL DIR -o OPTIONS
pool=\$1 dir=\$2 options=''
shift 2
while [ \$# -gt 0 ]; do
    if [ "\$1" = -o ]; then options=\$2; shift; fi
    shift
done
case ,\$options, in *,remount,*) exec mount -i -o "\$options" "\$dir" ;; esac
# umount(8) returns before the daemon has closed the pool.
for _ in \$(seq 300); do
    said=\$('$NODUPE' mount "\$pool" "\$dir" --allow-other --cache-size 256M \\
        -o "suid,dev,blocks=allocated\${options:+,\$options}" 2>&1) && exit
    case \$said in *"in use"*) sleep 0.1 ;; *) break ;; esac
done
echo "\$said" >&2
exit 32
HELPER
    # xfstests wants to see the type that it was told.
    printf '#!/bin/bash\n/bin/df "$@" | sed "s/fuse\\.nodupe/fuse/"\nexit "${PIPESTATUS[0]}"\n' >"$home/bin/df"
    chmod +x $helper "$home/bin/df"
    cat >"$home/config" <<CONFIG
export FSTYP=fuse FUSE_SUBTYP=.nodupe
export TEST_DEV=$home/test.pool SCRATCH_DEV=$home/scratch.pool
CONFIG
else
    for name in test scratch; do
        truncate -s 10G "$home/$name.img"
        loops+=("$(losetup -f --show "$home/$name.img")") || exit 2
    done
    mkfs.ext4 -qF "${loops[0]}" || exit 2
    echo "export FSTYP=ext4 TEST_DEV=${loops[0]} SCRATCH_DEV=${loops[1]}" >"$home/config"
fi
cat >>"$home/config" <<CONFIG
export TEST_DIR=$home/test SCRATCH_MNT=$home/scratch RESULT_BASE=$home/results
CONFIG

sed 's/#.*//' "$SUITES/xfstests.exclude" | awk 'NF {print $1}' >"$home/exclude"
tests=("$@")
[ $# -gt 0 ] || tests=(-E "$home/exclude" -g "${XFSTESTS_GROUP:-generic/quick}")
(cd "$XFSTESTS" && PATH=$home/bin:$PATH HOST_OPTIONS=$home/config ./check "${tests[@]}") >"$log" 2>&1
while read -r name verdict; do
    case $verdict in
    *'[not run]'* | *'[expunged]'*) skip ;;
    *'output mismatch'* | *failed* | *_check_*) bad "$name" "$(diff "$XFSTESTS/tests/$name.out" "$home/results/$name.out.bad" 2>/dev/null | sed -n 2,5p | cut -c1-160 | tr '\n' ' ')" ;;
    *) ok "$name" ;;
    esac
done < <(grep -E '^generic/[0-9]+ ' "$log")
grep -qE '^(Passed all|Failed) ' "$log" || { tail -5 "$log"; bad the-whole-run "ended early"; }
[ -z "${XFSTESTS_LOG:-}" ] || cp "$log" "$XFSTESTS_LOG"
sed -n 's/.*\[not run\] //p' "$log" | sed "s#$home[^ ]*#DEVICE#g" | sort | uniq -c | sort -rn | head -12
summary
