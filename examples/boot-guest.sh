#!/bin/bash
# Boots Debian guests from clones of one golden image, and proves that nothing was lost.
#
# usage: boot-guest.sh [OPTIONS] DIR
#   DIR              the datastore: a mounted nodupe pool, or any folder to compare with
#   --pool POOL      mount POOL at DIR first (made if missing), and unmount and mount it again
#                    before the check, so that what is checked comes from the pool
#   --nodupe BINARY  the program for --pool (default: nodupe in PATH, or the release build)
#   --cache MODE     cache mode of the guests' disks: none (O_DIRECT), writeback, directsync ...
#                    or both: one round with none, one with writeback (default: none)
#   --aio MODE       threads, native or io_uring (default: threads)
#   --accel NAME     tcg (works everywhere, the default) or kvm
#   --base DIR       where the golden image is kept between runs (default: /var/tmp/nodupe-guest)
#   --keep           leave the images in DIR
#
# What happens: a Debian system is made once with debootstrap (Debian's packages, its cloud
# kernel, ext4). It is copied into DIR, and cloned four times with cp. Two clones boot at the
# same time; each writes 64 MiB of random data to its root file system, syncs it, prints the
# checksum on its console and powers off. Then the file is read back out of each image and its
# checksum compared, all five images must pass fsck.ext4, and the golden image and the two
# clones that were not booted must still be, byte for byte, what was copied in.
#
# Needs root for debootstrap, on the first run only. Exit codes: 0 proved, 1 not, 2 usage.
set -euo pipefail

die() { echo "boot-guest: $*" >&2; exit 1; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit "${1:-2}"; }
began=${EPOCHREALTIME/./}
ms_since() { echo $(((${EPOCHREALTIME/./} - $1) / 1000)); }
say() { local ms; ms=$(ms_since "$began"); printf '%4d.%ds  %s\n' $((ms / 1000)) $((ms % 1000 / 100)) "$*"; }

pool='' nodupe='' caches=none aio=threads accel=tcg base=/var/tmp/nodupe-guest keep='' dir=''
while [ $# -gt 0 ]; do
    case $1 in
    --pool) pool=${2:?} && shift ;;
    --nodupe) nodupe=${2:?} && shift ;;
    --cache) caches=${2:?} && shift ;;
    --aio) aio=${2:?} && shift ;;
    --accel) accel=${2:?} && shift ;;
    --base) base=${2:?} && shift ;;
    --keep) keep=1 ;;
    -h | --help) usage 0 ;;
    -*) echo "boot-guest: no option $1" >&2; usage ;;
    *) [ -z "$dir" ] || usage; dir=$1 ;;
    esac
    shift
done
[ -n "$dir" ] || usage
[ "$caches" != both ] || caches="none writeback"

PATH=$PATH:/usr/sbin:/sbin
for program in qemu-system-x86_64 debugfs fsck.ext4 mkfs.ext4 cmp; do
    command -v "$program" >/dev/null || die "$program is missing: run scripts/setup"
done

# ---- the golden image, made once ----------------------------------------------------------

# What the guest runs as its init: no service manager, so that it boots quickly under emulation.
guest_init() {
    cat <<'INIT'
#!/bin/sh
# Runs as init: writes 64 MiB, syncs, prints the checksum, powers off.
mount -t proc proc /proc
echo "GUEST root: $(grep ' / ext4 ' /proc/mounts | cut -c1-60)"
if dd if=/dev/urandom of=/proof.bin bs=1M count=64 conv=fsync 2>/dev/null; then
    # From the disk and not from memory: the checksum also proves reading.
    echo 3 >/proc/sys/vm/drop_caches
    echo "GUEST sha256: $(sha256sum </proof.bin | cut -d' ' -f1)"
else
    echo "GUEST failed to write"
fi
sync
mount -o remount,ro / && echo "GUEST done"
echo o >/proc/sysrq-trigger
sleep 60
INIT
}

make_base() {
    [ "$(id -u)" = 0 ] || die "making the golden image needs root (debootstrap): run once as root"
    command -v debootstrap >/dev/null || die "debootstrap is missing: run scripts/setup"
    local root=$base/root
    rm -rf "$root"
    mkdir -p "$root"
    say "debootstrap: Debian and its cloud kernel (once; log: $base/debootstrap.log)"
    debootstrap --variant=minbase --include=linux-image-cloud-amd64 bookworm "$root" \
        >"$base/debootstrap.log" 2>&1 || {
        tail -5 "$base/debootstrap.log" >&2
        die "debootstrap failed"
    }
    # Only the modules that the root disk needs: a small initrd is a quick boot under emulation.
    sed -i 's/^MODULES=.*/MODULES=list/' "$root/etc/initramfs-tools/initramfs.conf"
    printf '%s\n' virtio_pci virtio_blk ext4 >>"$root/etc/initramfs-tools/modules"
    chroot "$root" update-initramfs -u >>"$base/debootstrap.log" 2>&1 ||
        die "update-initramfs failed, see $base/debootstrap.log"
    guest_init >"$root/sbin/proof-init"
    chmod 755 "$root/sbin/proof-init"
    rm -rf "$root"/var/cache/apt/archives/*.deb
    cp "$root"/boot/vmlinuz-* "$base/vmlinuz"
    cp "$root"/boot/initrd.img-* "$base/initrd"
    truncate -s 1G "$base/gold.tmp"
    mkfs.ext4 -q -F -L guest -d "$root" "$base/gold.tmp" || die "mkfs.ext4 failed"
    rm -rf "$root"
    mv "$base/gold.tmp" "$base/gold.raw"
}

# ---- the datastore -------------------------------------------------------------------------

mounted='' work='' pids=()
cleanup() {
    local status=$?
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    [ -z "$work" ] || [ -n "$keep" ] || rm -rf "$work"
    [ -z "$mounted" ] || "$nodupe" umount "$dir" || status=1
    exit $status
}
trap cleanup EXIT

mount_pool() {
    "$nodupe" mount "$pool" "$dir" "$@" || die "$pool cannot be mounted at $dir"
    mounted=1
}

remount() {
    [ -n "$pool" ] || return 0
    "$nodupe" umount "$dir" || die "$dir cannot be unmounted"
    mounted=''
    mount_pool
    say "unmounted and mounted again"
}

# ---- one round -----------------------------------------------------------------------------

boot() {                # boot NUMBER CACHE: starts a guest in the background
    timeout 600 qemu-system-x86_64 -accel "$accel" -cpu "$cpu" -m 256 -smp 1 -no-reboot -nic none \
        -display none -monitor none -serial "file:$logs/$1.console" \
        -kernel "$base/vmlinuz" -initrd "$base/initrd" \
        -append "console=ttyS0 root=/dev/vda rw init=/sbin/proof-init panic=-1 quiet" \
        -drive "file=$work/vm$1.raw,format=raw,if=virtio,cache=$2,aio=$aio,discard=unmap" \
        >"$logs/$1.qemu" 2>&1 &
    pids+=($!)
}

round() {               # round CACHE
    local cache=$1 i sum found bad=0 t
    work=$dir/guests-$cache.$$
    logs=$(mktemp -d)
    mkdir "$work"
    cp --sparse=always "$base/gold.raw" "$work/gold.raw"
    sync "$work/gold.raw"
    say "cache=$cache: golden image copied in"
    for i in 1 2 3 4; do
        t=${EPOCHREALTIME/./}
        cp "$work/gold.raw" "$work/vm$i.raw"
        say "clone $i by cp: $(ms_since "$t") ms"
    done
    df -h "$dir" | sed 's/^/          /'
    pids=()
    boot 1 "$cache"
    boot 2 "$cache"
    say "two guests boot"
    for pid in "${pids[@]}"; do
        wait "$pid" || { tail -5 "$logs"/*.qemu "$logs"/*.console >&2; die "a guest failed or took over 600 s"; }
    done
    pids=()
    for i in 1 2; do
        grep -aq '^GUEST done' "$logs/$i.console" || {
            tail -15 "$logs/$i.console" >&2
            die "guest $i did not finish"
        }
    done
    say "both guests have written, synced and powered off"
    remount
    for i in 1 2; do
        sum=$(sed -n 's/^GUEST sha256: \([0-9a-f]*\).*/\1/p' "$logs/$i.console")
        found=$(debugfs -R 'cat /proof.bin' "$work/vm$i.raw" 2>/dev/null | sha256sum | cut -d' ' -f1)
        if [ "$sum" = "$found" ]; then say "vm$i: sha256 $found as the guest printed it"; else
            say "vm$i: WRONG: the guest printed $sum, the image has $found"; bad=1; fi
    done
    for i in gold vm1 vm2 vm3 vm4; do
        if fsck.ext4 -fn "$work/$i.raw" >"$logs/fsck" 2>&1; then say "$i: fsck.ext4 clean"; else
            say "$i: fsck.ext4 FAILED"; cat "$logs/fsck"; bad=1; fi
    done
    for i in gold vm3 vm4; do
        if cmp -s "$base/gold.raw" "$work/$i.raw"; then say "$i: as copied in"; else
            say "$i: CHANGED, though no guest used it"; bad=1; fi
    done
    rm -rf "$logs"
    if [ -z "$keep" ]; then rm -rf "$work"; fi
    work=''
    return $bad
}

mkdir -p "$base"
[ -e "$base/gold.raw" ] || make_base
case $accel in tcg) cpu=qemu64 ;; *) cpu=host ;; esac
if [ -n "$pool" ]; then
    if [ -z "$nodupe" ]; then
        nodupe=$(command -v nodupe || echo "$(dirname "$0")/../target/release/nodupe")
    fi
    [ -x "$nodupe" ] || die "$nodupe is missing: name the program with --nodupe"
    mount_pool --create
fi
[ -d "$dir" ] || die "$dir is not a folder"
result=0
for cache in $caches; do
    round "$cache" || result=1
done
[ $result = 0 ] && say "proved" || say "NOT proved"
exit $result
